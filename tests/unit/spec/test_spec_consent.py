"""Bounds of what owners sign when a state passes on."""

from __future__ import annotations

import pytest

from casemate.spec.consent import (
    MAX_TRUST,
    Consented,
    HandoverRequest,
    Head,
    RecoveryConsent,
    SoftwareConsent,
)
from casemate.spec.evidence import Evidence, ServerPolicy
from casemate.spec.identity import SEAL_KEY_BYTES, SIGN_KEY_BYTES
from casemate.spec.job import Charge

HEAD = Head(origin="log", size=0, root=bytes(32))


def refused(kind, **fields) -> str:
    with pytest.raises(ValueError) as e:
        kind(**fields)
    return str(e.value)


def test_a_head_may_be_of_an_empty_log():
    for size, root in ((-1, 32), (1, 31), (1, 33)):
        assert "a root of 32" in refused(Head, origin="log", size=size, root=bytes(root))
    assert Head(origin="log", size=1, root=bytes(32)) != HEAD


def test_a_measurement_is_hex():
    def made(measurement, trust="t"):
        return {"origin": "o", "dataset": "d", "measurement": measurement, "trust": trust}

    SoftwareConsent(**made("0123456789abcdef" * 16))
    SoftwareConsent(**made("", ""))
    SoftwareConsent(**made("aa", "t" * MAX_TRUST))
    for bad in ("a" * 257, "AA", "0g", "aa ", "X"):
        assert refused(SoftwareConsent, **made(bad)) == "a measurement is in hex, lower case"
    assert str(MAX_TRUST) in refused(SoftwareConsent, **made("aa", "t" * (MAX_TRUST + 1)))
    for pair in (("aa", ""), ("", "t")):
        assert "stand together" in refused(SoftwareConsent, **made(*pair))


def test_what_is_charged_after_a_recovery():
    def made(**more):
        return {"head": HEAD, "next": "n", "dataset": "d"} | more

    none = Charge(rdp_nano=(0, 0), delta_femto=0, epsilon=0.0)
    RecoveryConsent(**made(charge=none))
    RecoveryConsent(**made(rest=True))
    assert "either the rest" in refused(RecoveryConsent, **made(charge=none, rest=True))
    for rdp, delta in (((-1, 0), 0), ((0, -1), 0), ((0, 0), -1)):
        charge = Charge(rdp_nano=rdp, delta_femto=delta, epsilon=0.0)
        assert "never negative" in refused(RecoveryConsent, **made(charge=charge))


def test_keys_have_their_lengths():
    policy = ServerPolicy(software="", dev=True, filter="f", release_owner="", sandbox=())
    evidence = Evidence(tee="simulated", simulated=True, files={})
    more = {"policy": policy, "anchor": "", "evidence": evidence}
    HandoverRequest(hpke_key=bytes(SEAL_KEY_BYTES), **more)
    Consented(envelope="", sign_key=bytes(SIGN_KEY_BYTES), seal_key=bytes(SEAL_KEY_BYTES))
    for off in (-1, 1):
        wrong = refused(HandoverRequest, hpke_key=bytes(SEAL_KEY_BYTES + off), **more)
        assert wrong == "the key has the wrong length"
        for sign, seal in ((off, 0), (0, off)):
            keys = {
                "sign_key": bytes(SIGN_KEY_BYTES + sign),
                "seal_key": bytes(SEAL_KEY_BYTES + seal),
            }
            assert refused(Consented, envelope="", **keys) == "a key has the wrong length"

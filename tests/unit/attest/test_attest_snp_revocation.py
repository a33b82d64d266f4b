"""AMD's revocation lists. No source ships one of AMD's own, so all here are under a test root."""

from datetime import UTC, datetime

import pytest

from casemate.attest.verdict import Checks
from support import snp

VALID = ("valid", "accept", "")
ASK, ASVK = 0x10001, 0x10002


def judged(product="Genoa", kind="VCEK", now=snp.NOW, **files):
    """``crl`` and ``ask_crl``: lists to carry."""
    demanded = files.pop("demanded", True)
    carried = {f"{name}.der": data for name, data in files.items()}
    return snp.judge(snp.evidence(product, kind, files=carried), now=now, crl=demanded)


@pytest.mark.parametrize("kind", ["VCEK", "VLEK"])
@pytest.mark.parametrize("product", list(snp.CPUID))
def test_a_list_that_names_nothing_of_the_chain(product, kind):
    found = judged(product, kind, crl=snp.crl(product, (1, 2, 0x99)))
    assert snp.outcome(found) == VALID
    revocation = next(c for c in found.checks if c.name == "revocation")
    assert (revocation.outcome, revocation.detail) == ("passed", "crl.der")


@pytest.mark.parametrize(("kind", "serial"), [("VCEK", ASK), ("VLEK", ASVK)])
def test_a_revoked_intermediate(kind, serial):
    found = judged("Milan", kind, crl=snp.crl("Milan", (serial,)))
    assert snp.outcome(found) == ("valid", "reject", "revocation-revoked")
    other = {ASK: ASVK, ASVK: ASK}[serial]
    assert snp.outcome(judged("Milan", kind, crl=snp.crl("Milan", (other,)))) == VALID


def test_a_list_of_the_intermediate_is_about_the_leaf():
    """AMD gives every VCEK the same serial number, 0; should it list one, none is believed."""
    lists = {"crl": snp.crl(), "ask_crl": snp.crl(kind="VCEK", revoked=(1,))}
    assert snp.outcome(judged(**lists)) == ("valid", "reject", "revocation-revoked")
    lists["ask_crl"] = snp.crl(kind="VCEK", revoked=(2,))
    assert snp.outcome(judged(**lists)) == VALID
    leaf = snp.leaf("Genoa", serial=0)
    lists["ask_crl"] = snp.crl(kind="VCEK")
    files = {"vcek.der": leaf, **{f"{k}.der": v for k, v in lists.items()}}
    assert snp.outcome(snp.judge(snp.evidence(files=files), crl=True)) == VALID


def test_what_is_demanded_and_not_there():
    assert snp.outcome(judged()) == ("valid", "needs-collateral", "needs-crl")
    alone = judged(ask_crl=snp.crl(kind="VCEK"))
    assert snp.outcome(alone) == ("valid", "needs-collateral", "needs-crl")
    found = judged(demanded=False)
    assert ("revocation", "unchecked") in {(c.name, c.outcome) for c in found.checks}


@pytest.mark.parametrize("demanded", [True, False])
def test_a_list_that_comes_is_checked_whatever_the_policy(demanded):
    found = judged(crl=snp.crl(revoked=(ASK,)), demanded=demanded)
    assert found.code == "evidence.revocation-revoked"


@pytest.mark.parametrize(("made", "code"), [
    (lambda: snp.crl(signer="stranger"), "chain-signature"),
    (lambda: snp.crl("Milan"), "chain-issuer"),
    (lambda: snp.crl(kind="VCEK"), "chain-issuer"),
    (lambda: snp.crl(critical=True), "parse-crl"),
    (lambda: snp.crl()[:-1], "parse-crl"),
    (lambda: snp.crl() + b"\0", "parse-crl"),
    (lambda: b"", "parse-crl"),
])  # fmt: skip
def test_lists_that_are_not_the_roots(made, code):
    found = judged(crl=made())
    assert snp.outcome(found) == ("invalid", "reject", code)


def test_the_window_of_a_list():
    early, late = (datetime(2026, month, 1, tzinfo=UTC) for month in (5, 7))
    carried = snp.crl(lives=(early, late))
    for now, code in (
        (early.timestamp(), ""), (late.timestamp(), ""),
        (early.timestamp() - 1, "validity-not-yet"), (late.timestamp() + 1, "validity-expired"),
    ):  # fmt: skip
        found = judged(now=now, crl=carried)
        assert (found.crypto, found.code.removeprefix("evidence.")) == ("valid", code)


def test_its_age_is_told():
    from casemate.attest.snp.kind import KIND

    checks = Checks()
    KIND.check(snp.evidence(files={"crl.der": snp.crl()}), snp.policy(), snp.NOW, checks)
    assert checks.issued == {"crl.der": snp.START.timestamp()}

import json

import pytest

from casemate.attest.trust import Trust
from casemate.attest.verdict import (
    EXITS,
    HARDENING,
    STAGES,
    Checks,
    Unchecked,
    decision,
    refusal,
    stage,
)
from casemate.attest.verify import verify_attestation, verify_evidence
from casemate.spec.errors import CasemateError, EvidenceError
from support.evidence import NONCE, NOW, attestation, tee


def test_stored_evidence_is_verified_but_not_fresh():
    stored = verify_evidence(attestation(), Trust.simulated(tee().root), now=NOW)
    live = verify_attestation(
        attestation(), NONCE, Trust.simulated(tee().root), now=NOW, tls_spki=b"t" * 32
    )
    open_ = {c.name for c in stored.unchecked} - {c.name for c in live.unchecked}
    assert open_ == {"freshness", "tls-key"}
    assert all(c.detail for c in stored.unchecked)


def test_a_caller_that_gives_no_connection_is_told():
    verdict = verify_attestation(attestation(), NONCE, Trust.simulated(), now=NOW)
    assert "tls-key" in {c.name for c in verdict.unchecked}


def test_a_verdict_is_json_that_says_simulated():
    verdict = verify_evidence(attestation(), Trust.simulated(), now=NOW)
    shown = json.loads(json.dumps(verdict.to_json()))
    assert shown["simulated"] is True
    assert [c["name"] for c in shown["checks"]] == [c.name for c in verdict.checks]
    assert {c["outcome"] for c in shown["checks"]} == {"passed", "unchecked"}


def test_a_verdict_says_what_signatures_say_and_what_follows():
    verdict = verify_evidence(attestation(), Trust.simulated(), now=NOW)
    assert (verdict.crypto, verdict.decision, verdict.parts) == ("valid", "accept", ())
    shown = verdict.to_json()
    assert shown["crypto"] == "valid"
    assert shown["decision"] == "accept"
    assert shown["tcb_status"] is None
    assert shown["advisories"] == []
    assert shown["ar4si"]["status"] == "contraindicated"  # it is simulated


def test_what_follows_from_a_code():
    assert decision("", "UpToDate") == "accept"
    for status in HARDENING:
        assert decision("", status) == "accept-with-status"
    for code, found in (
        ("needs-tcb-info", "needs-collateral"),
        ("absent-report", "not-applicable"),
        ("signature-report", "reject"),
        ("tcb-status", "reject"),
    ):
        assert decision(f"evidence.{code}", "ConfigurationNeeded") == found


def test_every_stage_has_an_exit_code_of_its_own():
    assert set(STAGES.values()) == set(EXITS)
    assert len(set(EXITS.values())) == len(EXITS)
    assert stage("evidence.tee-unknown") == ""


def test_a_refusal_carries_the_checks_until_then_and_travels_as_any_error():
    checks = Checks()
    with checks.step("first") as step:
        step.detail = "seen"
    with checks.step("second") as step:
        step.unchecked("why not")
    with pytest.raises(EvidenceError) as e, checks.step("third"):
        raise refusal("validity-expired", "It has expired.", "vcek.der")
    assert [(c.name, c.outcome, c.detail, c.code) for c in e.value.checks] == [
        ("first", "passed", "seen", ""),
        ("second", "unchecked", "why not", ""),
        ("third", "failed", "It has expired.", "evidence.validity-expired"),
    ]
    again = CasemateError.from_wire(e.value.to_wire(), e.value.status)
    assert isinstance(again, EvidenceError)
    assert str(again) == str(e.value)


def test_foreign_exceptions_are_not_swallowed_as_checks():
    checks = Checks()
    with pytest.raises(ZeroDivisionError), checks.step("broken"):
        raise ZeroDivisionError
    assert checks.done == []
    assert Unchecked("a reason").reason == "a reason"

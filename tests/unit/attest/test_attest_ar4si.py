"""Claims and tiers from checks: each step of the module's procedure."""

import json

import pytest

from casemate.attest import ar4si
from casemate.attest.trust import Trust
from casemate.attest.verdict import STAGES, Check
from casemate.attest.verify import verify_evidence
from support.evidence import NOW, attestation, tee

PASSED = {
    "signature": "passed", "guest-policy-debug": "passed", "measurement": "passed",
    "chip": "passed", "vmpl": "passed",
}  # fmt: skip


def result(code: str = "", crypto: str = "valid", decision: str = "accept", **changed):
    given = {
        "tee": "sev-snp", "simulated": False, "crypto": crypto, "decision": decision,
        "code": f"evidence.{code}" if code else "", "tcb_status": "",
    }  # fmt: skip
    outcomes = PASSED | changed.pop("outcomes", {})
    checks = [Check(name, outcome, "") for name, outcome in outcomes.items()]
    return ar4si.result(**(given | changed), checks=checks)


def said(found) -> dict[str, int]:
    return {claim: value for claim, value in found["trustworthiness-vector"].items() if value}


def test_all_that_was_wanted_was_found():
    found = result()
    assert said(found) == {
        "instance-identity": 2, "configuration": 2, "executables": 3, "hardware": 2,
        "runtime-opaque": 2,
    }  # fmt: skip
    assert found["status"] == "affirming"
    assert set(found["trustworthiness-vector"]) == set(ar4si.CLAIMS) == set(found["tiers"])
    json.dumps(found)


@pytest.mark.parametrize(
    ("outcomes", "claim", "value"),
    [
        ({"guest-policy-debug": "failed"}, "configuration", 96),
        ({"guest-policy-debug": "failed"}, "runtime-opaque", 96),
        ({"vmpl": "unchecked"}, "configuration", 3),
        ({"measurement": "failed"}, "executables", 33),
        ({"measurement": "unchecked"}, "executables", 0),
        ({"chip": "failed"}, "instance-identity", 97),
        ({"chip": "unchecked"}, "instance-identity", 0),
        ({"signature": "unchecked"}, "hardware", 0),
    ],
)
def test_a_check_moves_its_claim(outcomes, claim, value):
    assert result(outcomes=outcomes)["trustworthiness-vector"][claim] == value


def test_checks_of_a_device_count_too():
    found = result(outcomes={"gpu0/measurements": "failed"})
    assert found["trustworthiness-vector"]["executables"] == 33


@pytest.mark.parametrize(
    ("code", "crypto", "value"),
    [
        ("parse-report-length", "invalid", 1),
        ("signature-report", "invalid", 99),
        ("chain-signature", "invalid", 99),
        ("collateral-keys", "unknown", 0),
        ("needs-tcb-info", "valid", 0),
        ("validity-expired", "valid", 0),
        ("absent-report", "valid", 0),
    ],
)
def test_what_was_not_verified_claims_nothing_good(code, crypto, value):
    vector = result(code, crypto, "reject")["trustworthiness-vector"]
    assert {vector[claim] for claim in ar4si.SAID} == {value}


@pytest.mark.parametrize(
    ("code", "status", "value"),
    [
        ("", "UpToDate", 2),
        ("", "ConfigurationNeeded", 32),
        ("tcb-out-of-date", "OutOfDate", 96),
        ("revocation-revoked", "", 96),
        ("root-unknown", "", 97),
    ],
)
def test_the_platforms_standing(code, status, value):
    found = result(code, tcb_status=status)
    assert found["trustworthiness-vector"]["hardware"] == value


def test_memory_by_kind():
    values = {kind: result(tee=kind)["trustworthiness-vector"]["runtime-opaque"]
              for kind in ("tdx", "nitro", "tpm", "nvidia")}  # fmt: skip
    assert values == {"tdx": 2, "nitro": 32, "tpm": 0, "nvidia": 0}


def test_simulation_is_contraindicated_whatever_was_checked():
    verdict = verify_evidence(attestation(), Trust.simulated(tee().root), now=NOW)
    found = verdict.to_json()["ar4si"]
    assert found["status"] == "contraindicated"
    assert found["trustworthiness-vector"]["hardware"] == 96
    assert found["trustworthiness-vector"]["runtime-opaque"] == 96


def test_the_status_follows_the_decision_where_that_is_worse():
    assert result("freshness-mismatch", decision="reject")["status"] == "contraindicated"
    assert result("needs-tcb-info", decision="needs-collateral")["status"] == "none"
    assert result(tcb_status="SWHardeningNeeded")["status"] == "warning"


def test_tiers():
    for value, tier in ((0, "none"), (1, "none"), (-1, "none"), (2, "affirming"),
                        (31, "affirming"), (32, "warning"), (-95, "warning"),
                        (96, "contraindicated"), (127, "contraindicated"),
                        (-128, "contraindicated")):  # fmt: skip
        assert ar4si.tier(value) == tier


def test_no_refusal_reads_as_affirming():
    for word in STAGES:
        for crypto in ("valid", "invalid", "unknown"):
            assert result(f"{word}-x", crypto, "reject")["status"] == "contraindicated"

"""Each field of a policy, met and not met, on reports that are genuinely signed."""

import pytest

from casemate.attest.trust import Trust, Unchecked
from casemate.attest.trust import _snp as policy
from casemate.attest.verify import verify_attestation
from casemate.spec.errors import EvidenceError
from support.evidence import NONCE, NOW, attestation, tee

FLOOR = {"bootloader": 10, "tee": 0, "snp": 25, "microcode": 84}
OTHER = {"Turin": {"fmc": 0, "bootloader": 0, "tee": 0, "snp": 0, "microcode": 0}}


def trust(**fields) -> Trust:
    given = {"measurements": Unchecked("a test"), "roots": {"Genoa": (tee().root,)}} | fields
    return Trust(simulation=True, policies={"sev-snp": policy(given.pop("measurements"), **given)})


def judge(fields, **report):
    return verify_attestation(attestation(**report), NONCE, trust(**fields), now=NOW)


MEASURED = tee().measurement
CHIP = tee()._chip.hex()

CASES = [
    # field of the policy, its value, fields of a report that meets it, of one that does not, check
    ("signing_keys", ("VLEK",), None, {}, "signing-key-kind"),
    ("report_versions", (3, 5), {"version": 5}, {"version": 2, "cpuid_fam_id": 0,
     "cpuid_mod_id": 0, "cpuid_step": 0}, "report-version"),
    ("vmpl", (0, 1), {"vmpl": 1}, {"vmpl": 2}, "vmpl"),
    ("vmpl", (0,), {}, {"vmpl": 1}, "vmpl"),
    ("chip_ids", ("00" * 64, CHIP), {}, None, "chip"),
    ("chip_ids", ("00" * 64,), None, {}, "chip"),
    ("measurements", (MEASURED,), {}, {"measurement": b"\1" * 48}, "measurement"),
    ("measurements", ("ab" * 48, MEASURED), {}, {"measurement": bytes(48)}, "measurement"),
    ("host_data", ("11" * 32,), {"host_data": b"\x11" * 32}, {}, "host-data"),
    ("id_keys", ("22" * 48,), {"id_key_digest": b"\x22" * 48}, {}, "id-key"),
    ("guest_svn", 7, {"guest_svn": 7}, {"guest_svn": 6}, "guest-svn"),
    ("firmware", (1, 55, 39), {}, {"committed_build": 38}, "firmware"),
    ("firmware", (1, 55, 39), {"committed_minor": 56, "committed_build": 0},
     {"committed_major": 0, "committed_minor": 99}, "firmware"),
    ("reported_tcb", {"Genoa": FLOOR}, {}, None, "reported-tcb"),
    ("reported_tcb", {"Genoa": FLOOR | {"snp": 26}}, None, {}, "reported-tcb"),
    ("reported_tcb", OTHER, None, {}, "reported-tcb"),
    ("committed_tcb", {"Genoa": FLOOR}, {"committed_tcb": bytes.fromhex("0b01000000001955")},
     {"committed_tcb": bytes.fromhex("0b01000000001853")}, "committed-tcb"),
    ("launch_tcb", {"Genoa": FLOOR}, {"launch_tcb": bytes.fromhex("ff000000000019ff")},
     {"launch_tcb": bytes.fromhex("09ff00000000ffff")}, "launch-tcb"),
    ("guest_policy", {"debug": False, "migrate_ma": False, "smt": False}, {"policy": 1 << 17}, {},
     "guest-policy-smt"),
    ("guest_policy", {"debug": False, "migrate_ma": False, "single_socket": True},
     {"policy": 1 << 17 | 1 << 20}, {}, "guest-policy-single-socket"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "meets", "fails", "check"), CASES)
def test_each_field(field, value, meets, fails, check):
    if meets is not None:
        verdict = judge({field: value}, **meets)
        assert (check, "passed") in {(c.name, c.outcome) for c in verdict.checks}
    if fails is not None:
        with pytest.raises(EvidenceError) as e:
            judge({field: value}, **fails)
        assert e.value.code == f"evidence.appraise-{check}"
        assert e.value.where == check


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("measurements", {"measurement"}), ("host_data", {"host-data"}), ("id_keys", {"id-key"}),
        ("chip_ids", {"chip"}), ("vmpl", {"vmpl"}), ("report_versions", {"report-version"}),
        ("guest_svn", {"guest-svn"}), ("firmware", {"firmware"}),
        ("reported_tcb", {"reported-tcb"}), ("committed_tcb", {"committed-tcb"}),
        ("launch_tcb", {"launch-tcb"}), ("guest_policy", {"guest-policy"}),
    ],
)  # fmt: skip
def test_what_is_unchecked_is_shown_with_its_reason(field, names):
    verdict = judge({field: Unchecked("because of the test")})
    shown = {c.name for c in verdict.unchecked if c.detail == "because of the test"}
    assert names <= shown


def test_bits_that_the_policy_leaves_open_are_shown():
    others = next(c for c in judge({}).checks if c.name == "guest-policy-others")
    assert others.outcome == "unchecked"
    assert "smt" in others.detail
    assert "debug" not in others.detail


@pytest.mark.parametrize(
    ("bit", "name"), [(19, "debug"), (18, "migrate-ma"), (26, "reserved"), (63, "reserved")]
)
def test_bad_guest_policies_are_refused_by_default(bit, name):
    with pytest.raises(EvidenceError) as e:
        judge({}, policy=1 << 17 | 1 << bit)
    assert e.value.code == f"evidence.appraise-guest-policy-{name}"


def test_all_failures_are_listed_and_the_first_is_raised():
    with pytest.raises(EvidenceError) as e:
        judge({"measurements": ("ab" * 48,)}, vmpl=3, policy=1 << 17 | 1 << 19)
    failed = [c.code for c in e.value.checks if c.outcome == "failed"]
    assert failed == [
        "evidence.appraise-vmpl",
        "evidence.appraise-guest-policy-debug",
        "evidence.appraise-measurement",
    ]
    assert e.value.code == failed[0]
    assert e.value.checks[-1].name == "launch-tcb"

"""Each field of a policy, met and not met, on reports that are genuinely signed."""

from dataclasses import fields

import pytest

from casemate.attest.snp.policy import SnpPolicy
from casemate.attest.verdict import Unchecked
from support import snp

FLOOR = {"bootloader": 10, "tee": 0, "snp": 25, "microcode": 84}
TURIN = {"fmc": 1, "bootloader": 1, "tee": 1, "snp": 4, "microcode": 81}
CHIP = snp.hwid("Genoa").hex()
MEASURED = snp.MEASURED.hex()
OLD = {"cpuid_fam_id": 0, "cpuid_mod_id": 0, "cpuid_step": 0}
QUIET = {"debug": False, "migrate_ma": False}

CASES = [
    # field of the policy, its value, fields of a report that meets it, of one that does not, check
    ("signing_keys", ("VLEK",), None, {}, "signing-key-kind"),
    ("report_versions", (3, 5), {"version": 5}, {"version": 2, **OLD}, "report-version"),
    ("vmpl", (0, 1), {"vmpl": 1}, {"vmpl": 2}, "vmpl"),
    ("vmpl", (0,), {}, {"vmpl": 1}, "vmpl"),
    ("chip_ids", ("00" * 64, CHIP), {}, None, "chip"),
    ("chip_ids", ("00" * 64,), None, {}, "chip"),
    ("extractable", ("Milan",), {}, None, "extractable"),
    ("extractable", ("Milan", "Genoa"), None, {}, "extractable"),
    ("measurements", (MEASURED,), {}, {"measurement": b"\1" * 48}, "measurement"),
    ("measurements", ("ab" * 48, MEASURED), {}, {"measurement": bytes(48)}, "measurement"),
    ("host_data", ("11" * 32,), {"host_data": b"\x11" * 32}, {}, "host-data"),
    ("id_keys", ("22" * 48,), {"id_key_digest": b"\x22" * 48}, {}, "id-key"),
    ("author_keys", ("33" * 48,), {"author_key_digest": b"\x33" * 48, "flags": 1},
     {"author_key_digest": b"\x33" * 48}, "author-key"),
    ("author_keys", ("00" * 48,), None, {}, "author-key"),
    ("family_ids", ("44" * 16,), {"family_id": b"\x44" * 16}, {}, "family-id"),
    ("image_ids", ("55" * 16,), {"image_id": b"\x55" * 16}, {}, "image-id"),
    ("guest_svn", 7, {"guest_svn": 7}, {"guest_svn": 6}, "guest-svn"),
    ("firmware", (1, 55, 30), {}, {"committed_build": 29}, "firmware"),
    ("firmware", (1, 55, 30), {"committed_minor": 56, "committed_build": 0},
     {"committed_major": 0, "committed_minor": 99}, "firmware"),
    ("provisional", False, {}, {"current_build": 31}, "provisional"),
    ("provisional", False, {}, {"current_tcb": bytes.fromhex("0a00000000001955")}, "provisional"),
    ("provisional", True, {"current_build": 31}, None, "provisional"),
    ("reported_tcb", {"Genoa": FLOOR}, {}, None, "reported-tcb"),
    ("reported_tcb", {"Genoa": FLOOR | {"snp": 26}}, None, {}, "reported-tcb"),
    ("reported_tcb", {"Turin": TURIN}, None, {}, "reported-tcb"),
    ("committed_tcb", {"Genoa": FLOOR}, {"committed_tcb": bytes.fromhex("0b01000000001955")},
     {"committed_tcb": bytes.fromhex("0b01000000001853")}, "committed-tcb"),
    ("launch_tcb", {"Genoa": FLOOR}, {"launch_tcb": bytes.fromhex("ff000000000019ff")},
     {"launch_tcb": bytes.fromhex("09ff00000000ffff")}, "launch-tcb"),
    ("guest_policy", {**QUIET, "smt": False}, {"policy": 1 << 17}, {}, "guest-policy-smt"),
    ("guest_policy", {**QUIET, "single_socket": True}, {"policy": 1 << 17 | 1 << 20}, {},
     "guest-policy-single-socket"),
    ("platform_info", {"tsme_en": True}, {"platform_info": 0x27}, {}, "platform-info-tsme-en"),
    ("platform_info", {"alias_check_complete": True}, {}, {"platform_info": 5},
     "platform-info-alias-check-complete"),
    ("platform_info", {"smt_en": False}, {"platform_info": 0x24}, {}, "platform-info-smt-en"),
    ("launch_mitigations", 0b101, {"launch_mit_vector": 0b111}, {"launch_mit_vector": 0b110},
     "launch-mitigations"),
    ("current_mitigations", 0b101, {"current_mit_vector": 0b101}, {"version": 3},
     "current-mitigations"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "meets", "fails", "check"), CASES)
def test_each_field(field, value, meets, fails, check):
    if meets is not None:
        found = snp.judge(snp.evidence(**meets), **{field: value})
        assert snp.outcome(found) == ("valid", "accept", "")
        assert (check, "passed") in {(c.name, c.outcome) for c in found.checks}
    if fails is not None:
        found = snp.judge(snp.evidence(**fails), **{field: value})
        assert snp.outcome(found) == ("valid", "reject", f"appraise-{check}")
        assert found.where == check


def test_every_field_has_a_case():
    of_signatures = {"roots", "crl", "csp_ids", "uvm_issuers", "uvm_feeds", "uvm_svn",
                     "uvm_validity"}  # fmt: skip
    assert {f.name for f in fields(SnpPolicy)} == of_signatures | {case[0] for case in CASES}


def test_turins_own_floor():
    files = snp.evidence("Turin")
    assert snp.judge(files, reported_tcb={"Turin": TURIN}).code == ""
    for component in TURIN:
        higher = {"Turin": TURIN | {component: TURIN[component] + 1}}
        found = snp.judge(files, reported_tcb=higher)
        assert found.code == "evidence.appraise-reported-tcb"


def test_lines_whose_secrets_can_be_extracted():
    milan, chip = snp.evidence("Milan"), snp.hwid("Milan").hex()
    assert snp.judge(milan).code == ""
    found = snp.judge(milan, extractable=("Milan",))
    assert found.code == "evidence.appraise-extractable"
    assert snp.judge(milan, extractable=("Milan",), chip_ids=(chip,)).code == ""
    found = snp.judge(milan, extractable=("Milan",), csp_ids=(snp.CSP,))
    assert found.code == "evidence.appraise-extractable"


def test_a_cloud_of_a_vlek():
    files = snp.evidence("Milan", "VLEK")
    assert snp.judge(files, csp_ids=(snp.CSP,)).code == ""
    assert snp.judge(files, csp_ids=("CN=another",)).code == "evidence.appraise-csp"
    assert snp.judge(files, extractable=("Milan",)).code == "evidence.appraise-extractable"
    assert snp.judge(files, extractable=("Milan",), csp_ids=(snp.CSP,)).code == ""
    # No list of chips admits a report that names none.
    for chip in ("00" * 64, CHIP):
        assert snp.judge(files, chip_ids=(chip,)).code == "evidence.appraise-chip"
    assert snp.judge(snp.evidence(), csp_ids=("CN=another",)).code == ""


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("measurements", {"measurement"}), ("host_data", {"host-data"}), ("id_keys", {"id-key"}),
        ("author_keys", {"author-key"}), ("family_ids", {"family-id"}), ("image_ids", {"image-id"}),
        ("chip_ids", {"chip"}), ("extractable", {"extractable"}), ("csp_ids", {"csp"}),
        ("vmpl", {"vmpl"}), ("report_versions", {"report-version"}),
        ("guest_svn", {"guest-svn"}), ("firmware", {"firmware"}), ("provisional", {"provisional"}),
        ("reported_tcb", {"reported-tcb"}), ("committed_tcb", {"committed-tcb"}),
        ("launch_tcb", {"launch-tcb"}), ("guest_policy", {"guest-policy"}),
        ("platform_info", {"platform-info"}), ("launch_mitigations", {"launch-mitigations"}),
        ("current_mitigations", {"current-mitigations"}), ("crl", {"revocation"}),
        ("uvm_feeds", {"uvm-feed"}), ("uvm_svn", {"uvm-svn"}),
    ],
)  # fmt: skip
def test_what_is_unchecked_is_shown_with_its_reason(field, names):
    found = snp.judge(snp.evidence(), **{field: Unchecked("because of the test")})
    shown = {c.name for c in found.checks if (c.outcome, c.detail) == ("unchecked", REASON)}
    assert names <= shown


REASON = "because of the test"


def test_bits_that_the_policy_leaves_open_are_shown():
    found = snp.judge(snp.evidence(), platform_info={"ecc_en": True})
    open_bits = {c.name: c for c in found.checks if c.name.endswith("-others")}
    assert {c.outcome for c in open_bits.values()} == {"unchecked"}
    assert "smt" in open_bits["guest-policy-others"].detail
    assert "debug" not in open_bits["guest-policy-others"].detail
    assert "tsme_en" in open_bits["platform-info-others"].detail
    assert "ecc_en" not in open_bits["platform-info-others"].detail


@pytest.mark.parametrize(
    ("bit", "name"), [(19, "debug"), (18, "migrate-ma"), (26, "reserved"), (63, "reserved")]
)
def test_bad_guest_policies_are_refused_by_default(bit, name):
    found = snp.judge(snp.evidence(policy=1 << 17 | 1 << bit))
    assert snp.outcome(found) == ("valid", "reject", f"appraise-guest-policy-{name}")


def test_platform_bits_of_unknown_meaning_are_shown():
    found = snp.judge(snp.evidence(platform_info=1 << 9))
    shown = next(c for c in found.checks if c.name == "platform-info-reserved")
    assert (found.code, shown.outcome) == ("", "unchecked")
    assert "0x2" in shown.detail


@pytest.mark.parametrize("at", range(0x330, 0x4A0))
def test_every_byte_that_nothing_signs_must_be_zero(at):
    raw = snp.evidence()["report.bin"]
    bad = raw[:at] + bytes([1 << at % 8]) + raw[at + 1 :]
    found = snp.judge(snp.evidence(files={"report.bin": bad}))
    assert snp.outcome(found) == ("valid", "reject", "appraise-unsigned-bytes")


def test_all_failures_are_listed_and_the_first_is_raised():
    files = snp.evidence(vmpl=3, policy=1 << 17 | 1 << 19)
    found = snp.judge(files, measurements=("ab" * 48,), vmpl=(0,))
    failed = [c.code for c in found.checks if c.outcome == "failed"]
    assert failed == [
        "evidence.appraise-vmpl",
        "evidence.appraise-guest-policy-debug",
        "evidence.appraise-measurement",
    ]
    assert found.code == failed[0]
    assert found.checks[-1].name == "uvm-svn"

"""Trust policies for SGX and TDX: each field holds, refuses and stays open; the defaults."""

from dataclasses import fields, replace

import pytest

from casemate.attest import fields as section
from casemate.attest import folder
from casemate.attest.dcap import policy
from casemate.attest.verdict import HARDENING, Unchecked
from casemate.spec.errors import UsageError
from support import dcap
from support.dcap import Case, level

RTMRS = {f"rtmr{n}": bytes([n + 1]) * 48 for n in range(4)}
TD = {
    "mrtd": b"m" * 48, "mrconfigid": b"c" * 48, "mrowner": b"o" * 48, "mrownerconfig": b"w" * 48,
    "mrseam": b"s" * 48, **RTMRS,
}  # fmt: skip
TD15 = Case(version=5, body_type=3, body=dcap.td(True, **TD))
ENCLAVE = Case(
    version=3,
    body=dcap.enclave(
        mrenclave=b"e" * 32, mrsigner=b"s" * 32, isvprodid=7, isvsvn=3, configid=b"c" * 64
    ),
)
HELD = {
    "tdx": {
        **{name: (value.hex(), "ab" * 48) for name, value in TD.items()},
        "xfam": ("00" * 8,), "td_attributes": {"debug": False, "pks": False, "perfmon": False},
    },
    "sgx": {
        "mrenclave": ("65" * 32,), "mrsigner": ("73" * 32,), "isvprodid": (6, 7), "isvsvn": 3,
        "configid": ("63" * 64,), "attributes": {"debug": False, "provision_key": False},
    },
    "both": {
        "tcb_statuses": ("UpToDate",), "denied_advisories": ("INTEL-SA-00009",),
        "instances": (dcap.PPID.hex(),), "fmspcs": (dcap.FMSPC.hex(),),
        "platform": {"dynamic_platform": True, "cached_keys": False},
    },
}  # fmt: skip
MISSED = {
    "tdx": {
        **dict.fromkeys((*TD, "mrservicetd"), ("ab" * 48,)), "xfam": ("01" + "00" * 7,),
    },
    "sgx": {
        "mrenclave": ("ab" * 32,), "mrsigner": ("ab" * 32,), "isvprodid": (8,), "isvsvn": 4,
        "configid": ("ab" * 64,),
    },
    "both": {"instances": ("ab" * 16,), "fmspcs": ("ab" * 6,)},
}  # fmt: skip
NAMED = {"instances": "instance", "fmspcs": "fmspc"}


def judge(case, **changes):
    policies = {"sgx": dcap.sgx(), "tdx": dcap.tdx()}
    tee = case.tee.lower()
    policies[tee] = replace(policies[tee], **changes)
    return folder.judge(case.files(), now=dcap.AT, policies=policies)


def checked(judged):
    return {check.name: check.outcome for check in judged.checks}


def cases(of):
    return [(tee, name) for tee, of_tee in of.items() for name in of_tee]


def evidence(tee):
    return {"tdx": [TD15], "sgx": [ENCLAVE], "both": [TD15, ENCLAVE]}[tee]


@pytest.mark.parametrize(("tee", "name"), cases(HELD))
def test_what_the_policy_admits(tee, name):
    for case in evidence(tee):
        judged = judge(case, **{name: HELD[tee][name]})
        assert (judged.decision, judged.code) == ("accept", "")


@pytest.mark.parametrize(("tee", "name"), cases(MISSED))
def test_what_the_policy_does_not_admit(tee, name):
    for case in evidence(tee):
        judged = judge(case, **{name: MISSED[tee][name]})
        shown = NAMED.get(name, name)
        assert (judged.decision, judged.code) == ("reject", f"evidence.appraise-{shown}")
        assert checked(judged)[shown] == "failed"
        assert checked(judged)[list(checked(judged))[-2]] != ""  # all are looked at


RESERVED, DEBUG, MIGRATABLE, NONE = (
    bits.to_bytes(8, "little") for bits in (1 << 28 | 1 << 8, 1 << 28 | 1, 3 << 28, 0)
)
SERVED = Case(version=5, body_type=3, body=dcap.td(True, mrservicetd=b"t" * 48))


def td(tdattributes):
    return Case(body=dcap.td(tdattributes=tdattributes))


def enclave(attributes):
    return Case(version=3, body=dcap.enclave(attributes=bytes([attributes]) + bytes(15)))


def at(one):
    return Case(info={"tcbLevels": [one]})


@pytest.mark.parametrize(
    ("case", "changes", "code"),
    [
        (TD15, {"platform": {"smt_enabled": False}}, "appraise-platform-smt-enabled"),
        (Case(platform=dcap.extension(drop="7")), {"platform": {"smt_enabled": False}},
         "appraise-platform-smt-enabled"),
        (TD15, {"td_attributes": {"debug": False, "pks": True}}, "appraise-td-attributes-pks"),
        (td(RESERVED), {}, "appraise-td-attributes-reserved"),
        (td(RESERVED), {"td_attributes": Unchecked("x")}, ""),
        (td(NONE), {}, "appraise-td-attributes-sept-ve-disable"),
        (td(MIGRATABLE), {}, "appraise-td-attributes-migratable"),
        (td(DEBUG), {}, "appraise-debug"),
        (td(DEBUG), {"td_attributes": {"debug": True}}, ""),
        (TD15, {"td_attributes": {"debug": True}}, "appraise-debug"),
        (td(bytes([0x10, 0, 0, 0x10, 0, 0, 0, 0])), {}, "appraise-debug"),
        (enclave(7), {}, "appraise-debug"),
        (enclave(4), {}, "appraise-attributes-init"),
        (SERVED, {}, "appraise-mrservicetd"),
        (TD15, {"event_log": True}, "binding-event-log-missing"),
        (at(level("SWHardeningNeeded")), {"tcb_statuses": ("UpToDate",)}, "tcb-status"),
        (at(level("OutOfDate")), {"tcb_statuses": Unchecked("x")}, ""),
        (at(level("Revoked")), {"tcb_statuses": Unchecked("x")}, "tcb-status"),
        (at(level(advisories=("INTEL-SA-00009",))),
         {"denied_advisories": ("intel-sa-00009",)}, "tcb-advisories"),
    ],
)  # fmt: skip
def test_what_else_is_refused(case, changes, code):
    assert judge(case, **changes).code == (code and f"evidence.{code}")


def test_every_failure_is_recorded_and_the_first_is_raised():
    judged = judge(TD15, mrtd=("ab" * 48,), rtmr3=("ab" * 48,), xfam=("01" * 8,))
    failed = [check.name for check in judged.checks if check.outcome == "failed"]
    assert failed == ["mrtd", "rtmr3", "xfam"]
    assert judged.code == "evidence.appraise-mrtd"


@pytest.mark.parametrize("status", HARDENING)
def test_hardening_states_are_accepted_with_status(status):
    for case in (at(level(status)),
                 Case(version=3, info={"tcbLevels": [level(status, tdx=None)]})):  # fmt: skip
        judged = judge(case)
        assert (judged.decision, judged.tcb_status) == ("accept-with-status", status)


def test_the_defaults_admit_the_hardening_states_and_no_others():
    for default in (policy.SGX, policy.TDX):
        assert default.tcb_statuses == ("UpToDate", *HARDENING)


def test_a_td_report_without_a_field_says_so():
    found = next(c for c in judge(Case()).checks if c.name == "mrservicetd")
    assert (found.outcome, found.detail) == ("unchecked", "a TD report 1.0 has none")


OPEN = {"collateral_grace"}
BAD = {
    "roots": ("ab",), "tcb_statuses": ("Revoked",), "denied_advisories": (), "tcb_evaluation": -1,
    "same_evaluation": 1, "collateral_age": -1, "collateral_grace": Unchecked("x"),
    "instances": ("ab",), "fmspcs": ("AB" * 6,), "platform": {"turbo": True},
}  # fmt: skip
BAD_SGX = BAD | {
    "mrenclave": ("ab",), "mrsigner": [], "isvprodid": (1 << 16,), "isvsvn": True,
    "configid": ("ab",), "attributes": {"init": True},
}  # fmt: skip
BAD_TDX = BAD | {
    **dict.fromkeys((*policy.MEASUREMENTS, "xfam"), ("ab",)),
    "td_attributes": {"debug": 0}, "event_log": "yes",
}  # fmt: skip


@pytest.mark.parametrize(
    ("default", "bad"), [(policy.SGX, BAD_SGX), (policy.TDX, BAD_TDX)], ids=["sgx", "tdx"]
)
def test_every_field_is_checked_and_may_stay_open(default, bad):
    names = {f.name for f in fields(default)}
    assert names == set(bad)
    for name in names:
        with pytest.raises(UsageError) as e:
            replace(default, **{name: bad[name]})
        assert e.value.code == "usage.trust"
        if name not in OPEN:
            replace(default, **{name: Unchecked("a test")})


def test_policies_are_read_from_toml():
    written = {f.name: {"unchecked": "a test"} for f in fields(policy.TDX)}
    written |= {"mrtd": ["6d" * 48], "td_attributes": {"debug": False}, "collateral_grace": 0}
    read = section.load(policy.TdxPolicy, written, "tdx")
    assert read.mrtd == ("6d" * 48,)
    assert read.rtmr0 == Unchecked("a test")
    with pytest.raises(UsageError):
        section.load(policy.TdxPolicy, {"mrtd": ["6d" * 48]}, "tdx")

"""SGX and TDX evidence captured from hardware, with Intel's own root and collateral: the answers,
values and windows that each case states, every kind of change refused, and each check missed when
it is taken away."""

from __future__ import annotations

import json
import random
from datetime import datetime
from pathlib import Path

import pytest

from casemate.attest import crl, folder, kinds, x509
from casemate.attest.dcap import abi, appraise, documents, pck, policy, replay, tcb, verify
from casemate.attest.verdict import HARDENING, Unchecked
from support import dcap
from support.mutation import flipped, flips

EVIDENCE = Path(__file__).resolve().parents[3] / "shared" / "evidence"
NAMES = [f"{tee}/{p.name}" for tee in ("sgx", "tdx") for p in sorted((EVIDENCE / tee).glob("*"))]
pytestmark = pytest.mark.skipif(not NAMES, reason="no captured evidence beside the project")

ORDER = abi.P256_ORDER
NOT_ASKED = Unchecked("evidence folder")


def about(name):
    return json.loads((EVIDENCE / name / "about.json").read_text())


def files(name):
    return folder.read(EVIDENCE / name)


def at(text):
    return datetime.fromisoformat(text).timestamp()


def stated(name, key):
    return about(name)["expect"][key].split()[0]


def judge(name, changed=None, now=None, nonce=NOT_ASKED, **fields):
    merged = {n: data for n, data in (files(name) | (changed or {})).items() if data is not None}
    tee = name.split("/")[0]
    policies = {"sgx": policy.SGX, "tdx": policy.TDX}
    policies[tee] = type(policies[tee])(
        **({f: getattr(policies[tee], f) for f in policies[tee].__dataclass_fields__} | fields)
    )
    now = at(about(name)["verify_at"]) if now is None else now
    return folder.judge(merged, now=now, policies=policies, nonce=nonce)


def of(decision):
    return [n for n in NAMES if stated(n, "default_policy") == decision]


ACCEPTED = of("accept") + of("accept-with-status")
NEEDY = of("needs-collateral")
GENUINE = [n for n in NAMES if stated(n, "crypto") == "valid"]
FULL = [n for n in NAMES if "collateral.json" in about(n)["files"]]


def outcome(judged, name):
    return next((c.outcome, c.detail) for c in judged.checks if c.name == name)


def summary(judged):
    return judged.crypto, judged.decision, judged.code, judged.tcb_status, judged.advisories


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_the_stated_ones(name):
    expect = about(name)["expect"]
    judged = folder.judge(files(name), now=at(about(name)["verify_at"]))
    assert judged.tee == name.split("/")[0]
    assert judged.crypto == stated(name, "crypto")
    assert judged.decision == stated(name, "default_policy")
    if "tcb_status" in expect:
        assert judged.tcb_status == expect["tcb_status"]
    if "advisory_ids" in expect:
        assert list(judged.advisories) == expect["advisory_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_stated_ones(name):
    values = about(name)["values"]
    quote = abi.parse(files(name)["quote.bin"])
    header, body = quote.header, quote.body
    assert (header.version, header.att_key_type, header.tee_type) == (
        values["version"], values["akt"], int(values["tee"], 16),
    )  # fmt: skip
    assert header.qe_vendor_id.hex() == values["qe_vendor"]
    assert header.user_data.hex() == values["user_data"]
    assert len(quote.padding) == values["trailing"]
    chain = pck.chain(quote.certification_data, "chain")
    assert pck.platform(chain[0], "pck").fmspc.hex() == values["fmspc"]
    for field, value in values.items():
        if hasattr(body, field):
            found = getattr(body, field)
            assert (found.hex() if isinstance(found, bytes) else found) == value
    for n, value in enumerate(values.get("rtmr", [])):
        assert getattr(body, f"rtmr{n}").hex() == value
    bits = values.get("td_attribute_bits") or values["sgx_attribute_bits"]
    known = {n: v for n, v in bits.items() if n in (*abi.SGX_ATTRIBUTES, *abi.TD_ATTRIBUTES)}
    assert {n: body.attribute(n) for n in known} == known
    assert "debug" in known


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_claims_are_the_stated_values(name):
    judged, values = judge(name), about(name)["values"]
    claims = judged.claims
    assert claims.bound.hex() == values["report_data"]
    assert claims.measurement == values.get("mrtd", values.get("mrenclave"))
    assert values["fmspc"] in claims.product
    assert claims.root in pck.ROOTS


@pytest.mark.parametrize("name", NAMES)
def test_what_enclave_show_says(name):
    values = about(name)["values"]
    said = json.loads(json.dumps(kinds.recognise(files(name)).fields(files(name))))
    assert said["report"]["report_data"] == values["report_data"]
    assert said["header"]["version"] == values["version"]
    assert said["pck"]["fmspc"] == values["fmspc"]
    assert bool(said["collateral"]["missing"]) == (name not in FULL)
    for n, value in enumerate(said.get("event_log", {}).values()):
        assert value == values["rtmr"][n]


@pytest.mark.parametrize("name", ACCEPTED)
def test_outside_its_window_it_is_refused(name):
    valid = about(name)["valid"]
    wanted = stated(name, "default_policy")
    for time in (at(valid["from"]), at(valid["to"])):
        assert judge(name, now=time).decision == wanted
    assert judge(name, now=at(valid["from"]) - 1).code == "evidence.validity-not-yet"
    assert judge(name, now=at(valid["to"]) + 1).code == "evidence.validity-expired"


@pytest.mark.parametrize("name", NEEDY)
def test_without_collateral_the_pck_chain_is_the_window(name):
    valid = about(name)["valid"]
    for time in (at(valid["from"]), at(valid["to"])):
        assert judge(name, now=time).decision == "needs-collateral"
    assert judge(name, now=at(valid["from"]) - 1).code == "evidence.validity-not-yet"
    assert judge(name, now=at(valid["to"]) + 1).code == "evidence.validity-expired"


@pytest.mark.parametrize("name", ACCEPTED)
def test_its_nonce_is_looked_for(name):
    data = bytes.fromhex(about(name)["values"]["report_data"])
    for nonce in {data, data.rstrip(b"\0")}:
        assert judge(name, nonce=nonce).decision == stated(name, "default_policy")
    for nonce, code in ((b"", "nonce"), (data[:-1] + b"\xff", "mismatch")):
        assert judge(name, nonce=nonce).code == f"evidence.freshness-{code}"


def pins(name):
    values = about(name)["values"]
    if name.startswith("sgx"):
        return {"mrenclave": values["mrenclave"], "mrsigner": values["mrsigner"]}
    rtmrs = {f"rtmr{n}": value for n, value in enumerate(values["rtmr"])}
    return rtmrs | {n: values[n] for n in ("mrtd", "mrconfigid", "mrowner", "mrseam")}


@pytest.mark.parametrize("name", ACCEPTED)
def test_pinned_values(name):
    for field, value in pins(name).items():
        other = "ab" * (len(value) // 2)
        assert judge(name, **{field: (other, value)}).decision == stated(name, "default_policy")
        judged = judge(name, **{field: (other,)})
        assert (judged.crypto, judged.code) == ("valid", f"evidence.appraise-{field}")


def test_hardening_states_are_refused_by_a_strict_policy():
    for name in of("accept-with-status"):
        assert judge(name).tcb_status in HARDENING
        assert judge(name, tcb_statuses=("UpToDate",)).code == "evidence.tcb-status"


@pytest.mark.parametrize("name", GENUINE)
def test_the_twin_signature_gets_the_same_answer(name):
    raw, wanted = files(name)["quote.bin"], summary(judge(name))
    quote = abi.parse(raw)
    start = len(quote.signed) + 4
    report = raw.index(quote.qe_report.raw) + 384
    for where, (_, s) in ((start, quote.signature), (report, quote.qe_report_signature)):
        twin = raw[: where + 32] + (ORDER - s).to_bytes(32, "big") + raw[where + 64 :]
        assert twin != raw
        assert summary(judge(name, {"quote.bin": twin})) == wanted


# --- every bit -----------------------------------------------------------------------------------


def listed(judged, before):
    """Refused, or accepted with another detail of what nothing covers."""
    if judged.decision not in ("accept", "accept-with-status"):
        return True
    return judged.checks != before.checks and summary(judged) == summary(before)


def signed_end(raw):
    return len(raw) - len(abi.parse(raw).padding)


DISTINCT = [n for n in ACCEPTED if n.startswith("sgx")] + [
    n for n in ACCEPTED if n in ("tdx/v4-uptodate-emr", "tdx/v5-td15-uptodate")
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_sampled_flips_of_the_quote_are_refused(name):
    raw, draw = files(name)["quote.bin"], random.Random(name)
    for bit in draw.sample(range(8 * signed_end(raw)), 60):
        judged = judge(name, {"quote.bin": flipped(raw, bit)})
        assert judged.decision == "reject"


@pytest.mark.full
@pytest.mark.parametrize("name", DISTINCT)
def test_every_flip_of_the_quote_is_refused(name):
    raw = files(name)["quote.bin"]
    for bad in flips(raw, 0, signed_end(raw)):
        assert judge(name, {"quote.bin": bad}).decision == "reject"


@pytest.mark.parametrize("name", [n for n in GENUINE if abi.parse(files(n)["quote.bin"]).padding])
def test_flips_of_what_nothing_covers_are_told(name):
    raw, draw, before = files(name)["quote.bin"], random.Random(name), judge(name)
    start = 8 * signed_end(raw)
    for bit in draw.sample(range(start, 8 * len(raw)), 10):
        judged = judge(name, {"quote.bin": flipped(raw, bit)})
        assert summary(judged) == summary(before)
        assert outcome(judged, "parse") != outcome(before, "parse")


@pytest.mark.parametrize("name", ACCEPTED)
def test_sampled_flips_of_collateral_are_refused(name):
    raw, draw, before = files(name)["collateral.json"], random.Random(name), judge(name)
    for bit in draw.sample(range(8 * len(raw)), 60):
        assert listed(judge(name, {"collateral.json": flipped(raw, bit)}), before)


@pytest.mark.full
@pytest.mark.parametrize("name", DISTINCT)
def test_every_flip_of_collateral_is_refused(name):
    raw, before = files(name)["collateral.json"], judge(name)
    for bad in flips(raw):
        assert listed(judge(name, {"collateral.json": bad}), before)


@pytest.mark.parametrize("name", ACCEPTED)
def test_flips_within_each_signed_part(name):
    """Where a flip stays well formed, it is the signature that refuses it."""
    members, draw = json.loads(files(name)["collateral.json"]), random.Random(name)
    for member in ("tcb_info", "qe_identity"):
        text = members[member].encode()
        for where in draw.sample([i for i, c in enumerate(text) if chr(c).isdigit()], 20):
            other = str((text[where] - 48 + 1) % 10).encode()
            changed = (text[:where] + other + text[where + 1 :]).decode()
            merged = json.dumps(members | {member: changed}).encode()
            assert judge(name, {"collateral.json": merged}).code == "evidence.collateral-signature"


# --- truncated, extended, swapped, stale, mixed --------------------------------------------------


@pytest.mark.parametrize("name", ACCEPTED)
def test_truncated_quotes(name):
    raw, draw = files(name)["quote.bin"], random.Random(name)
    end = signed_end(raw)
    for size in [0, 1, 47, 48, end - 1, *draw.sample(range(end), 40)]:
        judged = judge(name, {"quote.bin": raw[:size]})
        assert (judged.crypto, judged.stage) == ("invalid", "parse")
    assert judge(name, {"quote.bin": raw[:end]}).decision == stated(name, "default_policy")


@pytest.mark.parametrize("name", ACCEPTED)
def test_extended_quotes_are_told(name):
    raw = files(name)["quote.bin"]
    judged = judge(name, {"quote.bin": raw + b"\0" * 40 + b"more"})
    assert judged.decision == stated(name, "default_policy")
    assert "that nothing covers" in outcome(judged, "parse")[1]
    assert judge(name, {"quote.bin": raw + bytes(abi.MAX_BYTES)}).code == "evidence.parse-too-large"


def swapped(name, member, other):
    members = json.loads(files(name)["collateral.json"])
    return {"collateral.json": json.dumps(members | {member: other}).encode()}


@pytest.mark.parametrize("name", ACCEPTED)
def test_swapped_chains(name):
    members = json.loads(files(name)["collateral.json"])
    pck_chain, tcb_chain = members["pck_crl_issuer_chain"], members["tcb_info_issuer_chain"]
    for member, other, code in (
        ("tcb_info_issuer_chain", pck_chain, "chain-name"),
        ("qe_identity_issuer_chain", pck_chain, "chain-name"),
        ("pck_crl_issuer_chain", tcb_chain, "chain-name"),
        ("tcb_info_issuer_chain", (dcap.signer() + dcap.root()).decode(), "root-unknown"),
        ("pck_crl_issuer_chain", (dcap.authority() + dcap.root()).decode(), "root-unknown"),
        ("pck_crl", members["root_ca_crl"], "chain-issuer"),
        ("root_ca_crl", members["pck_crl"], "chain-issuer"),
        ("pck_crl", dcap.revoked(dcap.CA).hex(), "chain-issuer"),
        ("tcb_info_signature", members["qe_identity_signature"], "collateral-signature"),
        ("tcb_info", members["qe_identity"], "collateral-signature"),
    ):
        judged = judge(name, swapped(name, member, other))
        assert (judged.crypto, judged.code) == ("valid", f"evidence.{code}")


@pytest.mark.parametrize("member", ["tcb_info", "qe_identity"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_documents_of_other_cases(name, member):
    """Genuine documents, each with its own signature: of another platform, time or TEE."""
    own = json.loads(files(name)["collateral.json"])
    parts = [member, f"{member}_signature", f"{member}_issuer_chain"]
    allowed = {
        "collateral-fmspc", "collateral-tee", "validity-expired", "validity-not-yet",
        "collateral-mixed", "collateral-signature",
    }  # fmt: skip
    for other in FULL:
        members = json.loads(files(other)["collateral.json"])
        if members[member] == own[member]:
            continue
        mixed = own | {part: members[part] for part in parts}
        judged = judge(name, {"collateral.json": json.dumps(mixed).encode()})
        if judged.decision == "accept":  # issued on another day, about the same platform
            found, before = (getattr(documents, READ[member])(m[member].encode())
                             for m in (members, own))  # fmt: skip
            assert found.evaluation == before.evaluation
            assert found.levels == before.levels
        else:
            assert judged.code.removeprefix("evidence.") in allowed


READ = {"tcb_info": "tcb_info", "qe_identity": "identity"}


@pytest.mark.parametrize("name", ACCEPTED)
def test_stale_collateral(name):
    assert judge(name, tcb_evaluation=99).code == "evidence.collateral-evaluation"
    assert judge(name, collateral_age=0).code == "evidence.collateral-age"
    after = at(about(name)["valid"]["to"]) + 5 * policy.DAY
    assert judge(name, now=after).code == "evidence.validity-expired"
    judged = judge(name, now=after, collateral_grace=40)
    assert judged.decision == stated(name, "default_policy")


@pytest.mark.parametrize("name", ACCEPTED)
def test_missing_collateral(name):
    judged = judge(name, {"collateral.json": None})
    assert (judged.crypto, judged.decision) == ("valid", "needs-collateral")
    members = json.loads(files(name)["collateral.json"])
    for member in members:
        rest = {key: value for key, value in members.items() if key != member}
        judged = judge(name, {"collateral.json": json.dumps(rest).encode()})
        assert judged.decision == "needs-collateral"


@pytest.mark.parametrize("name", GENUINE)
def test_the_folders_word_for_its_root_counts_for_nothing(name):
    judged = judge(name, {"root.pem": dcap.root()}, roots=dcap.pin())
    assert (judged.crypto, judged.code) == ("invalid", "evidence.root-unknown")


def test_quotes_and_collateral_of_different_platforms():
    for name in ACCEPTED:
        for other in FULL:
            if about(other)["values"]["fmspc"] != about(name)["values"]["fmspc"]:
                changed = {"collateral.json": files(other)["collateral.json"]}
                assert judge(name, changed).decision == "reject"


# --- event logs ----------------------------------------------------------------------------------

LOGS = {"event_log.json", "ccel_data.bin"}
LOGGED = [n for n in NAMES if n.startswith("tdx") and LOGS & set(files(n))]


@pytest.mark.parametrize("name", LOGGED)
def test_event_logs_replay(name):
    judged = judge(name, event_log=True)
    assert judged.decision == stated(name, "default_policy")
    assert outcome(judged, "event-log")[0] == "passed"
    others = [n for n in LOGGED if n != name]
    for other in others:
        log = {f: data for f, data in files(other).items() if f in LOGS}
        changed = dict.fromkeys(LOGS) | log
        judged = judge(name, changed)
        assert (judged.crypto, judged.code) == ("valid", "evidence.binding-event-log")


@pytest.mark.parametrize("name", LOGGED)
def test_sampled_flips_of_event_logs(name):
    (file,) = LOGS & set(files(name))
    raw, draw = files(name)[file], random.Random(name)
    end = len(raw.rstrip(b"\xff\0"))
    wanted, before = judge(name), replay.read({file: raw})
    for bit in draw.sample(range(8 * end), 60):
        bad = flipped(raw, bit)
        judged = judge(name, {file: bad})
        if summary(judged) == summary(wanted):  # in what no digest covers
            found = replay.read({file: bad})
            assert found.rtmrs == before.rtmrs
            assert found.uncovered
        else:
            assert judged.code in ("evidence.binding-event-log", "evidence.parse-event-log",
                                   "evidence.parse-json")  # fmt: skip


# --- seeded bugs: each check taken away is missed by a case made up -----------------------------


def lenient(monkeypatch, module, name, put=lambda *a, **k: None):
    monkeypatch.setattr(module, name, put)


def accepted(files_, **fields):
    policies = {"tdx": dcap.tdx(**fields), "sgx": dcap.sgx()}
    return folder.judge(files_, now=dcap.AT, policies=policies).decision == "accept"


DEBUG = dcap.td(tdattributes=b"\1\0\0\x10" + bytes(4))
BUGS = {
    "no signature is checked": (verify, "_check", dcap.Case(quoted_by="x")),
    "no document's signature is checked": (verify, "_check", dcap.Case(
        parts={"tcb_info_signature": "11" * 64})),
    "no chain is checked": (x509, "check_issued", dcap.Case(
        chain=dcap.certificate(dcap.PCK, dcap.CA, value=dcap.extension(), by="x")
        + dcap.authority() + dcap.root())),
    "no list's signature is checked": (crl, "check_issued", dcap.Case(
        parts={"pck_crl": dcap.revoked(dcap.CA, by="x").hex()})),
    "nothing is revoked": (crl, "check_revoked", dcap.Case(
        parts={"pck_crl": dcap.revoked(dcap.CA, [13]).hex()})),
    "no window is looked at": (verify, "_window", dcap.Case(
        info={"nextUpdate": "2026-05-30T00:00:00Z"})),
    "no certificate expires": (x509, "check_validity", dcap.Case(
        chain=dcap.certificate(dcap.PCK, dcap.CA, value=dcap.extension(), after=dcap.START)
        + dcap.authority() + dcap.root())),
    "evaluations are not compared": (verify, "_evaluation", dcap.Case(
        info={"tcbEvaluationDataNumber": 17})),
    "debug is not looked at": (appraise, "debug", dcap.Case(body=DEBUG)),
    "the QE is not looked at": (tcb, "_identity", dcap.Case(qe={"mrsigner": bytes(32)})),
    "TCB info may be of others": (tcb, "_tcb_info", dcap.Case(info={"fmspc": "11" * 6})),
    "any root will do": (verify, "_root", None),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_each_check_bites(bug, monkeypatch):
    module, name, case = BUGS[bug]
    forged = (case or dcap.Case()).files()
    fields = {} if case else {"roots": pck.ROOTS}
    assert not accepted(forged, **fields)
    lenient(monkeypatch, module, name, lambda *a, **k: "" if name == "_tcb_info" else None)
    assert accepted(forged, **fields)


def test_a_level_by_one_number_instead_of_component_by_component(monkeypatch):
    levels = [
        dcap.level(sgx=bytes([4, 6]) + dcap.SVNS[2:]),
        dcap.level("OutOfDate", bytes(16), bytes(16), 0),
    ]
    forged = dcap.Case(info={"tcbLevels": levels}).files()
    assert not accepted(forged)
    monkeypatch.setattr(tcb, "_reaches", lambda own, wanted: own >= wanted)
    assert accepted(forged)


def test_statuses_that_do_not_converge(monkeypatch):
    old = {"tcbLevels": [dcap.svn_level(4, "OutOfDate")]}
    forged = dcap.Case(identity=old).files()
    assert not accepted(forged)
    monkeypatch.setattr(tcb, "converge", lambda platform, other: platform)
    assert accepted(forged)

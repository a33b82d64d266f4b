"""The verifier on evidence captured from AMD hardware, with AMD's own roots: the answers that each
case states, its values, its window of time, and every kind of change refused."""

import json
import random
from datetime import datetime

import pytest

from casemate.attest import x509
from casemate.attest.roots import AMD
from casemate.attest.snp import abi
from casemate.attest.trust import Trust, Unchecked
from casemate.attest.verdict import Checks
from casemate.attest.verify import verify_claims
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Evidence
from support.evidence import CAPTURED

pytestmark = pytest.mark.skipif(
    not CAPTURED.is_dir(), reason="no captured evidence beside the project"
)
NAMES = sorted(p.name for p in CAPTURED.glob("*")) if CAPTURED.is_dir() else []
AWS = "CN=cc-us-east-2.amazonaws.com"
CRYPTO_STAGES = ("chain", "root", "endorsement", "signature")


def trusting(name: str, products=tuple(AMD), **fields) -> Trust:
    """Milan needs a list of chips, or of clouds with a VLEK: those of the case."""
    values = about(name)["values"]
    if values.get("signing_key") == "VLEK":
        custody = {"signing_keys": ("VLEK",), "csp_ids": (AWS,)}
    else:
        custody = {"chip_ids": (values.get("chip_id", "0" * 128),)}
    return Trust.sev_snp(products=products, **custody, **fields)


def about(name: str) -> dict:
    return json.loads((CAPTURED / name / "about.json").read_text())


def files(name: str) -> dict[str, bytes]:
    known = ("report.bin", "vcek.der", "vlek.der", "ask.pem", "asvk.pem", "ark.pem")
    return {n: (CAPTURED / name / n).read_bytes() for n in known if n in about(name)["files"]}


def product(name: str) -> str:
    return about(name)["product"].split()[0]


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def judge(name: str, changed: dict[str, bytes | None] | None = None, now=None, trust=None):
    merged = files(name) | (changed or {})
    kept = {n: data for n, data in merged.items() if data is not None}
    evidence = Evidence(tee="sev-snp", simulated=False, files=kept)
    checks = Checks()
    now = at(about(name)["verify_at"]) if now is None else now
    trust = trust or trusting(
        name,
        measurements=Unchecked("no measurement is pinned by default"),
        vmpl=Unchecked("the collection's default policy takes any"),
    )
    return verify_claims(evidence, trust, now=now, checks=checks)


def refused(*args, **kwargs) -> str:
    with pytest.raises(EvidenceError) as e:
        judge(*args, **kwargs)
    return e.value.code.removeprefix("evidence.")


GOOD = [n for n in NAMES if about(n)["expect"]["default_policy"] == "accept"]


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_stated_one(name):
    expect = about(name)["expect"]
    if expect["default_policy"] == "accept":
        judge(name)
        return
    stage, _, _ = refused(name).partition("-")
    if expect["default_policy"] == "not-applicable":
        assert stage == "absent"
    elif expect["crypto"] == "invalid":
        assert stage in CRYPTO_STAGES
    else:
        assert stage == "appraise"


@pytest.mark.parametrize("name", GOOD)
def test_the_values_are_the_stated_ones(name):
    claims, values = judge(name), about(name)["values"]
    assert claims.measurement == values["measurement"]
    assert claims.bound.hex() == values["report_data"]
    assert claims.product == product(name)
    report = abi.parse(files(name)["report.bin"])
    assert (report.version, report.vmpl, report.signing_key) == (
        values["version"], values["vmpl"], values["signing_key"],
    )  # fmt: skip
    for field in ("host_data", "id_key_digest", "author_key_digest", "chip_id", "reported_tcb",
                  "current_tcb", "committed_tcb", "launch_tcb"):  # fmt: skip
        assert getattr(report, field).hex() == values[field]
    bits = values["policy_bits"]
    assert (report.policy.smt, report.policy.debug, report.policy.migrate_ma) == (
        bits["smt_allowed"], bits["debug_allowed"], bits["migrate_ma"],
    )  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_outside_its_window_it_is_refused(name):
    valid = about(name)["valid"]
    judge(name, now=at(valid["from"]))
    judge(name, now=at(valid["to"]))
    assert refused(name, now=at(valid["from"]) - 1) == "validity-not-yet"
    assert refused(name, now=at(valid["to"]) + 1) == "validity-expired"


@pytest.mark.parametrize("name", GOOD)
def test_the_root_is_ours_not_the_folders(name):
    judge(name, {"ark.pem": None})
    foreign = next(n for n in GOOD if product(n) != product(name))
    assert refused(name, {"ark.pem": files(foreign)["ark.pem"]}) == "chain-issuer"
    none = trusting(
        name,
        measurements=Unchecked("a test"),
        products=tuple({"Milan", "Genoa", "Turin"} - {product(name)}),
        vmpl=Unchecked("a test"),
    )
    assert refused(name, trust=none) == "root-unknown"


@pytest.mark.parametrize("name", GOOD)
def test_a_pinned_measurement(name):
    measured = about(name)["values"]["measurement"]
    vmpl = Unchecked("a test")
    judge(name, trust=trusting(name, measurements=("ab" * 48, measured), vmpl=vmpl))
    other = trusting(name, measurements=("ab" * 48,), vmpl=vmpl)
    assert refused(name, trust=other) == "appraise-measurement"


@pytest.mark.parametrize("name", ["milan-v3-vlek-aws"])
def test_a_higher_privilege_level_is_refused_where_it_is_asked_for(name):
    assert refused(name, trust=trusting(name, measurements=Unchecked("a test"))) == "appraise-vmpl"


@pytest.mark.parametrize("name", GOOD)
def test_sampled_flips_are_refused(name):
    draw = random.Random(name)
    for file, data in files(name).items():
        data = x509.from_pem(data) if file.endswith(".pem") else data
        judge(name, {file: data})
        for bit in draw.sample(range(len(data) * 8), 40):
            bad = data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
            refused(name, {file: bad})


@pytest.mark.parametrize("name", GOOD)
def test_the_twin_signature_gets_the_same_answer(name):
    raw = files(name)["report.bin"]
    twin = (abi.P384_ORDER - abi.parse(raw).s).to_bytes(72, "little")
    assert judge(name, {"report.bin": raw[:0x2E8] + twin + raw[0x330:]}) == judge(name)


def test_reports_and_certificates_of_different_cases_do_not_mix():
    for name in GOOD:
        for other in GOOD:
            if about(name)["values"]["chip_id"] != about(other)["values"]["chip_id"]:
                refused(name, {"report.bin": files(other)["report.bin"]})

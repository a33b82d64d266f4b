"""Several evidences in one attestation, and what a policy says of all kinds.

The CPU is a simulated SEV-SNP one. The GPU's evidence is made up under test roots of NVIDIA's form
(``support.nvidia``), and goes through the verifier for hardware: there is no captured GPU whose
nonce follows from a CPU's report.
"""

import json
from dataclasses import replace

import pytest

from casemate.attest import binding, verify
from casemate.attest.kind import Claims
from casemate.attest.kinds import KINDS
from casemate.attest.roots import AMD
from casemate.attest.trust import Trust, Unchecked
from casemate.attest.verdict import Checks
from casemate.attest.verify import appraise_terms, verify_attestation
from casemate.spec.errors import EvidenceError, UsageError
from casemate.spec.evidence import Evidence
from support import nvidia
from support.evidence import NONCE, NOW, PROMISES, attestation, bound, tee

DAY = 86400


def nonce_for(given, name: str) -> bytes:
    """What a device of this name must carry beside this attestation's CPU."""
    data = binding.report_data(given.binding)
    carried = binding.carried("sev-snp", data)
    return binding.carried("nvidia", binding.device_data("sev-snp", carried, name))


def gpu(nonce: bytes, **changed) -> dict[str, bytes]:
    return nvidia.files(report_bin=nvidia.report(nonce=nonce), **changed)


def beside(given, **devices: dict[str, bytes]):
    """The attestation with evidence of devices by name."""
    files = dict(given.evidence.files)
    for name, own in devices.items():
        files |= {f"{name}/{file}": data for file, data in own.items()}
    evidence = Evidence(tee=given.evidence.tee, simulated=True, files=files)
    return replace(given, evidence=evidence)


def with_gpu(name: str = "gpu0"):
    good = attestation()
    return beside(good, **{name: gpu(nonce_for(good, name))})


def trusting(**terms) -> Trust:
    base = Trust.simulated(tee().root)
    policies = {**base.policies, "nvidia": nvidia.policy()}
    return replace(base, policies=policies, **terms)


def judge(given, trust=None):
    return verify_attestation(given, NONCE, trust or trusting(gpu=True), now=NOW)


def refused(given, trust=None) -> str:
    with pytest.raises(EvidenceError) as e:
        judge(given, trust)
    assert e.value.checks[-1].outcome == "failed"
    return e.value.code.removeprefix("evidence.")


def test_a_gpu_whose_nonce_follows_from_the_cpus_report():
    verdict = judge(with_gpu())
    (part,) = verdict.parts
    assert (part.name, part.tee, part.product) == ("gpu0", "nvidia", "GH100")
    outcomes = {c.name: c.outcome for c in verdict.checks}
    assert outcomes["gpu0/binding"] == outcomes["gpu"] == "passed"
    assert outcomes["gpu0/signature"] == "passed"
    shown = json.loads(json.dumps(verdict.to_json()))
    assert shown["parts"][0]["chip_id"] == part.chip_id


def made_for_another_boot():
    other = attestation(what=bound(boot=b"B" * 16))
    return beside(attestation(), gpu0=gpu(nonce_for(other, "gpu0")))


def made_for_the_clients_nonce():
    """The client's own nonce, which anyone can pass to any GPU."""
    return beside(attestation(), gpu0=gpu(NONCE))


def made_for_another_name():
    good = attestation()
    return beside(good, gpu1=gpu(nonce_for(good, "gpu0")))


@pytest.mark.parametrize(
    "attack", [made_for_another_boot, made_for_the_clients_nonce, made_for_another_name]
)
def test_a_gpu_that_answered_something_else_is_refused_and_by_its_binding(attack, monkeypatch):
    assert refused(attack()) == "binding-device"
    monkeypatch.setattr(verify, "_part_binding", lambda *_: None)
    judge(attack())


def test_a_gpus_evidence_is_verified_like_any_other():
    good = with_gpu()
    files = good.evidence.files
    raw = files["gpu0/report.bin"]
    for changed, code in (
        ({"gpu0/report.bin": raw[:-1] + bytes([raw[-1] ^ 1])}, "signature-report"),
        ({"gpu0/report.bin": raw[:-1]}, "parse-"),
        ({"gpu0/driver_rim.xml": None}, "needs-driver-rim"),
        ({"gpu0/cert_chain.pem": None}, ""),
    ):
        kept = {n: d for n, d in (files | changed).items() if d is not None}
        bad = replace(good, evidence=replace(good.evidence, files=kept))
        assert refused(bad).startswith(code)
        with pytest.raises(EvidenceError) as e:
            judge(bad)
        assert e.value.checks[-1].name.startswith("gpu0/")
        assert e.value.checks[0].name == "label"


def test_one_device_does_not_answer_for_two(monkeypatch):
    good = attestation()
    both = beside(good, **{n: gpu(nonce_for(good, n)) for n in ("gpu0", "gpu1")})
    assert refused(both) == "binding-device-twice"
    monkeypatch.setattr(verify, "_distinct", lambda *_: None)
    assert len(judge(both).parts) == 2


def test_a_required_gpu_must_show_evidence():
    assert refused(attestation()) == "appraise-gpu"
    assert judge(attestation(), trusting(gpu=False)).parts == ()
    open_ = judge(attestation(), trusting(gpu=Unchecked("a test")))
    assert "gpu" in {c.name for c in open_.unchecked}


def test_a_switch_is_no_gpu():
    good = attestation()
    part = judge(with_gpu()).parts[0]
    claims = type("Claims", (), {"product": "LS_10"})
    step = verify.Step()
    with pytest.raises(EvidenceError):
        verify._gpu({"switch0": (KINDS["nvidia"], claims)}, True, step)
    assert part.product == "GH100"
    assert nonce_for(good, "gpu0") != nonce_for(good, "switch0")


def test_evidence_that_the_policy_does_not_ask_for_is_told_and_not_looked_at():
    verdict = judge(with_gpu(), Trust.simulated(tee().root))
    assert verdict.parts == ()
    told = {c.name: c.detail for c in verdict.unchecked}
    assert told["gpu0/kind"].startswith("not looked at")


def test_further_evidence_of_no_known_kind_is_refused():
    noise = beside(attestation(), gpu0={"noise": b"noise"})
    assert refused(noise) == "tee-unknown"
    assert refused(beside(attestation(), GPU={"report.bin": b""})) == "parse-name"


def test_a_device_runs_no_server():
    alone = gpu(nonce_for(attestation(), "gpu0"))
    evidence = Evidence(tee="nvidia", simulated=True, files=alone)
    assert refused(replace(attestation(), evidence=evidence)) == "tee-device"


def test_two_independent_roots():
    both = trusting(independent_roots=2)
    assert judge(with_gpu(), both).parts
    assert refused(attestation(), both) == "appraise-independent-roots"
    verdict = judge(with_gpu(), both)
    (check,) = [c for c in verdict.checks if c.name == "independent-roots"]
    assert check.detail == "AMD, NVIDIA"


def test_the_servers_own_policy():
    found = attestation().binding.server_policy
    assert judge(attestation(), trusting(server_policies=("sha256:" + "0" * 64, found)))
    other = trusting(server_policies=("sha256:" + "0" * 64,))
    assert refused(attestation(), other) == "appraise-server-policy"
    (check,) = [c for c in judge(attestation(), trusting()).checks if c.name == "server-policy"]
    assert (check.outcome, found in check.detail) == ("unchecked", True)


def test_the_layers_of_the_workers_sandbox():
    for asked in (("seccomp",), ("landlock", "seccomp")):
        assert judge(attestation(), trusting(sandbox=asked))
    with pytest.raises(EvidenceError) as e:
        judge(attestation(), trusting(sandbox=("seccomp", "memory-lock", "capabilities")))
    assert e.value.code == "evidence.appraise-sandbox"
    assert "without capabilities, memory-lock." in e.value.message
    with pytest.raises(UsageError, match="sandbox must be of capabilities"):
        trusting(sandbox=("secomp",))
    (check,) = [c for c in judge(attestation(), trusting()).checks if c.name == "sandbox"]
    assert (check.outcome, "landlock, seccomp" in check.detail) == ("unchecked", True)


def test_a_policy_that_the_evidence_does_not_bind():
    more = replace(PROMISES, sandbox=(*PROMISES.sandbox, "memory-lock"))
    assert refused(replace(attestation(), policy=more), trusting()) == "binding-policy"


def test_azures_evidence_and_the_chips_own_are_one_vendors_word():
    """Both end in AMD's root; under a root that casemate does not carry it is the row's vendor."""
    claims = Claims(
        bound=b"", fresh=(), product="Milan", root=AMD["Milan"][0], measurement="", chip_id="",
        tcb={}, other={},
    )  # fmt: skip
    assert verify._vendor(KINDS["azure-cvm"], claims) == "AMD"
    assert verify._vendor(KINDS["sev-snp"], claims) == "AMD"
    assert verify._vendor(KINDS["azure-cvm"], replace(claims, root="ab" * 32)) == "Microsoft"


# What a policy says of all kinds.


def terms(trust: Trust, **found) -> dict[str, str]:
    checks = Checks(**found)
    appraise_terms(trust, checks, now=NOW)
    return {c.name: c.outcome for c in checks.done}


def terms_refused(trust: Trust, **found) -> str:
    with pytest.raises(EvidenceError) as e:
        terms(trust, **found)
    return e.value.code.removeprefix("evidence.")


def test_the_age_of_collateral():
    trust = trusting(collateral_age=30)
    ages = {"pck_crl": NOW - DAY, "tcb_info": NOW - 30 * DAY}
    assert terms(trust, issued=ages)["collateral-age"] == "passed"
    assert terms_refused(trust, issued=ages | {"x": NOW - 30 * DAY - 1}) == "collateral-age"
    assert terms(trust)["collateral-age"] == "unchecked"
    assert terms(trusting(), issued={"x": 0.0})["collateral-age"] == "unchecked"


def test_denied_advisories():
    trust = trusting(advisories=("INTEL-SA-00837", "INTEL-SA-01036"))
    assert terms(trust, advisories=("INTEL-SA-00001",))["advisories"] == "passed"
    assert terms_refused(trust, advisories=("INTEL-SA-01036",)) == "appraise-advisory"
    assert terms(trusting(), advisories=("INTEL-SA-01036",))["advisories"] == "unchecked"


def test_physical_access_that_is_denied_stays_unchecked_since_nothing_shows_it():
    assert terms(trusting())["physical-access"] == "unchecked"
    assert terms(trusting(operator_physical_access=False))["physical-access"] == "unchecked"
    policy = replace(Trust.simulated(tee().root).policies["sev-snp"], chip_ids=("5" * 128,))
    listed = Trust.simulated(tee().root)
    listed = replace(listed, policies={"sev-snp": policy}, operator_physical_access=True)
    assert terms(listed)["physical-access"] == "passed"

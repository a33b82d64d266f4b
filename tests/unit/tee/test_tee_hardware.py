"""A whole attester: CPU and GPU under one binding, and what a client says of it."""

import json
from dataclasses import replace

import pytest

from casemate.attest import binding
from casemate.attest.trust import Trust
from casemate.attest.verify import verify_attestation
from casemate.spec.errors import EvidenceError, UsageError
from casemate.spec.evidence import Attestation, Evidence
from casemate.tee import azure, collateral, errors, hardware, nvidia, sealing, tpm
from casemate.tee.fetch import Reply
from support import dcap, snp, tees
from support import nvidia as gpu
from support.evidence import CAPTURED, NONCE, NONCES, NOW, PROMISES, FixedClock, bound

NO_KEY = sealing.unavailable("None here.", "None.")


class Gpus:
    name = "test"

    def count(self):
        return 1

    def collect(self, index, nonce):
        return gpu.report(nonce=nonce), gpu.pem(*gpu.device_chain())


@pytest.fixture
def place(tmp_path):
    with tees.snp_place(tmp_path, 0) as place:
        found = nvidia.Found(Gpus(), 1, "one")
        place.machine = replace(place.machine, gpus=lambda: found)
        rims = {"driver_rim.xml": gpu.driver_rim(), "vbios_rim.xml": gpu.vbios_rim()}
        collateral.keep(place.disk, "gpu0", rims, "test", NOW)
        yield place


def trust(**terms):
    base = Trust.of("sev-snp", roots={"Genoa": (snp.root(),)})
    policies = {**base.policies, "nvidia": gpu.policy()}
    return replace(base, policies=policies, **terms)


def attested(maker, what=None, evidence=None):
    what = what or bound()
    return Attestation(
        binding=what, policy=PROMISES, index=3, count=len(NONCES),
        path=binding.nonce_path(NONCES, 3),
        evidence=evidence or maker.attest(binding.report_data(what)),
    )  # fmt: skip


def test_a_cpu_and_its_gpu_are_verified_together(place):
    verdict = verify_attestation(attested(place.open()), NONCE, trust(gpu=True), now=NOW)
    names = {c.name: c.outcome for c in verdict.checks}
    assert names["gpu0/binding"] == names["gpu"] == "passed"
    assert "gpu0/kind" in names


def test_a_gpus_report_of_another_boot_is_refused(place):
    """The diversion: this machine's CPU, and a GPU's report that was made for another."""
    maker = place.open()
    mine, other = (maker.attest(binding.report_data(bound(boot=b * 16))) for b in (b"b", b"c"))
    files = {**mine.files, "gpu0/report.bin": other.files["gpu0/report.bin"]}
    mixed = Evidence(tee=mine.tee, simulated=False, files=files)
    with pytest.raises(EvidenceError) as e:
        verify_attestation(attested(maker, evidence=mixed), NONCE, trust(gpu=True), now=NOW)
    assert e.value.code.startswith("evidence.binding-")


def test_a_required_gpu_that_is_missing_is_refused(tmp_path):
    with tees.snp_place(tmp_path, 0) as place, pytest.raises(EvidenceError) as e:
        verify_attestation(attested(place.open()), NONCE, trust(gpu=True), now=NOW)
    assert e.value.code == "evidence.appraise-gpu"


def test_a_gpu_that_fails_fails_the_attestation(place):
    class Broken(Gpus):
        def collect(self, index, nonce):
            raise errors.device("gpu", "gone")

    machine = replace(place.machine, gpus=lambda: nvidia.Found(Broken(), 1, "one"))
    maker = replace(place, machine=machine).open()
    with pytest.raises(UsageError) as e:
        maker.attest(bytes(64))
    assert (e.value.code, e.value.status) == ("usage.tee-device", 503)


def test_what_is_made_stands_before_what_is_kept():
    tee = hardware.HardwareTee(
        "sev-snp", lambda field: {"report.bin": b"made", "vcek.der": b"made"},
        NO_KEY, FixedClock(),
        filler=lambda part, made: {"vcek.der": b"kept", "ask.pem": b"kept"},
    )  # fmt: skip
    assert tee.attest(bytes(64)).files == {
        "report.bin": b"made", "vcek.der": b"made", "ask.pem": b"kept",
    }  # fmt: skip
    assert (tee.root, tee.measurement) == ("", ""), "bytes that no verifier reads"
    assert tee.judged.decision == "reject"


def test_the_field_is_that_of_the_kind():
    seen = []

    def make(field):
        seen.append(field)
        return {}

    for kind in ("sev-snp", "tdx", "nitro", "tpm", "azure-cvm"):
        seen.clear()
        hardware.HardwareTee(kind, make, NO_KEY, FixedClock()).attest(b"r" * 64)
        assert seen == [binding.carried(kind, bytes(64)), binding.carried(kind, b"r" * 64)]


def test_a_log_goes_without_what_fills_its_table(tmp_path):
    source = CAPTURED.parent / "tdx" / "v4-gcp-cos-ccel" / "ccel_data.bin"
    if not source.exists():
        pytest.skip(f"no captured evidence at {source}")
    from casemate.attest.tpm import eventlog

    whole, cut = source.read_bytes(), tpm.event_log(source)
    assert len(cut) < len(whole) == 262144
    assert eventlog.parse(cut).padding == 0
    assert eventlog.parse(cut).events == eventlog.parse(whole).events


# Azure's metadata service.


def hcl_of_a_td() -> bytes:
    path = CAPTURED.parent / "azure-cvm" / "tdx-live-2026" / "hcl_report.bin"
    if not path.exists():
        pytest.skip(f"no captured evidence at {path}")
    return path.read_bytes()


def test_a_td_quote_is_asked_for_the_paravisors_td_report():
    hcl, quote = hcl_of_a_td(), dcap.Case().quote()
    files = azure.boot_files(hcl, tees.metadata(hcl, quote))
    assert files == {"hcl_report.bin": hcl, "td_quote.bin": quote}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"quote":7}', b'{"quote":"\xc3\xa9"}'])
def test_a_metadata_service_that_gives_no_quote(body):
    from casemate.spec.errors import CasemateError

    with pytest.raises(CasemateError) as e:
        azure.boot_files(hcl_of_a_td(), lambda _: Reply(200, {}, body))
    assert e.value.code in ("usage.tee-device", "net.collateral")


@pytest.mark.parametrize(
    "answer",
    [{}, {"vcekCert": 7}, {"vcekCert": "x", "certificateChain": ""},
     {"vcekCert": "x", "certificateChain": "-----BEGIN CERTIFICATE-----"}],
)  # fmt: skip
def test_a_metadata_service_that_gives_no_certificates(answer):
    with pytest.raises(UsageError) as e:
        azure._certificates(lambda _: Reply(200, {}, json.dumps(answer).encode()))
    assert e.value.code == "usage.tee-device"


def test_no_metadata_service_is_no_error_for_snp():
    assert azure._certificates(lambda _: Reply(503, {}, b"")) == {}


@pytest.mark.parametrize("hcl", [b"", b"HCLA" + bytes(3000), bytes(2600)])
def test_a_paravisors_report_that_is_none(hcl):
    with pytest.raises(EvidenceError):
        azure.boot_files(hcl, lambda _: Reply(200, {}, b"{}"))

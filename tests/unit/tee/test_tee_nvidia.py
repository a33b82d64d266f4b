"""GPU evidence through fakes of NVIDIA's library and tool."""

import base64
import json
import shutil
import types

import pytest

from casemate.attest import folder
from casemate.spec.errors import UsageError
from casemate.tee import nvidia
from support import nvidia as gpu
from support.evidence import NOW

NONCE = bytes(range(32))


class NVMLError(Exception):
    pass


def array(data, size):
    return list(data.ljust(size, b"\0"))


class FakeNvml:
    """pynvml, as far as it is used: C arrays of a fixed size with a length beside."""

    NVMLError = NVMLError

    def __init__(self, count=1, cc=1, error=""):
        self.count, self.cc, self.error = count, cc, error
        self.asked = []

    def _step(self, name):
        if self.error == name:
            raise NVMLError("Not Supported")

    def nvmlInit(self):
        self._step("init")

    def nvmlSystemGetConfComputeState(self):
        self._step("state")
        return types.SimpleNamespace(ccFeature=self.cc)

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        self._step("handle")
        return index

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle, nonce):
        self._step("report")
        self.asked.append((handle, nonce))
        report = gpu.report(nonce=nonce)
        return types.SimpleNamespace(
            attestationReport=array(report, 8192), attestationReportSize=len(report)
        )

    def nvmlDeviceGetConfComputeGpuCertificate(self, handle):
        chain = gpu.pem(*gpu.device_chain())
        return types.SimpleNamespace(
            attestationCertChain=array(chain, 20480), attestationCertChainSize=len(chain)
        )


def evidence(nonce, **changes):
    entry = {
        "version": "1.0", "arch": "HOPPER", "nonce": nonce,
        "evidence": base64.b64encode(gpu.report(nonce=bytes.fromhex(nonce))).decode(),
        "certificate": base64.b64encode(gpu.pem(*gpu.device_chain())).decode(),
    }  # fmt: skip
    return entry | changes


def tool(count=1, **top):
    """nvattest's output for the command line that it gets."""

    def run(arguments):
        assert arguments[:4] == ("nvattest", "collect-evidence", "--device", "gpu")
        nonce = arguments[arguments.index("--nonce") + 1]
        answer = {
            "evidences": [evidence(nonce) for _ in range(count)],
            "result_code": 0,
            "result_message": "Ok",
        }
        return json.dumps(answer | top).encode()

    return nvidia.Tool(run)


SOURCES = {"library": lambda: nvidia.Library(FakeNvml()), "tool": lambda: tool()}


@pytest.mark.parametrize("name", SOURCES)
def test_what_it_gives_the_verifier_takes(name):
    found = nvidia.detect([SOURCES[name]])
    assert found.count == 1
    (part,) = nvidia.parts(found)
    assert (part.name, part.kind) == ("gpu0", "nvidia")
    files = part.make(NONCE)
    rims = {n: d for n, d in gpu.files().items() if n.endswith(".xml")}
    judged = folder.judge(
        {**files, **rims}, now=NOW, policies={"nvidia": gpu.policy()}, nonce=NONCE
    )
    assert (judged.decision, judged.code) == ("accept", ""), judged.message
    assert judged.claims.bound == NONCE


def test_each_gpu_is_asked_with_its_own_nonce():
    fake = FakeNvml(count=3)
    parts = nvidia.parts(nvidia.detect([lambda: nvidia.Library(fake)]))
    assert [part.name for part in parts] == ["gpu0", "gpu1", "gpu2"]
    for i, part in enumerate(parts):
        part.make(bytes([i]) * 32)
    assert fake.asked == [(i, bytes([i]) * 32) for i in range(3)]


def test_the_tool_is_asked_for_the_right_gpu():
    parts = nvidia.parts(nvidia.detect([lambda: tool(count=2)]))
    assert len(parts) == 2
    assert parts[1].make(NONCE)["report.bin"][4:36] == NONCE


def test_a_report_for_another_nonce_is_never_given():
    class Stale(FakeNvml):
        def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle, nonce):
            return super().nvmlDeviceGetConfComputeGpuAttestationReport(handle, b"old" + bytes(29))

    (part,) = nvidia.parts(nvidia.detect([lambda: nvidia.Library(Stale())]))
    with pytest.raises(UsageError, match="nonce"):
        part.make(NONCE)


def test_the_first_source_with_a_gpu_is_taken():
    found = nvidia.detect([lambda: None, lambda: nvidia.Library(FakeNvml(cc=0)), lambda: tool()])
    assert found.source.name == "nvattest"
    found = nvidia.detect([lambda: nvidia.Library(FakeNvml()), lambda: tool()])
    assert found.source.name == "NVML"


def test_no_gpu_and_why():
    assert "neither" in nvidia.detect([lambda: None]).reason
    off = nvidia.detect([lambda: nvidia.Library(FakeNvml(cc=0))])
    assert off.count == 0
    assert "no GPU in confidential mode" in off.reason
    for error in ("init", "state"):
        failed = nvidia.detect([lambda error=error: nvidia.Library(FakeNvml(error=error))])
        assert failed.source is None
        assert "Not Supported" in failed.reason
    assert nvidia.parts(off) == ()


@pytest.mark.parametrize("error", ["handle", "report"])
def test_errors_of_the_library(error):
    fake = FakeNvml()
    (part,) = nvidia.parts(nvidia.detect([lambda: nvidia.Library(fake)]))
    fake.error = error
    with pytest.raises(UsageError) as e:
        part.make(NONCE)
    assert e.value.code == "usage.tee-device"


@pytest.mark.parametrize(
    "source",
    [
        nvidia.Tool(lambda _: b"no json"), nvidia.Tool(lambda _: b"[]"),
        tool(result_code=7), tool(evidences=None), tool(evidences=[7]), tool(evidences=[{}]),
        tool(evidences=[evidence("00" * 32, evidence="?")]),
        tool(evidences=[evidence("00" * 32, certificate=None)]), tool(evidences=[]),
    ],
)  # fmt: skip
def test_other_answers_of_the_tool(source):
    with pytest.raises(UsageError) as e:
        source.collect(0, NONCE)
    assert e.value.code == "usage.tee-device"


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_only_nonces_of_32_bytes(length):
    (part,) = nvidia.parts(nvidia.detect([SOURCES["tool"]]))
    with pytest.raises(ValueError, match="32"):
        part.make(bytes(length))


def script(folder, text):
    path = folder / "nvattest"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_the_tool_as_a_process(tmp_path):
    assert nvidia.run_tool([script(tmp_path, 'echo "$2"'), "a", "b"]) == b"b\n"
    with pytest.raises(UsageError, match="no driver"):
        nvidia.run_tool([script(tmp_path, "echo no driver >&2; exit 3")])
    with pytest.raises(UsageError, match="does not run"):
        nvidia.run_tool([str(tmp_path / "absent")])


def test_a_tool_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(nvidia, "TOOL_SECONDS", 0.2)
    with pytest.raises(UsageError, match="TimeoutExpired"):
        nvidia.run_tool([script(tmp_path, "sleep 30")])


def test_the_tool_is_looked_for_where_programs_are(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert nvidia._tool() is None
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvattest")
    assert nvidia._tool().name == "nvattest"

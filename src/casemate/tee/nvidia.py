"""GPU evidence through what NVIDIA installs: its management library, or its attestation tool.

Source: NVIDIA, NVML API reference, "Confidential Computing" (nvmlDeviceGetConfComputeGpu
AttestationReport, -Certificate, nvmlSystemGetConfComputeState); NVIDIA Attestation CLI, command
``collect-evidence``.

One table of sources, tried in order. Each asks one GPU for its SPDM report over a nonce of 32
bytes, and for the certificate chain of its device; the files are ``report.bin`` (request and
response) and ``cert_chain.pem``.
"""

from __future__ import annotations

import base64
import binascii
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from casemate.tee import errors
from casemate.tee.hardware import Part

KIND: Final = "nvidia"
NONCE_BYTES: Final = 32
REQUEST_BYTES: Final = 37  # GET_MEASUREMENTS with its nonce at 4
TOOL: Final = "nvattest"
TOOL_SECONDS: Final = 60.0
MAX_OUTPUT: Final = 16 << 20
_CC_ON: Final = 1  # NVML_CC_SYSTEM_FEATURE_ENABLED


class Source(Protocol):
    """GPUs in confidential mode, by index."""

    name: str

    def count(self) -> int: ...

    def collect(self, index: int, nonce: bytes) -> tuple[bytes, bytes]:
        """Report and certificate chain (PEM) of GPU ``index``."""


def _array(found: Any, size: int) -> bytes:
    return bytes(found[i] for i in range(size))


class Library:
    """NVML through its Python binding (nvidia-ml-py)."""

    name = "NVML"

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        with _nvml_said(nvml):
            nvml.nvmlInit()

    def count(self) -> int:
        """0 where confidential mode is off: such a GPU gives no report."""
        with _nvml_said(self._nvml):
            if self._nvml.nvmlSystemGetConfComputeState().ccFeature != _CC_ON:
                return 0
            return int(self._nvml.nvmlDeviceGetCount())

    def collect(self, index: int, nonce: bytes) -> tuple[bytes, bytes]:
        nvml = self._nvml
        with _nvml_said(nvml):
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            report = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(gpu, nonce)
            chain = nvml.nvmlDeviceGetConfComputeGpuCertificate(gpu)
            return (
                _array(report.attestationReport, report.attestationReportSize),
                _array(chain.attestationCertChain, chain.attestationCertChainSize),
            )


class _nvml_said:  # noqa: N801
    """NVML's exceptions as ``usage.tee-device``."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, e: BaseException | None, _: object) -> None:
        if isinstance(e, self._nvml.NVMLError):
            raise errors.device("gpu", f"NVML fails: {str(e)[:120]}.") from None


Run = Callable[[Sequence[str]], bytes]


def run_tool(arguments: Sequence[str]) -> bytes:
    """A tool's standard output. Raises ``usage.tee-device``."""
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        raise errors.device("gpu", f"{arguments[0]} does not run: {type(e).__name__}.") from None
    if done.returncode or len(done.stdout) > MAX_OUTPUT:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        said = f" ({last[0][:120]})" if last else ""
        raise errors.device("gpu", f"{arguments[0]} ends with {done.returncode}{said}.")
    return done.stdout


class Tool:
    """NVIDIA's attestation tool, which collects from all GPUs at once."""

    name = TOOL

    def __init__(self, run: Run = run_tool) -> None:
        self._run = run

    def _all(self, nonce: bytes) -> list[Any]:
        command = (TOOL, "collect-evidence", "--device", "gpu", "--nonce", nonce.hex())
        try:
            answer = json.loads(self._run(command))
        except ValueError:
            raise errors.device("gpu", f"{TOOL} prints no JSON.") from None
        if not isinstance(answer, dict) or answer.get("result_code") != 0:
            said = str(answer.get("result_message"))[:80] if isinstance(answer, dict) else "?"
            raise errors.device("gpu", f"{TOOL} collects no evidence: {said}.")
        found = answer.get("evidences")
        if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
            raise errors.device("gpu", f"{TOOL} lists no evidences.")
        return found

    def count(self) -> int:
        return len(self._all(bytes(NONCE_BYTES)))

    def collect(self, index: int, nonce: bytes) -> tuple[bytes, bytes]:
        found = self._all(nonce)
        if index >= len(found):
            raise errors.device("gpu", f"GPU {index} is gone.")
        try:
            report, chain = (
                base64.b64decode(found[index][name], validate=True)
                for name in ("evidence", "certificate")
            )
        except (KeyError, TypeError, binascii.Error):
            raise errors.device("gpu", f"{TOOL}'s evidence of GPU {index} is malformed.") from None
        return report, chain


@dataclass(frozen=True)
class Found:
    """``source``: None where no GPU can show evidence; ``reason`` says why, or what is there."""

    source: Source | None
    count: int
    reason: str


def _library() -> Source | None:
    try:
        import pynvml
    except (ImportError, OSError):
        return None
    return Library(pynvml)


def _tool() -> Source | None:
    return Tool() if shutil.which(TOOL) else None


SOURCES: Final[tuple[Callable[[], Source | None], ...]] = (_library, _tool)


def detect(sources: Sequence[Callable[[], Source | None]] = SOURCES) -> Found:
    """GPUs of this machine that can show evidence. Never raises: what fails is the reason."""
    reasons = []
    for opened in sources:
        try:
            source = opened()
            if source is None:
                continue
            count = source.count()
        except Exception as e:  # a vendor's library may raise anything; it is told, not hidden
            reasons.append(str(getattr(e, "message", e))[:120])
            continue
        if count:
            return Found(source, count, f"{count} in confidential mode, through {source.name}")
        reasons.append(f"{source.name} finds no GPU in confidential mode")
    return Found(None, 0, "; ".join(reasons) or "neither nvidia-ml-py nor nvattest is installed")


def _make(source: Source, index: int, nonce: bytes) -> dict[str, bytes]:
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a GPU's nonce has {len(nonce)} bytes, not {NONCE_BYTES}")
    report, chain = source.collect(index, nonce)
    if len(report) <= REQUEST_BYTES or report[4:36] != nonce:
        raise errors.device("gpu", f"The report of GPU {index} is not for the nonce asked.")
    return {"report.bin": report, "cert_chain.pem": chain}


def parts(found: Found) -> tuple[Part, ...]:
    """``gpu0``, ``gpu1`` and so on; none where none was found."""
    source = found.source
    if source is None:
        return ()

    def maker(index: int) -> Callable[[bytes], dict[str, bytes]]:
        return lambda nonce: _make(source, index, nonce)

    return tuple(Part(f"gpu{i}", KIND, maker(i)) for i in range(found.count))

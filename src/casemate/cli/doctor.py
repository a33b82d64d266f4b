"""``casemate doctor``: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import os
import platform
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final, Literal

import click

from casemate.cli import config, output

State = Literal["ok", "missing", "failed"]
# What breaks when a check is not ok: nothing that everyone needs, or everything.
Need = Literal["base", "optional"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``need``: whether casemate as a client works without it."""

    name: str
    state: State
    found: str
    mend: str = ""
    need: Need = "optional"


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()}")


def _tls() -> Finding:
    if ssl.HAS_TLSv1_3:
        return Finding("TLS 1.3", "ok", ssl.OPENSSL_VERSION, need="base")
    mend = "Use a Python built with OpenSSL 1.1.1 or later."
    return Finding("TLS 1.3", "failed", ssl.OPENSSL_VERSION, mend, "base")


def _sealing() -> Finding:
    try:
        from casemate.seal import hpke

        key = hpke.generate()
        held = key.open(hpke.seal(key.public, b"doctor", info=b"doctor"), info=b"doctor")
        assert held == b"doctor"
    except Exception as e:  # whatever is wrong with the installed library is what we report
        return Finding("sealing", "failed", f"{type(e).__name__}: {e}",
                       "Run pip install 'cryptography>=50'.", "base")  # fmt: skip
    return Finding(
        "sealing", "ok", f"HPKE ML-KEM-768+X25519, cryptography {version('cryptography')}",
        need="base",
    )  # fmt: skip


def _extras() -> Iterator[Finding]:
    """Each extra of the project, by its own list of requirements."""
    from importlib.metadata import metadata

    try:
        extras = metadata("casemate").get_all("Provides-Extra") or []
        lines = requires("casemate") or []
    except PackageNotFoundError:
        yield Finding("extras", "missing", "casemate is not installed", "Run pip install casemate.")
        return
    for extra in (e for e in ("torch", "data", "audit", "server") if e in extras):
        marker = (f'extra == "{extra}"', f"extra == '{extra}'")
        names = [_name(line) for line in lines if line.rstrip().endswith(marker)]
        absent = [n for n in names if n != "casemate" and not _installed(n)]
        if absent:
            yield Finding(
                f"extra {extra}",
                "missing",
                f"without {', '.join(absent)}",
                f"Run pip install 'casemate[{extra}]'.",
            )
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(n for n in names if n != "casemate"))


def _name(requirement: str) -> str:
    import re

    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found.group() if found else requirement


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


DEVICES: Final = (
    ("AMD SEV-SNP or Intel TDX (configfs-tsm)", "/sys/kernel/config/tsm/report"),
    ("AMD SEV-SNP guest device", "/dev/sev-guest"),
    ("Intel TDX guest device", "/dev/tdx_guest"),
    ("AWS Nitro enclave", "/dev/nsm"),
    ("TPM", "/dev/tpmrm0"),
)


def _tee() -> Finding:
    found = [name for name, path in DEVICES if Path(path).exists()]
    if found:
        return Finding("TEE", "ok", ", ".join(found))
    return Finding(
        "TEE",
        "missing",
        "no device of a TEE on this machine",
        "A server here can only simulate one: casemate serve --dev. Clients need none.",
    )


def _landlock() -> Finding:
    """landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) gives the ABI."""
    import ctypes

    if sys.platform != "linux":
        return Finding(
            "landlock", "missing", sys.platform, "Run the server on Linux 5.13 or later."
        )
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(444, None, 0, 1)
    if abi >= 1:
        return Finding("landlock", "ok", f"ABI {abi}")
    reason = os.strerror(ctypes.get_errno())
    return Finding("landlock", "missing", reason, "Use Linux 5.13 or later with landlock enabled.")


def _seccomp() -> Finding:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        text = ""
    if "Seccomp_filters:" in text or "Seccomp:" in text:
        return Finding("seccomp", "ok", "filters available")
    return Finding("seccomp", "missing", "not in /proc/self/status", "Use a kernel with seccomp.")


def _disk() -> Finding:
    folder = config.home()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            took = time.perf_counter() - start
    except OSError as e:
        mend = f"Make {folder} writable, or set CASEMATE_HOME."
        return Finding("disk", "failed", f"{folder}: {e.strerror}", mend, "base")
    free = os.statvfs(folder)
    room = free.f_bavail * free.f_frsize / 2**30
    return Finding(
        "disk", "ok", f"{folder}: fsync {took * 1e3:.1f} ms, {room:.1f} GiB free", need="base"
    )


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return Finding("memory", "missing", "unknown")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{total:.1f} GiB, {cores} core(s)"
    if total < 2:
        return Finding("memory", "missing", text, "A worker needs about 2 GiB; clients do not.")
    return Finding("memory", "ok", text)


def _identity() -> Finding:
    path = config.identity_path()
    if path.exists():
        return Finding("identity", "ok", str(path))
    return Finding("identity", "missing", f"no {path}", "Run casemate identity new.")


CHECKS: Final[tuple[Callable[[], Finding], ...]] = (
    _python, _tls, _sealing, _disk, _memory, _identity, _tee, _landlock, _seccomp,
)  # fmt: skip


def examine() -> list[Finding]:
    """Every finding, in the order to show."""
    return [*(check() for check in CHECKS), *_extras()]


@click.command()
@output.format_option
@click.pass_context
def doctor(ctx: click.Context, form: str) -> None:
    """Check this machine and say what is missing. Exit code 1 when a client cannot work here."""
    findings = examine()
    usable = all(f.state == "ok" for f in findings if f.need == "base")
    rows = [(f.name, f.state, f.found, f.mend) for f in findings]
    output.emit(
        form,
        {"usable": usable, "checks": [asdict(f) for f in findings]},
        lambda: output.rows_table("", ("check", "state", "found", "mend"), rows),
    )
    ctx.exit(0 if usable else 1)

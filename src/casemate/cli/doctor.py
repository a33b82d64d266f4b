"""``casemate doctor``: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import os
import platform
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from casemate.cli import config, output
from casemate.spec.errors import CasemateError

if TYPE_CHECKING:
    from casemate.seams import Disk
    from casemate.tee import Found, Machine, Tee

SIMULATED: Final = "simulated"

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
    for extra in (e for e in ("torch", "data", "audit", "server", "tpm") if e in extras):
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


def _looked(found: Sequence[Found]) -> Finding:
    """What there is to make evidence with; each kind that is absent, with its reason."""
    present = [f"{f.kind}: {f.reason}" for f in found if f.present]
    absent = [f"{f.kind}: {f.reason}" for f in found if not f.present and f.kind != SIMULATED]
    if present:
        return Finding("TEE", "ok", "; ".join([*present, *(f"not {x}" for x in absent)]))
    return Finding(
        "TEE",
        "missing",
        "; ".join(absent),
        "A server here can only simulate one: casemate serve --dev. Clients need none.",
    )


def _evidence(tee: Tee) -> Finding:
    """Which evidence the server would show, and what a client's default policy says of it."""
    judged = getattr(tee, "judged", None)
    if judged is None or judged.decision.startswith("accept"):
        return Finding("evidence", "ok", f"{tee.kind}, measurement {tee.measurement[:24]}...")
    code = judged.code.removeprefix("evidence.")
    return Finding(
        "evidence",
        "failed",
        f"{tee.kind}; a client's default policy answers {judged.decision} ({code}:"
        f" {judged.message})",
        f"{judged.mend} `casemate enclave collateral` fetches what is missing.",
    )


def _stored(disk: Disk, now: float) -> Finding:
    from casemate.tee import collateral

    rows = collateral.stored(disk, now)
    if not rows:
        return Finding("collateral", "missing", "none is kept", "Run casemate enclave collateral.")
    oldest = rows[0]
    days = oldest.age / 86400
    return Finding(
        "collateral", "ok",
        f"{len(rows)} file(s), the oldest {oldest.part}/{oldest.file} of {days:.1f} days ago",
    )  # fmt: skip


def _sealing_key(tee: Tee, owner: bytes | None) -> Finding:
    from casemate.tee.sealing import KINDS

    text = f"{tee.sealing}: {KINDS[tee.sealing]}"
    if tee.sealing == "owner-release" and owner is None:
        return Finding(
            "sealing key", "missing", text, "Name the owner's key: casemate serve --release-owner."
        )
    return Finding("sealing key", "ok", text)


def _anchor(machine: Machine) -> Finding:
    """What tells an old state from the newest one, where no witness does."""
    from casemate.tee import anchor

    fit, seen = anchor.look(machine.tpm_path, machine.tcti)
    if fit:
        return Finding("anchor", "ok", seen)
    mend = "Without a TPM a restored state is told by clients and witnesses only."
    return Finding("anchor", "missing", seen, mend)


def _opened(machine: Machine, disk: Disk) -> Iterator[Finding]:
    """Evidence, sealing key and collateral of the attester that ``serve`` would choose."""
    from casemate.seams import OsRng, SystemClock
    from casemate.tee import open as open_tee

    clock = SystemClock()
    try:
        tee = open_tee("auto", disk=disk, rng=OsRng(), clock=clock, machine=machine)
        yield _evidence(tee)
        yield _sealing_key(tee, machine.owner)
        yield _anchor(machine)
    except CasemateError as e:
        yield Finding("evidence", "failed", e.message, e.mend)
    yield _stored(disk, clock.wall())


def _tee(machine: Machine | None = None, state: Path | None = None) -> Iterator[Finding]:
    """All about evidence. Nothing is written but a TPM's transient objects."""
    from casemate.seams import OsDisk, OsRng
    from casemate.tee import Machine as Here
    from casemate.tee import look

    here = machine if machine is not None else Here()
    found = look(here, OsRng())
    yield _looked(found)
    gpus = here.gpus()
    if gpus.count:
        yield Finding("GPU evidence", "ok", gpus.reason)
    else:
        mend = "Install nvidia-ml-py and switch confidential mode on, to train on a GPU."
        yield Finding("GPU evidence", "missing", gpus.reason, mend)
    if not any(f.present for f in found):
        return
    with tempfile.TemporaryDirectory() as nowhere:
        folder = state if state is not None and state.is_dir() else Path(nowhere)
        yield from _opened(here, OsDisk(folder))


# The layers around a worker (docs/sandbox.md), each with its mend.
_LAYERS: Final = {
    "capabilities": "Use Linux on x86-64 or 64-bit ARM.",
    "descriptors": "Use Linux with /proc mounted.",
    "environment": "Report this.",
    "landlock": "Use Linux 5.13 or later with landlock among its LSMs (lsm=landlock,...).",
    "memory-lock": "Set LimitMEMLOCK=infinity, or ulimit -l unlimited, or run without swap.",
    "no-import": "Report this.",
    "no-new-privileges": "Use Linux 3.5 or later.",
    "not-dumpable": "Use Linux with /proc mounted.",
    "rlimits": "Allow the service to lower its own limits.",
    "seccomp": "Use Linux 4.14 or later, x86-64 or 64-bit ARM, with CONFIG_SECCOMP_FILTER.",
}


def _sandbox() -> Iterator[Finding]:
    """What holds around a worker here, found by shutting one in."""
    from casemate.server import pool

    if sys.platform != "linux":
        yield Finding("sandbox", "missing", sys.platform, "Run the server on Linux.")
        return
    held = pool.layers()
    yield Finding("sandbox", "ok" if held else "failed", ", ".join(held) or "no worker starts")
    for name, mend in _LAYERS.items():
        if name not in held:
            yield Finding(f"sandbox: {name}", "missing", "does not hold on this machine", mend)


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
    _python, _tls, _sealing, _disk, _memory, _identity,
)  # fmt: skip


def examine(machine: Machine | None = None, state: Path | None = None) -> list[Finding]:
    """Every finding, in the order to show. ``machine``: this one, unless tests give another;
    ``state``: the server's folder, whose collateral is looked at."""
    return [*(check() for check in CHECKS), *_sandbox(), *_tee(machine, state), *_extras()]


@click.command()
@output.format_option
@click.pass_context
def doctor(ctx: click.Context, form: str) -> None:
    """Check this machine and say what is missing. Exit code 1 when a client cannot work here."""
    from casemate.cli.serve import state_folder

    findings = examine(state=state_folder())
    usable = all(f.state == "ok" for f in findings if f.need == "base")
    rows = [(f.name, f.state, f.found, f.mend) for f in findings]
    output.emit(
        form,
        {"usable": usable, "checks": [asdict(f) for f in findings]},
        lambda: output.rows_table("", ("check", "state", "found", "mend"), rows),
    )
    ctx.exit(0 if usable else 1)

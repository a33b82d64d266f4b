"""What a worker can no longer do: from its start on (:func:`enter`), and once data may come
(:func:`lock`).

Both name the layers that hold. One that this machine lacks is left out, so that whoever reads the
names can insist (docs/adr/0014).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from casemate.worker import landlock, seccomp
from casemate.worker.syscall import call

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT, _CLEAR_ALL = 47, 4
_LAST_CAPABILITY: Final = 63
_CAPSET: Final = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_V3: Final = 0x20080522
_MCL_ALL: Final = 1 | 2 | 4  # current, future, on fault

# Audit events that are refused for ever from the lock on (docs.python.org, audit events table).
_REFUSED: Final = frozenset(
    {
        "import", "compile", "exec", "pickle.find_class", "marshal.loads",
        "ctypes.dlopen", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
        "os.forkpty", "os.spawn", "socket.connect", "socket.bind", "socket.getaddrinfo",
        "socket.__new__", "open",
    }
)  # fmt: skip

# What Python, torch and a compiler read; a folder with all beneath it.
_READ: Final = (
    "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/passwd", "/etc/localtime",
    "/proc", "/sys/devices/system", "/dev/urandom",
)  # fmt: skip


def _prctl(option: int, *values: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    long = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    return bool(libc.prctl(ctypes.c_int(option), *long) == 0)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _REFUSED:
        raise PermissionError(f"the worker is locked: {event}")


def _status(names: str) -> list[str]:
    """The values of this process's lines that begin so (proc_pid_status(5))."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        return [line.split()[1] for line in status if line.startswith(names)]


def _keep_in_memory() -> bool:
    """No page to the swap. Only where there is no limit: with one, memory would end there."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return False
    return bool(ctypes.CDLL(None, use_errno=True).mlockall(_MCL_ALL) == 0)


def _drop_capabilities() -> bool:
    """None is left, nor can a program that is started bring one back."""
    for capability in range(_LAST_CAPABILITY + 1):
        _prctl(_PR_CAPBSET_DROP, capability)  # refused where there is none to drop
    _prctl(_PR_CAP_AMBIENT, _CLEAR_ALL)
    number = _CAPSET.get(os.uname().machine)
    if number is None:
        return False
    try:
        call(number, struct.pack("=Ii", _CAPABILITY_V3, 0), bytes(24))
    except OSError:
        return False
    return all(int(word, 16) == 0 for word in _status("Cap"))


@dataclass(frozen=True, slots=True)
class Entered:
    """Where a worker may write until it is locked, and the layers that hold so far."""

    scratch: Path
    layers: tuple[str, ...]


def enter(scratch: Path) -> Entered:
    """Keep a process that has one thread to itself: code can still be loaded and a compiler run,
    with ``scratch`` as the one place to write. It ends with the thread that started it: the server
    has its workers started by threads that last as long as its event loop."""
    tempfile.tempdir = str(scratch)
    os.environ["TMPDIR"] = str(scratch)
    own = [Path(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if p]
    rights = dict.fromkeys([*map(Path, _READ), *own], landlock.CODE)
    rights[Path("/dev/null")] = landlock.READ | landlock.WRITE
    rights[scratch] = landlock.every()
    held = {
        "memory-lock": _keep_in_memory(),
        "not-dumpable": _prctl(_PR_SET_DUMPABLE, 0),
        "capabilities": _drop_capabilities(),
        "no-new-privileges": (alone := _prctl(_PR_SET_NO_NEW_PRIVS, 1)),
        "landlock": alone and landlock.restrict(rights),
        "seccomp": alone and seccomp.refuse(),
    }
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # last: who gives up privileges loses it
    return Entered(scratch, tuple(name for name, holds in held.items() if holds))


def _close_others(keep: Iterable[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for std in (0, 1, 2):
        if std not in keep:
            os.dup2(null, std)
    kept = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _limits(memory_bytes: int, file_bytes: int) -> None:
    held = 1024 * int(_status("VmData")[0])
    for limit, wanted in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_DATA, held + memory_bytes),
        (resource.RLIMIT_NOFILE, 256),
    ):
        hard = resource.getrlimit(limit)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(limit, (value, value))


def lock(
    keep: Iterable[int], entered: Entered, *, memory_bytes: int, file_bytes: int
) -> tuple[str, ...]:
    """Shut the process in for good; returns the layers that hold.

    keep: descriptors that stay open. memory_bytes: how much more data memory it may take.
    file_bytes: the largest file (the result's memfd) it may write.
    """
    gc.collect()
    _limits(memory_bytes, file_bytes)
    _close_others(list(keep))
    shutil.rmtree(entered.scratch, ignore_errors=True)
    os.environ.clear()
    early = entered.layers
    held = {
        **dict.fromkeys((*early, "environment", "rlimits", "descriptors", "no-import"), True),
        "landlock": landlock.restrict({}) and "landlock" in early,
        "seccomp": seccomp.allow() and "seccomp" in early,  # nothing is opened or loaded any more
    }
    sys.addaudithook(_hook)
    return tuple(name for name, holds in held.items() if holds)

"""Phase ``lock``: what the worker can no longer do once data may come.

Each layer is applied, then named in ``Locked``; one that this machine lacks is left out, so that
the server can insist. The full sandbox (seccomp allow-list, landlock) has its place here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterable
from typing import Any, Final

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38

# Audit events that are refused for ever from the lock on (docs.python.org, audit events table).
_REFUSED: Final = frozenset(
    {
        "import", "compile", "exec", "pickle.find_class", "marshal.loads",
        "ctypes.dlopen", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
        "os.forkpty", "os.spawn", "socket.connect", "socket.bind", "socket.getaddrinfo",
        "socket.__new__", "open",
    }
)  # fmt: skip


def _prctl(option: int, value: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(option, value, 0, 0, 0) == 0)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in _REFUSED:
        raise PermissionError(f"the worker is locked: {event}")


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
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        held = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
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


def lock(keep: Iterable[int], *, memory_bytes: int, file_bytes: int) -> tuple[str, ...]:
    """Shut the process in; returns the layers that hold.

    keep: descriptors that stay open. memory_bytes: how much more data memory it may take.
    file_bytes: the largest file (the result's memfd) it may write.
    """
    layers = []
    os.environ.clear()
    layers.append("environment")
    gc.collect()
    _limits(memory_bytes, file_bytes)
    layers.append("rlimits")
    _close_others(list(keep))
    layers.append("descriptors")
    if _prctl(_PR_SET_DUMPABLE, 0):
        layers.append("not-dumpable")
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        layers.append("no-new-privileges")
    sys.addaudithook(_hook)
    layers.append("no-import")
    return tuple(layers)

"""Which files and networks a worker may reach: Landlock (Linux's
Documentation/userspace-api/landlock.rst), as far as this kernel's version of it goes.

A domain holds for the calling thread and what it starts from then on; it can only become narrower.
Descriptors that are open stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from casemate.worker.syscall import call

# The same numbers on every architecture.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION, _BENEATH = 1, 1

EXECUTE: Final = 1 << 0
WRITE: Final = 1 << 1
READ: Final = 1 << 2
READ_FOLDER: Final = 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
CODE: Final = EXECUTE | READ | READ_FOLDER
# Rights to files by the version that brought them; likewise TCP (bind, connect) and scopes
# (abstract Unix sockets, signals to processes outside).
_FILES: Final = ((1, (1 << 13) - 1), (2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL))
_NETWORK: Final = ((4, 3),)
_SCOPES: Final = ((6, 3),)
_OF_FILES: Final = EXECUTE | WRITE | READ | _TRUNCATE | _IOCTL


def version() -> int:
    """Landlock's version here; 0: none."""
    try:
        return call(_CREATE, None, 0, _VERSION)
    except OSError:
        return 0


def _up_to(table: Iterable[tuple[int, int]], now: int) -> int:
    return sum(rights for since, rights in table if since <= now)


def every() -> int:
    """All rights to files that this kernel knows."""
    return _up_to(_FILES, version())


def restrict(rights: Mapping[Path, int]) -> bool:
    """Leave this thread the rights to these files and folders, and all beneath them, and no others;
    no TCP. Paths that are not there are passed over. Whether it holds. Needs no_new_privs."""
    now = version()
    if not now:
        return False
    files = _up_to(_FILES, now)
    asked = struct.pack("=QQQ", files, _up_to(_NETWORK, now), _up_to(_SCOPES, now))
    size = 8 if now < 4 else 16 if now < 6 else 24
    try:
        ruleset = call(_CREATE, asked, size, 0)
    except OSError:
        return False
    try:
        for path, allowed in rights.items():
            with contextlib.suppress(FileNotFoundError):
                _allow(ruleset, path, allowed & files)
        call(_RESTRICT, ruleset, 0)
    except OSError:
        return False
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: Path, allowed: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            allowed &= _OF_FILES
        call(_ADD, ruleset, _BENEATH, struct.pack("=Qi", allowed, fd), 0)
    finally:
        os.close(fd)

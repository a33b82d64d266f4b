"""Character devices that answer ioctls, behind a seam that tests can stand in for.

A fake gets the same request number and the same C structure as the kernel, addresses in it
included.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias


class Device(Protocol):
    def ioctl(self, request: int, argument: ctypes.Structure) -> None:
        """Raises OSError. ``argument`` is changed in place."""

    def close(self) -> None: ...


class OsDevice:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, request: int, argument: ctypes.Structure) -> None:
        fcntl.ioctl(self._fd, request, argument, True)

    def close(self) -> None:
        os.close(self._fd)


Opener: TypeAlias = Callable[[Path], Device]


def iowr(kind: int, number: int, argument: type[ctypes.Structure]) -> int:
    """``_IOWR`` of asm-generic/ioctl.h."""
    return 3 << 30 | ctypes.sizeof(argument) << 16 | kind << 8 | number

"""System calls that Python has no function for, by number."""

from __future__ import annotations

import ctypes
import os
from typing import Any


def call(number: int, *arguments: Any) -> int:
    """The kernel's answer; integers are passed as C longs. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    long = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    found = libc.syscall(ctypes.c_long(number), *long)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)

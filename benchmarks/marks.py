"""When each stage of a job began and ended, over several processes, on one clock.

A process writes to a file that it maps at its start, so that a worker that has closed its files and
may open none can still say when it trained. CLOCK_MONOTONIC is the same for all processes.
"""

from __future__ import annotations

import asyncio
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SIZE: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Mark:
    """One call: monotonic seconds, and ``cpu``, seconds of its process's time."""

    name: str
    start: float
    end: float
    cpu: float

    @property
    def wall(self) -> float:
        return self.end - self.start


class Marks:
    """The marks of this process, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        fd = os.open(folder / f"marks-{os.getpid()}", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, SIZE)
        self._map = mmap.mmap(fd, SIZE)
        os.close(fd)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            took = time.process_time() - cpu
            self._map.write(f"{name} {start!r} {time.monotonic()!r} {took!r}\n".encode())

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """From now on every call of ``owner.attribute`` is marked as ``name``."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return inner(*args, **kwargs)

        @functools.wraps(inner)
        async def wait(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return await inner(*args, **kwargs)

        setattr(owner, attribute, wait if asyncio.iscoroutinefunction(inner) else call)


def read(folder: Path) -> list[Mark]:
    """The marks of all processes, in the order in which they began."""
    found = []
    for path in folder.glob("marks-*"):
        for line in path.read_bytes().rstrip(b"\0").decode().splitlines():
            name, *numbers = line.split()
            found.append(Mark(name, *map(float, numbers)))
    return sorted(found, key=lambda mark: mark.start)

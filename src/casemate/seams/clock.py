"""Clock: monotonic seconds for waiting, wall seconds for display only (no budget decision)."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back."""

    def wall(self) -> float:
        """Unix seconds as the host claims them; untrusted."""

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

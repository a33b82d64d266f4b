"""An event loop whose time is simulated: it runs at once, and the same way for the same seed.

Nothing is waited for: when all tasks sleep, the clock jumps to whoever wakes first. What the
program sends to a thread runs on the loop, a random (seeded) while later, so that it interleaves.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
THREAD_SECONDS = 0.002


class Stuck(Exception):
    """All tasks wait for each other."""


class SimLoop(asyncio.BaseEventLoop):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self._now = 0.0
        self._clock_resolution = 1e-6
        self._selector = self

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """In the place of a selector: nothing comes from outside, so that only time passes."""
        if timeout is None:
            raise Stuck("every task waits and nothing is due")
        self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()

        def act() -> None:
            if future.cancelled():
                return  # a thread would not stop; one that had not begun does
            try:
                result = func(*args)
            except BaseException as e:
                future.set_exception(e)
            else:
                future.set_result(result)

        self.call_later(self._draw.random() * THREAD_SECONDS, act)
        return future


class SimClock:
    """The loop's time for waiting; ``jumps`` move it forward, and the wall clock anywhere."""

    def __init__(self, draw: random.Random, *, jumps: float = 0.0) -> None:
        self._draw, self._jumps = draw, jumps
        self._ahead = 0.0
        self._wall = 1_700_000_000.0

    def _jump(self) -> None:
        if self._jumps and self._draw.random() < self._jumps:
            self._ahead += self._draw.choice((0.5, 60.0, 86_400.0))
            self._wall += self._draw.choice((-1e9, -3600.0, 3600.0, 1e9))

    def monotonic(self) -> float:
        self._jump()
        return asyncio.get_running_loop().time() + self._ahead

    def wall(self) -> float:
        self._jump()
        return self._wall + asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


def simulate(
    work: Coroutine[Any, Any, T],
    seed: int,
    fault: Callable[[Any, dict[str, Any]], object] | None = None,
) -> T:
    """Run to the end on a fresh simulated loop; tasks that are left are cancelled. ``fault``: the
    loop's exception handler."""
    loop = SimLoop(seed)
    loop.set_exception_handler(fault)
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

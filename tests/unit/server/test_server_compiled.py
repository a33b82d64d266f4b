"""Whether parts of a job are compiled: decided once, told in the quote, kept to by any worker."""

from __future__ import annotations

import pytest

from casemate.spec.messages import Prepare, Run
from support.desk import Desk, Script, run_async


def _prepares(script: Script) -> list[Prepare]:
    return [m for m in script.told if isinstance(m, Prepare)]


@pytest.mark.parametrize("decided", [True, False])
def test_another_worker_is_told_what_the_first_decided(decided: bool) -> None:
    async def work() -> None:
        async with Desk(script=Script(prepared={"compiled": decided})) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            quote = await scientist.quote(await owner.push())
            assert quote.execution.compiled is decided
            desk.service.pool.kept.clear()  # type: ignore[attr-defined]
            await scientist.finished((await scientist.submit(quote)).job)
            assert [m.compiled for m in _prepares(desk.script)] == [None, decided]
            (run,) = [m for m in desk.script.told if isinstance(m, Run)]
            assert run.execution.compiled is decided

    run_async(work())


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        ({}, 60.0),
        ({"compile_seconds": 0.0}, 0.0),
        ({"compile_seconds": 30.0}, 30.0),
        ({"prepare_seconds": 20.0}, 10.0),
    ],
)
def test_compiling_ends_long_before_a_worker_is_given_up(
    limits: dict[str, float], seconds: float
) -> None:
    async def work() -> None:
        async with Desk(**limits) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            await scientist.quote(await owner.push())
            assert [m.compile_seconds for m in _prepares(desk.script)] == [seconds]

    run_async(work())

"""Jobs as an oracle: a scientist who cancels, repeats and renames jobs to see more of the rows than
is charged, and an operator who turns the clocks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from casemate.ledger import ledger
from casemate.server import run as running
from casemate.spec.data import Budget, DatasetInfo
from casemate.spec.messages import Failed, Run
from support.desk import (
    AutoClock,
    Desk,
    HandClock,
    Person,
    Refused,
    Script,
    ScriptedWorker,
    refused_in_run,
    run_async,
    spent,
)
from support.server import train_spec

POLLS = 8


async def people(desk: Desk, **push: Any) -> tuple[Person, Person, DatasetInfo]:
    owner, scientist = await desk.person("owner"), await desk.person("scientist")
    return owner, scientist, await owner.push(**push)


def worlds() -> dict[str, Script]:
    """How a run may be going, behind the same public face."""
    return {
        "has long ended": Script(),
        "still runs": Script(hold=asyncio.Event()),
        "has failed on a row": Script(answers={Run: refused_in_run("row 7")}),
    }


async def cancelled_early(script: Script) -> list[Any]:
    """All that a scientist sees who watches a job and cancels it before half of its time."""
    clock = HandClock()
    async with Desk(clock=clock, script=script) as desk:
        owner, scientist, info = await people(desk, budget=Budget(epsilon=9.0, delta=1e-3))
        quote = await scientist.quote(info)
        job = (await scientist.submit(quote)).job
        store = desk.service.store
        await desk.until(lambda: ledger.job(store, job).state == "running")
        if script.hold is None:
            await desk.until(clock.awaited)  # the run is over, and its end waits
        seen: list[Any] = []
        for _ in range(POLLS):
            status = await scientist.status(job)
            seen.append((status.state, status.tick, status.error, status.message))
            await clock.advance(quote.seconds / 2 / (POLLS + 2))
        answer = await scientist.ask("DELETE", f"/v1/jobs/{job}")
        seen.append((answer["state"], answer["tick"], answer["error"]))
        for path in ("result", "receipt"):
            with pytest.raises(Refused) as e:
                await scientist.ask("GET", f"/v1/jobs/{job}/{path}")
            seen.append((path, e.value.code))
        found = await owner.dataset(info.dataset)
        assert found.budget is not None
        seen.append((found.budget.jobs, round(spent(found), 9)))
        assert spent(found) == pytest.approx(quote.datasets[0].charge.epsilon, rel=1e-6)
        assert "row 7" not in desk.log_text()
    return seen


def test_reads_a_row_by_cancelling_what_looks_wrong() -> None:
    """Before the first public moment a job that has ended, one that runs and one that failed look
    alike, also when they are cancelled: the same states, no result, the whole charge."""
    seen = {name: run_async(cancelled_early(script)) for name, script in worlds().items()}
    first = seen["still runs"]
    assert first[-4][0] == "cancelled"
    for name, found in seen.items():
        assert found == first, name


def test_reads_a_row_by_how_long_a_cancellation_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that still runs has to be ended, and one with much memory takes its time: were that
    waited for, the answer would come sooner where the run is over."""
    gone, end = asyncio.Event(), ScriptedWorker.end

    async def slowly(self: ScriptedWorker, reason: str = "done") -> None:
        await gone.wait()
        await end(self, reason)

    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(script=script) as desk:
            _, scientist, info = await people(desk)
            store = desk.service.store
            job = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(store, job).state == "running")
            monkeypatch.setattr(ScriptedWorker, "end", slowly)
            async with asyncio.timeout(5):
                answer = await scientist.ask("DELETE", f"/v1/jobs/{job}")
                assert answer["state"] == (await scientist.status(job)).state == "cancelled"
            ended = len(script.ended)
            gone.set()
            await desk.until(lambda: len(script.ended) > ended)
            assert ledger.job(store, job).state == "cancelled"
            # The queue goes on.
            script.hold.set()  # type: ignore[union-attr]
            again = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(store, again).state == "done")

    run_async(work())


def test_an_end_that_is_shown_at_once_is_an_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: without public moments the three worlds differ."""
    monkeypatch.setattr(running.Ticks, "wait", lambda self, now: 0.0)
    clock = HandClock()

    async def work() -> str:
        async with Desk(clock=clock) as desk:
            _, scientist, info = await people(desk)
            job = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(desk.service.store, job).state != "queued")
            for _ in range(50):
                await clock.advance(0.0)
                await asyncio.sleep(0.001)
            return (await scientist.status(job)).state

    assert run_async(work()) == "done"


def test_draws_again_for_nothing_by_cancelling() -> None:
    """Each start is a fresh draw and is charged as one: cancelling refunds nothing, until the
    budget is gone; and the same quote is the same, cancelled job."""

    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(script=script) as desk:
            owner, scientist, info = await people(desk, budget=Budget(epsilon=6.0, delta=1e-3))
            store, started, refusal = desk.service.store, 0, None
            for _ in range(20):
                quote = await scientist.quote(info, train=train_spec(epsilon=2.0, steps=4))
                refusal = quote.datasets[0].refusal
                if refusal is not None:
                    break
                job = (await scientist.submit(quote)).job
                await desk.until(lambda job=job: ledger.job(store, job).state == "running")  # type: ignore[misc]
                before = spent(await owner.dataset(info.dataset))
                assert (await scientist.ask("DELETE", f"/v1/jobs/{job}"))["state"] == "cancelled"
                assert spent(await owner.dataset(info.dataset)) == before
                assert (await scientist.submit(quote)).state == "cancelled"
                started += 1
            assert refusal == "budget.exhausted"
            assert 1 < started < 20
            found = await owner.dataset(info.dataset)
            assert found.budget is not None
            assert found.budget.jobs == started

    run_async(work())


def test_runs_another_job_under_an_id_that_was_approved() -> None:
    """An id is one job's: another body under it is refused, another scientist's too, and the first
    job stays what it was."""

    async def work() -> None:
        async with Desk() as desk:
            owner, scientist, info = await people(desk)
            other = await desk.person("another")
            quote = await scientist.quote(info)
            job = (await scientist.submit(quote)).job
            done = await scientist.finished(job)
            before = spent(await owner.dataset(info.dataset))
            for who, steps in ((scientist, 11), (other, 10), (other, 11)):
                with pytest.raises(Refused) as e:
                    again = await who.quote(info, job=job, train=train_spec(steps=steps))
                    await who.submit(again)
                assert e.value.code in ("job.id-reused", "auth.forbidden"), e.value
            assert await scientist.status(job) == done
            assert spent(await owner.dataset(info.dataset)) == before
            with pytest.raises(Refused):
                await other.status(job)

    run_async(work())


class Turned(AutoClock):
    """A wall clock that the operator sets as it likes, differently each time it is read."""

    def __init__(self, times: list[float]) -> None:
        super().__init__()
        self.times = times
        self.reads = 0

    def wall(self) -> float:
        self.reads += 1
        return self.times[self.reads % len(self.times)]


TIMES = {
    "stands still": [1_700_000_000.0],
    "goes back": [1_700_000_000.0, 1_600_000_000.0, 1_000_000_000.0],
    "jumps by centuries": [1_700_000_000.0, 9_000_000_000.0, 5.0],
    "begins anew": [0.0, 1.0],
}


async def spends(desk: Desk) -> list[Any]:
    """Four jobs on a budget for two, what became of each, and what was spent."""
    async with desk:
        owner, scientist, info = await people(desk, budget=Budget(epsilon=2.5, delta=1e-3))
        seen: list[Any] = []
        for _ in range(4):
            quote = await scientist.quote(info, train=train_spec(epsilon=2.0, steps=4))
            refusal = quote.datasets[0].refusal
            if refusal is None:
                job = (await scientist.submit(quote)).job
                seen.append((await scientist.finished(job)).state)
            else:
                seen.append(refusal)
            seen.append(round(spent(await owner.dataset(info.dataset)), 9))
        await owner.ask("POST", f"/v1/datasets/{info.dataset}/epoch", {"epoch": 1})
        with pytest.raises(Refused):
            await owner.ask("POST", f"/v1/datasets/{info.dataset}/epoch", {"epoch": 0})
        return seen


@pytest.fixture(scope="module")
def honest() -> list[Any]:
    return run_async(spends(Desk()))


@pytest.mark.parametrize("what", TIMES)
def test_spends_twice_by_turning_the_clock(what: str, honest: list[Any]) -> None:
    """No decision of the budget reads it: the same jobs fit, the same charge is taken, policies
    hold by epoch alone."""
    assert honest[0] == "done"
    assert honest[-2] == "budget.exhausted"
    assert run_async(spends(Desk(clock=Turned(TIMES[what])))) == honest


def test_a_failure_says_nothing_but_that() -> None:
    """Whatever a worker says of a row in phase ``run``, the scientist reads one code, no words."""

    async def work(answer: Failed) -> tuple[Any, ...]:
        async with Desk(script=Script(answers={Run: answer})) as desk:
            _, scientist, info = await people(desk)
            status = await scientist.finished(
                (await scientist.submit(await scientist.quote(info))).job
            )
            assert "row" not in desk.log_text().replace("rows", "")
            return status.state, status.error, status.message, status.tick

    said = {run_async(work(refused_in_run(f"row {i}"))) for i in range(3)}
    assert len(said) == 1
    assert next(iter(said))[:2] == ("failed", "job.failed")

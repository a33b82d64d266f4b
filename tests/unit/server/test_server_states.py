"""Runs that are gone on with after a crash: states kept, sealed, named, taken up, swept."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from casemate.ledger import catalog, fsck, ledger
from casemate.plan import state as form
from casemate.seal import stream
from casemate.server import states
from casemate.server.config import Limits
from casemate.spec.data import MAX_RESUMES, Policy
from casemate.spec.messages import GoOn, Run, State
from support.desk import Desk, Person, Script, fresh_disk, run_async, training_state
from support.server import train_spec

LIMITS = Limits()
LONG = {"seconds_per_step": 1.0, "seconds_fixed": 1000.0, "seconds_per_microbatch": 1.0}


async def _begun(desk: Desk) -> tuple[Person, Person, Any, str]:
    owner, scientist = await desk.person("owner"), await desk.person("scientist")
    info = await owner.push()
    quote = await scientist.quote(info)
    assert 0 < states.every(quote, LIMITS) < quote.plan.steps
    return owner, scientist, quote, (await scientist.submit(quote)).job


def _runs(desk: Desk, job: str) -> bool:
    return ledger.job(desk.service.store, job).state == "running"


def _steps(script: Script, kind: type) -> list[int]:
    return [m.step for m in script.told if isinstance(m, kind)]  # type: ignore[attr-defined]


def test_states_are_kept_when_due_and_gone_with_the_run() -> None:
    async def work() -> None:
        script = Script(prepared=LONG)
        async with Desk(script=script) as desk:
            _, scientist, quote, job = await _begun(desk)
            assert (await scientist.finished(job)).state == "done"
            every, steps = states.every(quote, LIMITS), quote.plan.steps
            due = list(range(every, steps, every))
            assert _steps(script, GoOn) == due
            assert ledger.training_states(desk.service.store) == set()
            await desk.until(lambda: not script.told or desk.disk.list(states.FOLDER) == [])
            assert desk.disk.list(states.FOLDER) == []

    run_async(work())


@pytest.mark.parametrize("lost", [False, True])
def test_a_crash_in_the_middle_goes_on_from_the_newest_state(lost: bool) -> None:
    """With new keys for the noise, which the worker draws; charged once. Without the state's file
    the job begins again."""

    async def work() -> None:
        disk, script = fresh_disk(), Script(prepared=LONG, hold=asyncio.Event())
        async with Desk(disk, script=script) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            info = await owner.push()
            quote = await scientist.quote(info)
            every = states.every(quote, LIMITS)
            script.hold_at = 3 * every
            job = (await scientist.submit(quote)).job
            store = desk.service.store
            await desk.until(lambda: _steps(script, GoOn)[-1:] == [2 * every])
            await desk.until(lambda: getattr(ledger.training_state(store, job), "step", 0) > every)
            kept = ledger.training_state(store, job)
            assert kept is not None and kept.step == 2 * every
            raw = desk.disk.snapshot()[kept.path]
            plain = training_state(quote.plan, quote.request.train, kept.step)
            assert plain not in raw and b"".join(stream.decrypt(kept.key, [raw])) == plain
            assert desk.disk.list(states.FOLDER) == [f"{job}.{kept.step}"]
            charged = catalog.account(store, info.dataset)
            crashed = disk.power_cycle()
        if lost:
            crashed.remove(kept.path)
        script = Script(prepared=LONG)
        async with Desk(crashed, script=script) as again:
            scientist = Person(again, scientist.identity)
            assert (await scientist.finished(job)).state == "done"
            assert script.resumed == ([] if lost else [plain])
            (run,) = (m for m in script.told if isinstance(m, Run))
            assert (run.resume is None) == lost
            assert _steps(script, GoOn)[0] == (every if lost else 3 * every)
            store = again.service.store
            assert catalog.account(store, info.dataset) == charged
            assert ledger.job(store, job).takeovers == 1
            assert not fsck.check(store.all, recompute=True).findings

    run_async(work())


def test_a_job_that_takes_the_server_down_again_and_again_ends() -> None:
    async def work() -> None:
        disk, job = fresh_disk(), ""
        identity = None
        for boot in range(MAX_RESUMES + 2):
            script = Script(prepared=LONG, hold=asyncio.Event())
            async with Desk(disk, script=script) as desk:
                if identity is None:
                    owner, scientist = await desk.person("owner"), await desk.person("scientist")
                    identity, info = scientist.identity, await owner.push()
                    job = (await scientist.submit(await scientist.quote(info))).job
                scientist = Person(desk, identity)
                found = ledger.job(desk.service.store, job)
                assert found.takeovers == min(boot, MAX_RESUMES)
                if boot > MAX_RESUMES:
                    status = await scientist.status(job)
                    assert (status.state, status.error) == ("failed", "job.abandoned")
                    assert catalog.account(desk.service.store, info.dataset).jobs == 1
                    return
                await desk.until(partial(_runs, desk, job))
                disk = disk.power_cycle(clean=True)

    run_async(work())


WRONG = [
    lambda state: State(step=state.step + 1, bytes=state.bytes),
    lambda state: State(step=state.step, bytes=state.bytes - 1),
    lambda state: State(step=state.step, bytes=1 << 40),
    lambda state: State(step=state.step, bytes=0),
]


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_a_worker_that_says_another_state_is_ended(wrong: int) -> None:
    async def work() -> None:
        script = Script(prepared=LONG)
        async with Desk(script=script) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            info = await owner.push()
            quote = await scientist.quote(info)
            size = form.size(quote.request.train, quote.parameters)
            good = State(step=states.every(quote, LIMITS), bytes=size)
            script.answers[Run] = WRONG[wrong](good)
            status = await scientist.finished((await scientist.submit(quote)).job)
            assert (status.state, status.error) == ("failed", "job.failed")
            assert ledger.training_states(desk.service.store) == set()

    run_async(work())


def test_a_run_that_is_short_keeps_none() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            quote = await scientist.quote(await owner.push())
            assert states.every(quote, LIMITS) == 0

    run_async(work())


def test_a_native_step_keeps_none() -> None:
    native = {"path": ("native",), "artifact": "sha256:" + "0" * 64}

    async def work() -> None:
        async with Desk(script=Script(prepared=LONG | native)) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            train = replace(train_spec(), runtime="native")
            quote = await scientist.quote(await owner.push(), train=train)
            assert states.every(quote, LIMITS) == 0
            assert (await scientist.finished((await scientist.submit(quote)).job)).state == "done"

    run_async(work())


def test_an_owner_who_wants_no_resume_has_none() -> None:
    async def work() -> None:
        disk, script = fresh_disk(), Script(prepared=LONG, hold=asyncio.Event())
        async with Desk(disk, script=script) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            info = await owner.push(policy=Policy(scientists=("*",), resumes=0))
            job = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(partial(_runs, desk, job))
            crashed = disk.power_cycle(clean=True)
        async with Desk(crashed) as again:
            status = await Person(again, scientist.identity).status(job)
            assert (status.state, status.error) == ("failed", "job.abandoned")

    run_async(work())


def test_a_state_that_could_be_too_large_is_not_kept() -> None:
    async def work() -> None:
        async with Desk(script=Script(prepared=LONG)) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            quote = await scientist.quote(await owner.push())
            size = form.size(quote.request.train, quote.parameters)
            fits, large = Limits(result_bytes=size), Limits(result_bytes=size - 1)
            assert states.every(quote, fits) and not states.every(quote, large)

    run_async(work())

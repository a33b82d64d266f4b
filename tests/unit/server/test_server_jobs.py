"""Jobs through the whole application: order of events, refusals, ends, what a restart keeps."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from dataclasses import replace

import pytest

from casemate.client import receipts
from casemate.ledger import catalog, ledger, log
from casemate.seal import checkpoint
from casemate.seal.identity import Identity
from casemate.server import release, run
from casemate.server.app import CHECKPOINT_HEADER
from casemate.server.pool import WorkerGone
from casemate.spec import codec, tensors
from casemate.spec.data import Budget, DatasetInfo, Policy
from casemate.spec.errors import InternalError
from casemate.spec.messages import CheckDataset, Prepare, Run
from casemate.spec.receipt import LogEntry, ReceiptBundle
from support.desk import (
    AutoClock,
    Desk,
    Failed,
    HandClock,
    Person,
    Refused,
    Script,
    fresh_disk,
    refused_in_run,
    run_async,
    spent,
    weights,
)
from support.disk import SimDisk
from support.server import schema, table, train_spec


async def _parties(desk: Desk, **push: object) -> tuple[Person, Person, DatasetInfo]:
    owner, scientist = await desk.person("owner"), await desk.person("scientist")
    return owner, scientist, await owner.push(**push)  # type: ignore[arg-type]


def test_a_job_end_to_end() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, scientist, info = await _parties(desk, budget=Budget(epsilon=10.0, delta=1e-3))
            quote = await scientist.quote(info)
            assert [d.refusal for d in quote.datasets] == [None]
            assert spent(await owner.dataset(info.dataset)) == 0.0
            job = (await scientist.submit(quote)).job
            status = await scientist.finished(job)
            assert (status.state, status.tick) == ("done", quote.ticks)
            after = await owner.dataset(info.dataset)
            assert spent(after) == pytest.approx(quote.datasets[0].charge.epsilon, rel=1e-6)
            bundle = codec.from_json(
                ReceiptBundle, await scientist.ask("GET", f"/v1/jobs/{job}/receipt")
            )
            receipt = receipts.read_statement(_payload(bundle))
            assert receipt.quote_digest == codec.digest(quote)
            assert receipt.simulated == ("tee",)
            assert receipt.boot == desk.service.keys.boot
            entry = codec.decode(LogEntry, bundle.entry)
            assert (entry.kind, entry.subject) == ("commit", job)
            key = checkpoint.log_key(receipt.log, bundle.attestation.binding.log_key)
            proof = checkpoint.read_proof(bundle.proof)
            assert checkpoint.verify_proof(proof, bundle.entry, key).size > entry.sequence
            sealed = (await scientist.send("GET", f"/v1/jobs/{job}/result")).content
            assert _open(scientist, job, sealed, receipt.result_digest) == weights()

    run_async(work())


def _payload(bundle: ReceiptBundle) -> bytes:
    from casemate.seal import dsse

    key = bundle.attestation.binding.receipt_key
    return dsse.verify(bundle.envelope, {key.hex(): key})[1]


def _open(person: Person, job: str, sealed: bytes, digest: str) -> bytes:
    from casemate.seal import stream

    cut = 4 + int.from_bytes(sealed[:4], "big")
    key = person.identity.open(
        sealed[4:cut], info=f"casemate/result-key/v1|{job}|{digest}".encode()
    )
    return b"".join(stream.decrypt(key, [sealed[cut:]]))


def test_keys_reach_a_worker_only_after_the_durable_charge() -> None:
    """At the moment of ``Run`` a power cut keeps the charge."""

    async def work() -> None:
        disk = fresh_disk()
        desk = Desk(disk)
        charged: list[float] = []

        class Told(list[object]):
            def append(self, message: object) -> None:
                super().append(message)
                if isinstance(message, Run):
                    survivor = disk.power_cycle()
                    again = Desk(survivor)
                    lineage = catalog.dataset(again.service.store, message.datasets[0].dataset)
                    state = catalog.budget_state(again.service.store, lineage.lineage)
                    charged.append(state.spent_epsilon)
                    again.service.store.close()

        desk.script.told = Told()
        async with desk:
            _, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            await scientist.finished((await scientist.submit(quote)).job)
        assert charged and charged[0] > 0

    run_async(work())


def test_prepared_worker_is_used_again_and_never_for_two_jobs() -> None:
    async def work() -> None:
        async with Desk() as desk:
            _, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            await scientist.finished((await scientist.submit(quote)).job)
            kinds = [type(m) for m in desk.script.told]
            assert kinds == [CheckDataset, Prepare, Run]
            assert len(desk.script.ended) == 2

    run_async(work())


def test_a_second_job_over_the_budget_is_refused_before_any_data_is_read() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, scientist, info = await _parties(desk, budget=Budget(epsilon=2.0, delta=1e-2))
            first = await scientist.quote(info, train=train_spec(epsilon=2.0))
            second = await scientist.quote(info, train=train_spec(epsilon=2.0))
            await scientist.finished((await scientist.submit(first)).job)
            before = spent(await owner.dataset(info.dataset))
            with pytest.raises(Refused) as refused:
                await scientist.submit(second)
            assert (refused.value.status, refused.value.code) == (409, "budget.exhausted")
            assert sum(isinstance(m, Run) for m in desk.script.told) == 1
            assert spent(await owner.dataset(info.dataset)) == before
            third = await scientist.quote(info, train=train_spec(epsilon=2.0))
            assert third.datasets[0].refusal == "budget.exhausted"

    run_async(work())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("epoch", "policy.stale-epoch"),
        ("policy", "policy.changed"),
        ("revoke", "policy.revoked"),
        ("reject", "policy.rejected"),
    ],
)
def test_what_owners_change_after_the_quote_stops_the_job(change: str, code: str) -> None:
    async def work() -> None:
        async with Desk() as desk:
            policy = Policy(scientists=("*",), approval="each-quote")
            owner, scientist, info = await _parties(desk, policy=policy)
            quote = await scientist.quote(info)
            digest = codec.digest(quote)
            with pytest.raises(Refused) as early:
                await scientist.submit(quote)
            assert early.value.code == "policy.not-approved"
            await owner.ask("POST", f"/v1/quotes/{digest}/approval")
            path = f"/v1/datasets/{info.dataset}"
            if change == "epoch":
                await owner.ask("POST", f"{path}/epoch", {"epoch": 1})
            elif change == "policy":
                await owner.ask("PUT", f"{path}/policy", Policy(scientists=(scientist.id,)))
            elif change == "revoke":
                await owner.ask("DELETE", path)
            else:
                await owner.ask("DELETE", f"/v1/quotes/{digest}/approval")
            with pytest.raises(Refused) as refused:
                await scientist.submit(quote)
            assert refused.value.code == code
            assert not any(isinstance(m, Run) for m in desk.script.told)

    run_async(work())


def test_an_approved_quote_runs() -> None:
    async def work() -> None:
        async with Desk() as desk:
            policy = Policy(scientists=("*",), approval="each-quote")
            owner, scientist, info = await _parties(desk, policy=policy)
            quote = await scientist.quote(info)
            waiting = await owner.ask("GET", "/v1/quotes")
            assert [w["request"]["job"] for w in waiting] == [quote.request.job]
            await owner.ask("POST", f"/v1/quotes/{codec.digest(quote)}/approval")
            assert await owner.ask("GET", "/v1/quotes") == []
            assert (await scientist.finished((await scientist.submit(quote)).job)).state == "done"

    run_async(work())


MARKER = "ROW-VALUE-7f3a"


@pytest.mark.parametrize(
    "answer",
    [
        refused_in_run(MARKER),
        WorkerGone("closed"),
        WorkerGone("memory"),
        WorkerGone("time"),
        RuntimeError(MARKER),
    ],
    ids=["failed", "closed", "memory", "time", "fault"],
)
def test_a_failure_in_the_run_says_nothing_of_the_rows(answer: object) -> None:
    """Whatever went wrong, status, log and metrics are the same bytes but for the worker's end."""

    async def work() -> None:
        async with Desk(script=Script(answers={Run: answer})) as desk:
            owner, scientist, info = await _parties(desk)
            job = (await scientist.submit(await scientist.quote(info))).job
            status = await scientist.finished(job)
            assert (status.state, status.error) == ("failed", "job.failed")
            assert (
                status.message == "The run failed. For the sake of the rows, nothing more is said."
            )
            assert spent(await owner.dataset(info.dataset)) > 0
            metrics = (await desk.http.get("/metrics")).text
            assert MARKER not in desk.log_text() + metrics + str(status)
            assert not [line for line in desk.logs if '"worker-start"' in line]
            with pytest.raises(Refused) as refused:
                await scientist.ask("GET", f"/v1/jobs/{job}/result")
            assert refused.value.code == "job.not-done"
            # The server goes on.
            desk.script.answers.clear()
            again = (await scientist.submit(await scientist.quote(info))).job
            assert (await scientist.finished(again)).state == "done"

    run_async(work())


def _result(**tensor: tuple[str, tuple[int, ...], bytes]) -> bytes:
    return tensors.dump(tensor)


@pytest.mark.parametrize(
    "result",
    [
        b"not safetensors",
        weights() + b"smuggled",
        _result(w0=("f32", (1000,), bytes(4000))),
        _result(w0=("i64", (1,), bytes(8))),
        b"",
    ],
    ids=["form", "tail", "too-many", "dtype", "empty"],
)
def test_a_result_of_another_form_is_never_released(result: bytes) -> None:
    async def work() -> None:
        async with Desk(script=Script(result=result)) as desk:
            _, scientist, info = await _parties(desk)
            job = (await scientist.submit(await scientist.quote(info))).job
            status = await scientist.finished(job)
            assert (status.state, status.error) == ("failed", "job.failed")
            assert not any(name.startswith("results/") for name in desk.disk.snapshot())

    run_async(work())


def test_a_model_refused_in_prepare_is_told_and_costs_nothing() -> None:
    failed = Failed(
        phase="prepare", code="model.batch-norm", message="Node bn1 mixes records.",
        mend="Convert it to GroupNorm.", where="bn1",
    )  # fmt: skip

    async def work() -> None:
        async with Desk(script=Script(answers={Prepare: failed})) as desk:
            owner, scientist, info = await _parties(desk)
            with pytest.raises(Refused) as refused:
                await scientist.quote(info)
            assert (refused.value.status, refused.value.code) == (422, "model.batch-norm")
            assert refused.value.error["where"] == "bn1"
            assert spent(await owner.dataset(info.dataset)) == 0.0

    run_async(work())


@pytest.mark.parametrize("other", [{"microbatch": 7}, {"path": ("graph",)}])
def test_a_worker_that_prepares_otherwise_than_quoted_is_stopped_before_the_charge(
    other: dict[str, object],
) -> None:
    script = Script()

    async def work() -> None:
        async with Desk(script=script) as desk:
            owner, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            desk.service.pool.kept.clear()  # type: ignore[attr-defined]
            script.prepared |= other
            status = await scientist.finished((await scientist.submit(quote)).job)
            assert (status.state, status.error) == ("failed", "job.stale-quote")
            assert spent(await owner.dataset(info.dataset)) == 0.0
            assert not any(isinstance(m, Run) for m in script.told)

    run_async(work())


@pytest.mark.parametrize(
    ("code", "shown"), [("data.bounds", "data.bounds"), ("x y", "job.worker-failed")]
)
def test_a_dataset_refused_at_push_is_told_to_its_owner_alone(code: str, shown: str) -> None:
    failed = Failed(phase="check", code=code, message=MARKER, mend="", where="")

    async def work() -> None:
        async with Desk(script=Script(answers={CheckDataset: failed})) as desk:
            _, scientist, info = await _parties(desk)
            assert (info.state, info.error) == ("refused", shown)
            with pytest.raises(Refused) as refused:
                await scientist.dataset(info.dataset)
            assert refused.value.status == 404
            await desk.until(
                lambda: not [n for n in desk.disk.snapshot() if n.startswith("uploads/up_")]
            )
            assert MARKER not in desk.log_text()

    run_async(work())


def test_progress_is_elapsed_over_predicted_time_and_the_end_waits_for_a_public_moment() -> None:
    """P6: whatever the worker does, the visible states follow the public clock."""

    async def ticks_seen(answer_at_once: bool) -> list[tuple[str, int]]:
        clock = HandClock()
        script = Script(hold=asyncio.Event())
        async with Desk(clock=clock, script=script) as desk:
            owner, scientist = await desk.person("o"), await desk.person("s")
            info = await owner.push()
            quote = await scientist.quote(info)
            tick = quote.seconds / quote.ticks
            job = (await scientist.submit(quote)).job
            await desk.until(lambda: ledger.job(desk.service.store, job).state == "running")
            seen = []

            def settled() -> bool:
                """The run has not ended, or its end waits for its moment, or is there."""
                state = ledger.job(desk.service.store, job).state
                return not script.hold.is_set() or clock.awaited() or state == "done"

            if answer_at_once:
                script.hold.set()
                await desk.until(settled)
            for step in range(2 * quote.ticks + 1):
                status = await scientist.status(job)
                seen.append((status.state, status.tick))
                await clock.advance(tick / 2)
                await desk.until(settled)
                if step == 3:
                    script.hold.set()
                    await desk.until(settled)
                if status.state == "done":
                    break
            return seen

    early, late = run_async(ticks_seen(True)), run_async(ticks_seen(False))
    # Done after 0 or after 2 ticks of real time: both are shown at half the predicted time.
    count = early[-1][1]
    assert count > 4
    assert early == late
    assert early == [("running", n // 2) for n in range(count)] + [("done", count)]


def test_cancel_keeps_the_charge_and_kills_the_worker() -> None:
    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(script=script) as desk:
            owner, scientist, info = await _parties(desk)
            first = (await scientist.submit(await scientist.quote(info))).job
            queued = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(desk.service.store, first).state == "running")
            ended = len(script.ended)
            assert (await scientist.ask("DELETE", f"/v1/jobs/{queued}"))["state"] == "cancelled"
            assert (await scientist.ask("DELETE", f"/v1/jobs/{first}"))["state"] == "cancelled"
            await desk.until(lambda: len(script.ended) > ended)
            after = await owner.dataset(info.dataset)
            assert after.budget is not None
            assert after.budget.jobs == 1  # the queued one had taken nothing
            script.hold = None
            again = (await scientist.submit(await scientist.quote(info))).job
            assert (await scientist.finished(again)).state == "done"
            assert (await scientist.ask("DELETE", f"/v1/jobs/{again}"))["state"] == "done"

    run_async(work())


def test_a_server_that_is_stopped_ends_what_it_runs_and_starts_nothing() -> None:
    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(script=script) as desk:
            _, scientist, info = await _parties(desk)
            store, queue = desk.service.store, desk.service.queue
            first = (await scientist.submit(await scientist.quote(info))).job
            second = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(store, first).state == "running")
            await queue.drain(0.05)  # too short for it
            assert ledger.job(store, first).state == "running"
            drained = asyncio.create_task(queue.drain(30.0))
            await asyncio.sleep(0.05)
            assert not drained.done()
            assert script.hold is not None
            script.hold.set()
            await drained
            queue.wake()
            await asyncio.sleep(0.05)
            assert ledger.job(store, first).state == "done"
            assert ledger.job(store, second).state == "queued"

    run_async(work())


def test_a_second_signal_ends_the_wait_for_jobs() -> None:
    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(script=script) as desk:
            _, scientist, info = await _parties(desk)
            store, queue = desk.service.store, desk.service.queue
            job = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(store, job).state == "running")
            drained = asyncio.create_task(queue.drain(1e6))
            await asyncio.sleep(0.05)
            assert not drained.done()
            queue.hurry()
            await drained
            assert ledger.job(store, job).state == "running"

    run_async(work())


def test_what_is_not_charged_when_the_server_is_stopped_stays_queued() -> None:
    async def work() -> None:
        gate = asyncio.Event()
        async with Desk() as desk:
            _, scientist, info = await _parties(desk)
            store, pool = desk.service.store, desk.service.pool
            quote = await scientist.quote(info)
            taken = pool.worker

            @contextlib.asynccontextmanager
            async def slow(prepared: str | None = None):
                await gate.wait()
                async with taken(prepared) as worker:
                    yield worker

            pool.worker = slow  # type: ignore[method-assign]
            job = (await scientist.submit(quote)).job
            await desk.until(lambda: bool(desk.service.queue._running))
            await desk.service.queue.drain(30.0)
            assert ledger.job(store, job).state == "queued"

    run_async(work())


def test_revoking_ends_a_run_that_reads_the_dataset() -> None:
    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(script=script) as desk:
            owner, scientist, info = await _parties(desk)
            job = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(desk.service.store, job).state == "running")
            await owner.ask("DELETE", f"/v1/datasets/{info.dataset}")
            status = await scientist.status(job)
            assert (status.state, status.error) == ("failed", "policy.revoked")
            await desk.until(lambda: len(catalog.uploads(desk.service.store)) == 0)
            assert not [n for n in desk.disk.snapshot() if n.startswith("uploads/up_")]

    run_async(work())


def test_the_same_quote_again_is_the_same_job_and_another_body_is_refused() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            first, second = await scientist.submit(quote), await scientist.submit(quote)
            assert first.job == second.job
            await scientist.finished(first.job)
            assert (await owner.dataset(info.dataset)).budget.jobs == 1  # type: ignore[union-attr]
            other = await scientist.quote(info, job=first.job, train=train_spec(steps=11))
            with pytest.raises(Refused) as refused:
                await scientist.submit(other)
            assert refused.value.code == "job.id-reused"

    run_async(work())


def test_what_a_restart_keeps() -> None:
    """Identities, datasets, budgets, results and receipts with their boot's evidence stay; a job
    that ran when the power failed is taken over, charged once; a queued one runs."""

    async def work() -> None:
        disk = fresh_disk()
        script = Script()
        desk = Desk(disk, script=script)
        async with desk:
            owner, scientist, info = await _parties(desk)
            done = (await scientist.submit(await scientist.quote(info))).job
            await scientist.finished(done)
            receipt = await scientist.ask("GET", f"/v1/jobs/{done}/receipt")
            script.hold = asyncio.Event()
            running = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: ledger.job(desk.service.store, running).state == "running")
            queued = (await scientist.submit(await scientist.quote(info))).job
            before = await owner.dataset(info.dataset)
            crashed = disk.power_cycle()
        again = Desk(crashed)
        async with again:
            owner, scientist = Person(again, owner.identity), Person(again, scientist.identity)
            status = await scientist.status(running)
            assert status.state == "running"
            assert (await scientist.finished(running)).state == "done"
            assert ledger.job(again.service.store, running).takeovers == 1
            assert (await scientist.finished(queued)).state == "done"
            after = await owner.dataset(info.dataset)
            assert before.budget is not None and after.budget is not None
            assert (before.budget.jobs, after.budget.jobs) == (2, 3)
            assert await scientist.ask("GET", f"/v1/jobs/{done}/receipt") == receipt
            bundle = codec.from_json(ReceiptBundle, receipt)
            assert bundle.attestation.binding.boot == desk.service.keys.boot
            assert bundle.attestation.binding.boot != again.service.keys.boot
            digest = receipts.read_statement(_payload(bundle)).result_digest
            sealed = (await scientist.send("GET", f"/v1/jobs/{done}/result")).content
            assert _open(scientist, done, sealed, digest) == weights()

    run_async(work())


def test_a_check_that_a_crash_cut_short_is_done_again() -> None:
    async def work() -> None:
        disk = fresh_disk()
        desk = Desk(disk)
        async with desk:
            owner = await desk.person("owner")
            made = await owner.registration()
            desk.service.queue.check = lambda dataset: None  # type: ignore[method-assign]
            await owner.ask("POST", "/v1/datasets", made)
            crashed = disk.power_cycle()
        async with Desk(crashed) as again:
            found = await Person(again, owner.identity).settled(made.dataset)
            assert found.state == "ready"

    run_async(work())


def test_a_new_version_inherits_the_budget() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, scientist, info = await _parties(desk)
            await scientist.finished((await scientist.submit(await scientist.quote(info))).job)
            newer = await owner.push(previous=info.dataset)
            assert spent(newer) == spent(await owner.dataset(info.dataset)) > 0

    run_async(work())


def test_size_of_an_upload_must_be_the_schemas() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            made = await owner.registration(rows=64, wire=table(32))
            with pytest.raises(Refused) as refused:
                await owner.ask("POST", "/v1/datasets", made)
            assert refused.value.code == "data.size"

    run_async(work())


def test_wire_size_is_what_a_table_has() -> None:
    from casemate.server.datasets import wire_size

    for rows in (1, 7, 64):
        assert wire_size(schema(rows=rows)) == len(table(rows))


def test_the_queue_runs_as_many_jobs_at_once_as_it_may() -> None:
    async def work() -> None:
        script = Script(hold=asyncio.Event())
        async with Desk(clock=AutoClock(), script=script, workers=2) as desk:
            _, scientist, info = await _parties(desk)
            jobs = [(await scientist.submit(await scientist.quote(info))).job for _ in range(3)]

            def states() -> list[str]:
                return [ledger.job(desk.service.store, j).state for j in jobs]

            await desk.until(lambda: states().count("running") == 2)
            await asyncio.sleep(0.05)
            assert states() == ["running", "running", "queued"]
            script.hold.set()
            assert {(await scientist.finished(j)).state for j in jobs} == {"done"}

    run_async(work())


def test_a_job_that_is_cancelled_while_it_is_prepared_is_not_begun_again() -> None:
    async def work() -> None:
        async with Desk() as desk:
            _, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            desk.service.pool.kept.clear()  # type: ignore[attr-defined]
            begun: list[object] = []

            async def slow(*_: object) -> None:
                begun.append(object())
                await asyncio.sleep(3600)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "prepare", slow)
                job = (await scientist.submit(quote)).job
                await desk.until(lambda: bool(begun))
                assert (await scientist.ask("DELETE", f"/v1/jobs/{job}"))["state"] == "cancelled"
                for _ in range(50):
                    await asyncio.sleep(0)
                assert len(begun) == 1
                assert not desk.service.queue._running

    run_async(work())


def test_a_job_that_is_only_being_prepared_waits_for_the_next_start() -> None:
    """Nothing was charged, so a shutdown costs it nothing."""

    async def work() -> None:
        disk = fresh_disk()
        script = Script()
        async with Desk(disk, script=script) as desk:
            owner, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            desk.service.pool.kept.clear()  # type: ignore[attr-defined]
            reached = asyncio.Event()

            async def slow(*_: object) -> None:
                reached.set()
                await asyncio.sleep(3600)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "prepare", slow)
                job = (await scientist.submit(quote)).job
                await reached.wait()
                await desk._life.__aexit__(None, None, None)
                assert ledger.job(desk.service.store, job).state == "queued"
                left = disk.power_cycle(clean=True)
                desk._life = desk.service.queue.serve()
                await desk._life.__aenter__()
        async with Desk(left) as again:
            assert (await Person(again, scientist.identity).finished(job)).state == "done"
            budget = (await Person(again, owner.identity).dataset(info.dataset)).budget
            assert budget is not None and budget.jobs == 1

    run_async(work())


def test_a_guarantee_that_the_events_do_not_give_is_never_signed() -> None:
    async def work() -> None:
        async with Desk() as desk:
            _, scientist, info = await _parties(desk)
            quote = await scientist.quote(info)
            release.check_guarantee(quote)
            part = quote.datasets[0]
            cheaper = replace(part.charge, rdp_nano=tuple(n - 1 for n in part.charge.rdp_nano))
            event = replace(quote.plan.events[0], noise_multiplier=0.5)
            for lie in (
                replace(quote, epsilon=quote.epsilon * 0.99),
                replace(quote, datasets=(replace(part, charge=cheaper),)),
                replace(quote, plan=replace(quote.plan, events=(event,))),
                replace(quote, plan=replace(quote.plan, delta_truncation=1.5e-7)),
            ):
                with pytest.raises(InternalError) as refused:
                    release.check_guarantee(lie)
                assert refused.value.code == "internal.guarantee"

    run_async(work())


def test_a_store_that_stopped_stops_the_server() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            stopped: list[bool] = []
            desk.service.stop = lambda: stopped.append(True)
            desk.disk.fault = (len(desk.disk.trace) + 3, "EIO")
            answer = await owner.send("POST", "/v1/uploads", {"size": 10})
            assert answer.status_code == 500
            again = await owner.send("GET", "/v1/datasets")
            assert again.status_code == 500
            assert again.json()["error"]["code"] == "ledger.stopped"
            assert stopped and desk.service.broken is not None

    run_async(work())


def test_after_a_rollback_was_found_nobody_is_served_before_the_server_ends() -> None:
    async def work() -> None:
        async with Desk() as desk:
            await desk.person("first")
            older = SimDisk.of(desk.disk.snapshot())
            await desk.person("second")
            seen = log.sign(desk.service.store)
        async with Desk(older) as desk:
            said = {CHECKPOINT_HEADER: base64.b64encode(str(seen).encode()).decode()}
            someone = await desk.person("someone")
            refused = await desk.http.get("/v1/health", headers=said)
            assert refused.json()["error"]["code"] == "ledger.rolled-back"
            for again in (
                await desk.http.get("/v1/health"),
                await someone.send("GET", "/v1/datasets"),
                await someone.send("POST", "/v1/uploads", {"size": 10}),
            ):
                assert again.json()["error"]["code"] == "ledger.rolled-back"

    run_async(work())


def test_a_result_without_its_commit_is_swept_at_start() -> None:
    async def work() -> None:
        disk = fresh_disk()
        async with Desk(disk) as desk:
            _, scientist, info = await _parties(desk)
            job = (await scientist.submit(await scientist.quote(info))).job
            await scientist.finished(job)
            for name in ("job_" + "0" * 32, "stray"):
                disk.open(f"results/{name}", create=True).close()
            left = disk.power_cycle(clean=True)
        async with Desk(left):
            assert left.list("results") == [job]

    run_async(work())


def test_a_key_that_nothing_can_be_sealed_to_is_refused_at_enrolment() -> None:
    async def work() -> None:
        async with Desk() as desk:
            good = Identity.generate("x")
            bad = replace(good.public, seal_key=b"\xff" * len(good.public.seal_key))
            person = Person(desk, replace(good, public=bad))
            with pytest.raises(Refused) as refused:
                await person.enrol()
            assert refused.value.code == "format.seal-key"

    run_async(work())

"""Deployed models at the server: who is let in, counts, turns, limits, workers that come and go."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from typing import Any

import pytest

from casemate.ledger import models
from casemate.seal import calls
from casemate.server.pool import WorkerGone
from casemate.spec import tensors
from casemate.spec.errors import CasemateError
from casemate.spec.messages import Failed, Predict, Predicted, Serve
from casemate.spec.serving import Deployment, ServePolicy, TensorSpec
from support.desk import (
    Desk,
    Person,
    Script,
    call,
    denied,
    deploy,
    deployment,
    predict,
    run_async,
    serving,
    told,
)


def test_deploy_and_call() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, caller = await desk.person("owner"), await desk.person("caller")
            info = await deploy(owner, ServePolicy(callers=(caller.id,)))
            assert (info.state, info.left, info.owner) == ("ready", None, owner.id)
            given = struct.pack("<8f", *range(8))
            found = tensors.load(await predict(caller, info.model, 2, given))
            assert bytes(found["scores"][1]) == struct.pack("<4f", 0, 1, 4, 5)
            assert len(told(desk, Serve)) == 1  # warm from its deployment on
            text = (await desk.http.get("/metrics")).text
            label = f'{{model="{info.model}"}}'
            assert f"casemate_model_calls_total{label} 1.0" in text
            assert f"casemate_model_records_total{label} 2.0" in text
            assert f"casemate_model_call_seconds_count{label} 1.0" in text

    run_async(work())


def test_the_same_deployment_again_is_the_same_and_another_body_is_refused() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            policy = ServePolicy(callers=("*",))
            made = await deployment(owner, policy, bytes(32))
            first = await owner.ask("POST", "/v1/models", made)
            assert await owner.ask("POST", "/v1/models", made) == first
            assert len(told(desk, Serve)) == 1
            other = dataclasses.replace(made, name="another")
            assert await denied(owner.ask("POST", "/v1/models", other)) == "policy.model-taken"
            digest = "sha256:" + "cd" * 32
            id_ = Deployment.id(owner.id, digest, made.upload)
            again = dataclasses.replace(made, model=id_, model_digest=digest)
            assert await denied(owner.ask("POST", "/v1/models", again)) == "data.upload-used"

    run_async(work())


def test_a_key_that_is_for_something_else_deploys_nothing() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            policy = ServePolicy(callers=("*",))
            made = await deployment(owner, policy, bytes(31))
            assert await denied(owner.ask("POST", "/v1/models", made)) == "format.sealed"
            made = await deployment(owner, policy, bytes(32))
            wider = dataclasses.replace(made, policy=ServePolicy(callers=("*",), calls=5))
            assert await denied(owner.ask("POST", "/v1/models", wider)) == "format.sealed"
            assert await owner.ask("GET", "/v1/models") == [] and not told(desk, Serve)

    run_async(work())


def test_a_model_that_is_refused_leaves_nothing() -> None:
    async def work() -> None:
        no = Failed(phase="prepare", code="model.mixes-records", message="n", mend="m", where="w")
        async with Desk(script=Script(answers={Serve: no}), models=1) as desk:
            owner = await desk.person("owner")
            assert await denied(deploy(owner, ServePolicy(callers=()))) == "model.mixes-records"
            desk.script.answers = {Serve: WorkerGone("time")}
            assert await denied(deploy(owner, ServePolicy(callers=()))) == "job.worker-failed"
            other = serving("sha256:" + "cd" * 32)
            desk.script.answers = {Serve: other}
            assert await denied(deploy(owner, ServePolicy(callers=()))) == "job.worker-failed"
            assert await owner.ask("GET", "/v1/models") == []
            desk.script.answers = {}
            assert (await deploy(owner, ServePolicy(callers=()))).state == "ready"

    run_async(work())


def test_a_model_whose_answers_would_be_too_large_is_refused() -> None:
    async def work() -> None:
        huge = TensorSpec(name="scores", dtype="f32", shape=(1 << 20,))
        found = dataclasses.replace(serving("sha256:" + "ab" * 32), outputs=(huge,))
        async with Desk(script=Script(answers={Serve: found})) as desk:
            owner = await desk.person("owner")
            policy = ServePolicy(callers=(), records=2)
            assert await denied(deploy(owner, policy)) == "limit.answer-size"
            await deploy(owner, dataclasses.replace(policy, records=1))

    run_async(work())


def test_limits_of_deployments() -> None:
    async def work() -> None:
        async with Desk(models=2) as desk:
            owner = await desk.person("owner")
            limits = dataclasses.replace(desk.service.config.limits, models=1, worker_bytes=10)
            config = dataclasses.replace(desk.service.config, limits=limits)
            desk.service.config = config
            policy = ServePolicy(callers=())
            assert await denied(deploy(owner, policy)) == "limit.memory"
            desk.service.config = dataclasses.replace(
                config, limits=dataclasses.replace(limits, worker_bytes=1 << 30)
            )
            await deploy(owner, policy)
            assert await denied(deploy(owner, policy)) == "limit.models"

    run_async(work())


def test_calls_are_counted_before_they_are_answered_and_never_given_back() -> None:
    async def work() -> None:
        desk = Desk()
        async with desk:
            owner, caller = await desk.person("owner"), await desk.person("caller")
            policy = ServePolicy(callers=(caller.id,), calls=5)
            info = await deploy(owner, policy)
            assert info.left is None  # its owner is no caller
            await predict(caller, info.model)
            desk.script.answers = {Predict: WorkerGone("closed")}
            assert await denied(predict(caller, info.model)) == "job.worker-failed"
            desk.script.answers = {}
            assert models.used(desk.service.store, info.model, caller.id) == 2
        again = Desk(desk.disk)
        async with again:
            caller = Person(again, caller.identity)
            for _ in range(3):
                await predict(caller, info.model)
            assert await denied(predict(caller, info.model)) == "policy.calls"
            shown = await caller.ask("GET", f"/v1/models/{info.model}")
            assert shown["left"] == 0
            owner = Person(again, owner.identity)
            path = f"/v1/models/{info.model}/policy"
            more = dataclasses.replace(policy, calls=6)
            assert await denied(owner.ask("PUT", path, more)) == "policy.calls-fixed"
            await owner.ask("PUT", path, dataclasses.replace(more, epoch=1))
            await predict(caller, info.model)
            assert await denied(owner.ask("PUT", path, policy)) == "policy.epoch-back"

    run_async(work())


def test_a_crash_costs_a_caller_what_was_left_of_a_block() -> None:
    async def work() -> None:
        desk = Desk()
        async with desk:
            owner, caller = await desk.person("owner"), await desk.person("caller")
            info = await deploy(owner, ServePolicy(callers=("*",), calls=640))  # blocks of 10
            await predict(caller, info.model)
            shown = await caller.ask("GET", f"/v1/models/{info.model}")
            assert shown["left"] == 639
        async with Desk(desk.disk) as again:
            shown = await Person(again, caller.identity).ask("GET", f"/v1/models/{info.model}")
            assert shown["left"] == 630

    run_async(work())


def test_a_change_of_policy_counts_at_once() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, caller = await desk.person("owner"), await desk.person("caller")
            info = await deploy(owner, ServePolicy(callers=(caller.id,), records=4))
            path = f"/v1/models/{info.model}/policy"
            assert await denied(predict(caller, info.model, 5)) == "limit.records"
            await owner.ask("PUT", path, ServePolicy(callers=(caller.id,), records=8))
            assert len(told(desk, Serve)) == 2  # with passes of other sizes
            await predict(caller, info.model, 5)
            await owner.ask("PUT", path, ServePolicy(callers=(owner.id,), records=8))
            assert await denied(predict(caller, info.model)) == "model.unknown"
            await predict(owner, info.model)
            assert len(told(desk, Serve)) == 2

    run_async(work())


def test_undeploy_destroys_the_key_and_the_sealed_bytes() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ServePolicy(callers=("*",), calls=5))
            await predict(owner, info.model)
            upload = models.model(desk.service.store, info.model).deployment.upload
            assert await denied(owner.ask("DELETE", "/v1/models/model_1")) == "model.unknown"
            await owner.send("DELETE", f"/v1/models/{info.model}")
            assert await denied(predict(owner, info.model)) == "model.unknown"
            assert not desk.disk.exists(f"uploads/{upload}")
            assert desk.script.ended[-1] == "done"
            assert not desk.service.store.all("SELECT * FROM model_calls")

    run_async(work())


def test_a_model_waits_for_its_owner_where_other_software_runs() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ServePolicy(callers=("*",)))
            with desk.service.store.transaction():
                models.freeze(desk.service.store)
            assert await denied(predict(owner, info.model)) == "policy.frozen"
            shown = await owner.ask("GET", f"/v1/models/{info.model}")
            assert shown["state"] == "frozen"
            await owner.ask("PUT", f"/v1/models/{info.model}/policy", info.policy)
            await predict(owner, info.model)

    run_async(work())


def test_callers_take_turns_and_a_loud_one_waits_for_itself() -> None:
    async def work() -> None:
        hold = asyncio.Event()
        async with Desk(script=Script(hold=hold)) as desk:
            owner, loud, quiet = [await desk.person(n) for n in ("owner", "loud", "quiet")]
            info = await deploy(owner, ServePolicy(callers=("*",), at_once=4))
            order: list[str] = []

            async def ask(who: Person, name: str) -> None:
                await predict(who, info.model)
                order.append(name)

            tasks = [asyncio.create_task(ask(loud, "loud")) for _ in range(4)]
            await desk.until(lambda: len(told(desk, Predict)) == 1)
            host = desk.service.inference._hosts[info.model]
            await desk.until(lambda: host.calls(loud.id) == 4)
            assert await denied(predict(loud, info.model)) == "limit.calls"
            tasks.append(asyncio.create_task(ask(quiet, "quiet")))
            await desk.until(lambda: host.calls() == 5)
            hold.set()
            await asyncio.gather(*tasks)
            assert order.index("quiet") <= 2  # after the one that ran, and one that stood first

    run_async(work())


def test_a_busy_server_says_when_to_come_again() -> None:
    async def work() -> None:
        hold = asyncio.Event()
        async with Desk(script=Script(hold=hold), models=1, model_calls=1) as desk:
            one, two = await desk.person("one"), await desk.person("two")
            first = await deploy(one, ServePolicy(callers=("*",)))
            running = asyncio.create_task(predict(one, first.model))
            await desk.until(lambda: bool(told(desk, Predict)))
            made = call(two, first.model)
            answer = await two.send("POST", made.path, made.body)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "limit.calls"
            assert await denied(deploy(two, ServePolicy(callers=()))) == "limit.models-busy"
            hold.set()
            await running
            await deploy(two, ServePolicy(callers=()))  # the idle one makes room

    run_async(work())


def test_the_model_called_longest_ago_makes_room_and_comes_back() -> None:
    async def work() -> None:
        async with Desk(models=2) as desk:
            owner = await desk.person("owner")
            a, b = [(await deploy(owner, ServePolicy(callers=("*",)))).model for _ in "ab"]
            await predict(owner, a)
            c = (await deploy(owner, ServePolicy(callers=("*",)))).model
            assert set(desk.service.inference._hosts) == {a, c}
            await predict(owner, b)
            assert set(desk.service.inference._hosts) == {c, b}
            assert len(told(desk, Serve)) == 4

    run_async(work())


def test_records_of_several_callers_share_a_pass_where_there_are_slots() -> None:
    async def work() -> None:
        hold = asyncio.Event()
        async with Desk(script=Script(hold=hold)) as desk:
            people = [await desk.person(str(i)) for i in range(5)]
            info = await deploy(people[0], ServePolicy(callers=("*",), slots=4, records=6))
            assert info.slots == 4
            sizes = [1, 2, 3, 1, 6]
            given = [struct.pack("<4f", i, i, i, i) * n for i, n in enumerate(sizes)]
            tasks = []
            host = desk.service.inference._hosts[info.model]
            for i, (n, data) in enumerate(zip(sizes, given, strict=True)):
                tasks.append(asyncio.create_task(predict(people[i], info.model, n, data)))
                await desk.until(lambda i=i: host.calls() > i)
            hold.set()
            found = await asyncio.gather(*tasks)
            for i, (n, raw) in enumerate(zip(sizes, found, strict=True)):
                assert bytes(tensors.load(raw)["scores"][1]) == struct.pack("<2f", i, i) * n
            passes = [[c.records for c in m.calls] for m in told(desk, Predict)]
            assert passes[0] == [1] and sorted(n for p in passes for n in p) == sorted(sizes)
            assert all(sum(p) <= 4 or len(p) == 1 for p in passes) and len(passes) < 5

    run_async(work())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (WorkerGone("time"), "job.worker-failed"),
        (Predicted(calls=2), "job.worker-failed"),
        (
            Failed(phase="run", code="job.failed", message="x", mend="", where=""),
            "job.worker-failed",
        ),
        (RuntimeError("a fault"), "job.worker-failed"),
    ],
    ids=str,
)
def test_a_worker_that_fails_takes_its_calls_along_and_another_is_started(
    answer: Any, code: str
) -> None:
    async def work() -> None:
        async with Desk(script=Script(answers={Predict: answer})) as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ServePolicy(callers=("*",)))
            assert await denied(predict(owner, info.model)) == code
            assert info.model not in desk.service.inference._hosts
            desk.script.answers = {}
            await predict(owner, info.model)
            assert len(told(desk, Serve)) == 2

    run_async(work())


def test_those_who_wait_hear_of_a_worker_that_failed() -> None:
    async def work() -> None:
        hold = asyncio.Event()
        script = Script(hold=hold)
        async with Desk(script=script) as desk:
            people = [await desk.person(str(i)) for i in range(3)]
            info = await deploy(people[0], ServePolicy(callers=("*",)))
            tasks = [asyncio.create_task(predict(p, info.model)) for p in people]
            host = desk.service.inference._hosts[info.model]
            await desk.until(lambda: host.calls() == 3)
            await desk.service.inference.drop(info.model)
            for task in tasks:
                assert await denied(task) == "job.worker-failed"
            with pytest.raises(CasemateError, match=r"job\.worker-failed"):
                made = call(people[0], info.model)
                key = desk.service.keys.hpke
                opened = calls.open_head(key, info.model, people[0].id, made.body)
                model = models.model(desk.service.store, info.model)
                desk.service.inference._hosts[info.model] = host  # it ended under the caller
                await desk.service.inference.call(model, people[0].id, opened)

    run_async(work())


def test_what_is_wrong_with_a_model_is_not_its_callers_to_know() -> None:
    async def work() -> None:
        desk = Desk()
        async with desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ServePolicy(callers=("*",)))
        no = Failed(phase="prepare", code="limit.memory", message="m", mend="m", where="w")
        async with Desk(desk.disk, script=Script(answers={Serve: no})) as again:
            owner = Person(again, owner.identity)
            assert await denied(predict(owner, info.model)) == "job.worker-failed"
            lock = Failed(phase="lock", code="internal.sandbox", message="m", mend="m", where="w")
            again.script.answers = {Serve: lock}
            assert await denied(predict(owner, info.model)) == "job.worker-failed"

    run_async(work())


def test_of_a_call_only_the_size_is_known() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ServePolicy(callers=("*",)))
            made = call(owner, info.model)
            short = made.body[:-1]
            assert await denied(owner.ask("POST", made.path, short)) == "data.inputs-size"
            nothing = made.body[: calls.HEAD_BYTES]
            assert await denied(owner.ask("POST", made.path, nothing)) == "format.call"
            two = (2).to_bytes(4, "big") + made.body[4:]
            assert await denied(owner.ask("POST", made.path, two)) == "format.sealed"
            assert not told(desk, Predict)

    run_async(work())

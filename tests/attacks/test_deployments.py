"""Attacks on what a server keeps of deployed models: ids taken over, policies raced, more models
loaded than may be, words of their workers, what is left of one that is gone."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from casemate.client.sales import sign
from casemate.ledger import catalog, log, models
from casemate.seal import calls
from casemate.server.config import Limits, Rate
from casemate.spec.errors import CasemateError
from casemate.spec.messages import Predict, Serve
from casemate.spec.sale import Sale
from casemate.spec.serving import ModelInfo, ServePolicy
from support.desk import (
    FREE,
    Desk,
    Person,
    Refused,
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

ANYONE = ServePolicy(callers=("*",))


async def sell(seller: Person, info: ModelInfo, buyer: str) -> None:
    sale = Sale(
        origin=log.key(seller.desk.service.store).origin, model=info.model,
        model_digest=info.model_digest, seller=seller.id, buyer=buyer,
    )  # fmt: skip
    body = {"envelope": sign(sale, seller.identity)}
    await seller.ask("POST", f"/v1/models/{info.model}/sales", body)


@pytest.mark.parametrize("who", ["owner", "stranger"])
def test_the_id_of_a_model_that_is_gone_is_nobodys(who: str) -> None:
    """Another model under it would answer its callers; one that was sold before would be at odds
    with its sales, so that the store opens no more and the server never starts again."""

    async def work() -> None:
        desk = Desk()
        async with desk:
            people = {name: await desk.person(name) for name in ("owner", "stranger", "caller")}
            owner, caller = people["owner"], people["caller"]
            info = await deploy(owner, ANYONE)
            await predict(caller, info.model)
            await sell(owner, info, owner.id)
            await owner.send("DELETE", f"/v1/models/{info.model}")
            for digest in ("ab" * 32, "cd" * 32):
                again = deploy(people[who], ANYONE, model=info.model, digest=digest)
                assert await denied(again) == "format.field"
            assert await denied(predict(caller, info.model)) == "model.unknown"
        async with Desk(desk.disk) as after:
            assert await Person(after, caller.identity).ask("GET", "/v1/models") == []

    run_async(work())


def test_an_id_that_was_chosen_is_none() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, other = await desk.person("owner"), await desk.person("other")
            made = await deployment(owner, ANYONE, bytes(32))
            for changes in (
                {"model": "model_" + "1" * 32},
                {"model_digest": "sha256:" + "cd" * 32},
                {"upload": (await deployment(owner, ANYONE, bytes(32))).upload},
            ):
                lie = dataclasses.replace(made, **changes)
                assert await denied(owner.ask("POST", "/v1/models", lie)) == "format.field"
            stolen = dataclasses.replace(made, owner=other.id)
            assert await denied(other.ask("POST", "/v1/models", stolen)) == "format.field"
            assert not told(desk, Serve)
            await owner.ask("POST", "/v1/models", made)

    run_async(work())


def test_no_more_models_are_loaded_than_may_be_however_calls_race() -> None:
    """A worker's memory is its share of the machine's."""

    async def work() -> None:
        hold = asyncio.Event()
        async with Desk(models=2) as desk:
            owner = await desk.person("owner")
            names = [(await deploy(owner, ANYONE)).model for _ in range(6)]
            desk.script.hold, desk.script.hold_end = hold, asyncio.Event()
            tasks = [asyncio.create_task(predict(owner, name)) for name in names]
            for _ in range(1000):
                await asyncio.sleep(0)
            desk.script.hold_end.set()
            for _ in range(1000):
                await asyncio.sleep(0)
            assert len(desk.service.inference._hosts) == 2
            assert len(told(desk, Serve)) - len(desk.script.ended) == 2
            hold.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            codes = [f.code if isinstance(f, Refused) else "" for f in found]
            assert codes.count("limit.models-busy") == 4 and codes.count("") == 2

    run_async(work())


def test_a_call_that_races_a_policy_loads_the_model_under_no_other() -> None:
    """Whoever ends sharing has no call of theirs in a shared pass from then on."""

    async def work() -> None:
        async with Desk() as desk:
            owner, caller = await desk.person("owner"), await desk.person("caller")
            shared = dataclasses.replace(ANYONE, slots=4)
            info = await deploy(owner, shared)
            desk.script.hold_end = asyncio.Event()
            alone = dataclasses.replace(ANYONE, slots=1)
            path = f"/v1/models/{info.model}/policy"
            change = asyncio.create_task(owner.ask("PUT", path, alone))
            for _ in range(1000):
                await asyncio.sleep(0)
            racing = asyncio.create_task(predict(caller, info.model))
            for _ in range(1000):
                await asyncio.sleep(0)
            desk.script.hold_end.set()
            assert (await change)["slots"] == 1
            await asyncio.gather(racing, return_exceptions=True)
            await predict(caller, info.model)
            assert told(desk, Serve)[-1].slots == 1
            assert desk.service.inference._hosts[info.model].policy == alone

    run_async(work())


def test_a_policy_that_was_not_stored_is_in_no_worker() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, caller = await desk.person("owner"), await desk.person("caller")
            info = await deploy(owner, ANYONE)
            path = f"/v1/models/{info.model}/policy"
            desk.script.hold_end = asyncio.Event()
            late = dataclasses.replace(ANYONE, slots=4, epoch=1)
            change = asyncio.create_task(owner.ask("PUT", path, late))
            for _ in range(1000):
                await asyncio.sleep(0)
            await owner.ask("PUT", path, dataclasses.replace(ANYONE, epoch=2))
            desk.script.hold_end.set()
            assert await denied(change) == "policy.epoch-back"
            await predict(caller, info.model)
            assert told(desk, Serve)[-1].slots == 1

    run_async(work())


def test_who_waits_for_a_model_that_goes_before_it_is_loaded_hears_of_it() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ANYONE)
            inference = desk.service.inference
            await inference.drop(info.model)
            made = call(owner, info.model)
            opened = calls.open_head(desk.service.keys.hpke, info.model, owner.id, made.body)
            model = models.model(desk.service.store, info.model)
            waiting = asyncio.create_task(inference.call(model, owner.id, opened))
            await asyncio.sleep(0)
            await inference.drop(info.model)  # before its worker's task ran at all
            with pytest.raises(CasemateError, match=r"job\.worker-failed"):
                await asyncio.wait_for(waiting, 5)

    run_async(work())


def test_a_worker_that_names_too_few_layers_is_given_no_call() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            desk.service.config = dataclasses.replace(desk.service.config, sandbox=("seccomp",))
            assert await denied(deploy(owner, ANYONE)) == "job.worker-failed"
            assert await owner.ask("GET", "/v1/models") == []

    run_async(work())


def test_a_worker_does_not_choose_to_share_passes() -> None:
    """A model that took its worker over would see several callers at once."""

    async def work() -> None:
        digest = "sha256:" + "ab" * 32
        for slots in (0, -1, 2, 256):
            script = Script(answers={Serve: serving(digest, slots)})
            async with Desk(script=script) as desk:
                owner = await desk.person("owner")
                assert await denied(deploy(owner, ANYONE)) == "job.worker-failed"
                if slots == 2:
                    await deploy(owner, dataclasses.replace(ANYONE, slots=2))

    run_async(work())


def test_one_caller_is_not_told_how_much_others_call() -> None:
    async def work() -> None:
        texts = []
        for others in (1, 3):
            hold = asyncio.Event()
            async with Desk(script=Script(hold=hold)) as desk:
                people = [await desk.person(str(i)) for i in range(1 + others)]
                info = await deploy(people[0], dataclasses.replace(ANYONE, at_once=1))
                tasks = [asyncio.create_task(predict(p, info.model)) for p in people]
                host = desk.service.inference._hosts[info.model]
                await desk.until(lambda h=host, n=1 + others: h.calls() == n)  # type: ignore[misc]
                made = call(people[0], info.model)
                answer = await people[0].send("POST", made.path, made.body)
                assert answer.json()["error"]["code"] == "limit.calls"
                texts.append(answer.text)
                hold.set()
                await asyncio.gather(*tasks)
        assert texts[0] == texts[1]

    run_async(work())


def test_nothing_is_left_of_a_model_that_is_gone() -> None:
    """Deploying, calling and undeploying again and again takes no memory of the server."""

    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, dataclasses.replace(ANYONE, calls=100))
            await predict(owner, info.model)
            assert info.model in (await desk.http.get("/metrics")).text
            await owner.send("DELETE", f"/v1/models/{info.model}")
            assert info.model not in (await desk.http.get("/metrics")).text
            inference = desk.service.inference
            assert not inference._hosts and not inference._counted

    run_async(work())


def test_a_crash_while_a_model_goes_leaves_no_sealed_bytes() -> None:
    """Its key is destroyed first; what was sealed under it goes at the next start."""

    async def work() -> None:
        desk = Desk()
        async with desk:
            owner = await desk.person("owner")
            gone, stays = await deploy(owner, ANYONE), await deploy(owner, ANYONE)
            models.undeploy(desk.service.store, gone.model)  # and no more
        async with Desk(desk.disk) as after:
            store = after.service.store
            kept = models.model(store, stays.model).deployment.upload
            assert [u.id for u in catalog.uploads(store)] == [kept]
            assert after.disk.list("uploads") == sorted([kept, f"{kept}.offset"])
            await predict(Person(after, owner.identity), stays.model)

    run_async(work())


def test_policies_start_workers_no_faster_than_deployments() -> None:
    async def work() -> None:
        rates = dataclasses.replace(FREE, quote=Rate(per_second=1e-6, burst=3))
        async with Desk(rates=rates) as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ANYONE)
            path = f"/v1/models/{info.model}/policy"
            for records in (1, 2):
                await owner.ask("PUT", path, dataclasses.replace(ANYONE, records=records))
            other = dataclasses.replace(ANYONE, records=3)
            assert await denied(owner.ask("PUT", path, other)) == "limit.rate"
            assert len(told(desk, Serve)) == 3

    run_async(work())


def test_answers_that_nobody_reads_take_no_more_memory_than_bodies_that_come() -> None:
    """A stranger may deploy a model, call it on every connection, and read nothing."""
    limits = Limits()
    assert limits.answer_bytes <= limits.chunk_bytes


def test_a_server_that_stops_says_so_to_who_still_waits() -> None:
    """After its grace uvicorn cancels what is under way."""

    async def work() -> None:
        async with Desk(script=Script(hold=asyncio.Event())) as desk:
            owner = await desk.person("owner")
            info = await deploy(owner, ANYONE)
            waiting = asyncio.create_task(predict(owner, info.model))
            await desk.until(lambda: bool(told(desk, Predict)))
            waiting.cancel()
            assert await denied(waiting) == "limit.stopping"
            assert "CancelledError" not in desk.log_text()

    run_async(work())

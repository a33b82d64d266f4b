"""Consents over the attested line: a server on other software, its datasets frozen until then."""

import asyncio

import pytest

from casemate.client import consents
from casemate.ledger import catalog, log
from casemate.spec.data import Policy
from casemate.spec.messages import Run
from casemate.tee import simulated
from support.desk import Desk, Person, Refused, Script, run_async

NEW = "bb" * 48


async def refused(work):
    with pytest.raises(Refused) as e:
        await work
    return e.value.code


def upgraded(monkeypatch, work):
    """``work(desk, owner, scientist, dataset)`` on a server that was started as other software."""

    async def run():
        desk = Desk()
        async with desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            info = await owner.push(policy=Policy(scientists=("*",)))
        monkeypatch.setattr(simulated, "measurement", lambda: bytes.fromhex(NEW))
        async with Desk(desk.disk) as again:
            people = [Person(again, p.identity) for p in (owner, scientist)]
            await work(again, *people, info)

    run_async(run())


def envelope(desk, owner, dataset, measurement=NEW, trust="simulated"):
    origin = log.key(desk.service.store).origin
    return {"envelope": consents.to_software(origin, dataset, measurement, trust, owner.identity)}


def test_frozen_until_the_owner_consents(monkeypatch):
    async def work(desk, owner, scientist, info):
        path = f"/v1/datasets/{info.dataset}"
        assert (await owner.ask("GET", path))["state"] == "frozen"
        assert (await scientist.ask("GET", path))["state"] == "frozen"
        assert await scientist.ask("GET", "/v1/datasets") == []
        quote = await scientist.quote(info)
        assert quote.datasets[0].refusal == "policy.frozen"
        given = await owner.ask("POST", f"{path}/consents", envelope(desk, owner, info.dataset))
        assert given["state"] == "ready"
        job = (await scientist.submit(await scientist.quote(info))).job
        assert (await scientist.finished(job)).state == "done"

    upgraded(monkeypatch, work)


def test_what_is_refused(monkeypatch):
    async def work(desk, owner, scientist, info):
        path = f"/v1/datasets/{info.dataset}/consents"
        good = envelope(desk, owner, info.dataset)
        assert await refused(scientist.ask("POST", path, good)) == "auth.forbidden"
        mine = envelope(desk, scientist, info.dataset)
        assert await refused(owner.ask("POST", path, mine)) == "policy.consent"
        other = envelope(desk, owner, "ds_" + "0" * 40)
        assert await refused(owner.ask("POST", path, other)) == "policy.consent"
        for trust in ("no toml =", "simulated:", "x = 1"):
            bad = envelope(desk, owner, info.dataset, trust=trust)
            assert await refused(owner.ask("POST", path, bad)) == "usage.trust"
        assert await refused(owner.ask("POST", path, {"envelope": "{}"})) == "policy.consent"
        await owner.ask("POST", path, envelope(desk, owner, info.dataset, "", ""))
        assert (await owner.ask("GET", path.removesuffix("/consents")))["state"] == "frozen"

    upgraded(monkeypatch, work)


def test_a_job_that_was_under_way_waits_for_the_consent(monkeypatch):
    """It is neither lost nor run by software that the owner did not accept."""

    async def run():
        script = Script(hold=asyncio.Event())
        desk = Desk(script=script)
        async with desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            info = await owner.push(policy=Policy(scientists=("*",)))
            job = (await scientist.submit(await scientist.quote(info))).job
            await desk.until(lambda: any(isinstance(m, Run) for m in script.told))
        monkeypatch.setattr(simulated, "measurement", lambda: bytes.fromhex(NEW))
        script = Script()
        async with Desk(desk.disk, script=script) as again:
            owner, scientist = Person(again, owner.identity), Person(again, scientist.identity)
            other = await (await again.person("other")).push()
            later = (await scientist.submit(await scientist.quote(other))).job
            assert (await scientist.finished(later)).state == "done"
            assert (await scientist.status(job)).state == "running"
            assert sum(isinstance(m, Run) for m in script.told) == 1
            path = f"/v1/datasets/{info.dataset}/consents"
            await owner.ask("POST", path, envelope(again, owner, info.dataset))
            assert (await scientist.finished(job)).state == "done"
            assert catalog.account(again.service.store, info.dataset).jobs == 1

    run_async(run())

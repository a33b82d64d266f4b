"""Consents over the attested line: a server on other software, its datasets frozen until then."""

import pytest

from casemate.client import consents
from casemate.ledger import log
from casemate.spec.data import Policy
from casemate.tee import simulated
from support.desk import Desk, Person, Refused, run_async

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

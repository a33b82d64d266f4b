"""Resumable uploads: offsets, limits, crashes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from casemate.ledger import catalog, models
from casemate.ledger.store import Store
from casemate.server import service, uploads
from casemate.server.config import Limits
from casemate.server.uploads import Uploads
from casemate.spec.errors import LedgerError
from casemate.spec.serving import ServePolicy
from support.desk import Desk, Person, Refused, deploy, run_async
from support.disk import PowerLoss, SimDisk
from support.ledgers import OPEN, open_store, person


def test_an_upload_goes_on_where_it_stopped() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            data = random.Random(1).randbytes(10_000)
            name = (await owner.ask("POST", "/v1/uploads", {"size": len(data)}))["upload"]
            path = f"/v1/uploads/{name}"
            at = 0
            for step in (1, 4000, 999, 5000):
                head = await owner.send("HEAD", path)
                assert head.headers["upload-offset"] == str(at)
                sent = await owner.send(
                    "PATCH", path, data[at : at + step], {"upload-offset": str(at)}
                )
                at += step
                assert (sent.status_code, sent.headers["upload-offset"]) == (204, str(at))
                # The same piece again, as after a lost answer, changes nothing.
                with pytest.raises(Refused) as refused:
                    await owner.ask(
                        "PATCH", path, data[at - step : at], {"upload-offset": str(at - step)}
                    )
                assert (refused.value.status, refused.value.code) == (409, "limit.offset")
            assert desk.disk.snapshot()[f"uploads/{name}"] == data

    run_async(work())


@pytest.mark.parametrize("offset", ["", "-1", "1.5", "x", "9" * 17])
def test_a_malformed_offset_is_refused(offset: str) -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            name = (await owner.ask("POST", "/v1/uploads", {"size": 10}))["upload"]
            answer = await owner.send(
                "PATCH", f"/v1/uploads/{name}", b"x", {"upload-offset": offset}
            )
            assert answer.status_code in (400, 409), answer.text

    run_async(work())


def test_pieces_sent_at_once_land_once() -> None:
    import asyncio

    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            name = (await owner.ask("POST", "/v1/uploads", {"size": 400}))["upload"]
            sent = [
                owner.send("PATCH", f"/v1/uploads/{name}", bytes([i]) * 100, {"upload-offset": "0"})
                for i in range(4)
            ]
            answers = await asyncio.gather(*sent)
            assert sorted(a.status_code for a in answers) == [204, 409, 409, 409]
            winner = next(i for i, a in enumerate(answers) if a.status_code == 204)
            assert desk.disk.snapshot()[f"uploads/{name}"] == bytes([winner]) * 100

    run_async(work())


def test_one_upload_too_many_ends_the_oldest_and_quotas_hold() -> None:
    async def work() -> None:
        async with Desk(open_uploads=2, identity_bytes=1000) as desk:
            owner, other = await desk.person("owner"), await desk.person("other")
            names = [
                (await owner.ask("POST", "/v1/uploads", {"size": 300}))["upload"] for _ in range(3)
            ]
            alive = [(await owner.send("HEAD", f"/v1/uploads/{n}")).status_code for n in names]
            assert alive == [404, 200, 200]
            assert not any(names[0] in path for path in desk.disk.snapshot())
            with pytest.raises(Refused) as refused:
                await owner.ask("POST", "/v1/uploads", {"size": 701})
            assert refused.value.code == "limit.quota"
            await other.ask("POST", "/v1/uploads", {"size": 1000})

    run_async(work())


def test_a_dataset_cannot_be_made_of_a_part() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            made = await owner.registration()
            name = (await owner.ask("POST", "/v1/uploads", {"size": 10}))["upload"]
            from casemate.spec import codec

            partial = codec.from_json(type(made), codec.to_json(made) | {"upload": name})  # type: ignore[operator]
            with pytest.raises(Refused) as refused:
                await owner.ask("POST", "/v1/datasets", partial)
            assert refused.value.code == "data.upload-incomplete"

    run_async(work())


def test_the_model_of_a_job_that_ended_is_removed() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            info = await owner.push()
            quote = await scientist.quote(info)
            assert len(catalog.uploads(desk.service.store)) == 2
            await scientist.finished((await scientist.submit(quote)).job)
            await desk.until(lambda: len(catalog.uploads(desk.service.store)) == 1)
            assert len([n for n in desk.disk.snapshot() if n.startswith("uploads/up_")]) == 2

    run_async(work())


async def _pages(person: Person, path: str, count: int) -> list[str]:
    """The ids that ``path`` lists, following links; each page but the last is full."""
    found: list[str] = []
    at: str | None = path
    while at is not None:
        response = await person.send("GET", at)
        page = [x.get("dataset") or x["model"] for x in response.json()]
        found += page
        link = response.links.get("next")
        assert (len(page) == count) == (link is not None) and len(page) <= count
        at = None if link is None else path + link["url"]
    return found


def test_listings_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shows what its reader may see and no other id, not in links either."""
    monkeypatch.setattr(service, "PAGE", 2)

    async def work() -> None:
        async with Desk() as desk:
            owner, other = await desk.person("owner"), await desk.person("other")
            named = replace(OPEN, scientists=(owner.id,))
            mine = sorted([(await owner.push(policy=named)).dataset for _ in range(4)])
            theirs = [(await other.push()).dataset for _ in range(3)]
            assert await _pages(owner, "/v1/datasets", 2) == sorted([*mine, *theirs])
            assert await _pages(other, "/v1/datasets", 2) == sorted(theirs)
            calls = [
                (await deploy(person, ServePolicy(callers=callers))).model
                for person, callers in ((owner, ("*",)), (owner, ()), (other, (owner.id,)))
            ]
            assert await _pages(owner, "/v1/models", 2) == sorted(calls)
            assert await _pages(other, "/v1/models", 2) == sorted(calls[::2])
            for odd in ("x", "%00", "ds_", "'--", "z" * 500):
                assert (await owner.send("GET", f"/v1/datasets?after={odd}")).status_code == 200
            twice = await owner.send("GET", "/v1/datasets?after=a&after=b")
            assert twice.json()["error"]["code"] == "format.field"

    run_async(work())


# Crashes.


def _store() -> Store:
    store = open_store(SimDisk())
    catalog.enrol(store, person("owner"))
    return store


def _resume(uploads_: Uploads, owner: str, name: str, data: bytes, draw: random.Random) -> None:
    while (at := uploads_.offset(name)) < len(data):
        uploads_.append(owner, name, at, data[at : at + draw.randrange(1, 2000)])


@pytest.mark.parametrize("seed", range(40))
def test_a_power_cut_at_any_call_loses_nothing_acknowledged(seed: int) -> None:
    """Cut, torn and reordered writes: what was acknowledged stands, and the upload can be ended."""
    draw = random.Random(seed)
    owner = person("owner")
    data = draw.randbytes(6000)
    disk = SimDisk(seed)
    store = _store()  # on a disk of its own: here the bytes' fate is at stake
    held = Uploads(disk, store, Limits())
    name = held.begin(owner.id, len(data))
    disk.fault = (len(disk.trace) + draw.randrange(1, 30), "POWER")
    acknowledged = 0
    try:
        while acknowledged < len(data):
            piece = data[acknowledged : acknowledged + draw.randrange(1, 2000)]
            acknowledged = held.append(owner.id, name, acknowledged, piece)
    except (PowerLoss, LedgerError):
        pass
    after = disk.power_cycle()
    again = Uploads(after, store, Limits())
    assert again.offset(name) >= acknowledged
    _resume(again, owner.id, name, data, draw)
    assert after.snapshot()[f"uploads/{name}"] == data


def test_an_offset_written_before_its_bytes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded bug: the offset is made durable without a sync of the bytes."""

    def hasty(self: Uploads, owner: str, name: str, offset: int, piece: bytes) -> int:
        file = self._disk.open(uploads.data_path(name))
        file.write(offset, piece)
        self._state(self._disk.open(f"uploads/{name}.offset"), offset + len(piece))
        return offset + len(piece)

    monkeypatch.setattr(Uploads, "append", hasty)
    caught = 0
    for seed in range(40):
        try:
            test_a_power_cut_at_any_call_loses_nothing_acknowledged(seed)
        except AssertionError:
            caught += 1
    assert caught


def test_bytes_without_a_record_and_records_without_bytes_go_at_start() -> None:
    disk = SimDisk()
    store, owner = _store(), person("owner")
    held = Uploads(disk, store, Limits())
    whole, torn = held.begin(owner.id, 10), held.begin(owner.id, 10)
    disk.remove(f"uploads/{torn}.offset")
    disk.open("uploads/up_stray", create=True).close()
    Uploads(disk, store, Limits())
    assert [u.id for u in catalog.uploads(store)] == [whole]
    assert disk.list("uploads") == sorted([whole, f"{whole}.offset"])


@pytest.mark.parametrize("cut", range(0, 48, 5))
def test_a_torn_slot_leaves_the_other(cut: int) -> None:
    good, newer = uploads._slot(4, 1000), uploads._slot(5, 2000)
    raw = bytearray(good + bytes(24))
    raw[24 : 24 + max(0, cut - 24)] = newer[: max(0, cut - 24)]
    assert uploads._read_slots(bytes(raw)) == (4, 1000)
    assert uploads._read_slots(good + newer) == (5, 2000)


def test_a_revocation_that_a_crash_cut_short_is_finished_by_the_next_start() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            kept, gone = await owner.push(), await owner.push()
            before = {f for f in desk.disk.snapshot() if f.startswith("uploads/")}
            found = catalog.revoke(desk.service.store, gone.dataset, owner.id)
            Uploads(desk.disk, desk.service.store, Limits())
            left = {f for f in desk.disk.snapshot() if f.startswith("uploads/")}
            name = f"uploads/{found.registration.upload}"
            assert before - left == {name, f"{name}.offset"}
            uploads_of = {u.used_by for u in catalog.uploads(desk.service.store)}
            assert uploads_of == {kept.dataset}

    run_async(work())


def test_the_end_of_a_model_that_a_crash_cut_short_is_finished_by_the_next_start() -> None:
    """Its key is gone: nobody can open the bytes, nor drop them."""

    async def work() -> None:
        async with Desk() as desk:
            owner = await desk.person("owner")
            gone, kept = [await deploy(owner, ServePolicy(callers=())) for _ in range(2)]
            models.undeploy(desk.service.store, gone.model)
            Uploads(desk.disk, desk.service.store, Limits())
            assert [u.used_by for u in catalog.uploads(desk.service.store)] == [kept.model]
            assert len([f for f in desk.disk.snapshot() if f.startswith("uploads/")]) == 2

    run_async(work())

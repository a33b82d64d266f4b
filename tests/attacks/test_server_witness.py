"""Witnesses at the server: keys and results wait for them; copies of the state are stopped by them.

An operator who clones the machine holds one reservation twice and would run it twice, with
different noise. Without witnesses both results come out and only the clients' checkpoints tell
(LIMITATIONS.md); with them one comes out.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
from collections.abc import Sequence

import pytest

from casemate.ledger import catalog, ledger, log
from casemate.seal import checkpoint, note
from casemate.seal.identity import Identity
from casemate.seams import Unreachable
from casemate.server import release
from casemate.server.publish import ASK_SECONDS, FRESH
from casemate.spec import codec
from casemate.spec.data import DatasetInfo, Policy
from casemate.spec.errors import LedgerError
from casemate.spec.messages import Run
from casemate.spec.receipt import ReceiptBundle
from support.desk import Desk, Person, Refused, Script, WitnessNet, fresh_disk, run_async
from support.disk import SimDisk
from support.witness import USELESS, FakeWitness

URLS = tuple(f"https://w{i}.example" for i in range(3))


def witnesses(*conducts: str) -> tuple[WitnessNet, tuple[str, ...]]:
    """A network of witnesses and their keys."""
    made = [FakeWitness(f"w{i}.example", conduct=c) for i, c in enumerate(conducts)]
    return WitnessNet(dict(zip(URLS, made, strict=False))), tuple(w.vkey for w in made)


def at(disk: SimDisk, net: WitnessNet, script: Script | None = None) -> Desk:
    desk = Desk(disk, script=script, net=net, witnesses=tuple(net.witnesses))
    for witness in net.witnesses.values():
        witness.watch(log.key(desk.service.store).verifier)
    return desk


async def parties(desk: Desk, keys: Sequence[str], k: int) -> tuple[Person, DatasetInfo]:
    owner, scientist = await desk.person("owner"), await desk.person("scientist")
    policy = Policy(scientists=("*",), witnesses=tuple(keys), cosignatures=k)
    return scientist, await owner.push(policy=policy)


async def turns(desk: Desk, count: int = 400) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)


def ran(script: Script) -> int:
    return sum(isinstance(m, Run) for m in script.told)


def test_a_receipt_carries_the_witnesses_word() -> None:
    async def work() -> None:
        net, keys = witnesses("honest", "honest", "down")
        async with at(fresh_disk(), net) as desk:
            scientist, info = await parties(desk, keys, 2)
            job = (await scientist.submit(await scientist.quote(info))).job
            assert (await scientist.finished(job)).state == "done"
            answer = await scientist.ask("GET", f"/v1/jobs/{job}/receipt")
            proof = checkpoint.read_proof(codec.from_json(ReceiptBundle, answer).proof)
            by = note.verify(proof.signed, map(note.verifier, keys))
            assert {v.name for v in by} == {"w0.example", "w1.example"}
            assert checkpoint.read(proof.signed.text).size > proof.place

    run_async(work())


@pytest.mark.parametrize("conduct", ["down", "garbage", "wrong-key", "other-text", "lies-more"])
def test_without_enough_of_them_nothing_is_charged_and_no_key_used(conduct: str) -> None:
    """And when the witness is itself again, the job that waited runs."""

    async def work() -> None:
        net, keys = witnesses("honest", conduct, conduct)
        script = Script()
        async with at(fresh_disk(), net, script) as desk:
            scientist, info = await parties(desk, keys, 2)
            job = (await scientist.submit(await scientist.quote(info))).job
            await turns(desk)
            assert (await scientist.status(job)).state == "queued"
            assert (ran(script), catalog.account(desk.service.store, info.dataset).jobs) == (0, 0)
            net.witnesses[URLS[1]].conduct = "honest"
            assert (await scientist.finished(job)).state == "done"

    run_async(work())


def test_a_receipt_has_enough_cosignatures_though_the_log_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Entries that come between the witnesses' answer and the release are not under its proof."""
    real = release.seal_key

    def grows(store, *rest):
        store_enrol(store)
        return real(store, *rest)

    def store_enrol(store) -> None:
        catalog.enrol(store, Identity.generate("late").public)

    monkeypatch.setattr(release, "seal_key", grows)

    async def work() -> None:
        net, keys = witnesses("honest", "honest", "honest")
        async with at(fresh_disk(), net) as desk:
            scientist, info = await parties(desk, keys, 3)
            job = (await scientist.submit(await scientist.quote(info))).job
            assert (await scientist.finished(job)).state == "done"
            answer = await scientist.ask("GET", f"/v1/jobs/{job}/receipt")
            proof = checkpoint.read_proof(codec.from_json(ReceiptBundle, answer).proof)
            assert len(note.verify(proof.signed, map(note.verifier, keys))) == 3
            assert checkpoint.read(proof.signed.text).size < desk.service.store.size()

    run_async(work())


@pytest.mark.parametrize("when", ["reserved", "committed"])
def test_witnesses_that_fall_silent_hold_keys_and_results_back(when: str) -> None:
    async def work() -> None:
        net, keys = witnesses("honest", "honest")
        script = Script(hold=asyncio.Event())
        async with at(fresh_disk(), net, script) as desk:
            scientist, info = await parties(desk, keys, 2)
            store, quiet = desk.service.store, net.witnesses[URLS[0]]
            if when == "reserved":
                real = ledger.reserve

                def reserve(*args):
                    quiet.conduct = "down"
                    return real(*args)

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(ledger, "reserve", reserve)
                    job = (await scientist.submit(await scientist.quote(info))).job
                    await desk.until(lambda: ledger.job(store, job).state == "reserved")
                    await turns(desk)
                    assert (ledger.job(store, job).state, ran(script)) == ("reserved", 0)
            else:
                job = (await scientist.submit(await scientist.quote(info))).job
                await desk.until(lambda: ran(script) == 1)
                quiet.conduct = "down"
            script.hold.set()
            if when == "committed":
                await desk.until(lambda: ledger.job(store, job).state == "committed")
                await turns(desk)
                for thing in ("result", "receipt"):
                    with pytest.raises(Refused):
                        await scientist.ask("GET", f"/v1/jobs/{job}/{thing}")
                assert (await scientist.status(job)).state == "running"
            quiet.conduct = "honest"
            assert (await scientist.finished(job)).state == "done"
            await scientist.ask("GET", f"/v1/jobs/{job}/receipt")

    run_async(work())


async def _bystander(desk: Desk) -> tuple[Person, DatasetInfo]:
    """Somebody else, whose dataset asks for no witness."""
    owner, scientist = await desk.person("other owner"), await desk.person("other scientist")
    return scientist, await owner.push()


@pytest.mark.parametrize("when", ["queued", "reserved", "committed"])
def test_a_silent_witness_holds_up_nobody_else(when: str) -> None:
    """An owner who names a witness that never answers: the jobs on that data wait, all others run,
    though there is one place for them."""

    async def work() -> None:
        net, keys = witnesses("honest")
        script = Script(hold=asyncio.Event())
        async with at(fresh_disk(), net, script) as desk:
            scientist, info = await parties(desk, keys, 1)
            other, free = await _bystander(desk)
            store, quiet = desk.service.store, net.witnesses[URLS[0]]
            quotes = [await scientist.quote(info) for _ in range(3)]
            beside = [await other.quote(free) for _ in range(3)]

            def falls_silent(state: str, real):
                def wrapped(*args, **named):
                    if state == when:
                        quiet.conduct = "down"
                    return real(*args, **named)

                return wrapped

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ledger, "reserve", falls_silent("reserved", ledger.reserve))
                patch.setattr(ledger, "commit", falls_silent("committed", ledger.commit))
                quiet.conduct = "down" if when == "queued" else "honest"
                desk.clock.now += FRESH  # since its last word
                script.hold.set()
                waits = [(await scientist.submit(quote)).job for quote in quotes]
                await desk.until(lambda: ledger.job(store, waits[0]).state == when)
                for quote in beside:
                    job = (await other.submit(quote)).job
                    assert (await other.finished(job)).state == "done"
                await turns(desk)
                states = [ledger.job(store, job).state for job in waits]
                assert states == [when, "queued", "queued"]
            quiet.conduct = "honest"
            for job in waits:
                assert (await scientist.finished(job)).state == "done"
            jobs = store.all("SELECT id FROM jobs WHERE id IN (?, ?, ?) ORDER BY ended", *waits)
            assert [id for (id,) in jobs] == waits  # in the order in which they came

    run_async(work())


class SilentNet(WitnessNet):
    """Witnesses of which those in ``silent`` take a request and never answer."""

    silent: tuple[str, ...] = ()

    async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        if url.startswith(self.silent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), seconds)
            raise Unreachable
        return await super().ask(url, body, seconds=seconds)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_witness_that_never_answers_does_not_delay_what_others_suffice_for(ahead: bool) -> None:
    """Jobs of other owners, with an honest witness and with none, though one that waits for the
    silent one stands first; and each ask of it takes :data:`ASK_SECONDS`."""

    async def work() -> None:
        made = [FakeWitness(f"w{i}.example") for i in range(2)]
        net = SilentNet(dict(zip(URLS, made, strict=False)))
        net.silent = (URLS[1],)
        async with at(fresh_disk(), net) as desk:
            began = asyncio.get_running_loop().time()
            scientist, info = await parties(desk, (made[0].vkey,), 1)
            _, slow = await parties(desk, (made[1].vkey,), 1)
            other, free = await _bystander(desk)
            jobs = [(scientist, info), (other, free)] * 2
            if ahead:
                waits = (await scientist.submit(await scientist.quote(slow))).job
            for who, of in jobs:
                job = (await who.submit(await who.quote(of))).job
                assert (await who.finished(job)).state == "done"
            taken = asyncio.get_running_loop().time() - began
            assert taken < ASK_SECONDS / 2, "nobody waited for it"
            if ahead:
                found = await scientist.status(waits)
                assert found.state == "queued"
                assert "witnesses" in found.message, "the scientist is told what it waits for"

    run_async(work())


@pytest.mark.parametrize("change", ["push", "policy", "no-witness", "epoch", "revoke", "approve"])
def test_a_change_by_an_owner_is_shown_to_the_witnesses_soon(change: str) -> None:
    """So that a state from before it is stopped, whoever comes first; also where the witness was
    away for a while."""

    async def work() -> None:
        net, keys = witnesses("honest")
        disk = fresh_disk()
        async with at(disk, net) as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            policy = Policy(
                scientists=("*",), witnesses=keys, cosignatures=1, approval="each-quote"
            )
            info = await owner.push(policy=policy)
            quote = await scientist.quote(info)
            store, witness = desk.service.store, net.witnesses[URLS[0]]
            origin = log.key(store).origin

            def seen() -> bool:
                return origin in witness.heads and witness.heads[origin].size == store.size()

            await desk.until(seen)
            old = disk.snapshot()
            witness.conduct = "down"
            place = f"/v1/datasets/{info.dataset}"
            if change == "push":
                await owner.push(policy=policy)
            elif change == "policy":
                await owner.ask("PUT", f"{place}/policy", dataclasses.replace(policy, resumes=0))
            elif change == "no-witness":
                await owner.ask("PUT", f"{place}/policy", Policy(scientists=("*",)))
            elif change == "epoch":
                await owner.ask("POST", f"{place}/epoch", {"epoch": info.epoch + 1})
            elif change == "revoke":
                await owner.ask("DELETE", place)
            else:
                await owner.ask("POST", f"/v1/quotes/{codec.digest(quote)}/approval")
            await turns(desk)
            assert not seen()
            witness.conduct = "honest"
            await desk.until(seen)
        async with at(SimDisk.of(old), net) as desk:
            await desk.until(lambda: desk.service.broken is not None)

    run_async(work())


def test_a_committed_job_that_meets_a_fault_goes_out_later(monkeypatch: pytest.MonkeyPatch) -> None:
    real, faults = release.seal_key, [OSError(), OSError()]

    def seal_key(*given):
        if faults:
            raise faults.pop()
        return real(*given)

    monkeypatch.setattr(release, "seal_key", seal_key)

    async def work() -> None:
        net, keys = witnesses("honest")
        async with at(fresh_disk(), net) as desk:
            scientist, info = await parties(desk, keys, 1)
            job = (await scientist.submit(await scientist.quote(info))).job
            assert (await scientist.finished(job)).state == "done"
            assert not faults

    run_async(work())


@pytest.mark.parametrize("when", ["queued", "reserved"])
def test_a_job_that_waits_for_witnesses_can_be_ended(when: str) -> None:
    async def work() -> None:
        net, keys = witnesses("honest")
        script = Script()
        async with at(fresh_disk(), net, script) as desk:
            scientist, info = await parties(desk, keys, 1)
            store, quiet, real = desk.service.store, net.witnesses[URLS[0]], ledger.reserve

            def reserve(*args):
                quiet.conduct = "down"
                return real(*args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ledger, "reserve", reserve)
                quiet.conduct = "down" if when == "queued" else "honest"
                desk.clock.now += FRESH  # since its last word
                job = (await scientist.submit(await scientist.quote(info))).job
                await desk.until(lambda: ledger.job(store, job).state == when)
                await turns(desk)
            await scientist.ask("DELETE", f"/v1/jobs/{job}")
            assert (await scientist.status(job)).state == "cancelled"
            quiet.conduct = "honest"
            await turns(desk)
            assert (ledger.job(store, job).state, ran(script)) == ("cancelled", 0)
            assert catalog.account(store, info.dataset).jobs == (when == "reserved")

    run_async(work())


async def _cloned(
    net: WitnessNet, keys: Sequence[str], k: int
) -> tuple[SimDisk, SimDisk, str, Identity]:
    """A job that runs, and the disk copied: two machines hold its reservation."""
    disk, script = fresh_disk(), Script(hold=asyncio.Event())
    async with at(disk, net, script) as desk:
        scientist, info = await parties(desk, keys, k)
        job = (await scientist.submit(await scientist.quote(info))).job
        await desk.until(lambda: ran(script) == 1)
        files = disk.snapshot()
    return SimDisk.of(files, 1), SimDisk.of(files, 2), job, scientist.identity


async def _released(disk: SimDisk, net: WitnessNet, job: str, identity: Identity) -> bool:
    """Whether this copy lets a result out."""
    desk = at(disk, net)
    try:
        async with desk:
            for _ in range(300):
                if desk.service.broken is not None:
                    return False
                if ledger.job(desk.service.store, job).state == "done":
                    return True
                await asyncio.sleep(0.002)
            return False
    except LedgerError as e:
        assert e.code == "ledger.rolled-back"
        return False


@pytest.mark.parametrize("conducts", [("honest",), ("honest", "honest", "forks")])
def test_of_two_clones_one_lets_its_result_out(conducts: tuple[str, ...]) -> None:
    """Also where fewer than enough witnesses are dishonest."""

    async def work() -> None:
        net, keys = witnesses(*conducts)
        one, two, job, identity = await _cloned(net, keys, len(keys) // 2 + 1)
        found = [await _released(d, net, job, identity) for d in (one, two)]
        assert found == [True, False]

    run_async(work())


def test_without_witnesses_both_clones_let_results_out_and_their_logs_tell() -> None:
    """What stays open without a witness: it is found by comparing checkpoints, not prevented."""

    async def work() -> None:
        net, _ = witnesses()
        one, two, job, identity = await _cloned(net, (), 0)
        assert [await _released(d, net, job, identity) for d in (one, two)] == [True, True]
        async with at(one, net) as first:
            seen = str(log.sign(first.service.store))
        async with at(two, net) as second:
            with pytest.raises(LedgerError) as e:
                log.check(second.service.store, note.parse(seen))
            assert e.value.code == "ledger.rolled-back"

    run_async(work())


@pytest.mark.full
@pytest.mark.parametrize("conduct", USELESS)
def test_no_useless_witness_is_taken_for_a_good_one(conduct: str) -> None:
    test_without_enough_of_them_nothing_is_charged_and_no_key_used(conduct)


def test_a_restored_state_is_stopped_by_its_witness_at_the_start() -> None:
    async def work() -> None:
        net, keys = witnesses("honest")
        disk = fresh_disk()
        async with at(disk, net) as desk:
            scientist, info = await parties(desk, keys, 1)
            await desk.service.publisher.ask()
            old = disk.snapshot()
            job = (await scientist.submit(await scientist.quote(info))).job
            await scientist.finished(job)
        stopped: list[bool] = []
        desk = at(SimDisk.of(old), net)
        desk.service.stop = lambda: stopped.append(True)
        async with desk:
            await desk.until(lambda: desk.service.broken is not None)
            assert desk.service.broken is not None
            assert desk.service.broken.code == "ledger.rolled-back"
            assert stopped

    run_async(work())


def _header(text: str) -> dict[str, str]:
    return {"casemate-checkpoint": base64.b64encode(text.encode()).decode()}


def test_a_client_with_a_newer_checkpoint_stops_a_restored_state() -> None:
    """It is refused, and so is everyone after it."""

    async def work() -> None:
        net, _ = witnesses()
        disk = fresh_disk()
        async with at(disk, net) as desk:
            scientist, info = await parties(desk, (), 0)
            old = disk.snapshot()
            job = (await scientist.submit(await scientist.quote(info))).job
            await scientist.finished(job)
            seen = (await desk.http.get("/log/checkpoint")).text
            await scientist.ask("GET", "/v1/datasets", headers=_header(seen))
        stopped: list[bool] = []
        desk = at(SimDisk.of(old), net)
        desk.service.stop = lambda: stopped.append(True)
        async with desk:
            scientist = Person(desk, scientist.identity)
            await scientist.ask("GET", "/v1/datasets")
            with pytest.raises(Refused) as e:
                await scientist.ask("GET", "/v1/datasets", headers=_header(seen))
            assert (e.value.code, stopped) == ("ledger.rolled-back", [True])
            now = (await desk.http.get("/log/checkpoint")).text
            with pytest.raises(Refused) as e:
                await scientist.ask("GET", "/v1/datasets", headers=_header(now))
            assert e.value.code == "ledger.rolled-back"

    run_async(work())


def test_a_checkpoint_that_the_log_never_signed_stops_nobody() -> None:
    async def work() -> None:
        net, _ = witnesses()
        async with at(fresh_disk(), net) as desk:
            owner = await desk.person("owner")
            mine = log.key(desk.service.store)
            head = checkpoint.Checkpoint(mine.origin, 10**6, bytes(32))
            forged = str(checkpoint.sign(head, mine.public, lambda _: bytes(64)))
            for text in (forged, "x", forged.replace(mine.origin, "other/log")):
                with pytest.raises(Refused) as e:
                    await owner.ask("GET", "/v1/datasets", headers=_header(text))
                assert e.value.code.split(".")[0] in ("receipt", "format")
            for header in ("?", "AAAA"):
                with pytest.raises(Refused):
                    await owner.ask("GET", "/v1/datasets", headers={"casemate-checkpoint": header})
            assert desk.service.broken is None
            await owner.ask("GET", "/v1/datasets")

    run_async(work())


def test_a_seeded_bug_lets_both_clones_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ledger's own gate both use their keys and let their results out."""
    monkeypatch.setattr(ledger, "witnessed", lambda *_: True)

    async def work() -> None:
        net, keys = witnesses("honest")
        one, two, job, identity = await _cloned(net, keys, 1)
        net.witnesses[URLS[0]].conduct = "down"
        found = [await _released(d, net, job, identity) for d in (one, two)]
        assert found == [True, True]

    run_async(work())

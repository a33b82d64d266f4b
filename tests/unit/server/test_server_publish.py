"""Asking witnesses: who is asked, who is left alone for how long."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from casemate.ledger import catalog, ledger, log, recovery
from casemate.seal import checkpoint
from casemate.seal.identity import Identity
from casemate.seams import HttpNet, Unreachable
from casemate.server.logs import Log
from casemate.server.metrics import Metrics
from casemate.server.publish import FIRST_WAIT, LONGEST_WAIT, Publisher
from casemate.spec.data import Policy
from support.desk import Desk, HandClock, WitnessNet, fresh_disk, run_async
from support.disk import SimDisk
from support.ledgers import Witness, attestation, push, queue
from support.passing import OLD, opened, owner, started, to_recovery
from support.witness import FakeWitness

URLS = ("https://w0.example", "https://w1.example")


class CountingNet(WitnessNet):
    """``asked``: every call, by witness."""

    def __init__(self, witnesses: dict[str, FakeWitness]) -> None:
        super().__init__(witnesses)
        self.asked: list[str] = []

    async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        self.asked.append(next(u for u in URLS if url.startswith(u)))
        return await super().ask(url, body, seconds=seconds)


def desk_of(*conducts: str) -> tuple[Desk, CountingNet, HandClock]:
    made = [FakeWitness(f"w{i}.example", conduct=c) for i, c in enumerate(conducts)]
    net, clock = CountingNet(dict(zip(URLS, made, strict=True))), HandClock()
    desk = Desk(fresh_disk(), clock, net=net, witnesses=URLS)
    for witness in made:
        witness.watch(log.key(desk.service.store).verifier)
    return desk, net, clock


def grow(desk: Desk) -> None:
    """One more entry: there is a new head to cosign."""
    catalog.enrol(desk.service.store, Identity.generate("someone").public)


@pytest.mark.parametrize("conduct", ["down", "garbage"])
def test_a_witness_that_does_not_answer_is_left_alone_for_longer_and_longer(conduct: str) -> None:
    desk, net, clock = desk_of("honest", conduct)
    publisher = desk.service.publisher

    async def work() -> None:
        assert publisher.rest(URLS[1]) == LONGEST_WAIT
        wait = FIRST_WAIT
        for _ in range(10):
            net.asked.clear()
            grow(desk)
            await publisher.ask()
            assert {*URLS} == set(net.asked)
            assert publisher.rest(URLS[1]) == pytest.approx(wait)
            await clock.advance(wait - 0.25)
            net.asked.clear()
            grow(desk)
            await publisher.ask()  # the other one is asked all the same
            assert set(net.asked) == {URLS[0]}
            await clock.advance(0.25)
            assert publisher.rest(URLS[1]) == 0.0
            wait = min(2 * wait, LONGEST_WAIT)
        net.witnesses[URLS[1]].conduct = "honest"
        await publisher.ask()
        assert publisher.rest(URLS[1]) == LONGEST_WAIT
        net.asked.clear()
        grow(desk)
        await publisher.ask()
        assert set(net.asked) == {*URLS}

    run_async(work())


@pytest.mark.parametrize("conduct", ["honest", "down"])
def test_who_has_cosigned_the_newest_head_or_is_left_alone_is_not_asked(conduct: str) -> None:
    desk, net, _ = desk_of(conduct, conduct)

    async def work() -> None:
        await desk.service.publisher.ask()
        net.asked.clear()
        await desk.service.publisher.ask()
        assert net.asked == []

    run_async(work())


def test_one_that_answers_byte_by_byte_is_given_up() -> None:
    """Each byte within the time, all of them never."""

    async def work() -> None:
        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)

        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        began = time.monotonic()
        with pytest.raises(Unreachable):
            await HttpNet().ask(f"http://127.0.0.1:{port}", b"", seconds=0.5)
        assert time.monotonic() - began < 5
        server.close()

    run_async(work())


def test_a_fault_of_one_answer_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, net, _ = desk_of("honest", "honest")
    real = net.ask

    async def ask(url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        if url.startswith(URLS[0]):
            raise ZeroDivisionError
        await asyncio.sleep(0.01)
        return await real(url, body, seconds=seconds)

    monkeypatch.setattr(net, "ask", ask)

    async def work() -> None:
        await desk.service.publisher.ask()
        size = desk.service.store.size()
        assert [desk.service.publisher.shown(url) for url in URLS] == [-1, size]

    run_async(work())


def test_a_head_from_before_a_recovery_is_a_refusal() -> None:
    """Anybody who kept what the recovery gave up can show it, for a witness that shouts a size. It
    costs that cosignature; no job fails by it."""
    disk = SimDisk()
    store = started(disk, 1)
    good = Witness("good.example")
    policy = Policy(scientists=("*",), witnesses=(good.vkey,), cosignatures=1)
    info = push(store, "a", owner().public, policy=policy)
    store.empty_wal()
    store.close()
    kept = disk.snapshot()
    store = started(disk, 2)
    lost = str(log.sign(store))
    store.close()
    store = opened(SimDisk.of(kept), 3)
    asked = recovery.request(store, lost)
    recovery.recover(store, asked, [to_recovery(asked, info, owner(), rest=False)])
    recovery.start(store, attestation(store), software="a test", measurement=OLD)
    job = queue(store, "1", (info,))

    class Net:
        async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
            if url.startswith(URLS[0]):
                return (200, lost.encode()) if body is None else (409, b"999999\n")
            assert body is not None
            signed = checkpoint.read_request(body).signed
            return 200, str(good.sign(signed).lines[-1]).encode()

    lines: list[str] = []
    clock = HandClock()
    publisher = Publisher(store, Net(), clock, Log(lines.append, clock), Metrics(), URLS)

    async def work() -> None:
        await publisher.ask()
        assert "ledger.recovered" in "".join(lines)
        assert await publisher.witnessed(job, 0)
        ledger.reserve(store, job)
        granted = ledger.job(store, job).granted
        assert granted is not None
        assert await publisher.witnessed(job, granted)

    run_async(work())
    store.close()

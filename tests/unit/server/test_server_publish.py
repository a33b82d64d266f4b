"""Asking witnesses: who is asked, who is left alone for how long."""

from __future__ import annotations

import pytest

from casemate.ledger import log
from casemate.server.publish import FIRST_WAIT, LONGEST_WAIT
from support.desk import Desk, HandClock, WitnessNet, fresh_disk, run_async
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


@pytest.mark.parametrize("conduct", ["down", "garbage"])
def test_a_witness_that_does_not_answer_is_left_alone_for_longer_and_longer(conduct: str) -> None:
    desk, net, clock = desk_of("honest", conduct)
    publisher = desk.service.publisher

    async def work() -> None:
        assert publisher.rest() == LONGEST_WAIT
        wait = FIRST_WAIT
        for _ in range(10):
            net.asked.clear()
            await publisher.ask()
            assert {*URLS} == set(net.asked)
            assert publisher.rest() == pytest.approx(wait)
            await clock.advance(wait - 0.25)
            net.asked.clear()
            await publisher.ask()  # the other one is asked all the same
            assert set(net.asked) == {URLS[0]}
            await clock.advance(0.25)
            assert publisher.rest() == 0.0
            wait = min(2 * wait, LONGEST_WAIT)
        net.witnesses[URLS[1]].conduct = "honest"
        await publisher.ask()
        assert publisher.rest() == LONGEST_WAIT
        net.asked.clear()
        await publisher.ask()
        assert set(net.asked) == {*URLS}

    run_async(work())


def test_where_all_are_left_alone_nobody_is_asked() -> None:
    desk, net, _ = desk_of("down", "down")

    async def work() -> None:
        await desk.service.publisher.ask()
        net.asked.clear()
        await desk.service.publisher.ask()
        assert net.asked == []

    run_async(work())

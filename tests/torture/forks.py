"""Snapshots of the state folder, put back or run twice, at random moments.

Somebody who stands outside the machine always knows more than the snapshot: a client that keeps
the newest head, or the witnesses. Each time the start is refused, or the server is told and stops,
or two clients that compare their heads see that there are two logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass

from casemate.server.app import CHECKPOINT_HEADER
from casemate.spec.data import Budget
from support.disk import SimDisk
from support.simloop import simulate
from support.simserver import cheap, extends, head
from torture.clients import OWNERS, SCIENTISTS, Client, Owner, Scientist, person
from torture.model import demand
from torture.sim import BASES, begin
from torture.world import Seen, World, starts

PLAYS = ("restore", "restore the ledger", "restore one file", "fork", "fork and compare")
GUEST = "guest"
WIDE = Budget(epsilon=50.0, delta=1e-2)


@dataclass
class Found:
    """``play``, and who noticed."""

    play: str
    by: str


class Fork:
    """One snapshot and its use. :meth:`play` raises :class:`torture.model.Violation`."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.world = world = World(seed=seed, careful=0.5)
        self.number = self.draw.randrange(BASES)
        world.disk = begin(world, self.number)
        self.how = self.draw.choice(PLAYS)

    def _clients(self, names: tuple[str, ...]) -> list[Client]:
        people: list[Client] = [Owner(self.world, n, (WIDE,)) for n in names if n in OWNERS]
        return people + [Scientist(self.world, n, hasty=True) for n in names if n in SCIENTISTS]

    async def _live(self, names: tuple[str, ...], seconds: float) -> None:
        """Some clients live for a while; what they meet is not looked at here."""
        lives = [asyncio.ensure_future(c.live(20)) for c in self._clients(names)]
        await asyncio.wait(lives, timeout=seconds)
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    async def _one_more(self) -> None:
        """An entry of the log that somebody outside knows of."""
        world = self.world
        trouble, world.trouble = world.trouble, 0.0
        assert world.boot is not None
        size = head(world.boot.service)[0]
        guest = Client(world, GUEST)
        await guest.enrol()
        demand(guest.id in world.model.enrolled, "an honest server refuses")
        await world.remember(guest.identity)
        demand(world.heads[GUEST].size > size, "the head did not grow")
        world.trouble = trouble

    async def play(self) -> Found:
        world, draw = self.world, self.draw
        try:
            why = await starts(world.start(world.disk))
            demand(not why, f"no start: {why}")
            await self._live((*OWNERS, *SCIENTISTS), draw.uniform(0, 10))
            copied = world.disk.snapshot()
            await self._live((*OWNERS, *SCIENTISTS), draw.uniform(0, 10))
            await self._one_more()
            newest = world.disk.snapshot()
            await self._off()
            by = await self._use(copied, newest)
        finally:
            with contextlib.suppress(OSError):
                await world.stop()
        return Found(self.how, by)

    async def _off(self) -> None:
        self.world.disk.turn_off()
        await self.world.stop()

    async def _use(self, old: dict[str, bytes], new: dict[str, bytes]) -> str:
        if self.how.startswith("fork"):
            return await self._fork(old)
        mixed = dict(old)
        if self.how == "restore the ledger":
            mixed = {**new, **{n: d for n, d in old.items() if n.startswith("ledger/")}}
        elif self.how == "restore one file":
            # The database without its log, or the log without its database.
            one = self.draw.choice([n for n in old if n.startswith("ledger/")])
            mixed = {**new, one: old[one]}
        why = await starts(self.world.start(SimDisk.of(mixed, self.draw.getrandbits(32))))
        if why:
            demand(why.startswith("ledger."), f"the start ended with {why}")
            return "the start"
        return await self._told(self.world.heads)

    async def _told(self, heads: dict[str, Seen]) -> str:
        """Who stops the server: a witness by itself, or the first client whose head is not there.

        Where every head is in the log, the copy lacks nothing that anybody outside knows of."""
        world = self.world
        boot = world.boot
        assert boot is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(boot.dead.wait(), 5.0)
            broken = boot.service.broken
            demand(
                broken is not None and broken.code == "ledger.rolled-back", f"stopped by {broken}"
            )
            return "a witness"
        lacking = [n for n, s in heads.items() if not extends(boot.service, (s.size, s.root))]
        if not lacking:
            demand(self.how == "restore one file", "a whole older copy lacks nothing")
            world.check_what_is_known()
            return "nobody: nothing is lacking"
        world.heads = heads
        message = world.with_head(person(lacking[0]))
        demand(any(k.decode() == CHECKPOINT_HEADER for k, _ in message.headers), "no head is shown")
        answer = await boot.deliver(message)
        code = answer.code if answer is not None else "no answer"
        demand(code == "ledger.rolled-back", f"a newer head was answered with {code!r}")
        after = await boot.deliver(world.with_head(person(lacking[0])))
        demand(after is None or after.code == "ledger.rolled-back", "it serves after it was told")
        return "a client"

    async def _fork(self, old: dict[str, bytes]) -> str:
        """The copy lives on twice, each with other clients."""
        world = self.world
        before = dict(world.heads)
        known, net = world.model.copy(), world.net.known if world.net is not None else {}
        sides: list[dict[str, Seen]] = []
        for names in ((OWNERS[0], SCIENTISTS[0]), (OWNERS[1], SCIENTISTS[1])):
            world.model = known.copy()
            world.heads = {}
            why = await starts(world.start(SimDisk.of(old, self.draw.getrandbits(32))))
            demand(not why, f"a copy of a running server does not start: {why}")
            assert world.boot is not None
            if world.net is not None and world.net.known != net and sides:
                # The witnesses went with the first side.
                by = await self._told(before)
                return by if by == "a witness" else "a client before the witnesses"
            await self._live(names, self.draw.uniform(1, 6))
            if world.boot_is_dead:
                return "a witness"
            while names[0] not in world.heads and not world.boot_is_dead:
                await world.remember(person(names[0]))
            if world.boot_is_dead:
                return "a witness"
            sides.append(dict(world.heads))
            if len(sides) == 1:
                await self._off()
        if self.how == "fork and compare":
            return self._compare(*sides)
        return await self._told(sides[0])

    def _compare(self, one: dict[str, Seen], other: dict[str, Seen]) -> str:
        """Two clients hold their newest heads together; who has the second server before it asks
        whether the first one's is in its log."""
        assert self.world.boot is not None
        mine = max(one.values(), key=lambda s: s.size, default=None)
        demand(mine is not None and bool(other), "nobody kept a head")
        assert mine is not None
        same = extends(self.world.boot.service, (mine.size, mine.root))
        demand(not same, "two logs that grew apart look like one")
        return "two clients"


def fork(seed: int) -> Found:
    """Play one. Raises :class:`torture.model.Violation`."""
    played = Fork(seed)
    with cheap(signed=False):
        return simulate(played.play(), seed, played.world.fault)


def tally(found: list[Found]) -> Counter[str]:
    return Counter(f.by for f in found)

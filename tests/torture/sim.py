"""One simulated life of a server from one seed: clients, crashes, a hostile host, the reckoning.

An honest machine that loses its power may lose nothing that was acknowledged. A disk that lies and
a host that restores a snapshot may; then the start is refused, or the first client with a newer
head of the log finds it, or nothing that the log acknowledged is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from casemate.ledger import catalog
from casemate.spec.data import Budget, Policy
from support.disk import SimDisk
from support.simloop import simulate
from support.simserver import cheap, verdicts
from torture.clients import OWNERS, SCIENTISTS, SPECS, Client, Owner, Scientist, person, tight
from torture.model import ENDED, Model, Violation, charge_of, demand
from torture.world import Seen, Witnesses, World, starts

BASES = 4  # prepared servers
CALLS = 320  # of the disk, about, in a boot
HONEST = ("clean", "power", "kill")
# Errors that no disk, network or client may cause.
SLIPS = ("AttributeError", "TypeError", "KeyError", "ValueError", "NameError", "AssertionError")
FAULTS = ("EIO", "ENOSPC", "EMFILE", "SHORT")
HOSTILE = ("lie", "restore", "restore part")
PATIENCE = 400.0  # simulated seconds until every client is done
# A clock that jumped a day ahead puts the next public moment of a job a day off.
JOB_PATIENCE = 100 * 86_400.0


@dataclass
class Outcome:
    """How a run went. ``found``: by whom a rollback was noticed, where there was one; ``calls``: of
    the disk in the first boot."""

    calls: int = 0

    fates: list[str] = field(default_factory=list)
    found: str = ""
    acknowledged: int = 0
    jobs: int = 0
    seen: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Base:
    """A server with owners, datasets, scientists and quotes, shut down in order."""

    files: dict[str, bytes]
    model: Model
    heads: dict[str, Seen]
    boots: int
    witnessed: dict[str, tuple[dict[str, Any], ...]] | None


def budgets(model: Model, draw: random.Random) -> tuple[Budget, ...]:
    """Budgets that some jobs exhaust exactly, and wide ones."""
    known = {charge_of(q) for q in model.quotes.values()}
    wide = Budget(epsilon=20.0, delta=1e-2)
    if not known:
        return (wide,)
    ordered = sorted(known, key=lambda c: c.rdp_nano)
    one, other = draw.choice(ordered), draw.choice(ordered)
    chosen = ((one, 1), (other, 1)) if draw.random() < 0.3 else ((one, draw.choice((1, 2, 3))),)
    return wide, tight(chosen, False), tight(chosen, True)


async def _grow(world: World) -> None:
    await world.start(SimDisk(world.seed))
    owners = [Owner(world, name, budgets(world.model, world.draw)) for name in OWNERS]
    people = [Scientist(world, name) for name in SCIENTISTS]
    for client in (*owners, *people):
        await client.enrol()
    wide = []
    for owner in owners:
        wide.append(await owner.register(budget=Budget(epsilon=20.0, delta=1e-2)))
    await asyncio.sleep(20)
    for scientist, alone in zip(people, wide, strict=True):
        await scientist.quote(SPECS[0], on=alone)
        await scientist.quote(SPECS[1])
    # Budgets that one known charge exhausts exactly, and quotes that race for them.
    charge = charge_of(next(q for q in world.model.quotes.values() if len(q.datasets) == 1))
    train = next(q.request.train for q in world.model.quotes.values() if charge_of(q) == charge)
    for owner, over in zip(owners, (False, True), strict=True):
        taken = ((charge, world.draw.choice((1, 2, 3))),)
        name = await owner.register(budget=tight(taken, over), policy=Policy(scientists=("*",)))
        await asyncio.sleep(20)
        for scientist in people * 2:
            await scientist.quote(train, on=name)
    await world.stop()


@cache
def base(number: int) -> Base:
    """One of a few prepared servers: what most runs begin with."""
    world = World(seed=number, trouble=0.0)
    if number % 2:
        world.net = Witnesses(world, {})
    with cheap(signed=False):
        simulate(_grow(world), number)
    assert len(world.model.datasets) == 4 and len(world.model.quotes) == 12, world.seen
    witnessed = world.net.known if world.net is not None else None
    return Base(world.disk.snapshot(), world.model, dict(world.heads), world.boots, witnessed)


def begin(world: World, number: int) -> SimDisk:
    """Go on from a prepared server; its disk."""
    begun = base(number)
    world.model, world.heads = begun.model.copy(), dict(begun.heads)
    world.boots = begun.boots + 100  # other boots, other randomness
    if begun.witnessed is not None:
        world.net = Witnesses(world, begun.witnessed)
    return SimDisk.of(begun.files, world.seed)


class Run:
    """One run; :meth:`play` raises :class:`Violation`."""

    def __init__(
        self,
        seed: int,
        *,
        signed: bool | None = None,
        fates: tuple[str, ...] | None = None,
        fresh: bool | None = None,
        at: int | None = None,
        hasty: bool | None = None,
    ) -> None:
        """``fates`` of the boots; ``fresh``: on an empty disk; ``at``: the disk's call that the
        first boot's fault comes at; ``hasty``: scientists begin with what they have."""
        self.at, self.hasty = at, hasty
        self.draw = draw = random.Random(seed)
        self.signed = draw.random() < 0.1 if signed is None else signed
        fresh = draw.random() < 0.1 if fresh is None else fresh
        jumps = draw.choice((0.0, 0.02))
        self.world = world = World(seed=seed, signed=self.signed, clock_jumps=jumps)
        if not fresh:
            world.disk = begin(world, draw.randrange(BASES))
        else:
            world.disk = SimDisk(seed)
        self.old = world.model.copy()
        self.outcome = Outcome()
        if fates is None:
            fates = tuple(draw.choices(HONEST, (1, 3, 2), k=draw.choice((1, 1, 2))))
            last = draw.random()
            fates += (draw.choice(HOSTILE),) if last < 0.25 else ()
            fates += (draw.choice(FAULTS),) if last > 0.9 else ()
        self.fates = fates
        self.clients: list[Client] = []

    async def play(self) -> Outcome:
        world = self.world
        offered = budgets(world.model, self.draw)
        self.clients = [Owner(world, name, offered) for name in OWNERS]
        hasty = self.draw.random() < 0.4 if self.hasty is None else self.hasty
        self.clients += [Scientist(world, name, hasty=hasty) for name in SCIENTISTS]
        lives = [
            asyncio.ensure_future(c.live(3 if isinstance(c, Owner) else 6)) for c in self.clients
        ]
        disk = world.disk
        try:
            for fate in self.fates:
                self.outcome.fates.append(fate)
                disk = await self._boot(fate, disk, lives)
                if fate in HOSTILE:
                    await self._reckon_with_the_host(disk)
                    return self._done()
            await self._last(disk, lives)
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)
            with contextlib.suppress(OSError):
                await world.stop()
        return self._done()

    def _done(self) -> Outcome:
        demand(not self.world.wrong, "; ".join(self.world.wrong[:3]))
        slips = [line for line in self.world.logs if any(f'"error":"{s}"' in line for s in SLIPS)]
        demand(not slips, f"a fault of the program: {slips[:1]}")
        self.outcome.acknowledged = self.world.model.acknowledged
        self.outcome.jobs = len(self.world.model.charged)
        self.outcome.seen = self.world.seen
        return self.outcome

    async def _boot(self, fate: str, disk: SimDisk, lives: list[asyncio.Future[None]]) -> SimDisk:
        """One start and its end: the disk that the next one finds."""
        draw, world = self.draw, self.world
        old = disk.snapshot()
        if fate in ("power", "kill", "lie"):
            disk.fault = (self._call(), "POWER")
        elif fate in FAULTS:
            disk.counts_opens = True
            disk.fault = (self._call(), fate)
        disk.lies = draw.choice((0.02, 0.3, 1.0)) if fate == "lie" else 0.0
        why = await starts(world.start(disk))
        if why:
            demand(disk.fault is not None and len(disk.trace) >= disk.fault[0], f"no start: {why}")
        else:
            await self._until(lives, draw.uniform(3, 40), old if "restore" in fate else None)
            if fate in FAULTS and not world.boot_is_dead:
                await self._goes_on(lives)
        self.outcome.calls = self.outcome.calls or len(disk.trace)
        if fate not in ("clean", *FAULTS) and not disk.off:
            disk.turn_off()
        await world.stop()
        clean = fate in ("clean", "kill") or (fate in FAULTS and draw.random() < 0.5)
        if "restore" in fate:
            return self._restored(fate, disk, old)
        return disk.power_cycle(clean=clean)

    def _call(self) -> int:
        """Which call of the disk is the fatal one."""
        drawn = self.draw.randrange(1, CALLS)
        return drawn if self.at is None else self.at

    async def _until(
        self, lives: list[asyncio.Future[None]], seconds: float, old: dict[str, bytes] | None
    ) -> None:
        """Let the clients live until the time is over, all are done, or the machine stops."""
        world = self.world
        assert world.boot is not None
        dead = asyncio.ensure_future(world.boot.dead.wait())
        if old is not None:  # the host copies the disk while it is written
            await asyncio.wait({dead}, timeout=self.draw.uniform(0, seconds))
            world.snapshots.append(world.disk.snapshot())
        await asyncio.wait({dead}, timeout=seconds)
        dead.cancel()
        for life in lives:
            if life.done() and life.exception() is not None:
                raise life.exception() or AssertionError

    async def _goes_on(self, lives: list[asyncio.Future[None]]) -> None:
        """A server that did not stop at an error of the disk does all that it should."""
        trouble, self.world.trouble = self.world.trouble, 0.0
        for client in self.clients:
            if isinstance(client, Scientist) and not self.world.boot_is_dead:
                await self._jobs_end(client)
        self.world.trouble = trouble

    def _restored(self, fate: str, disk: SimDisk, old: dict[str, bytes]) -> SimDisk:
        """What the host puts in the place of the disk."""
        draw, now = self.draw, disk.snapshot()
        before = draw.choice([old, *self.world.snapshots])
        if fate == "restore":
            return SimDisk.of(before, draw.getrandbits(32))
        files = sorted(set(now) | set(before))
        taken = set(draw.sample(files, draw.randrange(1, len(files) + 1)))
        mixed = {n: (before if n in taken else now).get(n) for n in files}
        return SimDisk.of({n: d for n, d in mixed.items() if d is not None}, draw.getrandbits(32))

    async def _reckon_with_the_host(self, disk: SimDisk) -> None:
        world = self.world
        if why := await starts(world.start(disk)):
            self.outcome.found = f"start refused: {why}"
            return
        assert world.boot is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.boot.dead.wait(), 5.0)
            self.outcome.found = "the server was told"
            demand(self.witness_stopped(), f"stopped by {world.boot.service.broken}")
            return
        if who := world.who_finds():
            assert world.boot is not None
            self.outcome.found = "a client with a newer head"
            answer = await world.boot.deliver(world.with_head(person(who)))
            code = answer.code if answer is not None else ""
            if code == "receipt.note-unsigned":  # a log under another key: no part of the old one
                self.outcome.found = "a client, at the log's key"
                return
            demand(code == "ledger.rolled-back", f"an unknown head was answered with {code!r}")
            demand(world.boot_is_dead, "the server goes on after a rollback was found")
            return
        self.outcome.found = "nothing logged is missing"
        world.check_what_is_known()

    def witness_stopped(self) -> bool:
        """Whether the server stopped because a witness knew more of its log."""
        boot = self.world.boot
        broken = boot.service.broken if boot is not None else None
        return broken is not None and broken.code == "ledger.rolled-back"

    # The end of an honest run.

    async def _last(self, disk: SimDisk, lives: list[asyncio.Future[None]]) -> None:
        world = self.world
        why = await starts(world.start(disk))
        demand(not why, f"the last start was refused: {why}")
        world.check_ledger()
        demand(not world.who_finds(), "a head that a client saw is not in the log")
        done, _ = await asyncio.wait(lives, timeout=PATIENCE)
        for life in done:
            life.result()
        demand(len(done) == len(lives), "the clients get nowhere")
        await world.settle()
        world.trouble = 0.0
        assert world.boot is not None
        demand(not world.boot.dead.is_set(), "the server stopped on a sound disk")
        for client in self.clients:
            await self._everything_is_there(client)
        self._words_are_there()
        world.check_ledger()
        demand(not world.who_finds(), "a head that a client saw is not in the log")

    async def _everything_is_there(self, client: Client) -> None:
        model, old = self.world.model, self.old
        for name, registration in list(model.datasets.items()):
            if registration.owner == client.id and self._worth(name in old.datasets):
                demand(await client.dataset(name) is not None, f"lost: {name}")
        for name, offset in model.offsets.items():
            mine = model.owner_of[name] == client.id and name not in model.used
            if mine and self._worth(name in old.offsets):
                answer = await client.ask("HEAD", f"/v1/uploads/{name}")
                have = -1 if answer is None else int(answer.headers.get("upload-offset", "-1"))
                demand(have >= offset, f"{name}: {have} of {offset} acknowledged bytes")
        if not isinstance(client, Scientist):
            return
        for digest in client.own_quotes:
            if not self._worth(digest in old.quotes):
                continue
            answer = await client.ask("GET", f"/v1/quotes/{digest}")
            demand(answer is not None and answer.status == 200, f"lost: {digest}")
        await self._jobs_end(client)
        await client.fetch()
        for job in client.own_jobs:
            done = model.jobs[job] == "done"
            demand(not done or job in model.receipts, f"{job} is done and has no receipt")
            demand(not done or job in model.results, f"{job} is done and has no result")

    async def _jobs_end(self, client: Scientist) -> None:
        until, pause = asyncio.get_running_loop().time() + JOB_PATIENCE, 1.0
        for job in client.own_jobs:
            while True:
                answer = await client.ask("GET", f"/v1/jobs/{job}")
                if answer is None or answer.status >= 500:
                    dead = self.world.boot_is_dead
                    demand(dead, f"{job} cannot be asked for and the server goes on")
                    return
                demand(answer.status == 200, f"lost: {job}")
                if client.saw_status(answer).state in ENDED:
                    break
                demand(asyncio.get_running_loop().time() < until, f"{job} never ends")
                await asyncio.sleep(pause := 2 * pause)

    def _worth(self, old: bool) -> bool:
        """Of what was there before the run a part is asked for: each run another one."""
        return not old or self.draw.random() < 0.25

    def _words_are_there(self) -> None:
        boot, model = self.world.boot, self.world.model
        assert boot is not None
        for (owner, digest), said in model.values.items():
            if owner == "policy":
                continue
            counts, words = verdicts(boot.service, digest)
            for name, word in words.items():
                if counts and catalog.dataset(boot.service.store, name).owner == owner:
                    demand((word or "") in said, f"{digest}: {said} was said, {word} is kept")


def run(seed: int, **options: object) -> Outcome:
    """Play one run. Raises :class:`Violation`, or what else should not have happened."""
    played = Run(seed, **options)  # type: ignore[arg-type]
    with cheap(signed=played.signed):
        return simulate(played.play(), seed, played.world.fault)


__all__ = ["Outcome", "Run", "Violation", "run"]

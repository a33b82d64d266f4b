"""Real servers killed with SIGKILL at random instants of a start and of life under load.

After each kill the folder is read (``kept``) and the next server starts on it. A series of kills
lives on one folder, so that later kills meet what earlier ones left; then all must be there still,
every job ended, and the clients served.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from casemate.seams import OsDisk
from casemate.spec.data import Budget, Policy
from support.simserver import remembered
from torture import kept
from torture.clients import OWNERS, SCIENTISTS, SPECS, Client, Owner, Scientist, tight
from torture.model import ENDED, Model, charge_of, demand
from torture.real import RealWorld
from torture.zygote import Zygote

SERIES = 25  # kills on one folder
EARLY = 0.2  # of the kills, within START seconds of the fork
START = 0.15
MOST = 24  # answers, of which another one gives some before it is killed,
LIFE = 2.0  # or within so many seconds
LAST_SECONDS = 120.0


@dataclass
class Tally:
    """What was seen over many kills."""

    kills: int = 0
    starting: int = 0  # of them before the server listened
    acknowledged: int = 0
    jobs: int = 0
    reads: int = 0
    log: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name in ("kills", "starting", "acknowledged", "jobs", "reads"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.log += other.log


@cache
def _keys() -> dict[str, bytes]:
    """The simulated TEE's files; its RSA keys take seconds to make."""
    from support.desk import fresh_disk

    return fresh_disk().snapshot()


def fresh(state: Path) -> None:
    """A state folder on which only the TEE has been."""
    for name, data in _keys().items():
        path = state / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_bytes(data)
        path.chmod(0o600)


def parties(world: RealWorld, budgets: tuple[Budget, ...]) -> list[Client]:
    people: list[Client] = [Owner(world, name, budgets) for name in OWNERS]
    return people + [Scientist(world, name, hasty=True) for name in SCIENTISTS]


async def _live(client: Client) -> None:
    """As long as one is let."""
    while True:
        await client.live(20)


async def _grow(world: RealWorld) -> None:
    """Two owners, four datasets, two of which hold one or two jobs exactly."""
    world.fork()
    await world.attach()
    wide = Budget(epsilon=200.0, delta=1e-2)
    clients = parties(world, (wide,))
    owners = [c for c in clients if isinstance(c, Owner)]
    people = [c for c in clients if isinstance(c, Scientist)]
    for client in clients:
        await client.enrol()
    charge = None
    for owner in owners:
        for budget in (wide, None):
            if budget is None:
                assert charge is not None
                budget = tight(((charge, 2),), owner is owners[0])
            name = await owner.register(budget=budget, policy=Policy(scientists=("*",)))
            while world.model.settled.get(name or "") != "ready":
                await owner.dataset(name or "")
            for scientist in people:
                digest = await scientist.quote(SPECS[0], on=name)
                assert digest is not None, world.seen
                charge = charge_of(world.model.quotes[digest])
    assert world.child is not None
    world.child.kill()
    world.gone()


def template(zygote: Zygote, folder: Path) -> Model:
    """A folder to begin every series with, and what its clients know."""
    fresh(folder / "template")
    world = RealWorld(0, zygote, folder / "template", folder / "template.journal")
    asyncio.run(_grow(world))
    return world.model


async def _series(world: RealWorld, kills: int, tally: Tally) -> None:
    key = kept.store_key(OsDisk(world.state))
    budgets = (
        Budget(epsilon=200.0, delta=1e-2),
        *(r.budget for r in world.model.datasets.values()),
    )
    clients = parties(world, budgets)
    lives = [asyncio.ensure_future(_live(c)) for c in clients]
    try:
        for _ in range(kills):
            await _one(world, lives, tally)
            with kept.opened(OsDisk(world.state), key) as there:
                kept.check(there, world.model, world.read())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await _last(world, clients)
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
    with kept.opened(OsDisk(world.state), key) as there:
        kept.check(there, world.model, world.read())


async def _one(world: RealWorld, lives: list[asyncio.Future[None]], tally: Tally) -> None:
    """A start, some life, a kill."""
    draw = world.draw
    child = world.fork(seconds=0.02)
    ready = asyncio.ensure_future(world.attach())
    early = draw.random() < EARLY
    await asyncio.wait({ready}, timeout=draw.uniform(0.01, START) if early else None)
    tally.starting += not ready.done()
    if not early:
        # After so many answers, however slow the machine is; then at any instant.
        wanted = world.model.acknowledged + draw.randrange(MOST)
        end = asyncio.get_running_loop().time() + LIFE
        while world.model.acknowledged < wanted and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.002)
        await asyncio.sleep(draw.uniform(0.0, 0.03))
    done = [life for life in lives if life.done()]
    demand(child.alive, f"the server ended by itself: {world.last_words()}")
    child.kill()
    world.gone()
    ready.cancel()
    await asyncio.gather(ready, return_exceptions=True)
    tally.kills += 1
    for life in done:
        life.result()


async def _last(world: RealWorld, clients: list[Client]) -> None:
    """A server that nobody kills serves all, and ends every job."""
    child = world.fork()
    await world.attach()
    async with asyncio.timeout(LAST_SECONDS):
        for client in clients:
            for name, registration in list(world.model.datasets.items()):
                if registration.owner == client.id:
                    demand(await client.dataset(name) is not None, f"lost: {name}")
            if isinstance(client, Scientist):
                for job in client.own_jobs:
                    while True:
                        answer = await client.ask("GET", f"/v1/jobs/{job}")
                        demand(answer is not None and answer.status == 200, f"lost: {job}")
                        assert answer is not None
                        if client.saw_status(answer).state in ENDED:
                            break
                        await asyncio.sleep(0.01)
                await client.fetch()
    child.kill()
    world.gone()


def series(
    zygote: Zygote, folder: Path, begun: Model, seed: int, kills: int, *, bug: str = ""
) -> Tally:
    """Some kills on a copy of the template, of servers with one of ``bugs.BUGS``. Raises
    :class:`torture.model.Violation`."""
    state, journal = folder / f"state{seed}", folder / f"journal{seed}"
    shutil.copytree(folder / "template", state)
    world = RealWorld(seed, zygote, state, journal, model=begun.copy(), bug=bug)
    tally = Tally()
    try:
        with remembered(), contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_series(world, kills, tally))
    finally:
        if world.child is not None and world.child.alive:
            world.child.kill()
    tally.acknowledged = world.model.acknowledged - begun.acknowledged
    tally.jobs = len(world.model.charged)
    tally.reads = sum(world.read().values())
    shutil.rmtree(state)
    return tally

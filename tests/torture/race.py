"""64 clients on one budget, over TLS against a real server: exactly what fits is granted.

Each client has some jobs and asks for every one of them several times, all at once. What was
granted, what the budget says and what the ledger charged must be the same number, which is counted
here with integers alone.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from casemate.accounting import filters
from casemate.ledger import catalog, ledger, recovery
from casemate.ledger.store import Store
from casemate.seal.identity import Identity
from casemate.seams import OsDisk
from casemate.server.config import software
from casemate.server.uploads import _offset_path, _slot, data_path
from casemate.spec.data import Budget
from casemate.tee import simulated
from support.ledgers import EVENT, ask, attestation, push
from support.simserver import CountingRng, remembered
from torture import kept
from torture.clients import Client
from torture.kills import fresh
from torture.model import demand
from torture.real import RealWorld
from torture.zygote import Zygote

CLIENTS = 64
JOBS = 4  # of each client
FITS = 24


@dataclass
class Raced:
    requests: int
    granted: int
    refused: int


def budget() -> Budget:
    """Of which FITS jobs take all but less than one."""
    charge = filters.RdpFilter.charge((EVENT,), 2e-9, delta_shown=1e-6)
    total = tuple((FITS * 2 + 1) * n // 2 for n in charge.rdp_nano)
    return Budget(epsilon=filters.epsilon(total, 1e-5), delta=1e-5)


def fitting(of: Budget) -> int:
    """How many such jobs a budget holds."""
    charge = filters.RdpFilter.charge((EVENT,), 2e-9, delta_shown=1e-6)
    count = 0
    while filters.fits(
        [(count + 1) * n for n in charge.rdp_nano], filters.capacities(of.epsilon, of.delta)
    ):
        count += 1
    return count


def _prepare(state: Path, people: list[Identity], of: Budget) -> tuple[str, dict[str, list[str]]]:
    """The store as it stands before the race: one dataset, and each client's quotes."""
    disk = OsDisk(state)
    store = Store.open(disk, kept.store_key(disk), b"before the race!", CountingRng(1))
    here = simulated.measurement().hex()  # another one's state would wait for its owners' consent
    recovery.start(store, attestation(store), software=software(), measurement=here)
    dataset = push(store, "raced for", budget=of)
    quotes = {}
    for person in people:
        catalog.enrol(store, person.public)
        quotes[person.id] = [
            ask(store, f"{person.id} {i}", (dataset,), scientist=person.public) for i in range(JOBS)
        ]
    (state / "uploads").mkdir(mode=0o700)
    for upload in catalog.uploads(store):  # sealed bytes, as if they had been sent
        (state / data_path(upload.id)).write_bytes(bytes(upload.size))
        (state / _offset_path(upload.id)).write_bytes(_slot(1, upload.size))
    store.close()
    return dataset, quotes


async def _race(
    world: RealWorld, people: list[Identity], wanted: dict[str, list[str]], times: int
) -> dict[str, Counter[str]]:
    """How each quote's submissions ended."""
    ends: dict[str, Counter[str]] = {}
    gate = asyncio.Event()

    async def one(person: Identity) -> None:
        client = Client(world, "owner")
        client.identity = person
        await client.ask("GET", "/v1/jobs")  # the connection is open
        await gate.wait()
        mine = [d for d in wanted[person.id] for _ in range(times)]
        world.draw.shuffle(mine)
        for digest in mine:
            answer = await client.ask("POST", "/v1/jobs", {"quote": digest}, tries=1)
            demand(answer is not None, "no answer")
            assert answer is not None
            ends.setdefault(digest, Counter())[answer.code or "granted"] += 1

    world.fork(prepared={"path": ["record"]})  # as support.ledgers quotes it
    await world.attach()
    tasks = [asyncio.ensure_future(one(p)) for p in people]
    await asyncio.sleep(0.5)
    gate.set()
    await asyncio.gather(*tasks)
    assert world.child is not None
    world.child.kill()
    world.gone()
    return ends


def race(zygote: Zygote, folder: Path, requests: int = 2560) -> Raced:
    """All clients at once; ``requests`` in all. Raises :class:`torture.model.Violation`."""
    times = max(1, requests // (CLIENTS * JOBS))
    state = folder / "race"
    fresh(state)
    people = [Identity.generate(f"client {i}", CountingRng(1000 + i)) for i in range(CLIENTS)]
    of = budget()
    dataset, wanted = _prepare(state, people, of)
    world = RealWorld(0, zygote, state, folder / "race.journal")
    ends = asyncio.run(_race(world, people, wanted, times))
    granted = {digest for digest, end in ends.items() if end["granted"]}
    kinds = set().union(*ends.values())
    demand(kinds <= {"granted", "budget.exhausted"}, f"other ends: {kinds}")
    most = fitting(of)
    demand(1 < most < CLIENTS * JOBS, f"nothing to race for: {most}")
    demand(len(granted) == most, f"{len(granted)} jobs were granted, {most} fit")
    for end in ends.values():
        # One at a time from each client: a job that was granted is the same job ever after.
        demand(end["granted"] in (0, times), f"now granted, now refused: {end}")
    disk = OsDisk(state)
    with remembered(), kept.opened(disk, kept.store_key(disk)) as there:
        rows = there.store.all("SELECT quote, state FROM jobs")
        demand({quote for quote, _ in rows} == granted, "other jobs are queued than were granted")
        charged = sum(
            ledger.job(there.store, job).reserved is not None
            for (job,) in there.store.all("SELECT id FROM jobs")
        )
        account = catalog.account(there.store, catalog.dataset(there.store, dataset).lineage)
        demand(account.jobs == charged <= most, f"{account.jobs} charged of {most}")
    shutil.rmtree(state)
    total = sum(sum(end.values()) for end in ends.values())
    return Raced(total, len(granted), total - sum(e["granted"] for e in ends.values()))

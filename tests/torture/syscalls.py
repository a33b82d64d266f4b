"""SIGKILL at every write, fsync and rename of one real server's life.

One owner and one scientist go through a fixed life (upload, dataset, quotes, a job to its end, a
cancelled one, policy, epoch, revocation, the start itself); the server runs in one thread, so that
its calls have one order, and is killed at the N-th. By strace, which injects the signal at the
system call; where no process may be traced, by the server itself before the N-th call of its disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from casemate.seams import OsDisk
from casemate.spec.data import Budget, Policy
from support.simserver import remembered
from torture import kept
from torture.clients import SPECS, Client, Owner, Scientist
from torture.kills import fresh
from torture.model import ENDED, Violation, demand
from torture.real import RealWorld
from torture.zygote import Child, Zygote

CALLS = "pwrite64,fsync,fdatasync,ftruncate,unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat"
WAYS = ("strace", "seam")
LIFE_SECONDS = 120.0


def can_trace() -> bool:
    """Whether this machine lets one process trace another."""
    strace = shutil.which("strace")
    if strace is None:
        return False
    tried = subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True, check=False)
    return tried.returncode == 0


def _strace(pid: int, number: int | None, out: Path | str) -> subprocess.Popen[bytes]:
    inject = [] if number is None else ["-e", f"inject={CALLS}:signal=SIGKILL:when={number}"]
    return subprocess.Popen(
        ["strace", "-qq", "-o", str(out), "-e", f"trace={CALLS}", *inject, "-p", str(pid)],
        stderr=subprocess.DEVNULL,
    )


class Dead(Exception):
    """The server was killed: the life ends here."""


async def _life(world: RealWorld, child: Child) -> None:
    """A fixed life; raises :class:`Dead` when the server does not answer any more."""

    async def alive(done: object) -> None:
        for _ in range(0 if done else 400):  # its connections end a little before it does
            if not child.alive:
                raise Dead
            await asyncio.sleep(0.005)
        demand(bool(done), f"the server refuses: {world.seen}")

    wide = Budget(epsilon=100.0, delta=1e-2)
    owner, scientist = Owner(world, "owner", (wide,)), Scientist(world, "scientist")

    async def until(holds: str, client: Client, path: str) -> None:
        while True:
            answer = await client.ask("GET", path, tries=1)
            await alive(answer)
            assert answer is not None
            if answer.json()["state"] in holds.split():
                return

    for client in (owner, scientist):
        await client.enrol()
        await alive(client.id in world.model.enrolled)
    names = []
    for approval in ("none", "each-quote"):
        policy = Policy(scientists=("*",), approval=approval)  # type: ignore[arg-type]
        name = await owner.register(budget=wide, policy=policy)
        await alive(name)
        names.append(name or "")
        await until("ready", owner, f"/v1/datasets/{name}")
    for name, ends in ((names[0], "done"), (names[1], "cancelled"), (names[0], "done")):
        digest = await scientist.quote(SPECS[0], on=name)
        await alive(digest)
        if name == names[1]:
            await owner.judge()
        await scientist.submit(digest)
        job = world.model.quotes[digest or ""].request.job
        await alive(job in world.model.jobs)
        if ends == "cancelled":
            await alive(await scientist.ask("DELETE", f"/v1/jobs/{job}"))
        await until("done failed cancelled", scientist, f"/v1/jobs/{job}")
        await scientist.watch()
    await scientist.fetch()
    for step in (owner.change, owner.advance, owner.revoke):
        await step()
        await alive(child.alive)


async def _after(world: RealWorld) -> None:
    """The next start serves, and ends every job."""
    child = world.fork()
    await world.attach()
    owner, scientist = Owner(world, "owner", ()), Scientist(world, "scientist")
    for client in (owner, scientist):
        await client.enrol()
    for name in list(world.model.datasets):
        demand(await owner.dataset(name) is not None, f"lost: {name}")
    for job in scientist.own_jobs:
        while True:
            answer = await scientist.ask("GET", f"/v1/jobs/{job}")
            demand(answer is not None and answer.status == 200, f"lost: {job}")
            assert answer is not None
            if scientist.saw_status(answer).state in ENDED:
                break
            await asyncio.sleep(0.005)
    await scientist.fetch()
    child.kill()
    world.gone()


def _world(zygote: Zygote, folder: Path, name: str) -> RealWorld:
    state = folder / name
    fresh(state)
    return RealWorld(0, zygote, state, folder / f"{name}.journal")


async def _until_dead(world: RealWorld, child: Child) -> None:
    with contextlib.suppress(Dead, RuntimeError):
        async with asyncio.timeout(LIFE_SECONDS):
            await world.attach()
            await _life(world, child)
    world.gone()


def count(zygote: Zygote, folder: Path) -> int:
    """How many such calls the life makes; a few more or less each time (a worker's end may come a
    little later)."""
    world, out = _world(zygote, folder, "count"), folder / "count.calls"
    child = world.fork(one_thread=True, traced=True, seconds=0.0)
    tracer = _strace(child.pid, None, out)
    asyncio.run(_until_dead(world, child))
    child.signal(signal.SIGTERM)
    demand(child.wait() == 0, "the server does not stop in order")
    tracer.wait(30)
    return len(out.read_text().splitlines())


def one(zygote: Zygote, folder: Path, number: int, way: str, *, restart: bool = True) -> bool:
    """Kill at the call of this number; whether there was one. Raises :class:`Violation`."""
    world = _world(zygote, folder, f"{way}{number}")
    options = {"traced": True} if way == "strace" else {"die": number}
    child = world.fork(one_thread=True, seconds=0.0, **options)
    tracer = _strace(child.pid, number, os.devnull) if way == "strace" else None
    try:
        with remembered():
            asyncio.run(_until_dead(world, child))
            if child.alive:
                child.signal(signal.SIGTERM)
            status = child.wait()
            demand(status in (0, -signal.SIGKILL), f"the server ended with {status}")
            disk = OsDisk(world.state)
            with kept.opened(disk, kept.store_key(disk)) as there:
                kept.check(there, world.model, world.read())
            if restart:
                asyncio.run(_after(world))
                with kept.opened(disk, kept.store_key(disk)) as there:
                    kept.check(there, world.model, world.read())
    except Violation as e:
        raise Violation(f"call {number}: {e}") from e
    finally:
        if tracer is not None:
            tracer.kill()
            tracer.wait()
        if world.child is not None and world.child.alive:
            world.child.kill()
    shutil.rmtree(world.state)
    return status != 0

"""The simulated world: one server at a time on a simulated disk, a network, a pool of workers.

The server is the real one (``serve.assemble``, the ASGI application with all its gates, queue,
uploads, ledger); clock, disk, randomness, network and workers come from the seed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from casemate.ledger import catalog, log
from casemate.seal import checkpoint, note, requests
from casemate.seal.identity import Identity
from casemate.seams import Unreachable
from casemate.server import app, serve
from casemate.server.app import CHECKPOINT_HEADER
from casemate.server.config import Config, Limits
from casemate.server.pool import WorkerGone
from casemate.server.service import Service
from casemate.spec import canonical, codec
from casemate.spec.errors import CasemateError
from casemate.spec.messages import Done, Failed, Run
from support.desk import FREE, Script, ScriptedWorker, WitnessNet
from support.disk import SimDisk
from support.simloop import SimClock
from support.simserver import (
    CALLER,
    CountingRng,
    charged,
    entries,
    extends,
    findings,
    granted,
    refusal,
    spent,
    stores,
)
from support.witness import FakeWitness
from torture.model import Model, demand

T = TypeVar("T")
URL = "https://torture.example:8443"
PREPARED = {"seconds_fixed": 2.0, "seconds_per_step": 0.01}
LIMITS = Limits(open_uploads=64)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        if self.status < 400 or not self.body:
            return ""
        shape: Any = canonical.decode(self.body)
        return str(shape["error"]["code"])

    def json(self) -> Any:
        return canonical.decode(self.body)


@dataclass(frozen=True)
class Message:
    """A request as it is on the wire: what is sent twice is the same bytes."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class _Worker(ScriptedWorker):
    """Takes simulated time, dies now and then, and says in the model what it read."""

    def __init__(self, world: World) -> None:
        super().__init__(Script(prepared=dict(PREPARED)))
        self._world = world

    async def tell(self, message: object, fds: Any = ()) -> None:
        if isinstance(message, Run):
            for fd in fds[:-1]:  # the rows
                demand(os.fstat(fd).st_size > 0, "a run was given an empty dataset")
            self._world.model.reads[message.plan.request_digest] += 1
            self._world.check_witnessed(message.plan.request_digest, ("reserve", "takeover"))
        await super().tell(message, fds)

    async def expect(self, kinds: Any, seconds: float) -> Any:
        draw = self._world.draw
        await asyncio.sleep(draw.random() * 3)
        if draw.random() < self._world.trouble / 2:
            raise WorkerGone(draw.choice(("time", "memory", "closed")))
        if draw.random() < self._world.trouble / 4 and Done in kinds:
            return Failed(phase="run", code="job.failed", message="", mend="", where="")
        return await super().expect(kinds, seconds)


class _Pool:
    def __init__(self, world: World) -> None:
        self._world = world
        self._kept: dict[str, _Worker] = {}

    @contextlib.asynccontextmanager
    async def worker(
        self, prepared: str | None = None, *, prompt: bool = False
    ) -> AsyncIterator[tuple[Any, bool]]:
        kept = self._kept.pop(prepared, None) if prepared else None
        worker = kept or _Worker(self._world)
        try:
            yield worker, kept is not None
        finally:
            if worker not in self._kept.values():
                await worker.end()

    async def keep(self, quote: str, worker: Any) -> None:
        self._kept[quote] = worker


class Witnesses(WitnessNet):
    """Three witnesses, two of which a policy asks for; one is away now and then. They outlive every
    boot and know nothing of disks."""

    def __init__(self, world: World, known: dict[str, tuple[dict[str, Any], ...]]) -> None:
        super().__init__({f"https://w{i}.example": FakeWitness(f"w{i}.example") for i in range(3)})
        self._world = world
        for url, (heads, shown) in known.items():
            self.witnesses[url].heads.update(heads)
            self.witnesses[url].shown.update(shown)

    @property
    def known(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """What each has seen, to begin another run with."""
        return {url: (dict(w.heads), dict(w.shown)) for url, w in self.witnesses.items()}

    @property
    def policy(self) -> dict[str, Any]:
        """What an owner's policy says of them."""
        return {"witnesses": tuple(w.vkey for w in self.witnesses.values()), "cosignatures": 2}

    async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        await asyncio.sleep(self._world.draw.random() * 0.2)
        if self._world.draw.random() < self._world.trouble:
            raise Unreachable
        return await super().ask(url, body, seconds=seconds)


class Boot:
    """One start of the server on a disk. ``dead`` is set when it is to be taken away."""

    def __init__(self, world: World, disk: SimDisk, number: int) -> None:
        self.disk = disk
        self.dead = asyncio.Event()
        disk.on_off = self.dead.set
        config = Config(
            state=Path("unused"), port=0, dev=True, workers=2, rates=FREE, limits=LIMITS, threads=1,
            witnesses=tuple(world.net.witnesses) if world.net is not None else (),
        )  # fmt: skip
        self.service: Service = serve.assemble(
            config,
            disk=disk,
            clock=SimClock(world.draw, jumps=world.clock_jumps),
            rng=CountingRng(world.seed * 1000 + number),
            write_log=world.logs.append,
            net=world.net,
        )
        for witness in world.net.witnesses.values() if world.net is not None else ():
            witness.watch(log.key(self.service.store).verifier)
        self.service.pool = _Pool(world)  # type: ignore[assignment]
        self.service.stop = self.dead.set
        self.app = app.build(self.service, self.service.queue.serve)
        self._life = self.service.queue.serve()

    async def enter(self) -> None:
        await self._life.__aenter__()

    async def leave(self) -> None:
        """As SIGTERM would, or what is left to do when the machine is gone."""
        self.dead.set()
        with contextlib.suppress(OSError, CasemateError):
            await self._life.__aexit__(None, None, None)
        self.service.store.close()

    async def deliver(self, message: Message) -> Answer | None:
        """The answer; ``None`` if the server is gone before it has left."""
        work = asyncio.ensure_future(self._answer(message))
        gone = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done() or self.disk.off:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            return None
        return work.result()

    async def _answer(self, message: Message) -> Answer:
        path, _, query = message.path.partition("?")
        sent = [{"type": "http.request", "body": message.body, "more_body": False}]
        status, headers, parts = 0, {}, bytearray()

        async def receive() -> dict[str, Any]:
            if not sent:
                await asyncio.Event().wait()  # the client stays
            return sent.pop()

        async def send(event: Any) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                headers.update({k.decode(): v.decode() for k, v in event["headers"]})
            else:
                parts.extend(event.get("body", b""))

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
            "method": message.method, "scheme": "https", "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": list(message.headers), "client": ("192.0.2.1", 1), "server": ("x", 8443),
        }  # fmt: skip
        await self.app(scope, receive, send)
        return Answer(status, headers, bytes(parts))


@dataclass(frozen=True)
class Seen:
    """A head of the log that a client keeps: size, root, and the note that the log signed."""

    size: int
    root: bytes
    note: bytes


@dataclass
class World:
    """``draw`` decides everything. ``boot`` is ``None`` while the server is down."""

    seed: int
    signed: bool = False
    clock_jumps: float = 0.0
    trouble: float = 0.06  # of each message, on the network
    model: Model = field(default_factory=Model)
    disk: SimDisk = field(default_factory=SimDisk)
    logs: list[str] = field(default_factory=list)
    boot: Boot | None = None
    boots: int = 0
    net: Witnesses | None = None
    careful: float = 0.3  # how often a client asks for the log's head after an answer
    heads: dict[str, Seen] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # seen where nobody would hear of an error
    known: set[str] = field(default_factory=set)  # jobs charged below some client's head
    snapshots: list[dict[str, bytes]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self._up = asyncio.Event()
        self._late: set[asyncio.Task[Any]] = set()

    @property
    def boot_is_dead(self) -> bool:
        return self.boot is None or self.boot.dead.is_set()

    def fault(self, loop: object, context: dict[str, Any]) -> None:
        """What a callback of the loop raised."""
        self.logs.append(f"{context.get('message')}: {context.get('exception')!r}")

    def token(self, count: int) -> bytes:
        return self.draw.getrandbits(8 * count).to_bytes(count, "big")

    @property
    def seal_key(self) -> bytes | None:
        """What the running server opens."""
        return None if self.boot is None else self.boot.service.keys.hpke.public

    @property
    def policy(self) -> dict[str, Any]:
        """What every policy says here beside the rest."""
        return {} if self.net is None else self.net.policy

    async def pause(self) -> None:
        await asyncio.sleep(self.draw.expovariate(1.0))

    # The machine.

    async def start(self, disk: SimDisk) -> None:
        """A new boot on ``disk``; raises what ends a start."""
        self.disk = disk
        self.boots += 1
        with stores() as opened:
            try:
                boot = Boot(self, disk, self.boots)
                await boot.enter()
            except BaseException:
                for store in opened:
                    store.close()
                raise
        self.model.unheard.clear()  # what was signed for another start is refused
        self.boot = boot
        self._up.set()

    async def stop(self) -> None:
        """Take the server down; in order, unless its disk is off."""
        boot, self.boot = self.boot, None
        self._up.clear()
        if boot is not None:
            await boot.leave()

    # The network.

    async def send(
        self, who: Identity, method: str, path: str, body: object = None, **headers: str
    ) -> Answer | None:
        """A client's request; ``None`` when no answer came, whatever was done."""
        await self._up.wait()
        boot = self.boot
        if boot is None:
            return None
        shown = self._shown(who) if self.draw.random() < 0.5 else {}
        message = self._message(boot, who, method, path, body, headers | shown)
        if self.draw.random() >= self.trouble:
            return await boot.deliver(message)
        fate = self.draw.choice(("lost", "no answer", "twice", "late"))
        self.seen[fate] += 1
        if fate in ("twice", "late"):
            self._later(message)
        if fate == "twice":
            return await boot.deliver(message)
        if fate == "no answer":
            await boot.deliver(message)
        await asyncio.sleep(self.draw.random() * 2)
        return None

    def _later(self, message: Message) -> None:
        async def deliver() -> None:
            await asyncio.sleep(self.draw.expovariate(0.5))
            if self.boot is not None:
                await self.boot.deliver(message)

        task = asyncio.ensure_future(deliver())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    def _message(
        self, boot: Boot, who: Identity, method: str, path: str, body: object, extra: dict[str, str]
    ) -> Message:
        data = body if isinstance(body, bytes) else b"" if body is None else codec.encode(body)
        named = {name.replace("_", "-"): value for name, value in extra.items()}
        nonce = self.boots.to_bytes(6, "big") + self.token(requests.NONCE_BYTES - 6)
        head = {"host": URL[8:], "content-length": str(len(data)), **named}
        if self.signed:
            head = requests.sign(
                who, method, URL + path, head, data, boot=boot.service.keys.boot, nonce=nonce
            )
        else:
            head |= {
                CALLER: who.id,
                "casemate-boot": boot.service.keys.boot.hex(),
                "casemate-nonce": nonce.hex(),
            }
        return Message(method, path, tuple((k.encode(), v.encode()) for k, v in head.items()), data)

    async def settle(self) -> None:
        """Wait for what is still under way on the network."""
        while self._late:
            await asyncio.gather(*self._late, return_exceptions=True)

    # What must hold.

    async def remember(self, who: Identity) -> bool:
        """A client asks for the log's head and keeps it, as one that looks at the whole log; one
        that the log does not extend stays, as what it has against the operator. Whether kept."""
        held = self.heads.get(who.name)
        answer = await self.send(who, "GET", "/log/checkpoint")
        if answer is None or answer.status >= 400:
            return False
        told = checkpoint.read(note.parse(answer.body).text)
        true = self.look(extends, (told.size, told.root))
        demand(true is not False, "the checkpoint is not that of the entries")
        lost = held is not None and self.look(extends, (held.size, held.root)) is False
        if not true or lost:
            return False
        self.heads[who.name] = Seen(told.size, told.root, answer.body)
        self.known |= set(self.look(charged, told.size) or ())
        return True

    def look(self, question: Callable[..., T], *more: object) -> T | None:
        """What the running server's ledger says; ``None`` when it is down or has stopped."""
        if self.boot is None or self.disk.off:
            return None
        with contextlib.suppress(CasemateError):
            return question(self.boot.service, *more)
        return None

    def who_finds(self) -> str:
        """A client to whom the log is not what it remembers; nobody: ``""``."""
        assert self.boot is not None
        service = self.boot.service
        found = (n for n, s in self.heads.items() if not extends(service, (s.size, s.root)))
        return next(found, "")

    def with_head(self, who: Identity) -> Message:
        """A request that shows what its client remembers."""
        assert self.boot is not None
        return self._message(self.boot, who, "GET", "/v1/datasets", None, self._shown(who))

    def _shown(self, who: Identity) -> dict[str, str]:
        seen = self.heads.get(who.name)
        if seen is None:
            return {}
        return {CHECKPOINT_HEADER: base64.b64encode(seen.note).decode()}

    def check_witnessed(self, request: str, kinds: tuple[str, ...]) -> None:
        """Before keys go to a worker, and before a result is shown, two witnesses have cosigned the
        log up to the job's newest entry of these kinds."""
        job = self.model.request_of.get(request, request)
        written = self.look(entries)
        if self.net is None or written is None:
            return
        places = [i for i, e in enumerate(written) if e.subject == job and e.kind in kinds]
        cosigned = sum(
            any(h.size > max(places, default=len(written)) for h in w.cosigned)
            for w in self.net.witnesses.values()
        )
        if cosigned < 2:
            self.wrong.append(f"{job}: {kinds[-1]} with {cosigned} of 2 witnesses")

    def check_ledger(self) -> None:
        """The running server's ledger against the model."""
        assert self.boot is not None
        service = self.boot.service
        wrong = findings(service)
        demand(not wrong, f"fsck: {wrong[:3]}")
        sums = {name: spent(service, name) for name in self.model.datasets}
        self.model.check_spent(charged(service), granted(service), sums)

    def check_what_is_known(self) -> None:
        """As :meth:`check_ledger`, after a host played with the disk and nobody noticed: all that
        a client's head covers is there, and what is spent is what the log charges."""
        assert self.boot is not None
        service, model = self.boot.service, self.model
        wrong = findings(service)
        demand(not wrong, f"fsck: {wrong[:3]}")
        told = charged(service)
        demand(self.known <= set(told), f"a known charge is gone: {self.known - set(told)}")
        kept = {d.id: d for d in catalog.datasets(service.store)}
        for name, (epoch, revoked, policies) in model.sure.items():
            demand(name in kept, f"a known dataset is gone: {name}")
            demand(kept[name].epoch >= epoch, f"a known epoch of {name} is gone: {epoch}")
            gone = revoked and kept[name].state != "revoked"
            demand(not gone, f"a known revocation of {name} is gone")
            demand(kept[name].policy_digest in policies, f"a known policy of {name} is gone")
        fresh = Model(datasets=model.datasets, quotes=model.quotes, quote_of=model.quote_of)
        fresh.datasets = {n: r for n, r in model.datasets.items() if n in kept}
        sums = {name: spent(service, name) for name in fresh.datasets}
        fresh.check_spent(told, granted(service), sums)


def first_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


async def starts(work: Awaitable[None]) -> str:
    """Why a start ended, or nothing."""
    try:
        await work
    except (CasemateError, OSError) as e:
        return refusal(e)
    return ""

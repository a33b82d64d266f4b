"""A server in this process, without sockets or workers: the real application on a simulated disk
and clock, with a scripted pool, spoken to through ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import httpx

from casemate.graph import pack
from casemate.plan import state as plan_state
from casemate.seal import calls, hpke, requests, stream
from casemate.seal.identity import Identity
from casemate.seams import Net, OsRng, Unreachable
from casemate.seams.net import MAX_ANSWER
from casemate.server import app, run
from casemate.server.config import Config, Limits, Rate, Rates
from casemate.server.pool import WorkerGone
from casemate.server.serve import assemble
from casemate.spec import canonical, codec, tensors
from casemate.spec.data import Budget, DatasetInfo, DatasetKey, Policy, Registration
from casemate.spec.job import (
    JobStatus,
    Plan,
    Quote,
    Submission,
    TrainSpec,
)
from casemate.spec.messages import (
    CheckDataset,
    Checked,
    Done,
    Failed,
    GoOn,
    Locked,
    Predict,
    Predicted,
    Prepare,
    Prepared,
    Run,
    Serve,
    Serving,
    State,
)
from casemate.spec.serving import (
    Deployment,
    ModelInfo,
    ServePolicy,
    TensorSpec,
    dump,
    pack_answer,
    read_answer,
)
from casemate.tee.simulated import CHAIN_FILE, SEALING_FILE, SimulatedTee
from support.disk import SimDisk
from support.server import CLASSES, FEATURES, job_request, mlp, schema, table
from support.witness import Down, FakeWitness

T = TypeVar("T")
URL = "https://desk.example:8443"
QUICK = Rate(per_second=1e6, burst=10**6)
FREE = Rates(public=QUICK, enrol=QUICK, identity=QUICK, quote=QUICK)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run one test's coroutine to its end, within 60 s."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


class AutoClock:
    """Sleeping is instant: time jumps ahead."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)
        await asyncio.sleep(0)


class HandClock(AutoClock):
    """Time moves only by :meth:`advance`."""

    def __init__(self) -> None:
        super().__init__()
        self._moved = asyncio.Condition()
        self._until: list[float] = []

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        self._until.append(until)
        try:
            async with self._moved:
                await self._moved.wait_for(lambda: self.now >= until)
        finally:
            self._until.remove(until)

    def awaited(self) -> bool:
        """Whether somebody waits for a later time."""
        return any(until > self.now for until in self._until)

    async def advance(self, seconds: float) -> None:
        async with self._moved:
            self.now += seconds
            self._moved.notify_all()
        await asyncio.sleep(0)


@cache
def _chain() -> tuple[bytes, bytes]:
    """The simulated TEE's files, made once: its RSA keys take seconds."""
    disk = SimDisk()
    SimulatedTee(disk, OsRng(), AutoClock())
    found = []
    for path in (CHAIN_FILE, SEALING_FILE):
        file = disk.open(path)
        found.append(file.read(0, file.size()))
    return found[0], found[1]


def fresh_disk() -> SimDisk:
    """A simulated disk on which the TEE has been before."""
    disk = SimDisk()
    disk.make_folder("tee")
    for path, data in zip((CHAIN_FILE, SEALING_FILE), _chain(), strict=True):
        file = disk.open(path, create=True)
        file.write(0, data)
        file.sync()
    disk.sync_folder("tee")
    disk.sync_folder(".")
    return disk


PREPARED: dict[str, Any] = {
    "parameters": FEATURES * 8 + 8 + 8 * CLASSES + CLASSES,
    "dimension": FEATURES * 8 + 8 + 8 * CLASSES + CLASSES,
    "microbatch": 8,
    "seconds_per_microbatch": 0.01,
    "seconds_per_step": 0.01,
    "seconds_fixed": 20.0,
    "bytes": 1 << 20,
    "certified_eta": 1e-5,
    "rounding": 1e-6,
    "path": ("record",),
}


def weights() -> bytes:
    """A result of the right form."""
    return tensors.dump({"w0": ("f32", (8, FEATURES), bytes(4 * 8 * FEATURES))})


def told_result(result: bytes) -> dict[str, Any]:
    """What a worker says of its result before it reads rows."""
    head = result[: 8 + int.from_bytes(result[:8], "little")]
    return {
        "result": "sha256:" + hashlib.sha256(head).hexdigest(), "result_bytes": len(result)
    }  # fmt: skip


PREPARED |= told_result(weights())


@dataclass
class Script:
    """What the scripted workers do. ``answers`` override the plain course by message type: a value,
    or an exception to raise; ``prepared``: fields of what they prepare. ``hold`` keeps a run from
    answering until it is set, or with ``hold_at`` the state after so many steps. ``resumed``: the
    states that runs went on from. ``told``: all messages. ``ended``: why workers ended, each once
    ``hold_end`` is set."""

    answers: dict[type, Any] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)
    result: bytes = field(default_factory=weights)
    hold: asyncio.Event | None = None
    hold_at: int | None = None
    hold_end: asyncio.Event | None = None
    resumed: list[bytes] = field(default_factory=list)
    told: list[object] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


def training_state(plan: Plan, train: TrainSpec, step: int) -> bytes:
    """A state of the right form, all zeros."""
    dimension = PREPARED["dimension"]
    assert isinstance(dimension, int)
    filled = {
        "job": plan_state.job(plan, train), "step": step.to_bytes(8, "little")
    }  # fmt: skip
    return tensors.dump({
        name: (dtype, shape, filled.get(name, bytes(tensors.DTYPES[dtype][1] * math.prod(shape))))
        for name, (dtype, shape) in plan_state.layout(train, dimension).items()
    })  # fmt: skip


TAKES = (TensorSpec(name="x", dtype="f32", shape=(FEATURES,)),)
GIVES = (TensorSpec(name="scores", dtype="f32", shape=(CLASSES,)),)


def serving(digest: str, slots: int = 1) -> Serving:
    """What scripted workers say of every model that they load."""
    return Serving(model_digest=digest, inputs=TAKES, outputs=GIVES, parameters=58, slots=slots)


def scores(inputs: bytes, records: int) -> bytes:
    """A scripted worker's outputs: of each record its first features, as they are."""
    ((_, view),) = tensors.load(inputs).values()
    raw, each, given = bytes(view), 4 * FEATURES, 4 * CLASSES
    out = b"".join(raw[i * each : i * each + given] for i in range(records))
    return dump(GIVES, records, {"scores": out})


def _bytes(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


class ScriptedWorker:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.alive = True
        self.prepared: Prepared | None = None
        self._next: list[Any] = []

    def _answered(self, keys: bytes, records: int, sealed: bytes) -> bytes:
        asking, answering = calls.split(keys)
        said = scores(b"".join(stream.decrypt(asking, [sealed])), records)
        return b"".join(stream.encrypt(answering, [pack_answer(GIVES, records, said)]))

    async def octets(self, count: int, seconds: float) -> bytes:
        data = self._octets.pop(0)
        if len(data) != count:
            raise WorkerGone("protocol")
        return data

    async def tell(
        self, message: object, fds: Sequence[int] = (), payload: Sequence[bytes] = ()
    ) -> None:
        self.script.told.append(message)
        given = self.script.answers.get(type(message))
        if isinstance(message, CheckDataset):
            self._next = [given or Checked(dataset=message.dataset)]
        elif isinstance(message, Prepare):
            prepared = Prepared(
                model_digest=message.model_digest,
                **{**PREPARED, **self.script.prepared},  # type: ignore[arg-type]
            )
            self._next = [given] if given else [prepared, Locked(layers=("rlimits",))]
            self._prepare = message
        elif isinstance(message, Serve):
            ready = serving(message.model_digest, message.slots)
            self._next = [given or ready, Locked(layers=("rlimits",))]
        elif isinstance(message, Predict):
            self._next = [given or Predicted(calls=len(message.calls))]
            self._octets = [
                self._answered(call.keys, call.records, data)
                for call, data in zip(message.calls, payload, strict=True)
            ]
        elif isinstance(message, Run):
            self._next = [given or self._run(message, fds)]
        elif isinstance(message, GoOn):
            self._next = [given or self._on(message.step)]

    def _run(self, message: Run, fds: Sequence[int]) -> Any:
        """What a worker says first of a run: it keeps states when they are due."""
        self._steps, self._every = message.plan.steps, message.state_steps
        self._memory = os.dup(fds[-1]) if self._every else -1
        result = fds[-2] if self._every else fds[-1]
        os.write(result, self.script.result)
        if message.resume is not None:
            self.script.resumed.append(b"".join(
                stream.decrypt(message.resume.key, [_bytes(fds[len(message.datasets)])])
            ))  # fmt: skip
        self._plan = message.plan
        return self._on(0 if message.resume is None else message.resume.step)

    def _on(self, step: int) -> Any:
        due = plan_state.due(self._steps, self._every, step)
        if due is None:
            return Done(bytes=len(self.script.result))
        data = training_state(self._plan, self._prepare.train, due)
        os.pwrite(self._memory, data, 0)
        return State(step=due, bytes=len(data))

    async def expect(self, kinds: Sequence[type], seconds: float) -> Any:
        answer = self._next.pop(0)
        held = Done if self.script.hold_at is None else State
        due = getattr(answer, "step", None) == self.script.hold_at
        called = isinstance(answer, Predicted)
        if (called or (isinstance(answer, held) and due)) and self.script.hold is not None:
            await self.script.hold.wait()
        if isinstance(answer, Exception):
            raise answer
        if type(answer) not in kinds:
            raise WorkerGone("protocol")
        return answer

    async def end(self, reason: str = "done") -> None:
        if self.script.hold_end is not None:
            await self.script.hold_end.wait()
        if self.alive:
            self.script.ended.append(reason)
        self.alive = False


class ScriptedPool:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.kept: dict[str, ScriptedWorker] = {}

    @contextlib.asynccontextmanager
    async def worker(
        self, prepared: str | None = None, *, prompt: bool = False
    ) -> AsyncIterator[tuple[Any, bool]]:
        kept = self.kept.pop(prepared, None) if prepared else None
        worker = kept or ScriptedWorker(self.script)
        try:
            yield worker, kept is not None
        finally:
            if worker not in self.kept.values():
                await worker.end()

    async def keep(self, quote: str, worker: Any) -> None:
        self.kept[quote] = worker


class Desk:
    """One boot of a server. ``logs`` holds its log lines."""

    def __init__(
        self,
        disk: SimDisk | None = None,
        clock: AutoClock | None = None,
        script: Script | None = None,
        rates: Rates = FREE,
        workers: int = 1,
        models: int = 2,
        net: Net | None = None,
        witnesses: tuple[str, ...] = (),
        **limits: Any,
    ) -> None:
        self.disk = disk or fresh_disk()
        self.clock = clock or AutoClock()
        self.script = script or Script()
        self.logs: list[str] = []
        config = Config(
            state=Path("unused"), port=0, dev=True, workers=workers, models=models, rates=rates,
            limits=Limits(**limits), threads=1, witnesses=witnesses,
        )  # fmt: skip
        self.service = assemble(
            config, disk=self.disk, clock=self.clock, rng=OsRng(), write_log=self.logs.append,
            net=net,
        )  # fmt: skip
        self.service.pool = ScriptedPool(self.script)  # type: ignore[assignment]
        self.app = app.build(self.service, self.service.queue.serve)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app),
            base_url=URL,  # type: ignore[arg-type]
        )

    async def __aenter__(self) -> Desk:
        self._life = self.service.queue.serve()
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.service.inference.close()
        await self._life.__aexit__(None, None, None)
        await self.http.aclose()
        self.service.store.close()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let the loop run until ``holds``."""
        while not holds():
            await asyncio.sleep(0.001)

    async def person(self, name: str) -> Person:
        made = Person(self, Identity.generate(name))
        await made.enrol()
        return made

    def log_text(self) -> str:
        return "\n".join(self.logs)


class WitnessNet:
    """A network of witnesses by URL prefix. ``answered``: what they said."""

    def __init__(self, witnesses: Mapping[str, FakeWitness]) -> None:
        self.witnesses = dict(witnesses)
        self.answered: list[tuple[str, int]] = []

    async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        prefix = next(p for p in self.witnesses if url.startswith(f"{p}/"))
        call = url.removeprefix(f"{prefix}/")
        witness = self.witnesses[prefix]
        if body is None:
            signed = witness.newest(unquote(call.removeprefix("checkpoint/")))
            return (404, b"") if signed is None else (200, signed)
        assert call == "add-checkpoint"
        try:
            answer = witness.add_checkpoint(body)
        except Down:
            raise Unreachable from None
        if len(answer.body) > MAX_ANSWER:
            raise Unreachable
        self.answered.append((prefix, answer.status))
        return answer.status, answer.body


class Refused(Exception):
    """An answer that is an error: its status and code."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.error = response.json()["error"] if response.content else {"code": ""}
        super().__init__(f"{self.status} {self.error}")

    @property
    def code(self) -> str:
        return str(self.error["code"])


async def denied(work: Awaitable[Any]) -> str:
    """The code of the refusal in which ``work`` ends."""
    try:
        await work
    except Refused as e:
        return e.code
    raise AssertionError("it was not refused")


def told(desk: Desk, kind: type) -> list[Any]:
    """The messages of one kind that workers were told."""
    return [m for m in desk.script.told if isinstance(m, kind)]


@dataclass
class Person:
    """An identity at a desk."""

    desk: Desk
    identity: Identity

    @property
    def id(self) -> str:
        return self.identity.id

    def signed(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> httpx.Request:
        """A signed request, not yet sent."""
        data = body if isinstance(body, bytes) else b"" if body is None else codec.encode(body)
        head = requests.sign(
            self.identity, method, URL + path, headers or {}, data,
            boot=self.desk.service.keys.boot,
        )  # fmt: skip
        return self.desk.http.build_request(method, path, content=data, headers=head)

    async def send(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return await self.desk.http.send(self.signed(method, path, body, headers))

    async def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Any:
        """The answer's JSON, or :class:`Refused`."""
        response = await self.send(method, path, body, headers)
        if response.status_code >= 400:
            raise Refused(response)
        return canonical.decode(response.content) if response.content else response

    async def enrol(self) -> None:
        await self.ask("PUT", f"/v1/identities/{self.id}", self.identity.public)

    async def upload(self, sealed: bytes) -> str:
        name = (await self.ask("POST", "/v1/uploads", {"size": len(sealed)}))["upload"]
        await self.ask("PATCH", f"/v1/uploads/{name}", sealed, {"upload-offset": "0"})
        return str(name)

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        return hpke.seal(self.desk.service.keys.hpke.public, plaintext, info=info)

    async def registration(
        self,
        rows: int = 64,
        *,
        policy: Policy | None = None,
        budget: Budget | None = None,
        wire: bytes | None = None,
        name: str = "tiny",
        previous: str | None = None,
        salt: bytes = b"",
    ) -> Registration:
        wire = table(rows) if wire is None else wire
        of, policy = schema(name, rows), policy or Policy(scientists=("*",))
        key, salt = os.urandom(32), salt or os.urandom(32)
        commitment = hashlib.sha256(b"casemate/dataset/v1\0" + salt + wire).hexdigest()
        dataset = f"ds_{commitment[:40]}"
        info = Registration.info(dataset, codec.digest(policy), codec.digest(of))
        return Registration(
            dataset=dataset,
            owner=self.id,
            schema=of,
            policy=policy,
            budget=budget or Budget(epsilon=10.0, delta=1e-2),
            previous=previous,
            upload=await self.upload(b"".join(stream.encrypt(key, [wire]))),
            sealed_key=self.seal(codec.encode(DatasetKey(key=key, salt=salt)), info),
        )

    async def push(self, rows: int = 64, **more: Any) -> DatasetInfo:
        """Register and wait until it is settled."""
        made = await self.registration(rows, **more)
        await self.ask("POST", "/v1/datasets", made)
        return await self.settled(made.dataset)

    async def settled(self, dataset: str) -> DatasetInfo:
        while (found := await self.dataset(dataset)).state == "checking":
            await asyncio.sleep(0.001)
        return found

    async def dataset(self, name: str) -> DatasetInfo:
        return codec.from_json(DatasetInfo, await self.ask("GET", f"/v1/datasets/{name}"))

    async def submission(
        self,
        datasets: Sequence[DatasetInfo],
        train: TrainSpec | None = None,
        model: pack.Packed | None = None,
        job: str | None = None,
    ) -> Submission:
        model = model or mlp()
        request = job_request(self.id, datasets, model, train, job)
        key = os.urandom(32)
        place = await self.upload(b"".join(stream.encrypt(key, [model.data])))
        sealed = self.seal(key, Submission.info(codec.digest(request)))
        return Submission(request=request, upload=place, sealed_key=sealed)

    async def quote(self, *datasets: DatasetInfo, **more: Any) -> Quote:
        made = await self.submission(datasets, **more)
        return codec.from_json(Quote, await self.ask("POST", "/v1/quotes", made))

    async def submit(self, quote: Quote) -> JobStatus:
        body = {"quote": codec.digest(quote)}
        return codec.from_json(JobStatus, await self.ask("POST", "/v1/jobs", body))

    async def status(self, job: str) -> JobStatus:
        return codec.from_json(JobStatus, await self.ask("GET", f"/v1/jobs/{job}"))

    async def finished(self, job: str) -> JobStatus:
        while (status := await self.status(job)).state in ("queued", "running"):
            await asyncio.sleep(0.001)
        return status


@dataclass
class Called:
    """A call that was sealed and not sent yet, and the key of its answer."""

    path: str
    body: bytes
    key: bytes
    records: int

    def read(self, response: httpx.Response) -> bytes:
        """The outputs in an answer, or the error, raised."""
        if response.status_code >= 400:
            raise Refused(response)
        plain = calls.open_answer(self.key, response.content)
        return bytes(read_answer(GIVES, self.records, plain))


async def deploy(
    owner: Person,
    policy: ServePolicy,
    *,
    model: str | None = None,
    digest: str = "ab" * 32,
    key: bytes = b"",
) -> ModelInfo:
    """A model as scripted workers have it; its upload opens with a ``key`` of zeros."""
    made = await deployment(owner, policy, key or os.urandom(32), model=model, digest=digest)
    return codec.from_json(ModelInfo, await owner.ask("POST", "/v1/models", made))


async def deployment(
    owner: Person, policy: ServePolicy, key: bytes, *, model: str | None = None, digest: str = ""
) -> Deployment:
    digest = "sha256:" + (digest or "ab" * 32)
    upload = await owner.upload(b"".join(stream.encrypt(bytes(32), [b"a packed model"])))
    name = model or Deployment.id(owner.id, digest, upload)
    info = Deployment.info(name, owner.id, codec.digest(policy), digest)
    return Deployment(
        model=name, owner=owner.id, name="scores", policy=policy, model_digest=digest,
        upload=upload, sealed_key=owner.seal(key, info),
    )  # fmt: skip


def call(person: Person, model: str, records: int = 1, inputs: bytes | None = None) -> Called:
    """A sealed call, of zeros unless ``inputs`` are given (float32 after float32)."""
    wire = dump(TAKES, records, {"x": inputs or bytes(4 * FEATURES * records)})
    public = person.desk.service.keys.hpke.public
    body, key = calls.seal(public, model, person.id, records, wire, OsRng())
    return Called(f"/v1/models/{model}/predictions", body, key, records)


async def predict(
    person: Person, model: str, records: int = 1, inputs: bytes | None = None
) -> bytes:
    """The outputs of a call, as safetensors."""
    made = call(person, model, records, inputs)
    return made.read(await person.send("POST", made.path, made.body))


def spent(info: DatasetInfo) -> float:
    assert info.budget is not None
    return info.budget.spent_epsilon


def refused_in_run(marker: str = "") -> Failed:
    return Failed(phase="run", code="data.bounds", message=marker, mend=marker, where=marker)


__all__ = [
    "AutoClock", "Desk", "Failed", "HandClock", "Person", "Refused", "Script", "math", "run",
    "run_async", "spent",
]  # fmt: skip

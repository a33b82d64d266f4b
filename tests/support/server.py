"""A real server process on a free loopback port in a temporary state folder, and parties that
speak to it: tiny datasets and models made without torch or numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casemate.attest.trust import Trust
from casemate.client.connection import Connection
from casemate.client.uploads import upload
from casemate.graph import pack
from casemate.graph.model import Graph, InputSpec, Node, Ref, Size
from casemate.seal import hpke, stream
from casemate.seal.identity import Identity
from casemate.spec import codec, tensors
from casemate.spec.data import (
    Budget,
    Column,
    DatasetInfo,
    DatasetKey,
    DatasetSchema,
    Policy,
    Registration,
)
from casemate.spec.job import (
    DatasetUse,
    Dp,
    InputBinding,
    JobRequest,
    JobStatus,
    NonPrivate,
    Quote,
    Sgd,
    Submission,
    TrainSpec,
)

FEATURES = 4
CLASSES = 2
START = (
    "import json, sys\n"
    "from pathlib import Path\n"
    "from casemate.server.config import Config, Limits, Rate, Rates\n"
    "from casemate.server.serve import serve\n"
    "given = json.loads(sys.argv[2])\n"
    "limits = Limits(**given.pop('limits', {}))\n"
    "given = {'port': 0, **given}\n"
    "serve(Config(state=Path(sys.argv[1]), dev=True, limits=limits, threads=1, **given))\n"
)


def free_rng(seed: int) -> random.Random:
    return random.Random(seed)


@dataclass
class RunningServer:
    """A server process; ``facts`` is its ``server.json``."""

    state: Path
    process: subprocess.Popen[bytes]
    facts: dict[str, Any]
    log: Path

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    @property
    def trust(self) -> Trust:
        return Trust.simulated(self.facts["root"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def start(state: Path, **config: Any) -> Iterator[RunningServer]:
    """Start ``serve`` in a process of its own; stopped at the end, if it still runs, without
    waiting for its jobs. No worker is kept spare: each takes more than a second to start."""
    config = {"drain_seconds": 0.0, "spares": 0, **config}
    ready = state / "server.json"
    log = state.parent / f"{state.name}.log"
    state.mkdir(parents=True, exist_ok=True)
    ready.unlink(missing_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(state), json.dumps(config)],
            stdout=out,
            stderr=out,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.02)
        yield RunningServer(state, process, json.loads(ready.read_text()), log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def schema(name: str = "tiny", rows: int = 64, **changes: Any) -> DatasetSchema:
    """Two columns: ``x``, four features in [-4, 4]; ``y``, one of two classes."""
    columns = (
        Column(name="x", dtype="f32", shape=(FEATURES,), low=-4.0, high=4.0),
        Column(name="y", dtype="i64", low=0, high=CLASSES - 1, role="label"),
    )
    made = DatasetSchema(name=name, columns=columns, rows=rows, units=rows)
    return dataclasses.replace(made, **changes)


def table(rows: int, seed: int = 0, marker: bytes = b"") -> bytes:
    """The wire form of rows for :func:`schema`; ``marker`` (bytes, times 4) leads the features."""
    rng = free_rng(seed)
    x = [rng.uniform(-3, 3) for _ in range(rows * FEATURES)]
    y = [int(sum(x[i * FEATURES : (i + 1) * FEATURES]) > 0) for i in range(rows)]
    features = struct.pack(f"<{len(x)}f", *x)
    features = marker + features[len(marker) :]
    return tensors.dump(
        {
            "x": ("f32", (rows, FEATURES), features),
            "y": ("i64", (rows,), struct.pack(f"<{rows}q", *y)),
        }
    )


def mlp(hidden: int = 8, seed: int = 0) -> pack.Packed:
    """A packed two-layer network with cross entropy for :func:`schema`."""
    rng = free_rng(seed)

    def weight(name: str, *shape: int) -> tuple[InputSpec, tuple[str, tuple[int, ...], bytes]]:
        count = 1
        for size in shape:
            count *= size
        values = [rng.gauss(0, 0.5) for _ in range(count)]
        spec = InputSpec(name=name, kind="param", dtype="f32", shape=shape, tensor=name)
        return spec, ("f32", shape, struct.pack(f"<{count}f", *values))

    def node(name: str, op: str, *args: Any) -> Node:
        refs = tuple(Ref(name=a[1:]) if isinstance(a, str) else a for a in args)
        return Node(name=name, op=op, args=refs, kwargs={})

    made = [
        weight("w0", hidden, FEATURES),
        weight("b0", hidden),
        weight("w1", CLASSES, hidden),
        weight("b1", CLASSES),
    ]
    inputs = [spec for spec, _ in made]
    batch = Size(a=1)
    inputs.append(InputSpec(name="x", kind="data", dtype="f32", shape=(batch, FEATURES)))
    inputs.append(InputSpec(name="y", kind="data", dtype="i64", shape=(batch,)))
    graph = Graph(
        inputs=tuple(inputs),
        nodes=(
            node("h", "aten.linear.default", "%x", "%w0", "%b0"),
            node("r", "aten.relu.default", "%h"),
            node("o", "aten.linear.default", "%r", "%w1", "%b1"),
            node("loss", "aten.cross_entropy_loss.default", "%o", "%y", None, 0),
        ),
        loss="loss",
    )
    return pack.pack(graph, {spec.tensor: tensor for spec, tensor in made})


def train_spec(
    epsilon: float = 2.0, steps: int = 10, batch: int = 16, delta: float = 1e-3
) -> TrainSpec:
    return TrainSpec(
        batch_size=batch,
        steps=steps,
        privacy=Dp(epsilon=epsilon, delta=delta),
        optimizer=Sgd(lr=0.1),
    )


def job_request(
    scientist: str,
    datasets: Sequence[DatasetInfo],
    model: pack.Packed,
    train: TrainSpec | None = None,
    job: str | None = None,
) -> JobRequest:
    """A job of :func:`mlp`'s inputs under a fresh id."""
    return JobRequest(
        job=job or "job_" + os.urandom(16).hex(),
        scientist=scientist,
        datasets=tuple(
            DatasetUse(dataset=d.dataset, policy_digest=d.policy_digest, epoch=d.epoch)
            for d in datasets
        ),
        model_digest=model.digest,
        inputs=(
            InputBinding(input="x", columns=("x",)),
            InputBinding(input="y", columns=("y",)),
        ),
        train=train or train_spec(),
    )


@dataclass
class Party:
    """One identity with its own connection."""

    server: RunningServer
    name: str
    identity: Identity = field(init=False)
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.identity = Identity.generate(self.name)
        self.connect()

    def connect(self) -> None:
        """A new attested connection, and enrolment."""
        self.connection = Connection(
            self.server.url, trust=self.server.trust, identity=self.identity
        )
        self.connection.request("PUT", f"/v1/identities/{self.id}", self.identity.public)

    @property
    def id(self) -> str:
        return self.identity.id

    def request(self, method: str, path: str, body: object = None, **more: Any) -> Any:
        return self.connection.request(method, path, body, **more)

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        return hpke.seal(self.connection.line().attestation.binding.hpke_key, plaintext, info=info)

    def upload(self, key: bytes, plaintext: bytes) -> str:
        sealed = b"".join(stream.encrypt(key, [plaintext]))
        return upload(self.connection, io.BytesIO(sealed), len(sealed))

    def register(
        self,
        rows: int = 64,
        *,
        policy: Policy | None = None,
        budget: Budget | None = None,
        wire: bytes | None = None,
        of: DatasetSchema | None = None,
        seed: int = 0,
        previous: str | None = None,
    ) -> DatasetInfo:
        """Upload and register; the answer, state ``checking``."""
        of = of or schema(self.name, rows)
        wire = table(rows, seed) if wire is None else wire
        policy = policy or Policy(scientists=("*",))
        salt, key = os.urandom(32), os.urandom(32)
        digest = hashlib.sha256(b"casemate/dataset/v1\0" + salt + wire).hexdigest()
        dataset = f"ds_{digest[:40]}"
        info = Registration.info(dataset, codec.digest(policy), codec.digest(of))
        registration = Registration(
            dataset=dataset,
            owner=self.id,
            schema=of,
            policy=policy,
            budget=budget or Budget(epsilon=10.0, delta=1e-2),
            previous=previous,
            upload=self.upload(key, wire),
            sealed_key=self.seal(codec.encode(DatasetKey(key=key, salt=salt)), info),
        )
        return self.request("POST", "/v1/datasets", registration).value(DatasetInfo)

    def push(self, rows: int = 64, **more: Any) -> DatasetInfo:
        """Register and wait until it is checked."""
        found = self.register(rows, **more)
        while found.state == "checking":
            time.sleep(0.05)
            found = self.dataset(found.dataset)
        return found

    def dataset(self, name: str) -> DatasetInfo:
        return self.request("GET", f"/v1/datasets/{name}").value(DatasetInfo)

    def job_request(
        self,
        datasets: list[DatasetInfo],
        model: pack.Packed,
        train: TrainSpec | None = None,
        **changes: Any,
    ) -> JobRequest:
        made = job_request(self.id, datasets, model, train)
        return dataclasses.replace(made, **changes)

    def submission(self, request: JobRequest, model: pack.Packed) -> Submission:
        key = os.urandom(32)
        return Submission(
            request=request,
            upload=self.upload(key, model.data),
            sealed_key=self.seal(key, Submission.info(codec.digest(request))),
        )

    def quote(
        self, datasets: list[DatasetInfo], model: pack.Packed | None = None, **more: Any
    ) -> Quote:
        model = model or mlp()
        request = self.job_request(datasets, model, **more)
        return self.request("POST", "/v1/quotes", self.submission(request, model)).value(Quote)

    def submit(self, quote: Quote) -> JobStatus:
        body = {"quote": codec.digest(quote)}
        return self.request("POST", "/v1/jobs", body).value(JobStatus)

    def status(self, job: str) -> JobStatus:
        return self.request("GET", f"/v1/jobs/{job}").value(JobStatus)

    def wait(self, job: str, seconds: float = 120) -> JobStatus:
        """The job's last status."""
        deadline = time.monotonic() + seconds
        while (status := self.status(job)).state in ("queued", "running"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job} is still {status.state}")
            time.sleep(0.05)
        return status

    def result(self, job: str, digest: str) -> Mapping[str, Any]:
        """The opened weights, by tensor name."""
        sealed = io.BytesIO()
        self.connection.download(f"/v1/jobs/{job}/result", sealed.write, limit=1 << 30)
        data = sealed.getvalue()
        cut = 4 + int.from_bytes(data[:4], "big")
        info = f"casemate/result-key/v1|{job}|{digest}".encode()
        key = self.identity.open(data[4:cut], info=info)
        plain = b"".join(stream.decrypt(key, [data[cut:]]))
        assert "sha256:" + hashlib.sha256(plain).hexdigest() == digest
        return tensors.load(plain)


NON_PRIVATE = NonPrivate(words="all owners agree to this")

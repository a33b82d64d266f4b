"""Markers planted in rows, weights and keys turn up nowhere, whatever goes wrong: not on the disk,
in logs, answers, errors, output or core files. 1,000 faulted jobs, or some of them in the test run.

Searched is every byte that was ever written, not only what is left at the end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from casemate.seal import hpke, stream
from casemate.server import release, tls
from casemate.server import run as server_run
from casemate.spec import tensors
from casemate.spec.data import Budget, DatasetKey
from casemate.spec.errors import CasemateError, JobError
from casemate.spec.messages import CheckDataset, Checked, Failed, Prepare, Run
from casemate.tee.simulated import SimulatedTee
from support import desk as desk_module
from support import disk as disk_module
from support.desk import Desk, Person, Refused, Script, WorkerGone, fresh_disk, run_async
from support.markers import Markers, floats
from support.server import FEATURES, Party, mlp, start, table, train_spec

BUDGET = Budget(epsilon=50.0, delta=0.01)
LONG = {"seconds_per_step": 1.0, "seconds_fixed": 1000.0, "seconds_per_microbatch": 1.0}


class Watch:
    """What is planted, and every place where it could turn up."""

    def __init__(self) -> None:
        self.markers = Markers()
        self.written = bytearray()
        self.answers = bytearray()
        self.errors: list[str] = []
        self.logs: list[str] = []

    def places(self, **more: bytes) -> dict[str, bytes]:
        said = "\n".join(self.errors).encode()
        return {
            "the disk": bytes(self.written), "answers": bytes(self.answers), "errors": said,
            "logs": "\n".join(self.logs).encode(), **more,
        }  # fmt: skip


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Keys are planted where they are made or used: of streams, datasets, the seal, the state, TLS.
    Writes and answers are noted as they happen."""
    found = Watch()
    plant = found.markers.add
    encrypt, change, secret = stream.encrypt, disk_module._SimFile._change, hpke.from_secret
    sealing, generate = SimulatedTee.sealing_key, ec.generate_private_key
    state = desk_module.training_state

    def trained(plan: Any, train: Any, step: int) -> bytes:
        marked = found.markers.add_floats("a training state", floats(random.Random(), 8))
        return state(plan, train, step)[: -len(marked)] + marked

    def encrypted(key: bytes, source: Any, **more: Any) -> Any:
        return encrypt(plant("a stream's key", key), source, **more)

    def changed(self: Any, offset: int, data: bytes | None) -> None:
        found.written += data or b""
        change(self, offset, data)

    def dataset_key(key: bytes, salt: bytes) -> DatasetKey:
        return DatasetKey(key=plant("a dataset's key", key), salt=plant("a salt", salt))

    def generated(curve: Any) -> Any:
        made = generate(curve)
        if isinstance(curve, ec.SECP256R1):  # the simulated chip's own is on another curve
            plant("the TLS key", made.private_numbers().private_value.to_bytes(32, "big"))
        return made

    monkeypatch.setattr(stream, "encrypt", encrypted)
    monkeypatch.setattr(disk_module._SimFile, "_change", changed)
    monkeypatch.setattr(hpke, "from_secret", lambda raw: secret(plant("a seal key", raw)))
    monkeypatch.setattr(desk_module, "DatasetKey", dataset_key)
    monkeypatch.setattr(
        SimulatedTee,
        "sealing_key",
        lambda self, label: plant("the store's key", sealing(self, label)),
    )
    monkeypatch.setattr(tls.ec, "generate_private_key", generated)
    monkeypatch.setattr(desk_module, "training_state", trained)
    return found


# Faults: each arms the script or the disk for one job, and may act while it runs.


def dies(watch: Watch, desk: Desk, draw: random.Random) -> None:
    desk.script.answers[Run] = WorkerGone(draw.choice(("closed", "memory", "time", "protocol")))


def dies_early(watch: Watch, desk: Desk, draw: random.Random) -> None:
    desk.script.answers[Prepare] = WorkerGone("memory")


def tells(watch: Watch, desk: Desk, draw: random.Random) -> None:
    """A worker that puts a row into every text it may send."""
    (value,) = floats(draw, 1)
    text = watch.markers.add_text("a row in an error", f"{value:.6f}")
    phase = draw.choice(("run", "lock", "check"))
    code = draw.choice(("data.bounds", "internal.worker", "job.failed", "model.form"))
    desk.script.answers[Run] = Failed(phase=phase, code=code, message=text, mend=text, where=text)


def answers_otherwise(watch: Watch, desk: Desk, draw: random.Random) -> None:
    (value,) = floats(draw, 1)
    text = watch.markers.add_text("a row in a name", f"{value:.6f}")
    desk.script.answers[Run] = Checked(dataset=text)


def another_result(watch: Watch, desk: Desk, draw: random.Random) -> None:
    rows = watch.markers.add_floats("rows in a result", floats(draw, 64))
    desk.script.result = draw.choice((
        rows, tensors.dump({"w0": ("f32", (len(rows) // 4 * 40,), rows * 40)}), b"",
        tensors.dump({"rows": ("u8", (len(rows),), rows)}),
    ))  # fmt: skip


def breaks_the_disk(watch: Watch, desk: Desk, draw: random.Random) -> None:
    kind = draw.choice(("EIO", "ENOSPC", "SHORT", "POWER"))
    desk.disk.fault = (len(desk.disk.trace) + draw.randint(1, 60), kind)


def nothing(watch: Watch, desk: Desk, draw: random.Random) -> None:
    pass


def is_cancelled(watch: Watch, desk: Desk, draw: random.Random) -> None:
    desk.script.hold = asyncio.Event()


def loses_power_later(watch: Watch, desk: Desk, draw: random.Random) -> None:
    desk.script.hold = asyncio.Event()
    desk.script.hold_at = 3 if draw.random() < 0.5 else None


FAULTS: tuple[Callable[[Watch, Desk, random.Random], None], ...] = (
    dies, dies_early, tells, answers_otherwise, another_result, breaks_the_disk, nothing,
    is_cancelled, loses_power_later,
)  # fmt: skip


async def one_job(
    watch: Watch, desk: Desk, owner: Person, scientist: Person, draw: random.Random
) -> None:
    """A dataset, a quote, a job with a fault."""
    script = desk.script
    script.answers.clear()
    script.hold, script.hold_at = None, None
    script.prepared = LONG if draw.random() < 0.5 else {}
    plant = watch.markers.add_floats
    marked = plant("weights", floats(draw, 8 * FEATURES))
    script.result = tensors.dump({"w0": ("f32", (8, FEATURES), marked)})
    wire = table(64, marker=plant("rows", floats(draw, 8)))
    if draw.random() < 0.1:
        text = watch.markers.add_text("a row at push", f"{floats(draw, 1)[0]:.6f}")
        script.answers[CheckDataset] = Failed(
            phase="check", code="data.bounds", message=text, mend=text, where=text
        )
    info = await owner.push(wire=wire, budget=BUDGET)
    if info.state != "ready":
        return
    model = mlp(seed=draw.getrandbits(32))
    watch.markers.add("initial weights", model.data[-40:])
    fault = draw.choice(FAULTS)
    quote = await scientist.quote(info, train=train_spec(epsilon=0.5, steps=10), model=model)
    fault(watch, desk, draw)
    job = (await scientist.submit(quote)).job
    if script.hold is not None:
        for _ in range(20):
            await asyncio.sleep(0.001)
        if fault is is_cancelled:
            await scientist.ask("DELETE", f"/v1/jobs/{job}")
        else:
            desk.disk.turn_off()
        script.hold.set()
    status = await scientist.finished(job)
    if status.state == "done":
        await scientist.send("GET", f"/v1/jobs/{job}/result")
        await scientist.send("GET", f"/v1/jobs/{job}/receipt")


async def world(watch: Watch, seed: int, jobs: int) -> int:
    """Jobs on one server, which is started again on what its disk holds when it had to stop."""
    draw = random.Random(seed)
    disk, done = fresh_disk(), 0
    while done < jobs:
        script = Script()
        desk = Desk(disk=disk, script=script)

        async def note(response: httpx.Response) -> None:
            watch.answers += await response.aread()
            watch.answers += repr(response.headers.raw).encode()

        desk.http.event_hooks["response"] = [note]
        desk.service.log._write = watch.logs.append
        try:
            async with desk:
                owner, scientist = await desk.person("owner"), await desk.person("scientist")
                while done < jobs:
                    done += 1
                    async with asyncio.timeout(20):
                        await one_job(watch, desk, owner, scientist, draw)
                await desk.http.get("/metrics")
        except (Refused, CasemateError, OSError, TimeoutError) as e:
            watch.errors += traceback.format_exception(e)
        disk = disk.power_cycle()
        disk.fault = None
    return done


def search(watch: Watch, capfd: pytest.CaptureFixture[str], seeds: range, jobs: int) -> None:
    for seed in seeds:
        run_async(world(watch, seed, jobs))
    out, err = capfd.readouterr()
    assert len(watch.written) > 100_000 and len(watch.answers) > 10_000 and watch.logs
    assert watch.markers.found(watch.places(output=(out + err).encode())) == []


def test_no_secret_is_found_over_faulted_jobs(
    watch: Watch, capfd: pytest.CaptureFixture[str]
) -> None:
    search(watch, capfd, range(1), 10)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 140))
def test_no_secret_is_found_over_a_thousand(
    watch: Watch, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    search(watch, capfd, range(seed, seed + 1), 25)


# The search bites.


@pytest.mark.parametrize("leak", ["plain result", "message of a row", "key in a log"])
def test_a_leak_is_found(
    watch: Watch, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    """Seeded bugs: a result kept in clear for a moment; an error of phase run passed on; a key that
    is logged."""
    if leak == "plain result":
        write = release.write_sealed

        def clear(disk: Any, folder: str, path: str, key: bytes, data: bytes) -> None:
            disk.open("results/tmp", create=True).write(0, data)
            disk.remove("results/tmp")
            write(disk, folder, path, key, data)

        monkeypatch.setattr(release, "write_sealed", clear)
        wanted = "weights (bytes) in the disk"
    elif leak == "message of a row":
        monkeypatch.setitem(globals(), "FAULTS", (tells,))
        states = server_run._states

        async def told(*given: Any) -> Any:
            done = await states(*given)
            if isinstance(done, Failed):
                raise JobError("job.state", done.message, mend="")
            return done

        monkeypatch.setattr(server_run, "_states", told)
        wanted = "a row in an error (text) in answers"
    else:
        seal = release.seal_result

        def loud(disk: Any, rng: Any, job: str, weights: bytes) -> Any:
            made = seal(disk, rng, job, weights)
            print("sealed with", made[2].hex())
            return made

        monkeypatch.setattr(release, "seal_result", loud)
        wanted = "a stream's key (hex) in output"
    with pytest.raises(AssertionError) as e:
        search(watch, capfd, range(1), 3 if leak.startswith("m") else 6)
    assert wanted in str(e.value)


# Real processes: a worker and the server are made to dump core.


def _limits(pid: int) -> int:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith("Max core file size"))
    return int(line.split()[4])


def _workers(server: int) -> list[int]:
    tasks = Path(f"/proc/{server}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def _cores() -> set[Path]:
    places = {Path("/"), Path.cwd(), Path("/tmp")}
    return {p for place in places for p in place.glob("core*")}


@pytest.mark.e2e
def test_no_secret_is_found_beside_real_processes(tmp_path: Path) -> None:
    markers, draw = Markers(), random.Random(9)
    before = _cores()
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        with start(tmp_path / "state", spares=0) as server:
            owner, scientist = Party(server, "owner"), Party(server, "scientist")
            wire = table(64, marker=markers.add_floats("rows", floats(draw, 200)))
            dataset = owner.push(wire=wire, budget=BUDGET)
            model = mlp(seed=3)
            markers.add("initial weights", model.data[-40:])
            for who in (owner, scientist):
                markers.add("an identity", who.identity._secret)
            job = scientist.submit(scientist.quote([dataset], model, train=train_spec())).job
            done = scientist.wait(job)
            assert done.state == "done"
            receipt = scientist.request("GET", f"/v1/jobs/{job}/receipt").json()
            digest = json.loads(base64.b64decode(json.loads(receipt["envelope"])["payload"]))
            result = scientist.result(job, digest["predicate"]["result_digest"])
            for name, (_, data) in result.items():
                markers.add(f"trained {name}", bytes(data).ljust(12, b"\xee"))
            quote = scientist.quote([dataset], model, train=train_spec(steps=20_000, batch=64))
            assert _limits(server.process.pid) <= 1
            job = scientist.submit(quote).job
            while scientist.status(job).state == "queued":
                time.sleep(0.02)
            workers = _workers(server.process.pid)
            assert workers
            for worker in workers:
                assert _limits(worker) == 0
                os.kill(worker, signal.SIGABRT)
            assert scientist.wait(job).state == "failed"
            server.stop(signal.SIGABRT)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    places = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(p.endswith(".log") for p in places) and len(places) > 3
    assert markers.found(places) == []
    assert _cores() == before

"""Attacks on a worker by its own native step, on a server by a worker that says it has one, and on
a scientist by an enclave that trains otherwise than asked. Each is named for what it tries."""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casemate.engine.aot import run
from casemate.server.config import Config
from casemate.server.prepared import check_prepared
from casemate.spec.errors import InternalError, JobError
from casemate.spec.job import Dp, JobRequest, Metric, NonPrivate, Sgd, TrainSpec, Views
from casemate.spec.messages import Prepared
from casemate.worker import native
from support import desk, formats, native_lab
from support.server import train_spec

DIMENSION, STEPS = 23, 3
DIGEST = "sha256:" + "0" * 64


def answer(
    steps: int = STEPS, epsilon: float = 1.0, weights: float = 0.5, magic: bytes = run.MADE
) -> bytes:
    return struct.pack(f"<8sQd{DIMENSION}f", magic, steps, epsilon, *[weights] * DIMENSION)


def program(says: bytes, *, reads: bool = True, then: str = "") -> bytes:
    """One that answers this, and then does something else."""
    return (
        f"#!{sys.executable} -IS\n"
        "import os, sys, time\n"
        f"while {reads} and os.read(0, 1 << 16): pass\n"
        f"os.write(1, {says!r})\n"
        f"{then}\n"
    ).encode()


@pytest.fixture(scope="module")
def ready() -> Iterator[Any]:
    of = native_lab.worker_job()
    ready, step = native_lab.prepared(of)
    yield of, ready, step
    step.process.kill()
    step.process.wait()


def trained(ready: Any, text: bytes) -> Any:
    """The run of a worker whose program is another one."""
    of, made, step = ready
    message = native_lab.run_of(of, made)
    rows = native_lab.rows_of(of, made, message)
    process = run.started(text)
    other = native.Native(step.made, process)
    try:
        return native.trained(other, of.prepare, message, made.program, rows, bytes(32))
    finally:
        process.kill()
        process.wait()


def test_a_program_that_keeps_to_its_form_is_believed(ready: Any) -> None:
    found = trained(ready, program(answer()))
    assert {float(t.min()) for t in found.values()} == {0.5}


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b"", "without"),
        (answer()[:-1], "without"),
        (answer()[:24], "without"),
        (answer() + b"r", "more"),
        (answer() + answer(), "more"),
        (answer() * 100_000, "more"),
        (answer(magic=b"ROWS\0\0\0\0"), "form"),
        (answer(steps=STEPS - 1), "steps"),
        (answer(steps=STEPS + 1), "steps"),
        (answer(steps=2**64 - 1), "steps"),
        (answer(epsilon=math.inf), "steps"),
        (answer(epsilon=math.nan), "steps"),
        (answer(epsilon=-1e-9), "steps"),
        (answer(epsilon=99.0), "steps"),
        (answer(weights=math.nan), "numbers"),
        (answer(weights=math.inf), "numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{len(x)} bytes",
)
def test_a_program_says_too_little_too_much_or_what_cannot_be(
    says: bytes, why: str, ready: Any
) -> None:
    before = ready[1].program.flat.clone()
    with pytest.raises(InternalError, match=why) as refused:
        trained(ready, program(says))
    assert refused.value.code == "internal.native"
    assert bool((ready[1].program.flat == before).all())


def test_a_program_answers_without_reading_and_ends(ready: Any) -> None:
    """Its job is larger than a pipe holds, so that the worker notices."""
    _, _, step = ready
    process = run.started(program(answer(), reads=False))
    try:
        with pytest.raises(InternalError, match="before"):
            native.answered(
                native.Native(step.made, process), iter([bytes(1 << 16)] * 64), DIMENSION
            )
    finally:
        process.wait()


def test_a_program_that_died_before_its_job_came(ready: Any) -> None:
    with pytest.raises(InternalError, match=r"before|without"):
        trained(ready, program(b"", reads=False, then="os._exit(1)"))


WRITES = """
for fd in range(3, 64):
    try:
        os.pwrite(fd, b"?", 0)
    except OSError:
        continue
    os.write(1, b"written")
"""


def test_a_program_writes_itself_other_code() -> None:
    """seccomp lets it write, and it holds the file that it was started from."""
    with run.started(program(b"", reads=False, then=WRITES)) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert process.returncode == 0


PARENT = """
import subprocess, sys, time
from pathlib import Path
from casemate.engine.aot import run
process = run.started(Path(sys.argv[1]).read_bytes())
other = subprocess.Popen(["sleep", "600"], pass_fds=[process.stdin.fileno()])
print(process.pid, other.pid, flush=True)
time.sleep(600)
"""


def test_a_program_does_not_outlive_its_worker(tmp_path: Path) -> None:
    """Killed, a worker can close nothing; somebody else holds the program's input open."""
    of = native_lab.built("images")
    (tmp_path / "step").write_bytes(of.artifact.program)
    worker = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "step")], stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    child, other = map(int, worker.stdout.readline().split())
    worker.kill()
    worker.wait()
    try:
        native_lab.ended(child)
    finally:
        os.kill(other, signal.SIGKILL)


# What a worker may say of a native step, and what a job may ask of one.


def said(**other: Any) -> Prepared:
    fields = {"path": ("native",), "artifact": DIGEST, "ways": ("rank-one", "formed")}
    return Prepared(**{"model_digest": DIGEST, **desk.PREPARED, **fields, **other})


def test_a_native_step_that_is_named_is_quoted() -> None:
    check_prepared(said(), DIGEST, Config(state=Path("unused")), "native")


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_every_way_to_a_norm_may_be_told(kind: str) -> None:
    """The server's word for what a worker says is the engine's: else such a model has no quote."""
    sites = native_lab.stepped(kind)[0].path.sites
    names = {way.name for site in sites for way in site.ways}
    assert "gram64" in names
    for way in (*names, "gram+tied", "+".join(sorted(names) * 10)):
        check_prepared(said(ways=(way,)), DIGEST, Config(state=Path("unused")), "native")


@pytest.mark.parametrize(
    "other",
    [
        {"path": ("graph",)},  # the other way, silently
        {"path": ("record",)},
        {"artifact": ""},
        {"artifact": "sha256:" + "Z" * 64},
        {"artifact": DIGEST + "\n"},
        {"ways": ("a row says 7",)},
        {"ways": ("x" * 1025,)},
        {"ways": ("",)},
        {"ways": ("formed",) * (1 << 15)},
    ],
    ids=lambda d: f"{next(iter(d))}",
)
def test_a_worker_says_of_its_step_what_cannot_be(other: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        check_prepared(said(**other), DIGEST, Config(state=Path("unused")), "native")


@pytest.mark.parametrize(
    "other",
    [{}, {"path": ("graph",)}, {"path": ("graph",), "artifact": ""}, {"path": ("native",)}],
    ids=str,
)
def test_a_worker_trains_natively_what_nobody_asked_it_to(other: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        check_prepared(said(**other), DIGEST, Config(state=Path("unused")), "torch")


async def _two(one: desk.Desk) -> tuple[desk.Person, desk.Person, Any]:
    owner, scientist = await one.person("owner"), await one.person("scientist")
    return owner, scientist, await owner.push()


def test_another_program_than_the_quoted_one_is_not_charged() -> None:
    """The worker that made it is gone, and the next one makes other bytes."""

    async def work() -> None:
        script = desk.Script(
            prepared={"path": ("native",), "artifact": DIGEST, "ways": ("formed",)}
        )
        async with desk.Desk(script=script) as one:
            owner, scientist, info = await _two(one)
            quote = await scientist.quote(info, train=native_train())
            assert quote.execution.artifact == DIGEST and quote.execution.ways == ("formed",)
            one.service.pool.kept.clear()
            script.prepared["artifact"] = "sha256:" + "1" * 64
            status = await scientist.finished((await scientist.submit(quote)).job)
            assert (status.state, status.error) == ("failed", "job.stale-quote")
            assert desk.spent(await owner.dataset(info.dataset)) == 0.0
            assert script.told[-1].ways == ("formed",)  # it was asked for the same

    desk.run_async(work())


def native_train(**more: Any) -> TrainSpec:
    return replace(train_spec(), runtime="native", **more)


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ({"privacy": NonPrivate(words="I permit training without privacy")}, "privacy alone"),
        ({"privacy": Dp(epsilon=1.0, delta=1e-3, clipping="per-layer")}, "flat"),
        ({"privacy": Dp(epsilon=1.0, delta=1e-3, clipping="automatic")}, "flat"),
        ({"views": Views(count=4)}, "views"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_job_asks_of_it_what_it_does_not_have(more: dict[str, Any], lacks: str) -> None:
    async def work() -> None:
        script = desk.Script()
        async with desk.Desk(script=script) as one:
            owner, scientist, info = await _two(one)
            with pytest.raises(desk.Refused) as refused:
                await scientist.quote(info, train=native_train(**more))
            assert refused.value.code == "plan.native" and lacks in str(refused.value)
            assert desk.spent(await owner.dataset(info.dataset)) == 0.0

    desk.run_async(work())


def test_an_evaluation_is_no_native_job() -> None:
    train = native_train(steps=1, optimizer=Sgd(lr=1.0))
    request = replace(formats.sample(JobRequest), train=train)
    replace(request, metrics=(Metric(name="accuracy"),), train=replace(train, runtime="torch"))
    with pytest.raises(ValueError, match="metrics"):
        replace(request, metrics=(Metric(name="accuracy"),))

"""A worker trains by the native step: the engine's weights, no states, refusals and why."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from casemate.engine import native as compilers
from casemate.engine import train
from casemate.spec import tensors
from casemate.spec.errors import CasemateError, InternalError, LimitError, ModelError
from casemate.spec.job import Execution, Sgd
from casemate.spec.messages import Run
from casemate.worker import native, session
from support import engine_lab as lab
from support import native_lab, worker_lab

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def of():
    return native_lab.worker_job(optimizer=Sgd(lr=0.2, momentum=0.9), ema=0.5, steps=4)


@pytest.fixture(scope="module")
def prepared(of):
    ready, step = native_lab.prepared(of)
    yield ready, step
    step.process.kill()
    step.process.wait()


@pytest.fixture
def ready(prepared):
    return prepared[0]


@pytest.fixture
def step(prepared):
    """A process of its own for each run."""
    made = prepared[1].made
    process = native.run.started(made.artifact.program)
    yield native.Native(made, process)
    process.kill()
    process.wait()


class OneKey:
    def bytes(self, count: int) -> bytes:
        assert count == len(KEY)
        return KEY


def run(of, ready, step, message: Run, monkeypatch) -> bytes:
    monkeypatch.setattr(session.signal, "alarm", lambda seconds: 0)
    monkeypatch.setattr(session, "OsRng", OneKey)
    result = os.memfd_create("result")
    fds = [lab.sealed_fd(worker_lab.KEY, of.wire), result]
    count = session._run(None, of.prepare, ready, message, fds, step)  # type: ignore[arg-type]
    return os.pread(result, count, 0)


def test_the_weights_are_those_of_the_engines_run(of, ready, step, monkeypatch) -> None:
    message = native_lab.run_of(of, ready)
    start, plan = ready.program.flat.clone(), message.plan
    rows = native_lab.rows_of(of, ready, message)
    by_graph = Execution(path="graph")
    wanted = train.train(
        plan, by_graph, of.prepare.train, ready.program, rows, KEY, fast=ready.fast
    )
    wanted = {name: t.clone() for name, t in wanted.items()}
    with torch.no_grad():
        ready.program.flat.copy_(start)
    result = run(of, ready, step, message, monkeypatch)
    assert len(result) == ready.prepared.result_bytes
    found = {
        name: torch.frombuffer(bytearray(view), dtype=torch.float32).view(info.shape)
        for name, (info, view) in tensors.load(result).items()
    }
    assert found.keys() == wanted.keys()
    moved = torch.cat([t.reshape(-1) for t in wanted.values()]) - start
    off = torch.cat([(found[n] - t).reshape(-1) for n, t in wanted.items()])
    assert float(moved.norm()) > 0
    assert float(off.norm()) <= 1e-5 * float(moved.norm())


def test_what_is_prepared_names_the_program(of, ready, step) -> None:
    said = ready.prepared
    assert said.path == ("native", "rank-one: w0, w1", "formed: b0, b1")
    assert (said.artifact, said.ways) == (f"sha256:{step.made.artifact.digest}", native_lab.WAYS)
    assert not said.compiled and said.seconds_per_microbatch > 0


def test_the_limit_is_above_the_programs_own_account(of, ready, step) -> None:
    """And not far above the job's epsilon: another noise or rate would be stopped."""
    message = native_lab.run_of(of, ready)
    delta, epsilon = of.prepare.train.privacy.delta, of.prepare.train.privacy.epsilon
    limit = native.stop(message.plan, delta)
    rows = native_lab.rows_of(of, ready, message)
    names = [spec.name for spec in ready.program.data]
    given = native.run.job(
        step.made.artifact, message.plan, of.prepare.train, rows, names,
        step.made.artifact.step.inputs, KEY, limit, delta,
    )  # fmt: skip
    found = native.answered(step, given, ready.program.dimension)
    assert found.steps == message.plan.steps
    assert 0 < found.epsilon <= limit < 1.1 * epsilon


# A worker as it is, but for the compiler's work, which was done before it was shut in.
BUILT = """
import sys
from pathlib import Path
from casemate.engine.aot import build
from casemate.worker import __main__
program = Path(sys.argv.pop(1)).read_bytes()
build.build = lambda step: build.Artifact(program, step)
sys.exit(__main__.main())
"""


def test_a_worker_that_is_shut_in_trains_by_it(of, ready, prepared, tmp_path) -> None:
    (tmp_path / "step").write_bytes(prepared[1].made.artifact.program)
    with worker_lab.worker(program=["-c", BUILT, str(tmp_path / "step")]) as (sock, process):
        said = worker_lab.ask(sock, of.prepare, lab.sealed_fd(worker_lab.KEY, of.model))
        assert (said.artifact, said.ways) == (ready.prepared.artifact, ready.prepared.ways)
        assert {"seccomp", "no-import", "rlimits"} <= set(worker_lab.answer(sock).layers)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (child,) = children
        held = Path(f"/proc/{child}/status").read_text()
        for line in ("Seccomp:\t2", "NoNewPrivs:\t1", "Threads:\t1", "CapEff:\t" + "0" * 16):
            assert line in held
        result = os.memfd_create("result")
        kept = os.dup(result)
        message = native_lab.run_of(of, ready)
        done = worker_lab.ask(sock, message, lab.sealed_fd(worker_lab.KEY, of.wire), result)
        assert done.bytes == ready.prepared.result_bytes
        found = tensors.load(os.pread(kept, done.bytes, 0))
        assert found.keys() == ready.program.result().keys()
        assert process.wait(60) == 0
        native_lab.ended(int(child))


@pytest.mark.parametrize("kept", [True, False])
def test_a_native_step_has_no_states(kept, of, ready, step, monkeypatch) -> None:
    monkeypatch.setattr(session.signal, "alarm", lambda seconds: 0)
    resume, fd = worker_lab.sealed_state(bytes(8), 1)
    message = native_lab.run_of(of, ready)
    message = replace(message, **({"state_steps": 1} if kept else {"resume": resume}))
    fds = [lab.sealed_fd(worker_lab.KEY, of.wire), fd, os.memfd_create("result")]
    with pytest.raises(InternalError, match="no states"):
        session._run(None, of.prepare, ready, message, fds, step)  # type: ignore[arg-type]


def test_a_quote_of_another_program_is_not_run(of, ready, step, monkeypatch) -> None:
    message = native_lab.run_of(of, ready)
    other = replace(message.execution, artifact="sha256:" + "0" * 64)
    with pytest.raises(InternalError, match="path"):
        run(of, ready, step, replace(message, execution=other), monkeypatch)


@pytest.mark.parametrize("changed", [{"clip": 0.25}, {"grid": 2.0**-10}, {"sigma": 1e-3}])
def test_a_plan_that_it_was_not_made_for_is_not_run(changed, of, ready, step, monkeypatch) -> None:
    with pytest.raises(CasemateError, match=r"clip|noise|sensitivity"):
        run(of, ready, step, native_lab.run_of(of, ready, **changed), monkeypatch)


def test_a_machine_that_makes_none_says_why(monkeypatch) -> None:
    native.require(60.0)
    with pytest.raises(LimitError, match="operator") as refused:
        native.require(0.0)
    assert refused.value.code == "limit.native"
    with monkeypatch.context() as patch:
        patch.setattr(native.platform, "machine", lambda: "riscv64")
        with pytest.raises(LimitError, match="riscv64"):
            native.require(60.0)
    monkeypatch.setattr(compilers, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LimitError, match="compiler"):
        native.require(60.0)


def test_a_model_of_the_other_path_is_refused_with_its_reason(of, ready) -> None:
    said = replace(ready.prepared, path=("record", "graph: it mixes"))
    other = replace(ready, fast=None, prepared=said)
    with pytest.raises(ModelError, match="it mixes") as refused:
        native.prepared(of.prepare, of.model, other, time.monotonic())
    assert refused.value.code == "model.native"


def test_nothing_is_built_past_the_time_for_compiling(of, ready) -> None:
    with pytest.raises(LimitError, match="time") as refused:
        native.prepared(of.prepare, of.model, ready, time.monotonic() - 3601)
    assert refused.value.code == "limit.native"


def test_one_that_needs_too_much_memory_is_refused(of, monkeypatch) -> None:
    monkeypatch.setattr(native, "_BASE_BYTES", of.prepare.memory_bytes)
    with pytest.raises(LimitError) as refused:
        native_lab.prepared(of)
    assert refused.value.code == "limit.memory"

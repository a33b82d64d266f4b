"""One job over the socket: ``Ready``, then one check, or prepare, lock and run; or one deployed
model: prepare, lock and calls."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Iterable
from typing import Literal

# What a run needs is imported before Ready, so that waiting workers are warm and none is imported
# after the lock.
import torch

from casemate.engine import prepare, rows, select, train
from casemate.plan import state as states
from casemate.seal import stream
from casemate.seams import OsRng
from casemate.spec import codec, frames, tensors
from casemate.spec.errors import CasemateError, InternalError
from casemate.spec.messages import (
    CheckDataset,
    Checked,
    Done,
    Failed,
    GoOn,
    Locked,
    Prepare,
    Ready,
    Run,
    Serve,
    State,
)
from casemate.worker import dataset, native, serving
from casemate.worker.lock import Entered, lock

MAX_DATASETS = 64
_HEADROOM = 64 << 20
Phase = Literal["check", "prepare", "lock", "run"]


def serve(sock: socket.socket, entered: Entered) -> int:
    """Speak ``spec.messages`` until the job ends; the process's exit code. entered: what
    ``worker.lock.enter`` returned. Every failure but a lost
    peer is told as ``Failed``; in phase ``run`` it says nothing more than that (P6)."""
    warm()
    frames.send(sock, Ready(pid=os.getpid()))
    phase: Phase = "prepare"
    try:
        message, fds = frames.receive(sock, (CheckDataset, Prepare, Serve), max_fds=1)
        if len(fds) != 1:
            raise _protocol("one descriptor must come with the first message")
        if isinstance(message, CheckDataset):
            phase = "check"
            _check(sock, message, fds[0], entered)
            return 0
        if isinstance(message, Serve):
            called = serving.prepare(message, _packed_model(message, fds[0]))
            frames.send(sock, called.serving)
            phase = "lock"
            layers = _shut_in(
                message, [sock.fileno()], entered, memory_bytes=message.memory_bytes, file_bytes=0
            )
            frames.send(sock, Locked(layers=layers))
            phase = "run"
            serving.serve(sock, message, called)
        assert isinstance(message, Prepare)
        ready, step = _prepare(message, fds[0])
        if step is not None:
            native.leave(step)
        frames.send(sock, ready.prepared)
        phase = "lock"
        layers = _shut_in(
            message,
            [sock.fileno(), *(step.descriptors if step is not None else ())],
            entered,
            memory_bytes=message.memory_bytes,
            file_bytes=_file_bytes(message, ready.prepared.dimension),
        )
        frames.send(sock, Locked(layers=layers))
        run, fds = frames.receive(sock, (Run,), max_fds=MAX_DATASETS + 3)
        phase = "run"
        frames.send(sock, Done(bytes=_run(sock, message, ready, run, fds, step)))
    except Exception as e:
        frames.send(sock, _failed(phase, e))
        return 1
    return 0


def warm() -> None:
    """Do now what is done once: after the lock nothing is compiled or imported."""
    codec.warm()
    sealed = b"".join(stream.encrypt(bytes(32), [bytes(8)]))
    b"".join(stream.decrypt(bytes(32), [sealed]))
    values = torch.zeros(2, 2)
    bool(torch.isfinite(values).all() & ((values >= 0) & (values <= 1)).all())


def _protocol(what: str) -> InternalError:
    return InternalError("internal.protocol", f"{what[0].upper()}{what[1:]}.", mend="Report this.")


def _failed(phase: Phase, error: Exception) -> Failed:
    if phase == "run":
        return Failed(phase=phase, code="job.failed", message="The job failed.", mend="", where="")
    if isinstance(error, CasemateError):
        return Failed(
            phase=phase,
            code=error.code,
            message=error.message[:2000],
            mend=error.mend[:2000],
            where=error.where[:500],
        )
    if isinstance(error, MemoryError):
        return Failed(
            phase=phase,
            code="limit.memory",
            message="The worker has not enough memory.",
            mend="Make the model or the dataset smaller.",
            where="",
        )
    return Failed(
        phase=phase,
        code="internal.worker",
        message=f"The worker failed with {type(error).__name__}.",
        mend="Report this to the operator.",
        where="",
    )


def _shut_in(
    message: CheckDataset | Prepare | Serve,
    keep: list[int],
    entered: Entered,
    *,
    memory_bytes: int,
    file_bytes: int,
) -> tuple[str, ...]:
    """Lock, with all layers that the server promised its clients."""
    layers = lock(keep, entered, memory_bytes=memory_bytes, file_bytes=file_bytes)
    if missing := sorted(set(message.sandbox) - set(layers)):
        raise InternalError(
            "internal.sandbox",
            f"The worker would run without {', '.join(missing)}, which its server promises.",
            mend="Run casemate doctor, and start the server again.",
        )
    return layers


def _check(sock: socket.socket, message: CheckDataset, fd: int, entered: Entered) -> None:
    # The table is the owner's, so what parses it is shut in as well.
    _shut_in(message, [sock.fileno(), fd], entered, memory_bytes=1 << 62, file_bytes=0)
    columns = dataset.load(message.dataset, message.schema, message.key, message.salt, fd)
    dataset.check(message.schema, columns)
    frames.send(sock, Checked(dataset=message.dataset))


def _packed_model(message: Prepare | Serve, fd: int) -> bytes:
    reader = stream.Reader(message.key, fd)
    packed = reader.read(0, reader.size)
    os.close(fd)
    return packed


def _prepare(message: Prepare, fd: int) -> tuple[prepare.Ready, native.Native | None]:
    begun, by_step = time.monotonic(), message.train.runtime == "native"
    if by_step:
        native.require(message.compile_seconds)
    packed = _packed_model(message, fd)
    compiling = select.Compile(message.compile_seconds, message.compiled)
    ready = prepare.prepare(
        packed,
        message.model_digest,
        message.schemas,
        message.inputs,
        message.train,
        message.memory_bytes,
        compiling=prepare.NEVER if by_step else compiling,
        released=message.released,
        metrics=message.metrics,
        target=message.target,
    )
    return native.prepared(message, packed, ready, begun) if by_step else (ready, None)


def _file_bytes(message: Prepare, dimension: int) -> int:
    """The largest file that a run writes: its result, or a state."""
    return max(8 * dimension, states.size(message.train, dimension)) + _HEADROOM


def _run(
    sock: socket.socket,
    message: Prepare,
    ready: prepare.Ready,
    run: Run,
    fds: list[int],
    step: native.Native | None = None,
) -> int:
    """Train and write the result; its bytes."""
    resumed, kept = run.resume is not None, run.state_steps > 0
    if len(fds) != len(run.datasets) + resumed + 1 + kept or run.state_steps < 0:
        raise _protocol("descriptors and datasets differ in number")
    if tuple(d.schema for d in run.datasets) != message.schemas:
        raise _protocol("the run's schemas are not those prepared for")
    if run.plan.model_digest != message.model_digest:
        raise _protocol("the plan is for another model")
    if (run.execution.path, run.execution.artifact) != (ready.path, ready.prepared.artifact):
        raise _protocol("the quote's path cannot be had any more")
    if step is not None and (resumed or kept):
        raise _protocol("a native step has no states")
    signal.alarm(wall_clock(ready, run))
    after = fds[len(run.datasets) :]
    source = _resumed(message, run, after[0]) if resumed else None
    tables = [
        dataset.load(d.dataset, d.schema, d.key, d.salt, fd)
        for d, fd in zip(run.datasets, fds, strict=False)
    ]
    made = rows.assemble(message.schemas, tables, ready.program.data, ready.inputs)
    del tables

    def save(step: int, parts: Iterable[bytes | memoryview]) -> None:
        frames.send(sock, State(step=step, bytes=_write(parts, after[-1])))
        answer, _ = frames.receive(sock, (GoOn,))
        if answer.step != step:
            raise _protocol("another state was answered")

    # The generator's key is new in every run: a state holds none, so that no draw comes again.
    if step is not None:
        trained = native.trained(step, message, run, ready.program, made, OsRng().bytes(32))
        return _write([_packed(trained)], after[resumed])
    result = train.train(
        run.plan,
        run.execution,
        message.train,
        ready.program,
        made,
        OsRng().bytes(32),
        keep=ready.keep,
        fast=ready.fast,
        source=source,
        every=run.state_steps,
        save=save,
    )
    return _write([_packed(result)], after[resumed])


def _resumed(message: Prepare, run: Run, fd: int) -> stream.Reader:
    """The state to go on from, of this job and of the step that the server says."""
    assert run.resume is not None
    source = stream.Reader(run.resume.key, fd)
    head = source.read(0, states.HEAD_BYTES)
    if states.check(head, source.size, run.plan, message.train).step != run.resume.step:
        raise _protocol("the state is of another step")
    return source


def wall_clock(ready: prepare.Ready, run: Run) -> int:
    """Seconds after which the kernel ends the worker, should the server not have done so: twenty
    times the prediction, and five minutes."""
    p, plan = ready.prepared, run.plan
    step = p.seconds_per_step + plan.microbatches * p.seconds_per_microbatch
    return min(2**31 - 1, 300 + math.ceil(20 * (p.seconds_fixed + plan.steps * step)))


def _packed(result: dict[str, torch.Tensor]) -> bytes:
    return tensors.dump(
        {
            name: ("f32", tuple(t.shape), t.contiguous().numpy().tobytes())
            for name, t in result.items()
        }
    )


def _write(parts: Iterable[bytes | memoryview], fd: int) -> int:
    """Write a file from its beginning; its bytes."""
    at = 0
    for part in parts:
        data = memoryview(part)
        while data:
            count = os.pwrite(fd, data, at)
            at, data = at + count, data[count:]
    return at

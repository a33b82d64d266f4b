"""A run of an artifact: what it is given and what it gives (``runtime/loop.cpp``)."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from casemate.engine import keystream, noise, optim, sampling
from casemate.engine.aot.build import Artifact, refuse
from casemate.engine.rows import Rows
from casemate.engine.train import slots
from casemate.seal import stream
from casemate.spec.job import Adam, Plan, Sgd, TrainSpec

# The head of what a run is given: ``Job`` in runtime/loop.cpp, field by field.
JOB: Final = np.dtype(
    [("magic", "V8")]
    + [(name, "<u8") for name in ("steps", "units", "slots", "rows", "processes", "threshold",
                                  "all", "adam", "flags", "chunk", "rows_bytes")]
    + [(name, "<f8") for name in ("rate", "sigma", "normaliser", "delta", "epsilon", "momentum",
                                  "beta1", "beta2", "eps", "decay", "average")]
    + [(name, "V32") for name in ("sampling", "noise", "more", "rows_key")]
    + [("rows_prefix", "V8")]
)  # fmt: skip
_RESULT: Final = struct.Struct("<8sQd")
MAGIC: Final = b"CMNAT01\n"
MADE: Final = b"CMNRES1\0"
_SEALED: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Trained:
    """weights: all trained tensors one after another, float32 (d,), or their average. steps: taken
    before the budget's stop. epsilon: by the runtime's own account."""

    weights: torch.Tensor
    steps: int
    epsilon: float


def packed_rows(rows: Rows, names: list[str]) -> Iterator[bytes]:
    """``rows`` as the runtime reads them, with the inputs ``names`` in order."""
    yield np.asarray(rows.starts, dtype="<u8").tobytes()
    order = torch.from_numpy(rows.order)
    valid = rows.valid[rows.order].astype(np.uint8)
    yield valid.tobytes() + bytes(-len(valid) % 8)
    yield b"".join(rows.filler_of(name).contiguous().numpy().tobytes() for name in names)
    many = 4096
    for first in range(0, len(order), many):
        at = order[first : first + many]
        parts = [
            rows.inputs[name][at].contiguous().numpy().reshape(len(at), -1).view(np.uint8)
            for name in names
        ]
        yield np.concatenate([p.reshape(len(at), -1) for p in parts], axis=1).tobytes()


def job(
    artifact: Artifact,
    plan: Plan,
    train: TrainSpec,
    rows: Rows,
    names: list[str],
    tensors: Mapping[str, torch.Tensor],
    key: bytes,
    epsilon: float,
    delta: float,
    processes: int = 1,
) -> Iterator[bytes]:
    """The bytes that an artifact trains by, with the rows sealed under a key of their own.

    names: the inputs of rows, in the step's order. tensors: the step's trained and held ones by
    name. key: the run's, 32 bytes. epsilon, delta: past which no step is taken.
    """
    step, spec = artifact.step, train.optimizer
    if (plan.clip, plan.grid, plan.clipping) != (step.clip, step.grid, "flat") or not plan.private:
        raise refuse("The plan's clip is not the artifact's.")
    flags = int(isinstance(spec, Sgd) and spec.nesterov)
    flags |= 2 * int(isinstance(spec, Adam) and spec.decoupled)
    rows_key, header = os.urandom(stream.KEY_BYTES), stream.new_header()
    opening, prefix = stream.opening(rows_key, header)
    size = 8 * (rows.units + 1) + -(-len(rows.order) // 8) * 8
    size += (len(rows.order) + 1) * sum(rows.filler_of(n).nbytes for n in names)
    limit = sampling.threshold(plan.rate)
    head = {
        "magic": MAGIC, "steps": plan.steps, "units": plan.units, "slots": slots(plan),
        "rows": len(rows.order), "processes": processes, "threshold": min(limit, 2**64 - 1),
        "all": limit == 2**64, "adam": isinstance(spec, Adam), "flags": flags,
        "chunk": stream.CHUNK, "rows_bytes": size, "rate": plan.rate, "sigma": plan.sigma,
        "normaliser": plan.normaliser, "delta": delta, "epsilon": epsilon,
        "decay": spec.weight_decay, "average": train.ema or 0.0, "rows_key": opening,
        "rows_prefix": prefix, "sampling": keystream.subkey(key, sampling.PURPOSE),
        "noise": keystream.subkey(key, noise.PURPOSE), "more": keystream.subkey(key, noise.MORE),
    }  # fmt: skip
    own = ("beta1", "beta2", "eps") if isinstance(spec, Adam) else ("momentum",)
    yield packed_job(head | {name: getattr(spec, name) for name in own})
    rates = [spec.lr * optim.factor(train.schedule, i, plan.steps) for i in range(plan.steps)]
    yield np.asarray(rates, dtype="<f8").tobytes()
    for name in list(step.inputs)[: step.trained + step.held]:
        yield memory(tensors[name])
    sealed = stream.encrypt_with(rows_key, header, packed_rows(rows, names))
    yield from sealed


def packed_job(fields: Mapping[str, object], given: bytes = bytes(JOB.itemsize)) -> bytes:
    """``given`` with these fields of :data:`JOB`."""
    head = np.frombuffer(given, JOB).copy()
    for name, value in fields.items():
        head[name] = value
    return head.tobytes()


def memory(t: torch.Tensor) -> bytes:
    """A tensor's entries as they lie in memory, gaps and all."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return bytes(t.detach().as_strided((extent,), (1,)).numpy().view(np.uint8).data)


def started(program: bytes, errors: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """A process of the program, which waits for its job: pipes to its standard input and from its
    output, neither buffered. errors: where what it says of its end goes."""
    file = os.memfd_create("step", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(program)
        while left:
            left = left[os.write(file, left) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALED)  # it holds the file that its code lies in
        return subprocess.Popen(
            [f"/proc/self/fd/{file}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, env={}, cwd="/", pass_fds=[file], bufsize=0,
        )  # fmt: skip
    finally:
        os.close(file)


def answer_bytes(dimension: int) -> int:
    """Of a program's answer with so many weights."""
    return _RESULT.size + 4 * dimension


def feed(to: int, given: Iterable[bytes]) -> None:
    """Write all of it. Raises ``BrokenPipeError`` where nobody reads on."""
    for part in given:
        left = memoryview(part)
        while left:
            left = left[os.write(to, left) :]


def answer(made: bytes | bytearray) -> Trained:
    """What a program's answer says. Raises ``ModelError`` ``model.native`` for another form."""
    magic, steps, epsilon = _RESULT.unpack(made[: _RESULT.size].ljust(_RESULT.size, b"\0"))
    if magic != MADE or len(made) <= _RESULT.size or len(made) % 4:
        raise refuse("The native step gave no result of this form.")
    weights = torch.frombuffer(bytearray(made), dtype=torch.float32, offset=_RESULT.size)
    return Trained(weights, steps, epsilon)


def run(artifact: Artifact, given: Iterator[bytes]) -> Trained:
    """Run it in a process of its own; ``ModelError`` ``model.native`` where it stops early."""
    process = started(artifact.program, subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    try:
        feed(process.stdin.fileno(), given)
        process.stdin.close()
    except BrokenPipeError:
        pass
    made = process.stdout.read()
    told = process.stderr.read().decode(errors="replace")
    if process.wait() or len(made) < _RESULT.size:
        raise refuse(f"The native step ended with status {process.returncode}: {told.strip()}")
    return answer(made)

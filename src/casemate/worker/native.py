"""A job's native step (docs/native.md): made, accepted and started in phase ``prepare``, fed once
rows are there.

The program has shut itself in before it reads a byte. It holds code that a compiler made of a
stranger's model: what it answers counts in the one form that is due.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from casemate.accounting import rdp
from casemate.engine import native, prepare, train
from casemate.engine.aot import make, run
from casemate.engine.program import Program
from casemate.engine.rows import Rows
from casemate.plan.compile import constants
from casemate.spec.errors import InternalError, LimitError, ModelError
from casemate.spec.job import Dp, Plan
from casemate.spec.messages import Prepare
from casemate.spec.messages import Run as Asked

# The orders of the program's own account are whole numbers up to this (runtime/account.cpp).
TOP: Final = 512
# What is prepared for a program is not made of it: bytes of its code, stack and buffers.
_BASE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Native:
    """A native step that was accepted, and its process, which waits for its job."""

    made: make.Made
    process: subprocess.Popen[bytes]

    @property
    def descriptors(self) -> tuple[int, int]:
        """To its standard input and from its output."""
        assert self.process.stdin and self.process.stdout
        return self.process.stdin.fileno(), self.process.stdout.fileno()


def require(compile_seconds: float) -> None:
    """Raises ``LimitError`` ``limit.native`` where no native step can be made, whatever the job."""
    try:
        native.version(native.compiler())
        lacks = ""
    except (OSError, subprocess.SubprocessError):
        lacks = "there is no C++ compiler"
    if platform.machine() != "x86_64":
        lacks = f"it is no x86-64 but {platform.machine()}"
    if compile_seconds <= 0:
        lacks = "its operator lets nothing be compiled"
    if lacks:
        raise _unable(lacks)


def _unable(lacks: str) -> LimitError:
    return LimitError(
        "limit.native",
        f"This machine makes no native step: {lacks}.",
        mend='Let the engine train, runtime="torch", or ask the operator.',
    )


def prepared(
    message: Prepare, packed: bytes, ready: prepare.Ready, begun: float
) -> tuple[prepare.Ready, Native]:
    """Make the step that was prepared for the path ``graph``, and start it. begun: when ``prepare``
    was, by the monotonic clock: past ``compile_seconds`` nothing is begun.

    Raises ``ModelError`` ``model.native``, ``LimitError`` (``limit.native``, ``limit.memory``).
    """
    found = ready.prepared
    if ready.fast is None:
        raise ModelError(
            "model.native",
            "The native step is the path graph's, which this model does not take: "
            f"{'; '.join(found.path)[:300]}.",
            mend='Let the engine train: runtime="torch".',
        )
    if time.monotonic() - begun > message.compile_seconds:
        raise _unable("looking at the model took the time that is for compiling")
    ways = message.ways or tuple(site.way.name for site in ready.fast.sites)
    held = prepare.resident()
    plan = constants(message.train, message.schemas, found)
    with _no_modes():
        made = make.make(packed, plan, message.train, message.schemas, message.inputs, ways)
    rows = sum(s.rows * sum(c.row_bytes for c in s.columns) + 9 * s.units for s in message.schemas)
    needed = found.bytes + prepare.resident() - held + made.bytes + rows + _BASE_BYTES
    prepare.require_memory(needed, message.memory_bytes)
    said = replace(
        found,
        path=("native", *found.path[1:]),
        microbatch=plan.microbatch,
        seconds_per_microbatch=made.seconds() / 2,  # with all of a step that is not a microbatch's
        seconds_per_step=0.0,
        bytes=needed,
        artifact=f"sha256:{made.artifact.digest}",
        ways=made.ways,
    )
    process = run.started(made.artifact.program)
    return replace(ready, prepared=said), Native(made, process)


def leave(of: Native) -> None:
    """The kernel takes the process away when it ends: a worker that is locked may not ask how."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    of.process.returncode = 0


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """A worker may change no file's mode; inductor copies one's with its file, to no use."""
    before = shutil.copymode
    shutil.copymode = lambda *_, **__: None
    try:
        yield
    finally:
        shutil.copymode = before


def stop(plan: Plan, delta: float) -> float:
    """What the program's own account may come to before it stops: its orders are among others the
    ledger's whole ones, at which the plan's events come to this."""
    (event,) = plan.events
    best = min(
        r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, r in zip(rdp.ORDERS, rdp.curve(event), strict=True)
        if a == int(a) and a <= TOP
    )
    return max(0.0, best) + 1e-6 * (1 + abs(best))


def trained(
    of: Native, message: Prepare, asked: Asked, program: Program, rows: Rows, key: bytes
) -> dict[str, torch.Tensor]:
    """Train by it: the trained tensors by name, float32. key: the run's, 32 fresh bytes.

    Raises ``InternalError`` ``internal.native`` where the program answers another thing than the
    weights after the plan's steps.
    """
    plan, spec = asked.plan, message.train
    train.check_plan(plan, spec, program.dimension, rows.units, asked.execution.path)
    assert isinstance(spec.privacy, Dp)
    names = [data.name for data in program.data]
    delta, limit = spec.privacy.delta, stop(plan, spec.privacy.delta)
    artifact = of.made.artifact
    given = run.job(artifact, plan, spec, rows, names, artifact.step.inputs, key, limit, delta)
    got = answered(of, given, program.dimension)
    if got.steps != plan.steps or not 0 <= got.epsilon <= limit:
        raise _broken(f"took {got.steps} steps of {plan.steps}")
    if not bool(torch.isfinite(got.weights).all()):
        raise _broken("trained weights that are no numbers")
    with torch.no_grad():
        program.flat.copy_(got.weights)
    return program.result()


def answered(of: Native, given: Iterable[bytes], dimension: int) -> run.Trained:
    """Feed a program and read its answer to the end; no byte more than that of ``dimension``
    weights is kept."""
    to, back = of.descriptors
    assert of.process.stdin
    try:
        run.feed(to, given)
        of.process.stdin.close()
    except BrokenPipeError:
        raise _broken("ended before it had its job") from None
    made = bytearray()
    most = run.answer_bytes(dimension)
    while part := os.read(back, min(most + 1 - len(made), 1 << 20)):
        made += part
        if len(made) > most:
            raise _broken("answers more than the weights")
    if len(made) < most:
        raise _broken("ended without the weights")
    try:
        return run.answer(made)
    except ModelError:
        raise _broken("answers in another form") from None


def _broken(what: str) -> InternalError:
    return InternalError("internal.native", f"The native step {what}.", mend="Report this.")

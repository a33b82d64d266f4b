"""A worker spoken to as the server does: a real process, or its phase ``run`` in this one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from casemate.engine import prepare as prepare_
from casemate.seal import stream
from casemate.spec import frames
from casemate.spec.messages import (
    Checked,
    Done,
    Failed,
    GoOn,
    Locked,
    Prepare,
    Prepared,
    Ready,
    Resume,
    Run,
    State,
)
from casemate.worker import session
from support import engine_lab as lab

KEY, SALT, STATE_KEY = b"k" * 32, b"s" * 32, b"t" * 32
ANSWERS = (Ready, Checked, Prepared, Locked, State, Done, Failed)
FEATURES, CLASSES, ROWS = 4, 2, 40


@contextlib.contextmanager
def worker(
    threads: str = "1", program: Sequence[str] = ("-m", "casemate.worker")
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A process that is ready. program: Python's arguments before the socket's number."""
    ours, theirs = socket.socketpair()
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")}
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            [sys.executable, *program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**env, "OMP_NUM_THREADS": threads, "TMPDIR": scratch},
        )
        theirs.close()
        try:
            ready, _ = frames.receive(ours, (Ready,), timeout=120)
            assert ready.pid > 0
            yield ours, process
        finally:
            ours.close()
            process.kill()
            process.wait()


def ask(sock: socket.socket, message: object, *fds: int) -> Any:
    """Send a message with descriptors, which are closed; the answer."""
    frames.send(sock, message, fds)
    for fd in fds:
        os.close(fd)
    return answer(sock)


def answer(sock: socket.socket) -> Any:
    return frames.receive(sock, ANSWERS, timeout=120)[0]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run needs: the message of phase ``prepare``, the model, and one table's bytes."""

    prepare: Prepare
    model: bytes
    wire: bytes
    weights: dict[str, torch.Tensor]


def job(
    steps: int = 3,
    private: bool = True,
    *,
    sizes: Sequence[int] = (FEATURES, 3, CLASSES),
    spoilt: bool = False,
    rows: int = 0,
    **more: Any,
) -> Job:
    """A job on a small MLP. spoilt: every row is invalid, so that it adds nothing. rows:
    which rows."""
    graph, weights = lab.mlp(list(sizes))
    model = lab.packed(graph, weights)
    schema = lab.schema(sizes[0], sizes[-1], ROWS)
    table = lab.table(schema, rows)
    if spoilt:
        table["x"].fill_(float("nan"))
    message = Prepare(
        key=KEY,
        model_digest="sha256:" + hashlib.sha256(model).hexdigest(),
        schemas=(schema,),
        inputs=lab.BINDINGS,
        train=lab.spec_of(8, steps, private=private, **more),
        memory_bytes=4 << 30,
        threads=1,
    )
    return Job(message, model, lab.to_wire(table), weights)


def run_of(of: Job, prepared: Prepared, **more: Any) -> Run:
    """The message that runs a job; more: its other fields."""
    return dataclasses.replace(lab.run_of(of.prepare, prepared, of.wire, KEY, SALT), **more)


def sealed_state(state: bytes, step: int, key: bytes = STATE_KEY) -> tuple[Resume, int]:
    """A state as the server hands it over: its part of ``Run``, and its descriptor."""
    return Resume(key=key, step=step), lab.sealed_fd(key, state)


class InProcess:
    """Phase ``run`` in this process, of a job prepared once. Nothing here is locked."""

    def __init__(self, of: Job) -> None:
        self.job, m = of, of.prepare
        self.ready = prepare_.prepare(
            of.model, m.model_digest, m.schemas, m.inputs, m.train, m.memory_bytes
        )
        self._initial = self.ready.program.flat.clone()

    def run(
        self,
        monkeypatch: Any,
        *,
        state: tuple[Resume, int] | None = None,
        every: int = 0,
        answers: Sequence[int] | None = None,
        message: Run | None = None,
    ) -> tuple[bytes, dict[int, bytes]]:
        """The result's bytes, and the states by step.

        answers: the steps of ``GoOn``, in place of the right ones. message: in place of the right
        one, but for its resume and interval.
        """
        monkeypatch.setattr(session.signal, "alarm", lambda seconds: 0)
        with torch.no_grad():
            self.ready.program.flat.copy_(self._initial)
        message = dataclasses.replace(
            message or run_of(self.job, self.ready.prepared),
            resume=state[0] if state else None,
            state_steps=every,
        )
        states: dict[int, bytes] = {}
        result, kept = os.memfd_create("result"), os.memfd_create("state")
        fds = [lab.sealed_fd(KEY, self.job.wire), *([state[1]] if state else []), result]
        fds += [kept] if every else []
        ours, theirs = socket.socketpair()
        parent = threading.Thread(target=_parent, args=(ours, kept, states, answers))
        parent.start()
        try:
            count = session._run(theirs, self.job.prepare, self.ready, message, fds)
            return os.pread(result, count, 0), states
        finally:
            theirs.close()
            parent.join(30)
            ours.close()
            for fd in {*fds, kept}:
                os.close(fd)


def _parent(
    sock: socket.socket, kept: int, states: dict[int, bytes], answers: Sequence[int] | None
) -> None:
    with contextlib.suppress(Exception):
        while True:
            message, _ = frames.receive(sock, (State,), timeout=60)
            states[message.step] = os.pread(kept, message.bytes, 0)
            step = message.step if answers is None else answers[len(states) - 1]
            frames.send(sock, GoOn(step=step))


def opened(key: bytes, sealed: bytes) -> bytes:
    """A sealed stream in clear."""
    return b"".join(stream.decrypt(key, [sealed]))

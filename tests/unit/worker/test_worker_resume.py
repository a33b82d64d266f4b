"""A worker that hands its states over, and one that goes on from one of them."""

from __future__ import annotations

import os

import pytest

from casemate.plan import state as states
from casemate.spec import frames, tensors
from casemate.spec.job import Adam
from casemate.spec.messages import Done, GoOn, Locked, Prepared, State
from casemate.worker import session
from support import engine_lab as lab
from support.worker_lab import KEY, ask, job, run_of, sealed_state, worker

STEPS = 7


def made():
    return job(STEPS, optimizer=Adam(lr=0.1), ema=0.5)


def begin(sock, of, *, state=None, every=0):
    """Prepare and start a run; its message, its descriptors and its first answer."""
    prepared = ask(sock, of.prepare, lab.sealed_fd(KEY, of.model))
    assert isinstance(prepared, Prepared), prepared
    frames.receive(sock, (Locked,), timeout=60)
    more = {"state_steps": every} | ({"resume": state[0]} if state else {})
    run = run_of(of, prepared, **more)
    result, kept = os.memfd_create("result"), os.memfd_create("state")
    fds = [lab.sealed_fd(KEY, of.wire), *([state[1]] if state else []), os.dup(result)]
    fds += [os.dup(kept)] if every else []
    return run, result, kept, ask(sock, run, *fds)


def test_states_come_when_due_and_a_second_worker_goes_on_from_one():
    of = made()
    size = states.size(of.prepare.train, sum(t.numel() for t in of.weights.values()))
    with worker() as (sock, process):
        run, result, kept, said = begin(sock, of, every=2)
        found = {}
        while isinstance(said, State):
            found[said.step] = os.pread(kept, said.bytes, 0)
            assert said.bytes == size
            said = ask(sock, GoOn(step=said.step))
        assert isinstance(said, Done), said
        assert process.wait(timeout=30) == 0
        first = os.pread(result, said.bytes, 0)
    assert list(found) == [2, 4, 6]
    for step, data in found.items():
        head = states.check(data[: states.HEAD_BYTES], len(data), run.plan, of.prepare.train)
        assert head.step == step
    with worker() as (sock, process):
        _, result, _, said = begin(sock, of, state=sealed_state(found[4], 4), every=2)
        assert isinstance(said, State)
        assert said.step == 6
        said = ask(sock, GoOn(step=6))
        assert isinstance(said, Done), said
        assert process.wait(timeout=30) == 0
        second = os.pread(result, said.bytes, 0)
    assert {n: i.shape for n, (i, _) in tensors.load(second).items()} == {
        n: tuple(t.shape) for n, t in of.weights.items()
    }
    assert second != first  # other noise


@pytest.mark.full
def test_a_worker_waits_for_its_state_to_be_kept():
    """Until ``GoOn`` the memfd stays as it is; another answer, or another step, ends the run."""
    of = made()
    with worker() as (sock, process):
        _, _, kept, said = begin(sock, of, every=3)
        assert isinstance(said, State)
        data = os.pread(kept, said.bytes, 0)
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(None)
        assert os.pread(kept, said.bytes + 1, 0) == data
        assert ask(sock, GoOn(step=6)) == session._failed("run", RuntimeError())
        assert process.wait(timeout=30) == 1

"""Resuming against those who would gain by it: states that are hostile, keys that come again,
states that say more than the noised updates do."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casemate.engine import state as engine_state
from casemate.engine import train
from casemate.plan import state
from casemate.seams import OsRng
from casemate.spec import tensors
from casemate.spec.errors import CasemateError, InternalError
from casemate.spec.job import Adam, Sgd
from casemate.spec.messages import Resume
from casemate.worker import session
from support import engine_lab as lab
from support import resume_lab as resume
from support.resume_lab import Case
from support.worker_lab import KEY, SALT, STATE_KEY, InProcess, job, run_of, sealed_state

STEPS = 6


@pytest.fixture(scope="module")
def bench() -> InProcess:
    return InProcess(job(STEPS, optimizer=Adam(lr=0.1), ema=0.5))


@pytest.fixture(scope="module")
def wide() -> InProcess:
    """A job whose rows are all invalid: what moves the weights is noise alone."""
    return InProcess(job(3, sizes=(60, 400, 60), spoilt=True, optimizer=Sgd(lr=0.5)))


def weights_in(data: bytes, name: str) -> torch.Tensor:
    info, view = tensors.load(data)[name]
    assert info.dtype == "f32"
    return torch.frombuffer(bytearray(view), dtype=torch.float32)


def result_of(data: bytes) -> torch.Tensor:
    """In the order of ``lab.mlp``'s parameters."""
    names = sorted(tensors.load(data), key=lambda n: (n[1:], "wb".index(n[0])))
    return torch.cat([weights_in(data, n) for n in names])


# Keys.


class Noted(OsRng):
    """The worker's source of keys, which notes what it gave."""

    given: ClassVar[list[bytes]] = []

    def bytes(self, count: int) -> bytes:
        self.given.append(super().bytes(count))
        return self.given[-1]


def worker_states_hold_no_key(bench: InProcess, monkeypatch) -> None:
    """Of a run and of the one that goes on from it: no part of either's key, nor of a data key."""
    Noted.given = []
    monkeypatch.setattr(session, "OsRng", Noted)
    _, states = bench.run(monkeypatch, every=2)
    assert list(states) == [2, 4]
    _, later = bench.run(monkeypatch, state=sealed_state(states[2], 2), every=2)
    assert list(later) == [4]
    first, second = Noted.given
    for data in (*states.values(), *later.values()):
        resume.no_secret_in(data, first)
        resume.no_secret_in(data, second)
        assert all(key[:8] not in data for key in (KEY, SALT, STATE_KEY))


def test_a_state_holds_no_key(bench, monkeypatch):
    worker_states_hold_no_key(bench, monkeypatch)


@pytest.mark.parametrize("what", ["key", "subkey", "stream"])
def test_a_state_that_holds_a_key_is_noticed(bench, monkeypatch, what):
    """Seeded: the field for the job's digest carries part of a secret instead."""
    place = {"key": 0, "subkey": 2, "stream": 5}[what]

    def carrier(plan, spec):
        return (resume.secrets_of(Noted.given[-1])[place] * 2)[:32]

    Noted.given = [bytes(32)]
    monkeypatch.setattr(state, "job", carrier)
    monkeypatch.setattr(state, "check", lambda *a: right_check(*a, carrier))
    with pytest.raises(AssertionError):
        worker_states_hold_no_key(bench, monkeypatch)


def right_check(head, total, plan, spec, carrier):
    step = int.from_bytes(head[tensors.read_header(head, total)["step"].start :][:8], "little")
    return state.Head(step, tensors.read_header(head, total)["vector.weights"].shape[0])


def branches_have_noise_of_their_own(wide: InProcess, monkeypatch) -> None:
    """From one state, through the worker: the step after it in the abandoned run and in two runs
    that go on from it. False alarm below 4e-7 (resume_lab.noise_is_fresh_and_whole)."""
    ended, states = wide.run(monkeypatch, every=2)
    before = weights_in(states[2], "vector.weights")
    ends = [ended]
    for _ in range(2):
        ends.append(wide.run(monkeypatch, state=sealed_state(states[2], 2))[0])
    plan = run_of(wide.job, wide.ready.prepared).plan
    scale = 0.5 * plan.sigma / plan.normaliser
    resume.noise_is_fresh_and_whole([result_of(e) - before for e in ends], scale)


def test_a_resumed_run_has_keys_of_its_own(wide, monkeypatch):
    branches_have_noise_of_their_own(wide, monkeypatch)


class Constant(OsRng):
    def bytes(self, count: int) -> bytes:
        return bytes(count)


def test_a_key_that_comes_again_is_noticed(wide, monkeypatch):
    monkeypatch.setattr(session, "OsRng", Constant)
    with pytest.raises(AssertionError):
        branches_have_noise_of_their_own(wide, monkeypatch)


def test_a_resumed_run_without_noise_is_noticed(wide, monkeypatch):
    right = train.loop

    def quiet(*args):
        args = list(args)
        if args[-1] is not None:
            args[6] = lab.no_noise
        return right(*args)

    monkeypatch.setattr(train, "loop", quiet)
    with pytest.raises(AssertionError):
        branches_have_noise_of_their_own(wide, monkeypatch)


def test_samples_are_drawn_anew():
    """Without noise, two branches from one state still end differently."""
    case = Case(private=False, optimizer="sgd", ema=0.0)
    kept = resume.until(resume.begin(case, 0), 3)
    ends = [resume.end_of(resume.begin(case, 1, kept, key=k)) for k in (b"a" * 32, b"b" * 32)]
    assert ends[0] != ends[1]


# What a state says.


def test_two_states_of_other_rows_have_one_form(bench, monkeypatch):
    """Its length and its header are constants of the job: neither rows nor sample is in them."""
    other = InProcess(job(STEPS, optimizer=Adam(lr=0.1), ema=0.5, rows=1))
    assert other.job.wire != bench.job.wire
    states = [b.run(monkeypatch, every=2)[1] for b in (bench, other)]
    heads = {(len(d), d[: tensors.load(d)["step"][0].start]) for s in states for d in s.values()}
    assert len(heads) == 1


def test_an_overfull_or_empty_sample_leaves_the_form_as_it_is(monkeypatch):
    from casemate.engine import sampling

    sizes = set()
    for chosen in ([], range(resume.UNITS)):
        found = np.array(list(chosen), dtype=np.int64)
        monkeypatch.setattr(sampling, "sample", lambda *a, found=found: found)
        made = resume.until(resume.begin(Case(), 0), 2)
        sizes.add((len(made), made[: tensors.load(made)["vector.average"][0].start]))
    assert len(sizes) == 1


# Hostile states.


def in_place(data: bytes, name: str, raw: bytes) -> bytes:
    info = tensors.load(data)[name][0]
    return data[: info.start] + raw + data[info.start + len(raw) :]


def refused(bench: InProcess, monkeypatch, data: bytes, step: int = 2, key: bytes = STATE_KEY):
    """The code, as the worker itself has it. No table was opened, no weight was changed."""
    opened = []
    monkeypatch.setattr(session.dataset, "load", lambda *a: opened.append(a))
    fd = lab.sealed_fd(STATE_KEY, data)
    with pytest.raises(CasemateError) as found:
        bench.run(monkeypatch, state=(Resume(key=key, step=step), fd))
    assert not opened
    assert torch.equal(bench.ready.program.flat, bench._initial)
    assert session._failed("run", found.value).code == "job.failed"  # P6: nothing more is said
    return found.value.code


@pytest.fixture(scope="module")
def good(bench) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        return bench.run(patch, every=2)[1][2]


HOSTILE = {
    "empty": (lambda d: b"", "format.safetensors"),
    "zeros": (lambda d: bytes(len(d)), "format.json"),
    "cut in the header": (lambda d: d[:100], "format.safetensors"),
    "cut in a vector": (lambda d: d[:-5], "format.safetensors"),
    "a byte more": (lambda d: d + b"\0", "format.safetensors"),
    "another job": (lambda d: in_place(d, "job", bytes(32)), "plan.state"),
    "step 0": (lambda d: in_place(d, "step", bytes(8)), "plan.state"),
    "the last step": (lambda d: in_place(d, "step", (STEPS).to_bytes(8, "little")), "plan.state"),
    "far steps": (lambda d: in_place(d, "step", b"\xff" * 7 + b"\x7f"), "plan.state"),
    "before the start": (lambda d: in_place(d, "step", b"\xff" * 8), "plan.state"),
    "another step than the server says": (
        lambda d: in_place(d, "step", (3).to_bytes(8, "little")),
        "internal.protocol",
    ),
    "weights alone": (
        lambda d: lab.to_wire({"vector.weights": weights_in(d, "vector.weights")}),
        "format.state",
    ),
    "a tensor more": (
        lambda d: tensors.dump(
            {n: (i.dtype, i.shape, bytes(v)) for n, (i, v) in tensors.load(d).items()}
            | {"key": ("u8", (32,), bytes(32))}
        ),
        "format.state",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_states_are_refused_before_a_row_is_read(bench, good, monkeypatch, name):
    change, code = HOSTILE[name]
    assert refused(bench, monkeypatch, change(good)) == code


def test_a_state_of_a_larger_model_is_refused(bench, good, monkeypatch):
    """The right form and the right job, but for the number of scalars."""
    parts = {n: (i.dtype, i.shape, bytes(v)) for n, (i, v) in tensors.load(good).items()}
    d = parts["vector.weights"][1][0]
    for name, (dtype, shape, raw) in parts.items():
        if shape == (d,):
            parts[name] = (dtype, (2 * d,), raw * 2)
    larger = tensors.dump(parts)
    with pytest.raises(CasemateError) as found:
        bench.run(monkeypatch, state=sealed_state(larger, 2))
    assert found.value.code == "format.state"
    assert torch.equal(bench.ready.program.flat, bench._initial)


def test_a_sealed_state_that_was_changed_cut_or_swapped_does_not_open(bench, good, monkeypatch):
    monkeypatch.setattr(session.dataset, "load", lambda *a: pytest.fail("a table was opened"))
    resumed, fd = sealed_state(good, 2)
    sealed = bytearray(os.pread(fd, 1 << 20, 0))
    os.close(fd)
    changes = {"flip": sealed.copy(), "cut": sealed[:-1], "more": sealed + b"\0", "none": b""}
    changes["flip"][200] ^= 1
    for name, data in changes.items():
        other = os.memfd_create("sealed")
        os.write(other, data)
        with pytest.raises(CasemateError) as found:
            bench.run(monkeypatch, state=(resumed, other))
        assert found.value.code.startswith("format.stream-"), name
    with pytest.raises(CasemateError) as found:
        bench.run(
            monkeypatch, state=(Resume(key=b"u" * 32, step=2), lab.sealed_fd(STATE_KEY, good))
        )
    assert found.value.code == "format.stream-tampered"


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.full)])
def test_no_bytes_do_more_than_be_refused_or_set_vectors(count):
    """Whatever stands in a state, the engine refuses it with a code or starts from it: and then
    every step left is noised in full, so that what is in the vectors is no one's privacy."""

    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(data):
        good, case = _small_state(), Case()
        cut = data.draw(st.integers(0, len(good)))
        raw = bytearray(good[:cut] + data.draw(st.binary(max_size=8)) + good[cut:])
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(0, 255))
        try:
            run = resume.begin(case, 1, bytes(raw))
        except CasemateError as e:
            assert e.code.startswith("format.") or e.code == "plan.state"
            return
        assert 1 <= run.done < case.steps
        resume.end_of(run)

    check()


_SMALL: list[bytes] = []


def _small_state() -> bytes:
    if not _SMALL:
        _SMALL.append(resume.until(resume.begin(Case(), 0), 3))
    return _SMALL[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e-45])
def test_vectors_that_are_no_numbers_end_as_in_any_run(value):
    """Weights can diverge in an uninterrupted run as well: what is not finite is no way out of the
    clip or of the noise, and it is no refusal either, which would tell of the weights."""
    good = _small_state()
    raw = np.full(len(weights_in(good, "vector.weights")), value, dtype=np.float32).tobytes()
    run = resume.begin(Case(), 1, in_place(good, "vector.weights", raw))
    resume.end_of(run)


# The protocol.


@pytest.mark.parametrize("answers", [[0], [4], [-2], [2, 2]])
def test_a_wrong_answer_ends_the_run(bench, monkeypatch, answers):
    with pytest.raises(InternalError):
        bench.run(monkeypatch, every=2, answers=answers)


@pytest.mark.parametrize(("resumed", "every", "spare"), [(True, 0, -1), (False, 2, -1),
                                                        (False, 0, 1), (True, 2, 1),
                                                        (False, -1, 0)])  # fmt: skip
def test_descriptors_must_be_those_that_the_message_says(bench, resumed, every, spare):
    message = dataclasses.replace(
        run_of(bench.job, bench.ready.prepared),
        resume=Resume(key=STATE_KEY, step=2) if resumed else None,
        state_steps=every,
    )
    with pytest.raises(InternalError):
        session._run(
            None, bench.job.prepare, bench.ready, message,
            [-1] * (2 + resumed + (every > 0) + spare),
        )  # fmt: skip


def test_a_state_may_be_as_large_as_the_lock_allows(bench):
    """The lock's bound on files holds the state of any optimizer, not the result alone."""
    prepare = bench.job.prepare
    for dimension in (1, 10**9):
        assert session._file_bytes(prepare, dimension) > state.size(prepare.train, dimension)
        assert session._file_bytes(prepare, dimension) > 8 * dimension


def test_a_short_source_is_refused(bench):
    """A source that ends within a vector, though it said otherwise."""

    class Short(resume.Held):
        def readinto(self, offset, buffer):
            return super().readinto(offset, buffer) - (offset > state.HEAD_BYTES // 2)

    data = _small_state()
    case = Case()
    run = resume.begin(case, 0)
    vectors = {
        "weights": run.program.flat.clone(),
        **{n: torch.zeros_like(run.program.flat) for n in ("mean", "square")},
        "average": torch.zeros(len(run.program.flat), dtype=torch.float64),
    }
    plan = resume.plan_of(case)
    assert engine_state.read(resume.Held(data), plan, case.spec, vectors) == 3
    with pytest.raises(CasemateError) as found:
        engine_state.read(Short(data), plan, case.spec, vectors)
    assert found.value.code == "format.state"

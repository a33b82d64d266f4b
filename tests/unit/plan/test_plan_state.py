"""The form of a training state: its tensors, its size, its head, when one is due."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.plan import state
from casemate.spec import tensors
from casemate.spec.errors import CasemateError, FormatError, PlanError
from casemate.spec.job import Adam, Dp, DpEvent, Plan, Sgd, TrainSpec

D, STEPS = 5, 9

TRAINS = {
    "sgd": (Sgd(lr=0.1), 0.0, {"weights": "f32"}),
    "momentum": (Sgd(lr=0.1, momentum=0.9), 0.0, {"weights": "f32", "velocity": "f32"}),
    "adam": (Adam(lr=0.1), 0.0, {"weights": "f32", "mean": "f32", "square": "f32"}),
    "averaged": (Sgd(lr=0.1), 0.9, {"weights": "f32", "average": "i64"}),
    "all": (
        Adam(lr=0.1, decoupled=True),
        0.9,
        {"weights": "f32", "mean": "f32", "square": "f32", "average": "i64"},
    ),
}


def train_of(name: str) -> TrainSpec:
    optimizer, ema, _ = TRAINS[name]
    return TrainSpec(
        batch_size=4,
        steps=STEPS,
        privacy=Dp(epsilon=1.0, delta=1e-5),
        optimizer=optimizer,
        ema=ema,
    )


def plan_of(steps: int = STEPS) -> Plan:
    event = DpEvent(rate=0.1, noise_multiplier=1.0, steps=steps)
    return Plan(
        request_digest="sha256:" + "1" * 64, model_digest="sha256:" + "2" * 64, private=True,
        units=40, rate=0.1, steps=steps, clip=1.0, normaliser=4.0, sensitivity=1.1,
        noise_multiplier=1.0, sigma=1.1, grid=2.0**-20, microbatch=1, microbatches=12,
        events=(event,), delta_truncation=1e-9, delta_sampler=1e-9,
    )  # fmt: skip


Part = tuple[str, tuple[int, ...], bytes]


def made(train: TrainSpec, step: int = 3, instead: dict[str, Part | None] | None = None) -> bytes:
    """A state of zeros; instead: (dtype, shape, bytes) by name, ``None`` to leave one out."""
    parts: dict[str, Part] = {}
    for name, (dtype, shape) in state.layout(train, D).items():
        count = tensors.DTYPES[dtype][1] * (shape[0] if shape else 1)
        parts[name] = (dtype, shape, bytes(count))
    parts["job"] = ("u8", (32,), state.job(plan_of(), train))
    parts["step"] = ("i64", (1,), step.to_bytes(8, "little", signed=True))
    for name, part in (instead or {}).items():
        if part is None:
            del parts[name]
        else:
            parts[name] = part
    return tensors.dump(parts)


def check(data: bytes, train: TrainSpec) -> state.Head:
    return state.check(data[: state.HEAD_BYTES], len(data), plan_of(), train)


@pytest.mark.parametrize("name", TRAINS)
def test_a_state_of_the_form_is_taken(name: str) -> None:
    train = train_of(name)
    data = made(train)
    assert state.vectors(train) == TRAINS[name][2]
    assert len(data) == state.size(train, D)
    assert check(data, train) == state.Head(3, D)
    for step in (1, STEPS - 1):
        assert check(made(train, step), train).step == step


@pytest.mark.parametrize("step", [0, -1, STEPS, STEPS + 1, 2**62, -(2**63)])
def test_a_step_that_is_none_of_the_plans_is_refused(step: int) -> None:
    train = train_of("all")
    with pytest.raises(PlanError) as found:
        check(made(train, step), train)
    assert found.value.code == "plan.state"


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(TRAINS, 2)))
def test_a_state_of_another_optimizer_is_refused(a: str, b: str) -> None:
    with pytest.raises(FormatError) as found:
        check(made(train_of(a)), train_of(b))
    assert found.value.code == "format.state"


def test_a_state_of_another_job_is_refused() -> None:
    """One bit of plan or training makes it another's."""
    train = train_of("adam")
    data = made(train)
    others = [
        (dataclasses.replace(plan_of(), request_digest="sha256:" + "3" * 64), train),
        (dataclasses.replace(plan_of(), sigma=1.2), train),
        (plan_of(), dataclasses.replace(train, optimizer=Adam(lr=0.2))),
        (plan_of(), dataclasses.replace(train, optimizer=Adam(lr=0.1, decoupled=True))),
    ]
    for plan, other in others:
        with pytest.raises(PlanError) as found:
            state.check(data[: state.HEAD_BYTES], len(data), plan, other)
        assert found.value.code == "plan.state"


ALIEN: dict[str, dict[str, Part | None]] = {
    "no job": {"job": None},
    "no step": {"step": None},
    "no weights": {"vector.weights": None},
    "no moment": {"vector.mean": None},
    "a tensor more": {"key": ("u8", (32,), bytes(32))},
    "a tensor more, behind": {"z": ("u8", (1,), b"k")},
    "a shorter moment": {"vector.mean": ("f32", (D - 1,), bytes(4 * D - 4))},
    "a moment of another shape": {"vector.mean": ("f32", (D, 1), bytes(4 * D))},
    "weights of integers": {"vector.weights": ("i32", (D,), bytes(4 * D))},
    "no scalar": {"vector.weights": ("f32", (0,), b"")},
    "no axis": {"vector.weights": ("f32", (), bytes(4))},
    "a model of no scalars": {
        f"vector.{n}": ("i64" if n == "average" else "f32", (0,), b"")
        for n in ("weights", "mean", "square", "average")
    },
    "weights of two axes": {"vector.weights": ("f32", (D, 1), bytes(4 * D))},
    "a longer job": {"job": ("u8", (64,), bytes(64))},
    "two steps": {"step": ("i64", (2,), bytes(16))},
    "the average in bytes": {"vector.average": ("u8", (8 * D,), bytes(8 * D))},
}


@pytest.mark.parametrize("name", ALIEN)
def test_other_tensors_are_refused(name: str) -> None:
    train = train_of("all")
    with pytest.raises(FormatError) as found:
        check(made(train, instead=ALIEN[name]), train)
    assert found.value.code == "format.state"


@given(cut=st.integers(0, 2000))
def test_a_state_cut_anywhere_is_refused(cut: int) -> None:
    train = train_of("all")
    data = made(train)
    short = data[: cut % len(data)]
    with pytest.raises(CasemateError) as found:
        check(short, train)
    assert found.value.code.startswith("format.")


@given(at=st.integers(0, 2**16), flip=st.integers(1, 255))
def test_a_head_with_one_byte_changed_is_refused_or_another_step(at: int, flip: int) -> None:
    """Of the head each byte counts; the step's bytes are the sealed stream's to guard."""
    train = train_of("all")
    data = bytearray(made(train))
    infos = tensors.read_header(bytes(data), len(data))
    at %= infos["step"].end
    data[at] ^= flip
    try:
        found = check(bytes(data), train)
    except CasemateError:
        return
    assert infos["step"].start <= at
    assert found.dimension == D
    assert found.step != 3


@given(data=st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(CasemateError):
        check(data, train_of("sgd"))


def test_any_states_head_is_in_its_first_bytes() -> None:
    for name in TRAINS:
        train = train_of(name)
        for dimension in (1, 10**6, 2**38):
            prefix, names = tensors.layout(state.layout(train, dimension))
            assert names[:2] == ["job", "step"]
            assert len(prefix) + 40 <= state.HEAD_BYTES
            assert state.size(train, dimension) < len(prefix) + 40 + 20 * dimension + 1


@given(steps=st.integers(1, 60), every=st.integers(0, 70), after=st.integers(0, 60))
def test_what_is_due(steps: int, every: int, after: int) -> None:
    """The first multiple of ``every`` above ``after`` and below ``steps``."""
    found = next((s for s in range(after + 1, steps) if every and s % every == 0), None)
    assert state.due(steps, every, after) == found

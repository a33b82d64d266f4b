"""Resuming: bit-equal to a run that was not cut, given one stream of noise; without it, with noise
of its own, of the plan's scale. Seeded bugs show that these tests bite."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casemate.engine import noise, optim, state, train
from casemate.spec.job import Execution
from support import engine_lab as lab
from support import resume_lab as resume
from support.resume_lab import Case, Held

PATHS = ("record", "graph")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ema", [0.0, 0.6])
@pytest.mark.parametrize("optimizer", resume.OPTIMIZERS)
def test_every_optimizer_resumes_bit_equal_on_every_path(optimizer, ema, path):
    resume.resumes_bit_equal(Case(optimizer=optimizer, ema=ema, path=path), (2, 5))


@pytest.mark.parametrize(
    "case",
    [
        Case(private=False),
        Case(private=False, path="graph"),
        Case(frozen=1),
        Case(frozen=1, path="graph"),
        *(Case(schedule=s) for s in resume.SCHEDULES),
    ],
    ids=str,
)
def test_other_jobs_resume_bit_equal(case):
    resume.resumes_bit_equal(case, (1, 3, 6))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.builds(
        Case,
        optimizer=st.sampled_from(sorted(resume.OPTIMIZERS)),
        schedule=st.sampled_from(sorted(resume.SCHEDULES)),
        ema=st.sampled_from([0.0, 0.3, 0.9999]),
        path=st.sampled_from(PATHS),
    ),
    cuts=st.sets(st.integers(1, resume.STEPS - 1), min_size=1),
)
def test_wherever_and_however_often_it_is_cut(case, cuts):
    resume.resumes_bit_equal(case, sorted(cuts))


def _forgetful(name):
    """An optimizer whose state misses a vector."""
    right = optim.optimizer

    def made(*args):
        update = right(*args)
        kept = {n: torch.zeros_like(t) if n == name else t for n, t in update.state.items()}
        return optim.Update(update.apply, kept)

    return optim, "optimizer", made


class _CountsAnew(optim.Average):
    """An average that is not told how many weights it has seen."""

    @property
    def count(self):
        return self._count

    @count.setter
    def count(self, value):
        self._count = value if not hasattr(self, "_count") or value == self._count + 1 else 0


def _another_step(source, plan, spec, vectors):
    return max(1, state_read(source, plan, spec, vectors) - 1)


def _not_the_weights(source, plan, spec, vectors):
    others = {**vectors, "weights": vectors["weights"].clone()}
    found = state_read(source, plan, spec, others)
    vectors["weights"].zero_()
    return found


def _rounded(plan, spec, step, vectors):
    cut = {
        n: (t.to(torch.float32).to(t.dtype) if n == "average" else t) for n, t in vectors.items()
    }
    return state_write(plan, spec, step, cut)


state_read, state_write = state.read, state.write

BUGS = {
    "no velocity": ("momentum", _forgetful("velocity")),
    "no first moment": ("adam", _forgetful("mean")),
    "no second moment": ("adamw", _forgetful("square")),
    "the average's count": ("sgd", (optim, "Average", _CountsAnew)),
    "the average in float32": ("sgd", (state, "write", _rounded)),
    "the step": ("adam", (state, "read", _another_step)),
    "the weights": ("sgd", (state, "read", _not_the_weights)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_state_that_misses_something_is_noticed(bug, monkeypatch):
    optimizer, change = BUGS[bug]
    resume.resumes_bit_equal(Case(optimizer=optimizer))
    monkeypatch.setattr(*change)
    with pytest.raises(AssertionError):
        resume.resumes_bit_equal(Case(optimizer=optimizer))


def moves_of_branches(steps: int = 3):
    """Two branches from one state, each with a key of its own, and what their first steps moved;
    likewise the step that the abandoned run took after that state. Every row is invalid, so that a
    move is noise alone; and the scale that it must have."""
    graph, weights = lab.mlp([60, 400, 60])
    program = train.Program(graph, weights)
    schema = lab.schema(60, 60, 4)
    rows = lab.rows_of((schema, lab.table(schema)), graph=graph)
    rows.valid[:] = False
    spec = lab.spec_of(2, steps, clip=0.5)
    plan = lab.plan_of(spec, 4, program.dimension)

    def start(key, source=None):
        return train.start(plan, Execution(), spec, program, rows, key, source=source)

    run = start(b"\x01" * 32)
    kept = resume.until(run, 2)
    before = program.flat.clone()
    moves = []
    for key in (None, b"\x02" * 32, b"\x03" * 32):
        branch = run if key is None else start(key, Held(kept))
        assert torch.equal(program.flat, before)
        branch(2)
        moves.append(program.flat - before)
        if key is not None:
            assert branch.done == steps
        with torch.no_grad():
            program.flat.copy_(before)
    return moves, spec.optimizer.lr * plan.sigma / plan.normaliser


def test_branches_have_noise_of_their_own_and_of_the_plans_scale():
    """False alarm below 4e-7 (resume_lab.noise_is_fresh_and_whole)."""
    resume.noise_is_fresh_and_whole(*moves_of_branches())


def _weaker(total, key, step, scale, first=0):
    right_noise(total, key, step, scale * (0.96 if step == 2 else 1), first)


def _of_the_step_alone(total, key, step, scale, first=0):
    right_noise(total, b"\x01" * 32, step, scale, first)


right_noise = noise.add_gaussian


@pytest.mark.parametrize("bug", [_weaker, _of_the_step_alone])
def test_noise_that_is_weaker_or_comes_again_is_noticed(bug, monkeypatch):
    monkeypatch.setattr(noise, "add_gaussian", bug)
    with pytest.raises(AssertionError):
        resume.noise_is_fresh_and_whole(*moves_of_branches())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_state_is_made_of_noised_sums_alone(optimizer, path):
    resume.is_made_of_noised_sums(Case(optimizer=optimizer, path=path))


def test_a_state_that_saw_the_bare_sum_is_noticed(monkeypatch):
    right = train.applied

    def early(weights, add, update, factor):
        def peeked(step, first, total):
            bare = torch.from_numpy(total.copy()).float() * factor
            update.state["velocity"][first : first + len(total)].add_(bare)
            add(step, first, total)

        return right(weights, peeked, update, factor)

    monkeypatch.setattr(train, "applied", early)
    with pytest.raises(AssertionError):
        resume.is_made_of_noised_sums(Case(optimizer="momentum"))


def test_a_state_is_the_same_bytes_each_time_and_changes_nothing():
    run = resume.begin(Case(), 0)
    first = resume.until(run, 3)
    assert resume.state_of(run) == first
    ended = resume.end_of(run)
    run = resume.begin(Case(), 0)
    assert resume.end_of(run) == ended


def test_train_saves_where_it_is_due_and_resumes():
    """``train`` itself: every second step but the last; from each of them to the same end."""
    case = Case()
    made, initial = resume._ready("record", 0, 0)
    schema = lab.schema(5, 3, resume.UNITS)
    rows = lab.rows_of((schema, lab.table(schema)), graph=lab.mlp([5, 4, 3])[0])

    def whole(source=None):
        saved: dict[int, bytes] = {}
        if source is None:
            with torch.no_grad():
                made.program.flat.copy_(initial)
        result = train.train(
            resume.plan_of(case), Execution(), case.spec, made.program, rows, resume.KEY,
            keep=made.keep, source=source, every=2,
            save=lambda step, parts: saved.setdefault(step, b"".join(parts)) and None,
        )  # fmt: skip
        return saved, {n: t.clone() for n, t in result.items()}

    saved, wanted = whole()
    assert list(saved) == [2, 4, 6]
    for step, bytes_ in saved.items():
        later, found = whole(Held(bytes_))
        assert later == {s: b for s, b in saved.items() if s > step}
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_steps_are_taken_once_and_in_order():
    run = resume.begin(Case(), 0)
    run(0)
    for step in (0, 2, -1):
        with pytest.raises(ValueError):
            run(step)
    run(1)
    assert run.done == 2


def test_the_cases_differ():
    """The comparisons above mean something: other keys, rows and optimizers end elsewhere."""
    ends = [resume.end_of(resume.begin(Case(optimizer=o), 0))[0] for o in resume.OPTIMIZERS]
    ends.append(resume.end_of(resume.begin(Case(), 0, key=resume.OTHER))[0])
    ends.append(resume.end_of(resume.begin(Case(), 0, table=1))[0])
    assert all(a != b for a, b in itertools.combinations(ends, 2))


# What one who kills can gain: docs/privacy.md, "Resuming". One step with q = 1 and s = 1.


def _below(x):
    """The normal law's distribution function."""
    return 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))


def delta_of_gaussian(move: float, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv:1805.06530), Theorem 8, for a move of so many standard
    deviations."""
    a, b = move / 2, epsilon / move
    return float(_below(a - b) - math.exp(epsilon) * _below(-a - b))


def delta_of_killer(at: float, resumes: int, epsilon: float) -> float:
    """Of what is released when one who sees each branch's noised value kills it where it is below
    ``at``, at most ``resumes`` times; both ways round. By quadrature."""
    y = np.linspace(-12, 13, 200_001)

    def density(mean: float):
        killed = float(_below(np.array(at - mean)))
        kept = sum(killed**j for j in range(resumes))
        law = np.exp(-((y - mean) ** 2) / 2) / math.sqrt(2 * math.pi)
        return law * (np.where(y >= at, kept, 0.0) + killed**resumes)

    p, q = density(1.0), density(0.0)
    assert abs(p.sum() * (y[1] - y[0]) - 1) < 1e-3
    gaps = (np.maximum(a - math.exp(epsilon) * b, 0.0) for a, b in ((p, q), (q, p)))
    return max(float(g.sum() * (y[1] - y[0])) for g in gaps)


@pytest.mark.parametrize(("resumes", "epsilon"), list(itertools.product((1, 3), (0.5, 1.0, 2.0))))
def test_one_who_kills_by_what_he_sees_gains_no_more_than_every_branch_would_tell(resumes, epsilon):
    """His release tells more than one branch, which is what is charged, and never more than all
    branches together, which is the bound: the page says both. Where nothing is killed, the
    quadrature agrees with the closed form."""
    one = delta_of_gaussian(1.0, epsilon)
    every = delta_of_gaussian(math.sqrt(1 + resumes), epsilon)
    worst = max(delta_of_killer(at, resumes, epsilon) for at in np.linspace(-3, 3, 25))
    assert one + 0.01 < worst <= every + 1e-3
    assert delta_of_killer(-40.0, resumes, epsilon) == pytest.approx(one, abs=1e-3)
    if (resumes, epsilon) == (3, 1.0):  # the page's figures
        assert [round(d, 2) for d in (one, worst, every)] == [0.13, 0.33, 0.51]

"""The forms of the clip: their definitions, the bound that all keep, and bugs that must show."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.engine import clip, records, train
from casemate.engine.rows import Rows
from casemate.spec.errors import PlanError
from support import engine_checks as checks

FORMS = ("flat", "per-layer", "automatic")
Patch = pytest.MonkeyPatch


def test_every_form_of_the_format_is_there() -> None:
    from typing import get_args

    from casemate.spec.job import Clipping

    assert set(clip.FORMS) == set(get_args(Clipping)) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_algorithm_1_with_that_clip(form: str) -> None:
    """Six steps of the loop against a float64 loop of other code."""
    checks.agrees_with_algorithm_1(form=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_unit_of_several_rows_is_clipped_once(form: str) -> None:
    checks.agrees_with_algorithm_1(form=form, units=12, k=2)


def test_forms_differ() -> None:
    found = [
        checks.run(*checks.make(steps=6, form=form)[:4]) for form in FORMS
    ]  # fmt: skip
    for a, b in itertools.combinations(found, 2):
        assert float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize("gamma", [1e-12, 0.01, 1e6])
@pytest.mark.parametrize("form", FORMS)
def test_what_comes_in_is_bounded(form: str, gamma: float) -> None:
    checks.clip_bounds_anything(form=form, gamma=gamma)


def exact(x: torch.Tensor) -> Fraction:
    return sum((Fraction(v) ** 2 for v in x.tolist()), Fraction(0))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1e-30, 1e-3, 0.7, 1.0, 1e6]),
    st.floats(1e-12, 1e6),
    st.integers(0, 10**6),
    st.sampled_from([1e-45, 1e-30, 1e-3, 1.0, 1e10, 3e38]),
)
def test_the_bound_holds_in_exact_arithmetic(
    form: str, sizes: list[int], bound: float, gamma: float, seed: int, scale: float
) -> None:
    """|x| <= C (1 + eta(d)), x as the form leaves it, with rational numbers."""
    d = sum(sizes)
    made = torch.Generator().manual_seed(seed)
    x = (torch.randn(d, generator=made) * scale).double() * 3.0
    x *= 10.0 ** torch.randint(-6, 7, (d,), generator=made).double()
    clip.FORMS[form](sizes, gamma)(x, bound)
    limit = Fraction(bound) * (1 + Fraction(clip.eta(d)))
    assert exact(x) <= limit**2
    if form == "per-layer":
        for part in torch.split(x, sizes):
            assert exact(part) <= limit**2 / len(sizes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_component_that_is_not_finite_takes_all_with_it(form: str, value: float) -> None:
    for place in range(5):
        x = torch.ones(5, dtype=torch.float64)
        x[place] = value
        clip.FORMS[form]((2, 3), 0.01)(x, 1.0)
        assert x.tolist() == [0.0] * 5


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form: str) -> None:
    x = torch.zeros(5, dtype=torch.float64)
    clip.FORMS[form]((2, 3), 0.01)(x, 1.0)
    assert not bool(x.any())


def test_per_layer_leaves_short_parts_alone_and_automatic_makes_them_longer() -> None:
    x = torch.tensor([3.0, 4.0, 0.1], dtype=torch.float64)
    y = x.clone()
    clip.FORMS["per-layer"]((2, 1), 0.01)(y, 1.0)
    root = math.sqrt(0.5)
    assert y.tolist() == pytest.approx([0.6 * root, 0.8 * root, 0.1])
    z = torch.tensor([3e-3, 4e-3], dtype=torch.float64)
    clip.FORMS["automatic"]((2,), 0.01)(z, 1.0)
    assert z.tolist() == pytest.approx([3e-3 / 0.015, 4e-3 / 0.015])


# One record in and out of the sum of a job, under each form, within what the plan accounts.


def hostile(rows: Rows) -> list[Callable[[], None]]:
    x = rows.inputs["x"]
    kept = x.clone()

    def of(value: float, where: slice) -> Callable[[], None]:
        def spoil() -> None:
            x.copy_(kept)
            x[0, where] = value

        return spoil

    values = (0.0, 1e-30, 1.0, 1e10, 1e30, 3e38, math.inf, math.nan)
    return [of(v, w) for v in values for w in (slice(None), slice(0, 1))]


def nothing_moves_more_than_it_may(form: str) -> None:
    program, rows, _, plan, _ = checks.make(count=12, slots=12, form=form, clip=0.2)
    gradients = records.PATHS["record"](program, rows.inputs, rows.count, False)
    sizes = [leaf.numel() for leaf in program.leaves]
    moved = []
    for spoil in hostile(rows):
        spoil()
        both = [
            train.grid_sum(plan, gradients, rows, torch.tensor(chosen).numpy(),
                           program.dimension, sizes)
            for chosen in ([*range(12)], [*range(1, 12)])
        ]  # fmt: skip
        difference = (both[0] - both[1]).tolist()
        by = math.sqrt(sum(v * v for v in difference)) * plan.grid
        assert by <= plan.sensitivity, spoil
        moved.append(by)
    assert max(moved) > 0.5 * plan.clip  # it tried


@pytest.mark.parametrize("form", FORMS)
def test_no_record_moves_the_sum_by_more_than_is_accounted(form: str) -> None:
    nothing_moves_more_than_it_may(form)


@pytest.mark.parametrize("form", FORMS)
def test_the_engine_takes_the_jobs_own_form_alone(form: str) -> None:
    program, rows, spec, plan, _ = checks.make(form=form)
    d = program.dimension
    train.check_plan(plan, spec, d, rows.units)
    for other in FORMS:
        gamma = 0.01 if other == "automatic" else 0.0
        changed = dataclasses.replace(plan, clipping=other, gamma=gamma)
        if other == form:
            assert changed == plan
            continue
        with pytest.raises(PlanError, match="clip is not the job's"):
            train.check_plan(changed, spec, d, rows.units)
    for change in ({"gamma": 0.5}, {"clip": plan.clip / 2}):
        with pytest.raises(PlanError, match="clip is not the job's"):
            train.check_plan(dataclasses.replace(plan, **change), spec, d, rows.units)


# Seeded bugs of each form: (form, how to plant it, the check that must fail).

Check = Callable[[str], None]


def _share_is_the_whole(patch: Patch) -> None:
    patch.setattr(clip, "share", lambda bound, tensors: bound)


def _share_of_the_mean(patch: Patch) -> None:
    patch.setattr(clip, "share", lambda bound, tensors: bound / tensors)


def _one_part_is_left(patch: Patch) -> None:
    right = clip.per_layer

    def most(sizes: list[int]) -> clip.Clip:
        def layers(x: torch.Tensor, bound: float) -> None:
            right(sizes[:-1])(x[: -sizes[-1]], bound)

        return layers

    patch.setattr(clip, "per_layer", most)


def _parts_are_judged_alone(patch: Patch) -> None:
    def bare(sizes: list[int]) -> clip.Clip:
        def layers(x: torch.Tensor, bound: float) -> None:
            for part in torch.split(x, list(sizes)):
                clip.clip(part, clip.share(bound, len(sizes)))

        return layers

    patch.setattr(clip, "per_layer", bare)


def _gamma_is_taken_off(patch: Patch) -> None:
    right = clip.automatic
    patch.setattr(clip, "automatic", lambda gamma: right(-gamma))


def _gamma_is_forgotten(patch: Patch) -> None:
    right = clip.automatic
    patch.setattr(clip, "automatic", lambda gamma: right(1e-12))


def _only_when_too_long(patch: Patch) -> None:
    patch.setattr(clip, "automatic", lambda gamma: clip.clip)


def _infinite_left(patch: Patch) -> None:
    def bare(gamma: float) -> clip.Clip:
        def scale(x: torch.Tensor, bound: float) -> None:
            x.mul_(bound / (float(torch.linalg.vector_norm(x)) + gamma))

        return scale

    patch.setattr(clip, "automatic", bare)


def is_the_formula(form: str) -> None:
    checks.agrees_with_algorithm_1(form=form)


def is_all_or_nothing(form: str) -> None:
    test_a_component_that_is_not_finite_takes_all_with_it(form, math.nan)


BUGS: dict[str, tuple[str, Callable[[Patch], None], Check]] = {
    "each tensor has the whole bound": (
        "per-layer", _share_is_the_whole, nothing_moves_more_than_it_may),
    "each tensor has C / L": ("per-layer", _share_of_the_mean, is_the_formula),
    "the last tensor is not clipped": (
        "per-layer", _one_part_is_left, nothing_moves_more_than_it_may),
    "parts that are finite stay": ("per-layer", _parts_are_judged_alone, is_all_or_nothing),
    "gamma is subtracted": ("automatic", _gamma_is_taken_off, nothing_moves_more_than_it_may),
    "gamma is forgotten": ("automatic", _gamma_is_forgotten, is_the_formula),
    "short ones stay short": ("automatic", _only_when_too_long, is_the_formula),
    "what is not finite stays": ("automatic", _infinite_left, is_all_or_nothing),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, monkeypatch: Patch) -> None:
    form, plant, check = BUGS[bug]
    check(form)
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(form)

"""The privacy rules of the engine, and for each a seeded bug that the same check must catch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from casemate.engine import clip, noise, records, sampling, train
from support import engine_checks as checks

RULES = {
    "algorithm 1": checks.agrees_with_algorithm_1,
    "algorithm 1, units of two rows": lambda: checks.agrees_with_algorithm_1(units=12, k=2),
    "algorithm 1, by autograd": lambda: checks.agrees_with_algorithm_1(replayed=False),
    "P13": checks.contributions_are_alone,
    "P13 amplified": checks.amplified_contributions_are_alone,
    "P3": checks.clip_bounds_anything,
    "P3 is no more than needed": checks.small_contributions_stay,
    "P4": checks.noise_has_the_plans_law,
    "P2": checks.sampling_is_poisson,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    RULES[rule]()


# Seeded bugs: (the rule that must fail, how to plant the bug).


def wrong_scale(factor):
    def plant(patch):
        right = noise.add_gaussian
        patch.setattr(
            noise,
            "add_gaussian",
            lambda t, k, s, scale, first=0: right(t, k, s, scale * factor, first),
        )

    return plant


def key_used_again(patch):
    right = noise.add_gaussian
    patch.setattr(
        noise, "add_gaussian", lambda t, key, step, scale, first=0: right(t, key, 0, scale, first)
    )


def clip_after_the_mean(patch):
    def mean_then_clip(plan, gradients, rows, chosen, dimension, sizes=()):
        total = train.plain_sum(plan, gradients, rows, chosen, dimension)
        clip.clip(total, plan.clip * max(1, len(chosen)))
        return train.grid.to_grid(total, plan.grid)

    patch.setattr(train, "grid_sum", mean_then_clip)


def scale_by(norm_of):
    def plant(patch):
        def bad(x, bound):
            if not math.isfinite(float(torch.dot(x, x))):
                x.zero_()
                return
            x.mul_(min(1.0, bound / max(norm_of(x), 1e-300)))

        patch.setattr(clip, "clip", bad)

    return plant


def half_precision_norm(x):
    return float(torch.linalg.vector_norm(x.half()))


def single_precision_norm(x):
    return math.sqrt(float((x.float() ** 2).sum()))


def norm_without_the_last_tensor(x):
    return float(torch.linalg.vector_norm(x[:-3]))


def not_finite_left(patch):
    def bad(x, bound):
        norm = float(torch.linalg.vector_norm(x))
        x.mul_(min(1.0, bound / norm) if norm else 1.0)

    patch.setattr(clip, "clip", bad)


def realised_normaliser(patch):
    right = train.grid_sum

    def bad(plan, gradients, rows, chosen, dimension, sizes=()):
        total = right(plan, gradients, rows, chosen, dimension, sizes).double()
        return (total * (plan.normaliser / max(1, len(chosen)))).round().to(torch.int64)

    patch.setattr(train, "grid_sum", bad)


def shuffled_batches(patch):
    def bad(key, step, units, rate):
        order = np.random.default_rng(step * len(key)).permutation(units)
        return np.sort(order[: round(units * rate)])

    patch.setattr(sampling, "sample", bad)


def rate_off(patch):
    right = sampling.sample
    patch.setattr(sampling, "sample", lambda k, s, u, rate: right(k, s, u, rate * 1.03))


def slot_dependent_kernel(patch):
    right = records.record

    def path(*args):
        inner, calls = right(*args), iter(range(10**9))

        def gradients(row, out):
            inner(row, out)
            # The rounding of every second slot differs in the last bit.
            if next(calls) % 2:
                out.mul_(1 + 2.0**-23)

        return gradients

    patch.setitem(records.PATHS, "record", path)


def company_dependent_kernel(patch):
    """Rounding that depends on the rows seen so far."""
    right = records.record

    def path(program, inputs, rows, keep):
        inner = right(program, inputs, rows, keep)
        seen = []

        def gradients(row, out):
            inner(row, out)
            seen.append(row)
            out.add_(float(np.sum([math.sin(r) for r in seen])) * 1e-7)

        return gradients

    patch.setitem(records.PATHS, "record", path)


BUGS = {
    "noise 3% too small": ("P4", wrong_scale(0.97)),
    "noise 3% too large": ("P4", wrong_scale(1.03)),
    "the key's stream used again each step": ("P4", key_used_again),
    "clip after the mean": ("P13", clip_after_the_mean),
    "norm in half precision": ("P3", scale_by(half_precision_norm)),
    "norm in single precision": ("P3", scale_by(single_precision_norm)),
    "a tensor missing from the norm": ("P3", scale_by(norm_without_the_last_tensor)),
    "NaN not replaced": ("P3", not_finite_left),
    "normaliser from the realised batch": ("algorithm 1", realised_normaliser),
    "shuffling instead of Poisson": ("P2", shuffled_batches),
    "sampling rate off by 3%": ("P2", rate_off),
    "slot-dependent kernel": ("P13", slot_dependent_kernel),
    "company-dependent kernel": ("P13", company_dependent_kernel),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bug_is_caught(bug, monkeypatch):
    rule, plant = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        RULES[rule]()

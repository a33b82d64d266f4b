"""The sampler's law. False alarm at most 1e-6 a test."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.engine import sampling

KEY = b"\x31" * 32


@given(st.floats(min_value=0, max_value=1, exclude_min=True))
def test_the_threshold_is_the_rate_rounded_down(rate):
    limit = sampling.threshold(rate)
    assert Fraction(limit, 2**64) <= Fraction(rate) < Fraction(limit + 1, 2**64)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, math.nan])
def test_rates_outside_0_and_1_are_refused(rate):
    with pytest.raises(ValueError):
        sampling.sample(KEY, 0, 10, rate)


def test_rate_1_takes_all():
    assert sampling.sample(KEY, 0, 7, 1.0).tolist() == list(range(7))


def test_samples_are_ascending_and_chunks_change_nothing(monkeypatch):
    whole = sampling.sample(KEY, 3, 1001, 0.4)
    assert np.all(np.diff(whole) > 0)
    assert whole.min() >= 0 and whole.max() < 1001
    monkeypatch.setattr(sampling, "_CHUNK", 16)
    assert np.array_equal(sampling.sample(KEY, 3, 1001, 0.4), whole)


def test_a_unit_is_taken_or_not_whoever_else_there_is():
    """Membership of unit u depends on key, step and u alone: units can be padded."""
    few, many = sampling.sample(KEY, 1, 500, 0.2), sampling.sample(KEY, 1, 5000, 0.2)
    assert np.array_equal(few, many[many < 500])


def test_pairs_of_units_and_of_steps_are_independent():
    """Correlations of neighbours in unit and in step, at 5.1 standard errors."""
    units, steps, rate = 300, 600, 0.25
    taken = np.zeros((steps, units))
    for step in range(steps):
        taken[step, sampling.sample(KEY, step, units, rate)] = 1
    z = (taken - rate) / math.sqrt(rate * (1 - rate))
    for a, b in ((z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
        assert abs(float((a * b).mean())) < 5.1 / math.sqrt(a.size)


def test_tiny_rates_give_empty_samples():
    assert all(len(sampling.sample(KEY, step, 100, 1e-12)) == 0 for step in range(50))

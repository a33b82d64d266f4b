"""The tight epsilon: present, tighter than the filter's charge, and named when absent."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest

from casemate.accounting import pld
from casemate.spec.errors import UsageError
from casemate.spec.job import DpEvent


def exact(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism by its closed form (Balle, Wang 2018, Theorem 8)."""

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        half = 1 / (2 * noise)
        d = normal(half - e * noise) - math.exp(e) * normal(-half - e * noise)
        low, high = (e, high) if d > delta else (low, e)
    return high


@pytest.mark.parametrize(("noise", "delta"), [(1.0, 1e-5), (0.5, 1e-3), (4.0, 1e-8)])
def test_gaussian_against_its_closed_form(noise: float, delta: float) -> None:
    event = DpEvent(rate=1.0, noise_multiplier=noise, steps=1)
    # From above, but for the cancellation in the closed form.
    assert -1e-6 <= pld.epsilon([event], delta) / exact(noise, delta) - 1 <= 2e-3


def test_events_compose() -> None:
    one = DpEvent(rate=1.0, noise_multiplier=2.0, steps=4)
    half = DpEvent(rate=1.0, noise_multiplier=2.0, steps=2)
    assert pld.epsilon([half, half], 1e-5) == pytest.approx(pld.epsilon([one], 1e-5), rel=1e-4)
    assert pld.epsilon([], 1e-5) == 0.0


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(UsageError) as e:
        pld.epsilon([DpEvent(rate=1.0, noise_multiplier=3.25, steps=1)], 1e-5)
    assert e.value.code == "usage.extra" and "audit" in e.value.mend


def test_long_jobs_are_composed_in_blocks() -> None:
    # 2500 steps are two blocks and a rest; 10^7 steps must not cost size ** steps.
    event = DpEvent(rate=0.01, noise_multiplier=2.0, steps=2500)
    parts = [dataclasses.replace(event, steps=n) for n in (900, 900, 700)]
    assert pld.epsilon([event], 1e-5) == pytest.approx(pld.epsilon(parts, 1e-5), rel=1e-3)
    long = DpEvent(rate=1.0, noise_multiplier=5000.0, steps=10_000_000)
    same = DpEvent(rate=1.0, noise_multiplier=5000.0 / math.sqrt(1e7), steps=1)
    assert pld.epsilon([long], 1e-5) == pytest.approx(pld.epsilon([same], 1e-5), rel=1e-2)


@pytest.mark.parametrize(("noise", "rate"), [(0.034, 6e-6), (0.078, 1e-6), (0.14, 1e-6)])
def test_little_noise_takes_no_minutes(noise, rate, monkeypatch):
    """Of a step's loss, spread over thousands, every piece was looked at: a quote of epsilon 100 on
    a million units held its server for minutes."""
    from dp_accounting.pld import privacy_loss_distribution

    asked = []
    real = privacy_loss_distribution.from_gaussian_mechanism

    def made(**given):
        asked.append(given["value_discretization_interval"])
        return real(**given | {"value_discretization_interval": 0.1})

    monkeypatch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", made)
    pld.epsilon([DpEvent(rate=rate, noise_multiplier=noise, steps=2)], 1e-6)
    loss = 1 / noise**2 + 20 / noise
    assert loss / asked[0] <= 2**19 + 1

"""The audit's battery in its short form, and that its laws bite. docs/audit.md; make audit."""

from __future__ import annotations

import numpy as np
import pytest

from audit import battery, chance, law

SEED = 20


@pytest.mark.parametrize("name", battery.CHECKS)
def test_the_battery_holds(name: str) -> None:
    """False alarm at most 1e-8 for all together: 500 comparisons of chance at 1e-11."""
    assert battery.one(name, SEED, steps=2_000) is None


def test_a_check_that_raises_anything_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(seed: int) -> None:
        raise ZeroDivisionError("whatever")

    monkeypatch.setitem(battery.CHECKS, "units", breaks)
    found = battery.one("units", SEED)
    assert found is not None
    assert (found.check, found.what) == ("units", "ZeroDivisionError: whatever")


def draws(count: int = 100_000) -> np.ndarray:
    return np.random.default_rng(3).normal(size=count)


def test_normal_draws_pass() -> None:
    law.normal(draws(), "draws")
    law.normal(draws(3), "few draws")


@pytest.mark.parametrize(
    "wrong",
    [
        draws() * 0.96,
        draws() + 0.03,
        np.clip(draws(), -3, 3),
        np.sign(draws()),
        np.where(np.arange(100_000) % 20, draws(), 0.0),
        np.append(draws(), np.nan),
        np.zeros(3),
        np.empty(0),
    ],
)
def test_other_draws_do_not(wrong: np.ndarray) -> None:
    with pytest.raises(law.Broken):
        law.normal(wrong, "draws")


def test_correlations_show_also_of_sizes_alone() -> None:
    first, other = draws(), np.random.default_rng(4).normal(size=100_000)
    law.uncorrelated(first, other, "two")
    signs = np.random.default_rng(5).choice([-1.0, 1.0], 100_000)
    for wrong in (first, -first, first * signs, 0.05 * first + other):
        with pytest.raises(law.Broken):
            law.uncorrelated(first, wrong, "two")


def test_lengths_and_lags_bite() -> None:
    z = draws()
    law.lengths(z.reshape(-1, 50), "rows")
    law.lags(z, "draws")
    for row in (np.zeros(50), z[:50] * 3):
        with pytest.raises(law.Broken):
            law.lengths(np.concatenate([z.reshape(-1, 50), row[None]]), "rows")
    again = z.copy()
    again[70_001:76_001] = -again[:6_000]
    with pytest.raises(law.Broken, match="entries 70001 apart"):
        law.lags(again, "draws")


def test_counts_bite_on_both_sides() -> None:
    law.count(5_000, 10_000, 0.5, "heads")
    for wrong in (4_600, 5_400):
        with pytest.raises(law.Broken):
            law.count(wrong, 10_000, 0.5, "heads")
    law.counts(np.array([40, 50, 60]), 100, 0.5, "heads")
    with pytest.raises(law.Broken):
        law.counts(np.array([40, 50, 99]), 100, 0.5, "heads")


def test_ideal_samples_pass_and_others_do_not() -> None:
    rng = np.random.default_rng(6)
    taken = rng.random((20_000, 48)) < 1 / 24
    chance._samples(taken, 1 / 24, "samples")
    sticky = taken.copy()
    again = rng.random(sticky.shape) < 0.02
    sticky[1:] |= sticky[:-1] & again[1:]
    epochs = np.concatenate([np.eye(24, dtype=bool)[rng.permutation(24)] for _ in range(833)])
    shuffled = np.repeat(epochs, 2, axis=1)
    twins = taken.copy()
    twins[:, 7] = twins[:, 30]
    for wrong in (sticky, shuffled, twins, rng.random((20_000, 48)) < 1 / 22):
        with pytest.raises(law.Broken):
            chance._samples(wrong, 1 / 24, "samples")

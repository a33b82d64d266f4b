"""What a job's duration tells: a model may be made to work longer on some rows than on others."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from casemate.server import run
from casemate.server.config import Limits

PREDICTED = [0.02, 1.0, 37.3, 3600.0, 86_400.0]


def ends(predicted: float) -> dict[float, float]:
    """Real duration -> when the end is shown, up to the run's limit."""
    quote: Any = SimpleNamespace(seconds=predicted, ticks=100)
    ticks = run.Ticks(quote, 1000.0)
    longest = Limits().run_floor + Limits().run_factor * predicted
    taken = [predicted * n / 50 for n in range(50)]
    taken += [predicted * (longest / predicted) ** (n / 5000) for n in range(5001)]
    return {t: round(t + ticks.wait(1000.0 + t), 6) for t in taken}


def steals_a_count_by_slow_rows() -> None:
    for predicted in PREDICTED:
        shown = ends(predicted)
        assert all(end > t - 1e-6 for t, end in shown.items())
        # Nothing is told of a run within half its prediction, and little of a longer one.
        assert {end for t, end in shown.items() if t < predicted / 2} == {round(predicted / 2, 6)}
        longest = max(shown)
        assert len(set(shown.values())) <= math.log2(20 * longest / predicted) + 19
        # Nor does anyone wait for long: a twentieth of the prediction, or what it was wrong by.
        for t, end in shown.items():
            if t >= predicted / 2:
                assert end - t <= max(0.05 * predicted, t - predicted) + 1e-6


def test_steals_a_count_by_slow_rows() -> None:
    steals_a_count_by_slow_rows()


def test_seeded_bug_of_fine_ticks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: run.Ticks, now: float) -> float:
        tick = self.predicted / self.ticks
        return self.started + (math.floor((now - self.started) / tick) + 1) * tick - now

    monkeypatch.setattr(run.Ticks, "wait", wait)
    with pytest.raises(AssertionError):
        steals_a_count_by_slow_rows()


def test_progress_is_the_clocks_alone() -> None:
    quote: Any = SimpleNamespace(seconds=25.0, ticks=100)
    ticks = run.Ticks(quote, 7.0)
    assert [ticks.tick(7.0 + s) for s in (0, 0.2, 0.3, 12.6, 24.8, 25.0, 1e6)] == [
        0, 0, 1, 50, 99, 99, 99,
    ]  # fmt: skip

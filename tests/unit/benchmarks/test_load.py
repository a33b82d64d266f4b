"""The figures of the load benchmark."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmarks import load


def test_figures_tell_what_was_lost_and_what_grew() -> None:
    seen = [["job", 0.001 * n, "ok"] for n in range(1, 201)]
    seen += [["quote", 9.0, "ok"], ["datasets", 5.0, "busy"], ["jobs", 1.0, "net.lost"]]
    told = [{"seen": seen, "jobs": ["a", "b"]}, {"seen": [["submit", 1.0, "budget.exhausted"]]}]
    samples = [(float(n), (100 + n // 10) << 20, 20 + n // 25) for n in range(50)]
    found = load._figures(
        told, samples, 60.0, 1.5, Counter({"done": 1, "lost": 1}), 0, 64
    )  # fmt: skip
    assert (found["requests"], found["lost"]) == (204, 1)
    assert found["light"]["requests"] == 200
    assert found["light"]["p50_ms"] == pytest.approx(101, abs=1)
    assert found["light"]["p99_ms"] == pytest.approx(199, abs=1)
    assert found["outcomes"]["busy"] == found["outcomes"]["budget.exhausted"] == 1
    assert found["rss_mib"] == [101.0, 104.0]
    assert found["descriptors"] == [20, 21]
    assert found["jobs"] == {"done": 1, "lost": 1}

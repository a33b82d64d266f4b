"""The demo's table is scikit-learn's, within its declared bounds, each row with one party."""

from __future__ import annotations

from sklearn.datasets import load_breast_cancer

from casemate.cli.demo import chart, table
from casemate.cli.demo.show import ROWS, interval
from casemate.cli.demo.story import Figures


def test_rows_are_scikit_learns_and_each_is_with_one_party():
    found = load_breast_cancer()
    at = [list(found.feature_names).index(name) for name in table.BOUNDS]
    whole = sorted(
        (tuple(float(v[i]) for i in at), str(found.target_names[t]))
        for v, t in zip(found.data, found.target, strict=True)
    )
    shares = table.load()
    assert sorted(shares.clinic + shares.centre + shares.held_out) == whole
    assert table.load() == shares


def test_the_bounds_hold_and_are_not_the_rows_own_extremes():
    shares = table.load()
    rows = shares.clinic + shares.centre + shares.held_out
    for i, (low, high) in enumerate(table.BOUNDS.values()):
        values = [v[i] for v, _ in rows]
        assert low <= min(values)
        assert max(values) <= high
        assert max(values) < high or min(values) > low or low == 0


def test_the_hospitals_differ_in_case_mix():
    shares = table.load()
    assert table.share(shares.clinic, "malignant") < 0.2
    assert table.share(shares.centre, "malignant") > 0.5
    assert 0.6 < table.share(shares.held_out, "benign") < 0.65


def test_scaling_is_that_of_the_declared_bounds(tmp_path):
    shares = table.load()
    table.write(tmp_path / "t.csv", shares.clinic)
    assert table.read(tmp_path / "t.csv") == shares.clinic
    low, high = zip(*table.BOUNDS.values(), strict=True)
    x, y = table.scaled(((low, "malignant"), (high, "benign")))
    assert x == [[-1.0] * 10, [1.0] * 10]
    assert y == [0, 1]


def test_intervals_are_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert abs(half - 2.776 * (2.5**0.5) / 5**0.5) < 1e-9


def test_a_chart_without_matplotlib_is_one_svg():
    figures = Figures(2.0, majority=0.63, held_out=169)
    figures.accuracy = {key: [0.9, 0.95] for key, _ in ROWS}
    text = chart.svg(figures)
    assert text.startswith("<svg ")
    assert text.count("92.5%") == len(ROWS)
    assert "Simulated TEE" in text

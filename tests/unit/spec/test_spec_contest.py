"""Contests as they are declared, what an entry must ask for, and what a result scores."""

from __future__ import annotations

import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from casemate.spec import tensors
from casemate.spec.contest import HIGHER, Contest, fits, scores, sums
from casemate.spec.data import Column, Policy
from casemate.spec.errors import FormatError
from casemate.spec.job import (
    DatasetUse,
    Dp,
    InputBinding,
    JobRequest,
    Metric,
    NonPrivate,
    Sgd,
    TrainSpec,
    longest,
)
from casemate.spec.receipt import rank

ACCURACY, LOSS = Metric(name="accuracy"), Metric(name="mse", limit=4.0)
EXACT = Contest(target="y", metrics=(ACCURACY, LOSS), entries=3)
NOISED = dataclasses.replace(EXACT, epsilon=0.5, delta=1e-5)


def request(privacy: Any, **changes: Any) -> JobRequest:
    fields: dict[str, Any] = {
        "job": "job_" + "0" * 32,
        "scientist": "id_s",
        "datasets": (DatasetUse(dataset="ds_x", policy_digest="sha256:0", epoch=0),),
        "model_digest": "sha256:1",
        "inputs": (InputBinding(input="x", columns=("x",)),),
        "train": TrainSpec(batch_size=8, steps=1, privacy=privacy, optimizer=Sgd(lr=1.0)),
        "metrics": EXACT.metrics,
        "target": "y",
    }
    return JobRequest(**(fields | changes))


def result(*values: float, name: str = "v") -> bytes:
    raw = struct.pack(f"<{len(values)}f", *values)
    return bytes(tensors.dump({name: ("f32", (len(values),), raw)}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ()}, "different metrics"),
        ({"metrics": (ACCURACY, ACCURACY)}, "different metrics"),
        ({"metrics": (Metric(name="auc"),)}, "'auc' is none of"),
        ({"metrics": (Metric(name="accuracy", limit=2.0),)}, "limit of accuracy"),
        ({"entries": 0}, "entries"),
        ({"epsilon": 1.0}, "both"),
        ({"delta": 1e-5}, "both"),
        ({"epsilon": 0.0, "delta": 1e-5}, "epsilon"),
    ],
)
def test_what_is_no_contest(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(EXACT, **changes)


def test_a_half_parts_yes_from_no_and_nothing_else() -> None:
    """Bounds are those of the wire form: what was scaled is from 0 to 1, or from -1."""

    def label(dtype: Any, low: float | None, high: float | None, **more: Any) -> Column:
        return Column(name="y", dtype=dtype, low=low, high=high, role="label", **more)

    bits = label("u8", 0, 1), label("bool", None, None), label("f32", 5, 9, scale="unit")
    others = label("u8", 0, 2), label("f32", 0, 9), label("f32", 5, 9, scale="symmetric")
    for metric in ("accuracy", "binary_cross_entropy_with_logits"):
        assert all(fits(metric, y, classes=False) for y in bits)
        assert not any(fits(metric, y, classes=False) for y in others)
    for y in (*bits, *others):
        assert fits("mse", y, classes=False) and fits("l1", y, classes=False)
        index = y.dtype == "u8"
        assert fits("accuracy", y, classes=True) == fits("cross_entropy", y, classes=True) == index
        assert not any(fits(m, y, classes=True) for m in ("mse", "l1", "auc"))
    assert not fits("accuracy", label("i64", 1, 3), classes=True), "classes are from 0 on"


def test_a_contest_is_of_a_dataset_for_evaluation() -> None:
    with pytest.raises(ValueError, match="for evaluation"):
        Policy(scientists=("*",), contest=EXACT)
    assert Policy(scientists=("*",), evaluation=True, contest=EXACT).contest == EXACT


def test_it_takes_its_own_entries_and_no_others() -> None:
    private = Dp(epsilon=0.5, delta=1e-5, clip=longest(2, 1))
    assert EXACT.takes(request(NonPrivate(words="")))
    assert NOISED.takes(request(private))
    assert not EXACT.takes(request(private))
    assert not NOISED.takes(request(NonPrivate(words="")))
    for changes in ({"target": "z"}, {"target": ""}, {"metrics": (ACCURACY,)},
                    {"metrics": (LOSS, ACCURACY)}):  # fmt: skip
        assert not EXACT.takes(request(NonPrivate(words=""), **changes))
    for privacy in (dataclasses.replace(private, epsilon=0.6),
                    dataclasses.replace(private, delta=1e-4)):  # fmt: skip
        assert not NOISED.takes(request(privacy))


def test_an_entry_is_of_one_dataset_and_asks_for_metrics() -> None:
    use = DatasetUse(dataset="ds_z", policy_digest="sha256:0", epoch=0)
    for changes in ({"metrics": ()}, {"datasets": (use, dataclasses.replace(use, dataset="ds_b"))}):
        with pytest.raises(ValueError, match="one dataset"):
            request(NonPrivate(words=""), **changes)


def test_scores_are_means_within_their_limits() -> None:
    assert sums(EXACT.metrics, result(0.5, 0.25, 0.125)) == (0.5, 0.25, 0.125)
    assert scores(EXACT.metrics, result(0.5, 0.25, 0.125)) == (0.5, 1.0)
    assert scores(EXACT.metrics, result(0.5, 0.75, -0.125)) == (1.0, 0.0)
    for rows in (0.0, -1.0, float("nan")):
        assert scores(EXACT.metrics, result(rows, 0.5, 0.5)) == (0.0, 4.0)
    worst = scores(EXACT.metrics, result(1.0, float("nan"), float("nan")))
    assert worst == (0.0, 4.0), "noise is never NaN, and NaN never wins"
    for other in (result(1.0, 1.0), result(1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(FormatError):
            scores(EXACT.metrics, other)


def test_entries_are_ranked_by_the_first_metric_and_then_by_who_came_first() -> None:
    def entry(metric: Metric, score: float, reserved: int) -> Any:
        return SimpleNamespace(metrics=(metric,), scores=(score,), reserved=reserved)

    high = [entry(ACCURACY, s, r) for s, r in ((0.9, 5), (0.9, 7), (0.5, 1))]
    low = [entry(LOSS, s, r) for s, r in ((0.1, 9), (0.5, 2), (0.5, 3))]
    for ordered in (high, low):
        given = [ordered[i] for i in (2, 0, 1)]
        assert sorted(given, key=rank) == ordered
    assert HIGHER["accuracy"] and not HIGHER["mse"]

"""Sequences of calls over registers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from casemate.engine.replay import At, Call, Replay


class Thing:
    """What can be asked whether it is still there."""


def test_arguments_by_place_by_name_and_in_lists() -> None:
    def note(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    calls = [
        Call(note, [], {}, "none"),
        Call(note, [At("a")], {"k": 3}, "one"),
        Call(note, [At("b"), 5, [1, 2], At("a")], {}, "several"),
        Call(note, [[At("a"), 7, At("c")], None, [0]], {"k": At("b"), "l": [At("c")]}, "lists"),
    ]
    run = Replay(calls, ["a", "b"], ["none", "one", "several", "lists", "c"], {"c": "C"})
    for a, b in (("A", "B"), ("x", "y")):  # twice: nothing stays behind
        assert list(run([a, b])) == [
            ((), {}), ((a,), {"k": 3}), ((b, 5, [1, 2], a), {}),
            (([a, 7, "C"], None, [0]), {"k": b, "l": ["C"]}), "C",
        ]  # fmt: skip


def test_results_that_are_several_or_that_nobody_reads() -> None:
    calls = [
        Call(divmod, [At("a"), 4], {}, ["q", None]),
        Call(lambda q: [q, -q], [At("q")], {}, ["q", "minus"]),  # a key made anew
        Call(abs, [At("minus")], {}, "unread"),
    ]
    run = Replay(calls, ["a"], ["minus", "q", "minus"])
    assert list(run([30])) == [-7, 7, -7]
    assert list(Replay(calls, ["a"], ["q"])([30])) == [7]
    assert list(Replay([], ["a"], [])([1])) == []


def test_what_does_not_fit_is_refused() -> None:
    run = Replay([Call(divmod, [At("a"), 4], {}, ["q", "r", "s"])], ["a"], ["q"])
    with pytest.raises(ValueError, match="shorter"):
        run([1])
    for given in ([], [1, 2]):
        with pytest.raises(TypeError, match="1 inputs are needed"):
            run(given)
    with pytest.raises(KeyError):
        Replay([Call(abs, [At("later")], {}, "b")], [], ["b"])
    with pytest.raises(ValueError, match="two inputs"):
        Replay([], ["a", "a"], [])


def test_values_go_after_their_last_use() -> None:
    alive: dict[str, Any] = {}
    seen = []

    def make(name: str, *given: Any) -> Thing:
        made = Thing()
        alive[name] = weakref.ref(made)
        seen.append({k for k, r in alive.items() if r() is not None})
        return made

    calls = [
        Call(make, ["a"], {}, "a"),
        Call(lambda *given: (make("b"), make("c"), make("d")), [At("a")], {}, ["b", "c", None]),
        Call(make, ["e", At("b")], {}, "e"),
        Call(make, ["f", [At("e"), At("e")]], {}, "f"),
        Call(make, ["g"], {}, "g"),
    ]
    given = Replay(calls, [], ["g", "c"])([])
    assert len(given) == 2
    assert seen[3:] == [set("abcd"), set("bce"), set("cef"), set("cg")]

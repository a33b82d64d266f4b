"""Fields of trust policies: what each may be, and that none may be left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from casemate.attest import fields
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError

OPEN = Unchecked("a test")


@dataclass(frozen=True, kw_only=True)
class Policy:
    names: tuple[str, ...] | Unchecked
    most: int | Unchecked

    def __post_init__(self) -> None:
        fields.words(self.names, {"a", "b"}, "names")
        fields.integer(self.most, range(5), "most")


def refused(call: Any, *args: Any) -> UsageError:
    with pytest.raises(UsageError) as e:
        call(*args)
    assert e.value.code == "usage.trust"
    assert e.value.mend
    return e.value


CASES = [
    (fields.digests, (4,), [("abcd",), OPEN], [(), ("ABCD",), ("abc",), ["abcd"], "abcd", (1,)]),
    (fields.digests, ((4, 6),), [("abcd", "abcdef")], [("abcde",)]),
    (fields.integers, (range(3),), [(0, 2), OPEN], [(), (3,), (True,), (-1,), 1]),
    (fields.integer, (range(3),), [0, OPEN], [3, True, "1", None]),
    (fields.words, ({"a"},), [("a",), OPEN], [(), ("b",), ("",), "a", (1,)]),
    (fields.words, (None,), [("anything",), OPEN], [(), ("",), (2,)]),
    (fields.flag, (), [True, False, OPEN], [0, 1, None, "true"]),
    (
        fields.flags, ({"debug"}, {"debug", "smt"}),
        [{"debug": False}, {"debug": True, "smt": False}, OPEN],
        [{}, {"smt": True}, {"debug": 1}, {"debug": False, "other": True}, ("debug",)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "args", "good", "bad"),
    CASES,
    ids=[f"{c[0].__name__}{n}" for n, c in enumerate(CASES)],
)
def test_what_a_field_may_be(check, args, good, bad):
    for found in good:
        check(found, *args, "here")
    for found in bad:
        assert refused(check, found, *args, "here").where == "here"


def test_a_section_gives_every_field():
    given = {"names": ["a"], "most": {"unchecked": "no bound is known"}}
    assert fields.load(Policy, given, "p") == Policy(
        names=("a",), most=Unchecked("no bound is known")
    )
    assert refused(fields.load, Policy, {"names": ["a"]}, "p").where == "most"
    assert refused(fields.load, Policy, {**given, "more": 1}, "p").where == "more"
    assert refused(fields.load, Policy, {**given, "names": ["c"]}, "p").where == "names"
    assert refused(fields.load, Policy, [], "p").where == "p"


@pytest.mark.parametrize("reason", ["", "  ", 3])
def test_unchecked_needs_a_reason(reason):
    refused(fields.toml, {"unchecked": reason})

"""What feeds the parsers (:mod:`support.fuzzing`) finds what costs too much and what is let out."""

from __future__ import annotations

import time

import pytest

from casemate.spec.errors import CasemateError
from support import fuzzing


def burn(data: bytes) -> None:
    end = time.process_time() + 0.08
    while time.process_time() < end:
        pass


def hoard(data: bytes) -> int:
    return len([bytes(1 << 10) for _ in range(80 << 10)])


def hoard_beyond_python(data: bytes) -> object:
    import torch

    return torch.ones(48 << 20)  # far over: a busy kernel may take other pages away meanwhile


@pytest.mark.parametrize("parse", [burn, hoard, hoard_beyond_python])
def test_what_costs_too_much_is_found(parse: fuzzing.Parse) -> None:
    with pytest.raises(fuzzing.Exceeded):
        fuzzing.feed(parse, [b"x"], (CasemateError,))


def test_a_foreign_exception_is_found() -> None:
    with pytest.raises(fuzzing.Foreign):
        fuzzing.feed(lambda data: {}[data], [b"x"], (CasemateError,))


def test_one_slow_moment_is_forgiven() -> None:
    moments = iter([burn])
    assert fuzzing.feed(lambda data: next(moments, len)(data), [b"x"] * 3, (CasemateError,)) == 3

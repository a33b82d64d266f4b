"""A step's sum by pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casemate.engine import windows

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def whole(pieces: Iterator[windows.Piece], most: int) -> torch.Tensor:
    """The pieces put together; each begins where the one before ended."""
    out: list[torch.Tensor] = []
    for first, part in pieces:
        assert first == sum(map(len, out))
        assert first % most == 0 and 0 < len(part) <= most
        out.append(part.clone())
        part.fill_(77)  # a consumer may write what it likes
    return torch.cat(out)


@given(sizes=SIZES, most=st.sampled_from([2, 6, 16, 1000]), data=st.data())
def test_tensors_of_any_sizes_are_one_vector(
    sizes: list[int], most: int, data: st.DataObject
) -> None:
    zero = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    tensors = [torch.arange(1, n + 1) * (i + 1) for i, n in enumerate(sizes)]

    def fill(at: torch.Tensor) -> windows.Fill:
        def add(window: torch.Tensor, first: int) -> None:
            window += at[first : first + len(window)]

        return add

    fills = (None if no else fill(t) for no, t in zip(zero, tensors, strict=True))
    wanted = torch.cat([t * (not no) for no, t in zip(zero, tensors, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW", most)
        got = whole(windows.filled(sizes, fills, torch.int64), most)
        assert torch.equal(got, wanted)
        assert torch.equal(whole(windows.of(wanted.clone()), most), wanted)


def test_a_fill_is_let_go_of_before_the_next_is_used() -> None:
    alive: list[int] = []

    class Held:
        def __init__(self, i: int) -> None:
            self.i = i
            self.used = False

        def __call__(self, window: torch.Tensor, first: int) -> None:
            if not self.used:
                alive.append(self.i)
            self.used = True
            assert alive == [self.i]

        def __del__(self) -> None:
            alive.remove(self.i)

    for _ in windows.filled([3] * 5, (Held(i) for i in range(5)), torch.int64):
        pass
    assert alive == []

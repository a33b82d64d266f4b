"""What slots are tried on: operands drawn, turned and spoilt (P13)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from casemate.engine.trials import Slots, fill, other_weights, place, rounds_for
from casemate.graph.ops import Batch, Value

ROWS, WIDTH = 16, 5
SPOIL = (-1, (None, math.inf, math.nan))


def alike(kernel: Callable[[Tensor], Tensor], per: int = 1, t: Tensor | None = None) -> bool:
    """Of a kernel of (rows, width); results are of ``per`` rows each."""
    t = torch.randn(ROWS, WIDTH) if t is None else t
    slots = Slots([(t, Value("f32", (1, WIDTH), Batch(0)))], ROWS, per)
    slots.draw(1, torch.Generator().manual_seed(0), False)
    order = torch.arange(ROWS // per).roll(1)
    found = slots.alike(lambda made: [kernel(made[0]).reshape(ROWS // per, -1)], [order], [SPOIL])
    return found == [True]


def _at_one_slot(x: Tensor) -> Tensor:
    out = x.clone()
    out[5] = torch.nextafter(out[5], torch.tensor(math.inf))
    return out


def _beside_nan(x: Tensor) -> Tensor:
    return x * (1 + 2.0**-20) if bool(x.isnan().any()) else x.clone()


def _beside_huge(x: Tensor) -> Tensor:
    largest = torch.nan_to_num(x, 0.0, 0.0, 0.0).abs().max()
    return x * (1 + 2.0**-20) if float(largest) > 1e15 else x.clone()


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "want"),
    [
        (torch.exp, True),
        (lambda x: x.view_as(x), True),  # a result in the operand's own memory
        (_at_one_slot, False),
        (_beside_nan, False),
        (_beside_huge, False),
        (lambda x: x - x.nan_to_num().mean(0), False),
    ],
)
def test_what_knows_its_slot_or_the_others_is_found(
    kernel: Callable[[Tensor], Tensor], want: bool, per: int
) -> None:
    assert alike(kernel, per) is want


def test_units_of_two_rows_are_turned_as_wholes() -> None:
    def pairs(x: Tensor) -> Tensor:
        return x.view(-1, 2, WIDTH).sum(1)

    assert alike(pairs, 2)


@pytest.mark.parametrize(
    "like", [torch.zeros(WIDTH, ROWS).t(), torch.zeros(ROWS, 9)[:, 3 : 3 + WIDTH],
             torch.zeros(1, WIDTH).expand(ROWS, WIDTH)],
)  # fmt: skip
def test_operands_lie_as_in_the_run(like: Tensor) -> None:
    seen = []

    def kernel(x: Tensor) -> Tensor:
        seen.append(place(x))
        return x * 2.0

    assert alike(kernel, t=like)
    assert set(seen) == {place(like)} and len(seen) == 3


def test_draws_are_of_all_magnitudes_and_no_record_is_another() -> None:
    value, generator = Value("f32", (1, 4096), Batch(0)), torch.Generator().manual_seed(0)
    slots = Slots([(torch.zeros(512, 4096), value)], 512)  # more than the pool
    for round_, low, high in ((1, 1e-2, 6.0), (2, 1.0, 600.0), (3, 1e-29, 1e31)):
        slots.draw(round_, generator, False)
        (drawn,) = slots.drawn
        sizes = drawn.abs().flatten()[: 1 << 16]
        assert float(sizes.quantile(0.01)) < low * 5 and float(sizes.max()) < high
        assert 0.49 < float((drawn > 0).float().mean()) < 0.51
        assert len({tuple(row) for row in drawn[:, :8].tolist()}) == 512
    assert float(sizes.quantile(0.99)) > 1e28
    slots.draw(1, generator, True)
    assert not bool(slots.drawn[0].any())
    again = fill(torch.empty(3), torch.Generator().manual_seed(0))
    assert torch.equal(again, fill(torch.empty(3), torch.Generator().manual_seed(0)))


def test_integers_are_tried_as_they_are_and_weights_are_others() -> None:
    index = torch.arange(ROWS * 2).view(ROWS, 2)
    slots = Slots([(index, Value("i64", (1, 2), Batch(0)))], ROWS)
    slots.draw(3, torch.Generator().manual_seed(0), False)
    assert torch.equal(slots.drawn[0], index)
    weights = {0: torch.zeros(7, 3).t()}
    made = [other_weights(weights, r, torch.Generator().manual_seed(0))[0] for r in (1, 2)]
    assert all(place(m) == place(weights[0]) and bool(m.all()) for m in made)
    assert bool((made[0] < 0).any()) and float(made[1].min()) >= 0.5


@pytest.mark.parametrize(("entries", "want"), [(1 << 20, 4), (1000, 10), (3, 64), (0, 64)])
def test_rounds_until_there_are_enough_entries(entries: int, want: int) -> None:
    assert rounds_for(entries) == want

"""Tensors as a dataset: names, what whole numbers may be, whose row each one is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from casemate.engine.capture import capture, make_loss, specs_of
from casemate.engine.capture.table import Table, group, named, table
from casemate.spec.errors import CasemateError, UsageError

ROWS = 24


class Text(nn.Module):
    def __init__(self, most: int = 10**6) -> None:
        super().__init__()
        self.words, self.head, self.most = nn.Embedding(11, 4), nn.Linear(4, 5), most

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> Any:
        found = self.words(words.clamp(max=self.most))
        return self.head((found * mask.unsqueeze(-1)).mean(1))


def text() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "words": torch.randint(11, (ROWS, 3), generator=made),
        "mask": torch.ones(ROWS, 3, dtype=torch.int64),
        "target": torch.randint(5, (ROWS,), generator=made),
    }


def made(module: nn.Module, tensors: dict[str, torch.Tensor], **bounds: Any) -> Table:
    packed = capture(module, make_loss("cross_entropy"), specs_of(tensors))
    return table(packed, group(tensors, None, 1), bounds)


def declared(found: Table) -> dict[str, Any]:
    return {c.name: (c.low, c.high) for c in found.schema.columns}


def test_whole_numbers_may_be_what_the_model_admits() -> None:
    found = made(Text(), text())
    assert declared(found) == {"words": (0, 10), "mask": (0, 1), "target": (0, 4)}
    assert {c.name for c in found.schema.columns if c.role == "label"} == {"target"}
    assert declared(made(Text(), text(), mask=(0, 7)))["mask"] == (0, 7)
    # Clamped by the model itself, any whole number is admitted; none is then assumed.
    with pytest.raises(CasemateError, match=r"data\.bounds \[words\].*assumed"):
        made(Text(10), text())
    assert declared(made(Text(10), text(), words=(0, 99)))["words"] == (0, 99)


def test_bounds_are_not_computed_from_the_rows() -> None:
    few = {**text(), "words": torch.zeros(ROWS, 3, dtype=torch.int64)}
    assert declared(made(Text(), few)) == declared(made(Text(), text()))
    line = nn.Linear(2, 2)
    for scale in (0.001, 10.0):
        rows = {"input": torch.full((ROWS, 2), scale), "target": torch.zeros(ROWS).long()}
        assert declared(made(line, rows))["input"] == (-16, 16)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"words": torch.full((ROWS, 3), 11)}, "data.bounds"),
        ({"words": torch.full((ROWS, 3), -1)}, "data.bounds"),
        ({"target": torch.full((ROWS,), 5)}, "data.bounds"),
    ],
)
def test_rows_outside_are_refused(changed: dict[str, torch.Tensor], code: str) -> None:
    with pytest.raises(CasemateError) as e:
        made(Text(), {**text(), **changed})
    assert e.value.code == code and e.value.where == next(iter(changed))


def test_bytes_and_bools() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, pixels: torch.Tensor, seen: torch.Tensor) -> Any:
            return self.lin(pixels.float() / 255 * seen)

    rows = {
        "pixels": torch.full((ROWS, 4), 255, dtype=torch.uint8),
        "seen": torch.ones(ROWS, 4, dtype=torch.bool),
        "target": torch.zeros(ROWS, dtype=torch.int64),
    }
    assert declared(made(Mixed(), rows)) == {
        "pixels": (0, 255), "seen": (None, None), "target": (0, 1),
    }  # fmt: skip


def test_of_each_person_the_first_rows() -> None:
    who = torch.tensor([9, 3, 9, 9, -4, 3, 9])  # ids need be neither sorted nor small
    rows = {"input": torch.arange(7.0).unsqueeze(1)}
    found = group(rows, who, 2)
    assert found.owner is not None
    assert (found.units, found.rows_per_unit) == (3, 2)
    assert found.tensors["input"].flatten().tolist() == [0, 1, 2, 4, 5]
    assert found.owner.tolist() == [2, 1, 2, 0, 1]


def test_tensor_datasets_feed_forward_in_order() -> None:
    given = text()
    assert list(named(TensorDataset(*given.values()), Text())) == ["words", "mask", "target"]
    assert list(named(TensorDataset(given["words"], given["mask"]), Text())) == ["words", "mask"]
    with pytest.raises(UsageError, match="more tensors"):
        named(TensorDataset(*[given["target"]] * 4), Text())

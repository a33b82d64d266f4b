"""Dropout as inputs that are drawn outside: torch with the same draws has the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from casemate.client.torch import export
from casemate.engine import draws
from casemate.engine.prepare import probe, weights_of
from casemate.engine.program import Program
from casemate.graph import check, pack
from casemate.spec.errors import ModelError
from support import dropouts

ROWS = 3
# Others of their kinds are quicker.
SLOW = (
    "gru, both ways", "multihead, batch second", "lstm, projected", "attention, grouped",
    "attention, masked", "attention, biased", "alpha channels", "batch last",
)  # fmt: skip
NAMES = [pytest.param(n, marks=pytest.mark.full) if n in SLOW else n for n in dropouts.CASES]


def data(rows: int = ROWS) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(2)
    x = torch.randn(rows, dropouts.LENGTH, dropouts.WIDTH, generator=made)
    return {"x": x, "target": torch.randint(3, (rows,), generator=made)}


def captured(module: nn.Module, **how: Any) -> Program:
    packed, _ = export(module, data(), loss="cross_entropy", **how)
    graph, view = pack.unpack(packed.data)
    check.check(graph, {n: i for n, (i, _) in view.items()})
    return Program(graph, weights_of(view))


def torchs(module: nn.Module, record: dict[str, Tensor], program: Program) -> dict[str, Tensor]:
    """The record's gradient by torch in float64, the record's draws put in by hand."""
    module = copy.deepcopy(module).double().train()
    kept = [(record[i.name] != 0).double() for i in program.random]
    with dropouts.by_hand(kept):
        scores = module(record["x"].double())
    functional.cross_entropy(scores, record["target"]).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_torchs_with_the_same_draws(name: str) -> None:
    torch.manual_seed(0)
    module = dropouts.CASES[name]()
    program = captured(module)
    assert program.random
    records = data(6) | draws.samples(program.random, 6)
    assert any(bool((records[i.name] == 0).any()) for i in program.random)
    out, again = torch.empty(2, program.dimension)
    for replayed in (False, True):
        if replayed:
            probe(program, records)
        for row in range(ROWS):
            record = {n: t[row : row + 1] for n, t in records.items()}
            frontier = program.prefix(record)
            program.gradient(frontier, out)
            program.gradient(frontier, again)
            assert torch.equal(out, again)
            want = torchs(module, record, program)
            parts = out.split([leaf.numel() for leaf in program.leaves])
            for spec, part in zip(program.trained, parts, strict=True):
                found = want[spec.tensor].float().reshape(-1)
                torch.testing.assert_close(part, found, rtol=1e-4, atol=1e-6, msg=spec.tensor)


def test_a_draw_that_all_records_share_is_refused() -> None:
    class Shared(dropouts.Run):
        def forward(self, x: Tensor) -> Tensor:
            weight = functional.dropout(self.last.weight, 0.5)
            return functional.linear(self.first(x), weight).mean(1)

    with pytest.raises(ModelError) as e:
        captured(Shared(lambda m, x: x))
    assert e.value.code == "model.random" and "for all records" in e.value.message


@pytest.mark.parametrize("run", [torch.rand_like, lambda x: torch.bernoulli(x.sigmoid())])
def test_other_draws_are_refused(run: Any) -> None:
    with pytest.raises(ModelError) as e:
        captured(dropouts.Run(lambda m, x: x * run(x)))
    assert e.value.code == "model.random"


def test_all_or_nothing() -> None:
    """p = 1 drops all and p = 0 nothing: neither needs a draw."""
    for p in (0.0, 1.0):
        program = captured(dropouts.Run(lambda m, x, p=p: functional.dropout(x, p)))
        assert not program.random
        frontier = program.prefix({n: t[:1] for n, t in data().items()})
        out = torch.empty(program.dimension)
        program.gradient(frontier, out)
        first = out[: dropouts.WIDTH**2]
        assert bool(first.any()) == (p == 0)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize("projected", [0, 2])
def test_a_recurrent_layer_that_has_none_after_it_drops_nothing(projected: int) -> None:
    width = dropouts.WIDTH
    rnn = nn.LSTM(width, width, 1, dropout=0.5, batch_first=True, proj_size=projected)
    out = nn.Linear(projected or width, width)
    module = dropouts.Run(lambda m, x: m.out(m.rnn(x)[0]), rnn=rnn, out=out)
    program = captured(module)
    assert not program.random
    record = {n: t[:1] for n, t in data().items()}
    found = torch.empty(program.dimension)
    program.gradient(program.prefix(record), found)
    want = torchs(module, record, program)
    own = torch.cat([want[i.tensor].reshape(-1) for i in program.trained])
    torch.testing.assert_close(found, own.float(), rtol=1e-4, atol=1e-6)

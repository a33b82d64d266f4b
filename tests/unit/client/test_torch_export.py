"""Export: bindings, what is trained, what is refused; weights back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from casemate.client.torch import export, groupnorm, load_weights
from casemate.engine.program import Program
from casemate.graph import check
from casemate.graph.model import Size
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import ModelError
from support.graphs import exported, interpret, tensors


def data(n: int = 4) -> dict[str, torch.Tensor]:
    return {"input": torch.randn(n, 4), "target": torch.randint(3, (n,))}


def columns(*names: str, **how: Any) -> tuple[Column, ...]:
    given: dict[str, Any] = {"dtype": "f32", "low": 0.0, "high": 1.0, **how}
    return tuple(Column(name=n, **given) for n in names)


LABEL = Column(name="sick", dtype="i64", low=0, high=2, role="label")


def schema(*given: Column) -> DatasetSchema:
    return DatasetSchema(name="d", columns=given, rows=10, units=10)


def test_bindings_from_a_schema() -> None:
    packed, bindings = export(
        nn.Linear(3, 3), schema(*columns("a", "b", "c"), LABEL), loss="cross_entropy"
    )
    assert {b.input: b.columns for b in bindings} == {"input": ("a", "b", "c"), "target": ("sick",)}
    graph, _, infos = tensors(packed)
    bounds = check.declared_bounds(graph, bindings, [schema(*columns("a", "b", "c"), LABEL)])
    assert bounds == {"target": (0, 2)}
    assert check.check(graph, infos, bounds=bounds).dimension == 12
    with pytest.raises(ModelError) as e:
        check.check(graph, infos, bounds={"target": (0, 3)})
    assert e.value.code == "model.index-range"


def test_bindings_by_names_and_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(
            self, rows: torch.Tensor, extra: torch.Tensor, gain: Any = None
        ) -> torch.Tensor:
            return self.a(rows) * extra.unsqueeze(-1)

    given = schema(*columns("p", "q", "extra"), LABEL)
    _, bindings = export(Two(), given, loss="cross_entropy", inputs={"rows": ["q", "p"]})
    assert {b.input: b.columns for b in bindings} == {
        "rows": ("q", "p"), "extra": ("extra",), "target": ("sick",)
    }  # fmt: skip
    with pytest.raises(ModelError) as e:
        export(Two(), given, loss="cross_entropy", inputs={"rows": ["q", "nowhere"]})
    assert e.value.code == "model.inputs"


def test_gradients_stop_where_the_module_stops_them() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.c.bias.requires_grad_(False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.a(input).tanh()
            return self.c(x + self.b(input).detach() + self.b(input))

    torch.manual_seed(0)
    module, given = Stops(), data(6)
    graph, weights, infos = tensors(exported(module, given, loss="cross_entropy"))
    trained = [i for i in graph.inputs if i.kind == "param"]
    for i in trained:
        weights[i.tensor].requires_grad_()
    interpret(graph, weights, given)[graph.loss].sum().backward()
    functional.cross_entropy(module(given["input"]), given["target"], reduction="sum").backward()
    for name, parameter in module.named_parameters():
        ours, theirs = weights[name].grad, parameter.grad
        if theirs is None:
            assert ours is None or not ours.any(), name
        else:
            torch.testing.assert_close(ours, theirs)
    assert {i.tensor for i in graph.inputs if i.kind == "frozen"} == {"c.bias"}
    made = check.check(graph, infos)
    assert made.dimension == 4 * 4 * 2 + 4 * 2 + 12


def test_frozen_prefix() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    module[0].requires_grad_(False)
    graph, _, infos = tensors(exported(module, data(), loss="cross_entropy"))
    made = check.check(graph, infos)
    assert {n.op.split(".")[1] for n in graph.nodes if n.name in made.frozen_prefix} == {
        "linear",
        "relu",
    }
    assert made.dimension == 27


def test_dropout_follows_the_mode_and_modes_come_back() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    for dropout in (True, False):
        for train in (True, False):
            module.train(train)
            graph = tensors(export(module, data(), loss="cross_entropy", dropout=dropout)[0])[0]
            assert not [n for n in graph.nodes if "dropout" in n.op]
            drawn = [(i.shape, i.rate) for i in graph.inputs if i.kind == "random"]
            assert drawn == ([((Size(a=1), 3), 0.5)] if dropout and train else [])
            assert module.training is module[1].training is train


def test_batchnorm_is_refused_with_the_mend_that_works() -> None:
    module = nn.Sequential(nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(18, 3))
    given = {"input": torch.randn(4, 2, 3), "target": torch.randint(3, (4,))}
    with pytest.raises(ModelError) as e:
        exported(module, given, loss="cross_entropy")
    assert (e.value.code, e.value.where) == ("model.batchnorm", "1")
    assert exported(groupnorm(module), given, loss="cross_entropy")
    untracked = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    with pytest.raises(ModelError) as e:
        exported(untracked, data(), loss="cross_entropy")
    assert e.value.code == "model.batchnorm"


@pytest.mark.parametrize(
    ("module", "loss", "code"),
    [
        (nn.Linear(4, 3), None, "model.loss"),
        (nn.Linear(4, 3), "accuracy", "model.loss"),
        (nn.Linear(4, 3), nn.CTCLoss(), "model.loss"),
        (nn.Linear(4, 3), lambda o, t: functional.cross_entropy(o, t), "model.mixes-records"),
        (nn.Linear(4, 3), lambda o, t: o, "model.loss"),
        (nn.Linear(5, 3), "cross_entropy", "model.export"),
        (nn.Linear(4, 3).double(), "cross_entropy", "model.dtype"),
        (nn.Linear(4, 3).requires_grad_(False), "cross_entropy", "model.nothing-trained"),
        (nn.LSTM(4, 3), "cross_entropy", "model.batch-fixed"),
    ],
)
def test_refusals(module: nn.Module, loss: Any, code: str) -> None:
    with pytest.raises(ModelError) as e:
        exported(module, data(), loss=loss)
    assert e.value.code == code
    assert e.value.mend


def test_weights_come_back_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    before = module[1].weight.clone()
    load_weights(module, {"0.weight": torch.ones(3, 4).numpy()})
    assert (module[0].weight == 1).all() and (module[1].weight == before).all()
    for bad in ({"2.weight": torch.ones(3, 4)}, {"0.weight": torch.ones(4, 3)}):
        with pytest.raises(ModelError) as e:
            load_weights(module, {"1.weight": torch.ones(3, 3), **bad})
        assert e.value.code == "model.weights"
    assert (module[1].weight == before).all()


def test_tied_weights_are_one_input() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    graph, _, _ = tensors(exported(module, data(), loss="cross_entropy"))
    assert sorted(i.shape for i in graph.inputs if i.kind == "param") == [(4,), (4,), (4, 4)]


class Assigning(nn.Module):
    """Writes to its own values, to the rows and to a new tensor, a time step after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input -= 0.5
        y = self.first(input)
        y[:, 0] = input[:, 0]
        y[:, 1] = 0.5
        y[:, 2:4] += y[:, 4:]
        y[:, 5] = input[:, 1] > 0
        z = input.new_zeros(input.shape[0], 2, 6)
        for t in range(2):
            z[:, t] = y.tanh() + z[:, t - 1]
        return self.second(z[:, -1])


def test_assignments_to_slices_have_their_gradient() -> None:
    module, rows = Assigning(), data(2)
    graph, weights, _ = tensors(exported(module, data(), loss="cross_entropy"))
    program = Program(graph, {n: t.clone() for n, t in weights.items()})
    found = torch.zeros(program.dimension)
    for i in range(2):
        one = {n: rows[n][i : i + 1] for n in ("input", "target")}
        program.gradient(program.prefix(one), found)
        loss = functional.cross_entropy(module(one["input"].clone()), one["target"])
        own = dict(module.named_parameters())
        want = torch.autograd.grad(loss, [own[s.tensor] for s in program.trained])
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in want]))


def test_an_assignment_by_mask_is_refused_with_the_mend_that_works() -> None:
    class Clipped(nn.Linear):
        def __init__(self, clip: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__(4, 3)
            self.clip = clip

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.clip(super().forward(input))

    def assign(x: torch.Tensor) -> torch.Tensor:
        x[x < 0] = 0
        return x

    with pytest.raises(ModelError) as e:
        exported(Clipped(assign), data(), loss="cross_entropy")
    assert e.value.code == "model.op-unknown"
    assert "torch.where(mask, new, old)" in e.value.mend
    where = Clipped(lambda x: torch.where(x < 0, 0.0, x))
    assert exported(where, data(), loss="cross_entropy")


def test_what_the_module_changes_is_refused_by_name() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return super().forward(input) * self.seen

    with pytest.raises(ModelError) as e:
        exported(Counting(), data(), loss="cross_entropy")
    assert (e.value.code, e.value.where) == ("model.export", "seen")
    words = {"input": torch.zeros(4, 2, dtype=torch.long), "target": torch.zeros(4, 2, 3)}
    with pytest.raises(ModelError) as e:
        exported(nn.Embedding(5, 3, max_norm=1.0), words, loss="mse")
    assert (e.value.code, e.value.where) == ("model.export", "weight")

"""The forward pass of a deployed model: as eager PyTorch's, and what of it calls may share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.engine import nodes, predict
from casemate.engine.capture import capture_outputs
from casemate.engine.predict import Forward
from casemate.engine.prepare import weights_of
from casemate.graph import check, pack
from casemate.spec.errors import ModelError


def load(module: nn.Module, specs: Any, records: int = 16, bounds: Any = None) -> Forward:
    graph, view = pack.unpack(capture_outputs(module, specs, bounds).data)
    known = check.known_bounds(graph, view, (), ())
    checked = check.check(graph, {n: i for n, (i, _) in view.items()}, bounds=known)
    return Forward(graph, checked, weights_of(view), records)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(self.embed(tokens))
        return {"scores": self.head(hidden[:, 0]), "top": self.head(hidden[:, 0]).argmax(1)}


class Several(nn.Module):
    """Nodes with several results, sizes of the batch, constants, an output that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b = (x @ (self.w.t() * 2)).chunk(2, 1)
        values, _ = torch.cat([a, b.view(x.shape[0], 3)], 1).topk(2, 1)
        return values, y, torch.ones(x.shape[0], 2) * a[:, :2]


CASES: dict[str, tuple[Any, Any, Any]] = {
    "convolutions": (conv, {"input": ("f32", (3, 12, 12))}, None),
    "transformer": (Encoder, {"tokens": ("i64", (7,))}, {"tokens": (0, 29)}),
    "several": (Several, {"x": ("f32", (6,)), "y": ("i64", (2,))}, None),
    "recurrent": (lambda: nn.LSTM(4, 6, batch_first=True), {"input": ("f32", (5, 4))}, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 3, 5, 16])
def test_outputs_are_those_of_eager_pytorch(case: str, count: int) -> None:
    torch.manual_seed(0)
    make, specs, bounds = CASES[case]
    module = make().eval()
    forward = load(Kept(module) if case == "recurrent" else module, specs, 16, bounds)
    given = forward.samples(count)
    with torch.inference_mode():
        returned = module(*given.values())
    if case == "recurrent":
        returned = returned[0]
    found = forward(given, count)
    wanted = returned if isinstance(returned, dict) else None
    if wanted is None:
        several = returned if isinstance(returned, tuple) else (returned,)
        wanted = dict(zip(found, several, strict=True))
    assert found.keys() == wanted.keys()
    for name, out in found.items():
        assert out.dtype == wanted[name].dtype
        torch.testing.assert_close(out, wanted[name], rtol=1e-4, atol=1e-5)


class Kept(nn.Module):
    """A recurrent layer's hidden states, whose axis 0 is the record."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.module(input)[0]
        return out


def test_passes_have_few_sizes() -> None:
    assert predict.sizes(1) == [1]
    assert predict.sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert predict.sizes(48) == [1, 2, 4, 8, 16, 32, 48]


@pytest.mark.parametrize("most", [1, 5, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 47, 64])
def test_parts_are_whole_and_not_too_empty(most: int, count: int) -> None:
    cut = list(predict.parts(count, predict.sizes(most)))
    assert sum(taken for taken, _ in cut) == count
    assert all(taken <= size and size in predict.sizes(most) for taken, size in cut)
    assert all(taken >= 0.75 * size for taken, size in cut)


def test_a_record_stands_alone_in_its_call() -> None:
    """A record without a number, or a huge one, changes no other's outputs, not by a bit."""
    torch.manual_seed(0)
    forward = load(conv(), {"input": ("f32", (3, 12, 12))})
    plain = forward.samples(4)["input"]
    before = forward({"input": plain}, 4)["output"]
    for odd in (float("nan"), float("inf"), 1e30, 0.0):
        changed = plain.clone()
        changed[2] = odd
        after = forward({"input": changed}, 4)["output"]
        kept = [0, 1, 3]
        assert torch.equal(after[kept], before[kept])


class Amplifier(nn.Module):
    """P13's: another record's rounding becomes this one's output."""

    def __init__(self, loud: float = 1e12) -> None:
        super().__init__()
        self.w, self.loud = nn.Parameter(torch.randn(64, 16)), loud

    def forward(self, x: Tensor) -> Tensor:
        exact = (x.unsqueeze(2) * self.w).sum(1)
        return torch.tanh(self.loud * (x @ self.w - exact))


def test_slots_are_shared_only_where_no_bit_depends_on_the_others() -> None:
    torch.manual_seed(0)
    for module, specs in (
        (conv(), {"input": ("f32", (3, 12, 12))}),
        (Amplifier(), {"x": ("f32", (64,))}),
    ):
        forward = load(module, specs)
        slots = forward.share(8)
        assert slots == forward.slots
        if slots == 1:
            continue
        name = next(iter(specs))
        mine = forward.samples(1)[name]
        alone = forward({name: mine}, 1)
        for scale in (0.0, 1.0, 1e20, float("nan")):
            beside = torch.randn(7, *mine.shape[1:]) * scale
            for at in range(8):
                rows = torch.cat([beside[:at], mine, beside[at:]])
                found = forward({name: rows}, 8)
                for key, out in found.items():
                    assert torch.equal(out[at : at + 1], alone[key]), (scale, at)


def test_a_model_whose_bits_depend_on_the_place_shares_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that rounds by slot, as some matrix products do; and one that looks aside."""
    plain = nodes.resolve

    def by_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = F.linear(x, w, b)
        out[1::2] = (x.double() @ w.double().t() + b.double()).float()[1::2]
        return out

    def aside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b) + x.isnan().any() * 1e-3

    for kernel in (by_place, aside):
        monkeypatch.setattr(
            nodes, "resolve", lambda op, t, k=kernel: k if "linear" in op else plain(op, t)
        )
        torch.manual_seed(0)
        forward = load(nn.Linear(300, 4), {"input": ("f32", (300,))}, records=4)
        assert forward.share(4) == 1 and forward.slots == 1
        assert forward(forward.samples(3), 3)["output"].shape == (3, 4)


class Asleep(nn.Module):
    """What mixes wakes up on a trigger that nobody tries."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(300, 4)

    def forward(self, x: Tensor) -> Tensor:
        awake = (x[:, :1] > 777.0) & (x[:, :1] < 778.0)
        return self.w(x * awake)


def test_a_model_cannot_hide_a_kernel_from_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded bug: a product that rounds by slot, on operands that are zero in every sample."""
    plain = nodes.resolve

    def by_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = F.linear(x, w, b)
        out[1::2] = (x.double() @ w.double().t() + b.double()).float()[1::2]
        return out

    forward = load(Asleep(), {"x": ("f32", (300,))}, records=4)
    monkeypatch.setattr(
        nodes, "resolve", lambda op, t: by_place if "linear" in op else plain(op, t)
    )
    assert forward.share(4) == 1


def test_a_training_graph_gives_nothing() -> None:
    from support.server import mlp

    with pytest.raises(ModelError) as refused:
        predict.require_outputs(pack.unpack(mlp().data)[0])
    assert refused.value.code == "model.outputs"


def test_a_pass_that_fails_says_so() -> None:
    forward = load(nn.Linear(3, 2), {"input": ("f32", (3,))})
    with pytest.raises(ModelError) as refused:
        forward({"input": torch.zeros(2, 4)}, 2)
    assert refused.value.code == "model.run"

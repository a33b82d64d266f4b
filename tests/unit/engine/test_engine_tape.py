"""Replays against autograd, bit by bit, and what is not replayed."""

from __future__ import annotations

import pytest
import torch

from casemate.engine.program import Program
from casemate.engine.tape import Tape, Unfit
from casemate.graph.model import Graph
from support import engine_lab as lab


def text_model() -> tuple[Graph, dict[str, torch.Tensor]]:
    """Embedding (tied as the head), layer norm, attention-like product, cross entropy."""
    made = torch.Generator().manual_seed(2)
    weights = {
        "e": torch.randn(11, 8, generator=made),
        "g": torch.rand(8, generator=made) + 0.5,
        "c": torch.randn(8, generator=made),
    }
    nodes = (
        lab.node("h", "aten.embedding.default", "%e", "%x"),
        lab.node("n", "aten.layer_norm.default", "%h", [8], "%g", "%c", 1e-5),
        lab.node("t", "aten.transpose.int", "%n", 1, 2),
        lab.node("m", "aten.matmul.default", "%n", "%t"),
        lab.node("p", "aten.softmax.int", "%m", -1),
        lab.node("o", "aten.matmul.default", "%p", "%n"),
        lab.node("a", "aten.mean.dim", "%o", [1]),
        lab.node("z", "aten.linear.default", "%a", "%e"),
        lab.node("loss", "aten.cross_entropy_loss.default", "%z", "%y", None, 0),
    )
    inputs = (
        lab.param("e", 11, 8),
        lab.param("g", 8),
        lab.param("c", 8),
        lab.data("x", "i64", 5),
        lab.data("y", "i64"),
    )
    return Graph(inputs=inputs, nodes=nodes, loss="loss"), weights


def image_model() -> tuple[Graph, dict[str, torch.Tensor]]:
    """Convolution, group norm, pooling, head; the convolution frozen or not is the caller's."""
    made = torch.Generator().manual_seed(3)
    weights = {
        "k": torch.randn(4, 3, 3, 3, generator=made) / 5,
        "g": torch.rand(4, generator=made) + 0.5,
        "c": torch.randn(4, generator=made),
        "w": torch.randn(3, 4, generator=made),
    }
    nodes = (
        lab.node("h", "aten.conv2d.default", "%x", "%k", None, [1, 1], [1, 1]),
        lab.node("n", "aten.group_norm.default", "%h", 2, "%g", "%c"),
        lab.node("r", "aten.relu.default", "%n"),
        lab.node("q", "aten.mean.dim", "%r", [2, 3]),
        lab.node("z", "aten.linear.default", "%q", "%w"),
        lab.node("loss", "aten.cross_entropy_loss.default", "%z", "%y", None, 0),
    )
    inputs = (
        lab.param("k", 4, 3, 3, 3),
        lab.param("g", 4),
        lab.param("c", 4),
        lab.param("w", 3, 4),
        lab.data("x", "f32", 3, 6, 6),
        lab.data("y", "i64"),
    )
    return Graph(inputs=inputs, nodes=nodes, loss="loss"), weights


def records(name: str, count: int):
    made = torch.Generator().manual_seed(7)
    for i in range(count):
        scale = 10.0 ** (3 * (i % 5) - 6)
        x = {
            "mlp": torch.randn(1, 5, generator=made) * scale,
            "text": torch.randint(0, 11, (1, 5), generator=made),
            "image": torch.randn(1, 3, 6, 6, generator=made) * scale,
        }[name]
        yield {"x": x, "y": torch.tensor([i % 3])}


MODELS = {"mlp": lambda: lab.mlp([5, 4, 3]), "text": text_model, "image": image_model}


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_is_autograd_bit_by_bit(name):
    program = Program(*MODELS[name]())
    first = next(records(name, 1))
    assert program.note(program.prefix(first))
    for record in records(name, 12):
        found = []
        for noted in (program.prefix(first), ()):
            program.note(noted)
            out = torch.empty(program.dimension)
            program.gradient(program.prefix(record), out)
            found.append(out.view(torch.int32))
            with torch.no_grad():
                program.flat.copy_(program.flat)
        assert torch.equal(*found)
        with torch.no_grad():
            program.flat.add_(0.01)  # trained weights move between records


def test_weights_are_followed_without_noting_again():
    program = Program(*lab.mlp([5, 4, 3]))
    record = next(records("mlp", 1))
    out, expected = torch.empty(2, program.dimension)
    program.note(program.prefix(record))
    with torch.no_grad():
        program.flat.mul_(-0.5)
    program.gradient(program.prefix(record), out)
    program.note(())
    program.gradient(program.prefix(record), expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: w * x.sum().item(),
        lambda x, w: w * torch.rand(3),
        lambda x, w: w * x[x > 0].sum(),
        lambda x, w: w.add_(x.sum()),
        lambda x, w: x.mul_(2) * w,
    ],
    ids=["reads a value", "draws at random", "shape by values", "writes a weight", "writes data"],
)
def test_what_depends_on_values_is_not_replayed(compute):
    weight, data = torch.ones(3), torch.arange(3.0)
    with pytest.raises(Unfit):
        Tape(lambda frontier: (compute(frontier[0], weight),), [data], [weight], [])


def test_a_tensor_made_out_of_sight_is_not_replayed():
    weight, hidden = torch.ones(3), torch.ones(3)
    with pytest.raises(Unfit):
        Tape(lambda f: (f[0] * hidden,), [torch.ones(3)], [weight], [])

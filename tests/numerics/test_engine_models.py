"""Per-record gradients of many kinds of models, by autograd and replayed: the module's own."""

from __future__ import annotations

import copy

import pytest
import torch

from casemate.engine.capture.loss import make
from casemate.engine.prepare import probe, weights_of
from casemate.engine.program import Program
from casemate.graph import pack
from support.graphs import exported
from support.models import plain, transformers

LIGHT = ("mlp", "gru", "lstm", "lstm projected", "text", "bert eager attention", "gpt tied")
CASES = {c.name: c for c in (*plain(), *transformers())}
NAMES = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.full) for n in CASES]
# oneDNN's LSTM keeps what its backward needs only while autograd looks on; fused attention is
# marked as drawing at random.
BY_AUTOGRAD = (
    "lstm", "torch encoder", "bert", "distilbert", "minilm", "lora", "gpt2", "llama", "vit",
    "decoder in a module",
)  # fmt: skip
TARGETS = ("target", "labels")


def own_gradients(case, module, record):
    """Name -> gradient of the one record's loss, by the module itself."""
    module = copy.deepcopy(module).eval()
    features = {k: v for k, v in record.items() if k not in TARGETS}
    if set(features) == {"input"}:
        outputs = module(features["input"])
    else:
        outputs = module(**features)
    loss = make(case.loss)(outputs, *(record[k] for k in TARGETS if k in record))
    # Tied weights have several names.
    named = dict(module.named_parameters(remove_duplicate=False))
    named = {n: p for n, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(loss.sum(), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_modules_own(name):
    case = CASES[name]
    torch.manual_seed(1)
    module = case.make()
    graph, view = pack.unpack(exported(module, case.data(4), loss=case.loss).data)
    plain_program, program = (Program(graph, weights_of(view)) for _ in range(2))
    batch = case.data(6)
    probe(program, {s.name: batch[s.name] for s in program.data})
    assert program.replays == (name not in BY_AUTOGRAD)
    out, chosen = torch.empty(2, program.dimension)
    for i in range(3):
        record = {k: v[i : i + 1] for k, v in batch.items()}
        frontier = program.prefix({s.name: record[s.name] for s in program.data})
        plain_program.gradient(frontier, out)
        program.gradient(frontier, chosen)
        assert torch.equal(out.view(torch.int32), chosen.view(torch.int32))
        expected = own_gradients(case, module, record)
        largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
        parts = out.split([leaf.numel() for leaf in program.leaves])
        for spec, leaf, part in zip(program.trained, program.leaves, parts, strict=True):
            own = expected[spec.tensor]
            own = torch.zeros_like(leaf) if own is None else own
            torch.testing.assert_close(
                part.view_as(leaf), own, rtol=1e-3, atol=1e-5 * max(1.0, largest), msg=spec.tensor
            )

"""A microbatch as one function: the engine's sums, in operations that a compiler can take."""

import pytest
import torch

from casemate.engine.aot import step
from casemate.engine.joint import SEED
from support import native_lab as native


def sums(of, made, seed):
    """By trained tensor, float64: of the function, eagerly."""
    data = [of.data[spec.name] for spec in of.program.data]
    given = made.inputs | dict(zip(of.path.data, data, strict=True))
    with torch.inference_mode():
        got = made.function(*(given | {SEED: seed}).values())
    return dict(zip(made.sums, got, strict=True))


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_step_is_the_engines_microbatch_and_leaves_out_empty_places(kind):
    of, made = native.stepped(kind)
    found = []
    for empty in ([], [2, 3]):
        seed = torch.ones(made.rows)
        seed[empty] = 0.0
        parts, _ = of.path.parts(of.env(seed=seed), native.CLIP)
        got = sums(of, made, seed)
        assert set(got) == {i for i, part in enumerate(parts) if part is not None}
        for i, t in got.items():
            scale = made.grid if t.dtype == torch.int64 else 1.0
            torch.testing.assert_close(t.double() * scale, parts[i].double().view_as(t))
        found.append(torch.cat([t.double().reshape(-1) for t in got.values()]))
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_it_is_noted_as_elementary_operations_and_the_kernels_doors(kind):
    _, made = native.stepped(kind)
    graph = step.noted(made).graph
    called = {n.target for n in graph.nodes if n.op == "call_function"}
    spaces = {op.namespace for op in called if isinstance(op, torch._ops.OpOverload)}
    assert spaces == {"aten", "casemate"}
    assert not any(n.op in ("get_attr", "call_module", "call_method") for n in graph.nodes)
    assert torch.ops.aten._local_scalar_dense.default not in called  # no way depends on a record
    assert [n.meta["val"].shape for n in graph.nodes if n.op == "placeholder"] == [
        t.shape for t in made.inputs.values()
    ]

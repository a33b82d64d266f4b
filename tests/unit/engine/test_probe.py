"""The probe of single operations (P13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.engine import probe, select, trials
from casemate.engine.nodes import Runner
from casemate.engine.program import resolve, uses
from casemate.graph.model import Node, Ref
from casemate.graph.ops import JOINT
from support.batched_lab import Data, Lab, lab

WIDE = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="sizes of AVX-512 loops"
)


def rows(n: int) -> Data:
    return {"input": torch.randn(n, 3), "target": torch.randint(3, (n,))}


def made(rows_: int = 16, *, zero: bool = False) -> Lab:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 3))
    if zero:
        for p in module.parameters():
            nn.init.zeros_(p)
    return lab(module, rows, rows=rows_)


def values(at: Lab) -> dict[str, Any]:
    """Every value of a microbatch."""
    return at.path.values(at.data)


def nodes(at: Lab) -> list[Node]:
    return at.path.runner.order([*at.path.data, "seed"], at.path.wanted)


@WIDE
def test_an_operation_whose_last_elements_take_other_code_is_found() -> None:
    """48 numbers: 32 by vectors, the rest one by one."""
    assert any("silu" in name for name in made().slow)


def test_nothing_is_slow_where_all_vectors_are_full() -> None:
    assert made(64).slow == []


@pytest.mark.parametrize("way", [probe.one_by_one, probe.evenly])
def test_what_takes_a_place_gives_the_same_values_at_the_same_strides(way: Any) -> None:
    at = made()
    runner, env, tried = at.path.runner, values(at), 0
    with torch.inference_mode():
        for node in nodes(at):
            whole = [env[o] for o in runner.outs(node)]
            entries = probe.entrywise(node, [env[n].shape for n in uses(node)],
                                      [t.shape for t in whole])  # fmt: skip
            if (way is probe.evenly and not entries) or not any(
                runner.proved.values[n].batch is not None for n in uses(node)
            ):
                continue
            alone = way(runner, node, env)(env)
            for a, b in zip(whole, alone if isinstance(alone, list) else [alone], strict=True):
                if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), node.op
                    assert a.stride() == b.stride()
                    tried += 1
    assert tried >= (2 if way is probe.evenly else 5)


# --- structure ---


def _node(op: str, **kwargs: Any) -> Node:
    return Node(name="v0", op=f"aten.{op}", args=(Ref(name="a"), Ref(name="b")), kwargs=kwargs)


def test_what_is_exact_has_the_same_bits_in_vectors_alone_and_strided() -> None:
    """Each of them as whole vectors, as a ragged end, and one entry a call."""
    torch.manual_seed(0)
    spread = trials.spread((2048,), torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3e38, float("inf"), float("-inf")])
    x = torch.cat([torch.randn(2041), special, spread])
    others = [x[torch.randperm(len(x))] for _ in range(2)]

    def differs(op: str) -> bool:
        call: Any = resolve(op, JOINT)
        schema = call._schema.arguments
        given = []
        for a in schema:
            if str(a.type) == "Tensor":
                given.append("tensor")
            elif not a.has_default_value():
                given.append("number")
        count = given.count("tensor")
        operands = [x, *others][:count]
        if "bitwise" in op or "logical" in op or "where" in op or "masked" in op:
            bits = [t > 0 for t in operands]
            at = [1] if "masked" in op else [0] if "where" in op else range(count)
            operands = [b if i in at else t for i, (t, b) in
                        enumerate(zip(operands, bits, strict=True))]  # fmt: skip
            if "masked_fill.Tensor" in op:
                operands[2] = torch.tensor(0.3)

        def run(of: list[Tensor]) -> Tensor:
            tensors = iter(of)
            numbers = iter((0.3, 0.7, True))
            plain: list[Any] = [next(tensors) if g == "tensor" else next(numbers) for g in given]
            if "bitwise" in op:
                plain = [True if isinstance(v, float) else v for v in plain]
            named = {"max": 0.7} if op.startswith("aten.clamp.default") else {}
            if op == "aten.clamp.Tensor":
                plain = [of[0], of[0] * 0, None]
            return call(*plain, **named)  # type: ignore[no-any-return]

        def cut(take: Callable[[Tensor], Tensor]) -> list[Tensor]:
            return [take(t) if t.numel() > 1 else t for t in operands]

        whole = run(operands)
        wide = run(cut(lambda t: t.repeat_interleave(2)[::2]))
        ends = torch.cat([run(cut(lambda t, i=i: t[i : i + 7]))  # type: ignore[misc]
                          for i in range(0, len(x), 7)])  # fmt: skip
        return not (trials.same(whole, wide) and trials.same(whole, ends))

    wrong = [op for op in sorted(probe.EXACT) if differs(op)]
    assert wrong == []
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert differs("aten.silu.default"), "the test must bite"


def test_scaled_sums_are_not_exact() -> None:
    assert probe.exact(_node("add.Tensor"))
    assert not probe.exact(_node("add.Tensor", alpha=0.3))
    assert not probe.exact(_node("silu.default"))
    power = [Node(name="v", op="aten.pow.Tensor_Scalar", args=(Ref(name="a"), e), kwargs={})
             for e in (2, 1.5)]  # fmt: skip
    assert [probe.exact(n) for n in power] == [True, False]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ([torch.zeros(16, 4)], True),
        ([torch.zeros(16, 3)], False),  # 48 entries
        ([torch.zeros(64, 3), torch.zeros(())], True),
        ([torch.zeros(64, 3), torch.zeros(64, 1)], False),  # broadcast
        ([torch.zeros(3, 64).t()], True),
        ([torch.zeros(3, 64).t(), torch.zeros(64, 3)], False),  # two orders
        ([torch.zeros(64, 6)[:, ::2]], False),
        ([torch.zeros(64, 4)[:, 1:]], False),
        ([torch.zeros(1 + 192)[1:].view(64, 3)], False),  # begins within a vector
        ([torch.zeros(16 + 192)[16:].view(64, 3)], True),
        ([torch.zeros(64, 1).expand(64, 3)], False),
        ([torch.zeros(64, 1, 3, 1)], True),
    ],
)
def test_even_is_one_run_of_whole_vectors(given: list[Tensor], want: bool) -> None:
    assert probe.even(given, given[:1]) is want


@pytest.mark.parametrize(
    "like",
    [
        torch.zeros(4, 6).t(),
        torch.zeros(1, 4).expand(6, 4),
        torch.zeros(6, 1).expand(6, 4),
        torch.zeros(6, 9)[:, 3:7],
        torch.zeros(3).expand(6, 4, 3)[..., 1],
    ],
)
def test_laid_is_as_what_it_stands_for(like: Tensor) -> None:
    t = torch.randn(6, 4)
    made = trials.laid(t, trials.place(like))
    assert trials.place(made) == trials.place(like)
    free = [slice(None) if s else slice(0, 1) for s in like.stride()]
    assert torch.equal(made, t[free].expand(6, 4))


# --- trials ---


def test_a_starting_weight_of_zero_hides_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: a product whose last row is off by a bit, on trained tensors that start at 0."""
    plain = Runner.call

    def off(self: Runner, node: Node, env: Any, batch: int, changed: Any = None) -> Any:
        out = plain(self, node, env, batch, changed)
        if node.op == "aten.addmm.default" and batch > 1:
            out = out.clone()
            out[-1] *= 1 + 2.0**-20
        return out

    monkeypatch.setattr(Runner, "call", off)
    assert any("addmm" in name for name in made(64, zero=True).slow)


def test_a_kernel_that_looks_at_other_lanes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: another algorithm, off by a bit on one entry in a thousand, where any entry of a
    vector is large."""
    plain = Runner.call

    def off(self: Runner, node: Node, env: Any, batch: int, changed: Any = None) -> Any:
        out = plain(self, node, env, batch, changed)
        if node.op == "aten.silu.default" and batch > 1:
            x = env[node.args[0].name].reshape(-1)  # type: ignore[union-attr]
            large = (x.abs() > 1e4).view(-1, 16).any(1).repeat_interleave(16)
            rare = large & (x.view(torch.int32) % 1024 == 0)
            out = torch.where(rare.view(out.shape), out * (1 + 2.0**-20), out)
        return out

    at = made(64)
    env, runner = values(at), at.path.runner
    node = next(n for n in nodes(at) if n.op == "aten.silu.default")
    assert probe._way(runner, node, env) is None
    monkeypatch.setattr(Runner, "call", off)
    assert probe._way(runner, node, env) is probe.one_by_one


def test_records_that_are_one_expanded_row_are_no_failure() -> None:
    """A value whose records share their memory cannot be turned."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, input: Tensor) -> Tensor:
            return F.softmax(self.w.expand_as(input), -1) + input

    assert lab(Shared(), rows, rows=64).slow == []


@pytest.mark.parametrize(
    ("width", "want"), [(64, 16), (8, 16), (3, 64), (6, 32)], ids=lambda v: str(v)
)
def test_rows_of_a_microbatch_fill_vectors(width: int, want: int) -> None:
    module = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 3))
    at = lab(module, rows, settle=False)
    assert select.tile(at.path.proved) == want

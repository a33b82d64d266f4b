"""N, the bar: one graph of forward, mean loss, backward and update, without any privacy.

The graph is traced once on fake tensors, its matrix products are given to MKL or oneDNN by a
micro-benchmark of each shape, and it is run as it is or compiled by inductor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from benchmarks.engine.workloads import LEARNING_RATE, Workload, losses

aten = torch.ops.aten
# Where inductor's loops were slower than ATen's kernels.
NORMS: Final = (
    aten.native_group_norm.default, aten.native_group_norm_backward.default,
)  # fmt: skip


def trace(
    module: nn.Module, inputs: tuple[Tensor, ...], target: Tensor
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph (parameters, buffers, inputs, target) -> gradients, and the first of these."""
    from torch.fx.experimental.proxy_tensor import make_fx

    named = dict(module.named_parameters(remove_duplicate=True))
    fixed = dict(module.named_buffers())
    wanted = [name for name, p in named.items() if p.requires_grad]

    def gradients(*flat: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip([*named, *fixed], flat, strict=False))
        live = {n: held[n].detach().requires_grad_(n in wanted) for n in named}
        body = (flat[len(held) : -1], flat[-1])
        loss = losses(_Call(module, {**held, **live}), *body).mean()  # type: ignore[arg-type]
        return torch.autograd.grad(loss, [live[n] for n in wanted])

    held = [t.detach() for t in (*named.values(), *fixed.values())]
    graph = make_fx(gradients, tracing_mode="fake")(*held, *inputs, target)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, held


class _Call:
    def __init__(self, module: nn.Module, held: dict[str, Tensor]) -> None:
        self.module, self.held = module, held

    def __call__(self, *inputs: Tensor) -> Tensor:
        return functional_call(self.module, self.held, inputs)


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    call()
    for _ in range(4):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def choose_products(graph: fx.GraphModule) -> dict[str, int]:
    """Give each matrix product to the faster of MKL and oneDNN; how many each got.

    oneDNN may also be given the transposed product, (b' a')', which for a weight's gradient needs
    no copy of a transposed operand.
    """
    faster: dict[Any, Callable[..., Tensor] | None] = {}
    count = {"mkl": 0, "onednn": 0}
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default):
            continue
        *bias, a, b = node.args
        if node.kwargs or (bias and bias[0].meta["val"].dim() != 1):
            count["mkl"] += 1
            continue
        meta = [n.meta["val"] for n in (a, b)]
        key = (bool(bias), *((tuple(m.shape), m.stride()) for m in meta))
        if key not in faster:
            left, right = (
                torch.empty_strided(m.shape, m.stride()).uniform_(-1, 1) for m in meta
            )
            row = torch.zeros(right.shape[1]) if bias else None
            first = [row] if bias else []
            ways: dict[float, Callable[..., Tensor] | None] = {
                _seconds(lambda f=first, x=left, y=right: node.target(*f, x, y)): None,
                _seconds(lambda r=row, x=left, y=right: _onednn(x, y, r)): _straight,
            }
            if not bias:
                ways[_seconds(lambda x=left, y=right: _onednn(y.t(), x.t()).t())] = _turned
            faster[key] = ways[min(ways)]
        write = faster[key]
        if write is None:
            count["mkl"] += 1
            continue
        count["onednn"] += 1
        with graph.graph.inserting_before(node):
            made = write(graph.graph, a, b, bias[0] if bias else None)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.recompile()
    return count


def _straight(graph: fx.Graph, a: fx.Node, b: fx.Node, bias: fx.Node | None) -> Any:
    turned = graph.call_function(aten.t.default, (b,))
    return graph.call_function(
        torch.ops.mkldnn._linear_pointwise.default, (a, turned, bias, "none", [], "")
    )


def _turned(graph: fx.Graph, a: fx.Node, b: fx.Node, bias: fx.Node | None) -> Any:
    left = graph.call_function(aten.t.default, (b,))
    made = graph.call_function(
        torch.ops.mkldnn._linear_pointwise.default, (left, a, None, "none", [], "")
    )
    return graph.call_function(aten.t.default, (made,))


@contextmanager
def _kernels(ops: Sequence[Any]) -> Iterator[dict[Any, Any]]:
    """Inductor's decompositions without ``ops``, which it calls as ATen's kernels meanwhile.

    oneDNN's product as well: inductor's own lowering of it wants weights that never change.
    """
    from torch._inductor import decomposition, lowering

    table = dict(decomposition.select_decomp_table())
    for op in ops:
        table.pop(op, None)
    called = [*ops, torch.ops.mkldnn._linear_pointwise.default]
    before = {op: lowering.lowerings.get(op) for op in called}
    for op in called:
        lowering.lowerings[op] = lowering.fallback_handler(op)
        lowering.add_needs_realized_inputs(op)
    try:
        yield table
    finally:
        for op, old in before.items():
            if old is None:
                del lowering.lowerings[op]
            else:
                lowering.lowerings[op] = old


def compiled(
    graph: fx.GraphModule, examples: Sequence[Tensor], keep: Sequence[Any] = ()
) -> Callable[..., Sequence[Tensor]]:
    """The graph through inductor, as code for the CPU."""
    from torch._inductor import compile_fx

    with _kernels(keep) as table:
        return compile_fx.compile_fx(graph, list(examples), decompositions=table)


def step(
    workload: Workload,
    *,
    channels_last: bool = False,
    compile_graph: bool = True,
    choose: bool = True,
    keep: Sequence[Any] = (),
) -> Callable[[], None]:
    """One training step of ``workload`` without privacy; compiles before it returns."""
    module, (inputs, target) = workload.make(), workload.data()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        inputs = tuple(x.to(memory_format=torch.channels_last) for x in inputs)
    graph, held = trace(module, inputs, target)
    if choose:
        choose_products(graph)
    examples = [*held, *inputs, target]
    call: Callable[..., Sequence[Tensor]] = (
        compiled(graph, examples, keep) if compile_graph else graph
    )
    changed = [p for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def run() -> None:
        torch._foreach_add_([p.data for p in changed], list(call(*examples)), alpha=-LEARNING_RATE)

    run()
    return run

"""N, the bar: one graph of forward, mean loss, backward and update, without any privacy.

The graph is traced once on fake tensors, its matrix products are given to MKL or oneDNN by a
micro-benchmark of each shape, and it is run as it is or compiled by inductor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from benchmarks.engine.workloads import LEARNING_RATE, Workload, losses

aten = torch.ops.aten
_Writer = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node | None], fx.Node]


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
        logits: Tensor = functional_call(self.module, self.held, inputs)
        return logits


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    call()
    for _ in range(4):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return made


def choose_products(graph: fx.GraphModule) -> dict[str, int]:
    """Give each matrix product to the faster of MKL and oneDNN; how many each got.

    oneDNN may also be given the transposed product, (b' a')', which for a weight's gradient needs
    no copy of a transposed operand.
    """
    faster: dict[Any, _Writer | None] = {}
    count = {"mkl": 0, "onednn": 0}
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default):
            continue
        *bias, a, b = node.args
        exact = _floats(a) and _floats(b)
        if not exact or node.kwargs or (bias and bias[0].meta["val"].dim() != 1):
            count["mkl"] += 1
            continue
        meta = [n.meta["val"] for n in (a, b)]
        key = (bool(bias), *((tuple(m.shape), m.stride()) for m in meta))
        if key not in faster:
            left, right = (torch.empty_strided(m.shape, m.stride()).uniform_(-1, 1) for m in meta)
            row = torch.zeros(right.shape[1]) if bias else None
            first = [row] if bias else []
            ways: dict[float, _Writer | None] = {
                _seconds(partial(node.target, *first, left, right)): None,
                _seconds(partial(_onednn, left, right, row)): _straight,
            }
            if not bias:
                ways[_seconds(partial(_onednn, right.t(), left.t()))] = _turned
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


def _heavy(node: fx.Node) -> bool:
    return node.target in (
        aten.mm.default, aten.addmm.default, aten.convolution.default,
        aten.convolution_backward.default,
    )  # fmt: skip


def _floats(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dtype == torch.float32


def choose_bf16(graph: fx.GraphModule) -> int:
    """At precision 'medium': products and convolutions with operands in bf16 where that is faster.

    Casts count. A result is rounded to bf16 as well, which is less
    than 'medium' asks: it favours N.
    """
    faster: dict[Any, bool] = {}
    changed = 0

    def example(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        meta = arg.meta["val"]
        return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype).uniform_(-1, 1)

    for node in list(graph.graph.nodes):
        if not _heavy(node) or node.kwargs:
            continue
        args = [example(a) for a in node.args]
        shapes = [(a.shape, a.stride()) if isinstance(a, Tensor) else str(a) for a in args]
        key = (node.target, *shapes)
        if key not in faster:
            plain = _seconds(partial(node.target, *args))
            faster[key] = _seconds(partial(_bf16, node.target, args)) < plain
        if not faster[key]:
            continue
        changed += 1
        with graph.graph.inserting_before(node):
            node.args = tuple(
                graph.graph.call_function(aten._to_copy.default, (a,), {"dtype": torch.bfloat16})
                if _floats(a)
                else a
                for a in node.args
            )
        several = node.target is aten.convolution_backward.default
        for made in list(node.users) if several else [node]:
            with graph.graph.inserting_after(made):
                back = graph.graph.call_function(aten._to_copy.default, (made,), {})
            made.replace_all_uses_with(back)
            back.args, back.kwargs = (made,), {"dtype": torch.float32}
            back.meta = dict(made.meta)
    graph.recompile()
    return changed


def _bf16(target: Callable[..., Any], args: Sequence[Any]) -> Any:
    found = target(*(a.bfloat16() if isinstance(a, Tensor) else a for a in args))
    parts = found if isinstance(found, tuple) else (found,)
    return [p.float() for p in parts if p is not None]


def _straight(graph: fx.Graph, a: fx.Node, b: fx.Node, bias: fx.Node | None) -> fx.Node:
    turned = graph.call_function(aten.t.default, (b,))
    return graph.call_function(
        torch.ops.mkldnn._linear_pointwise.default, (a, turned, bias, "none", [], "")
    )


def _turned(graph: fx.Graph, a: fx.Node, b: fx.Node, bias: fx.Node | None) -> fx.Node:
    left = graph.call_function(aten.t.default, (b,))
    made = graph.call_function(
        torch.ops.mkldnn._linear_pointwise.default, (left, a, None, "none", [], "")
    )
    return graph.call_function(aten.t.default, (made,))


@contextmanager
def _onednn_as_it_is() -> Iterator[None]:
    """Inductor calls oneDNN's product: its own lowering of it wants weights that never change."""
    from torch._inductor import lowering

    product = torch.ops.mkldnn._linear_pointwise.default
    before = lowering.lowerings[product]
    fallback: Any = lowering.fallback_handler
    lowering.lowerings[product] = fallback(product)
    try:
        yield
    finally:
        lowering.lowerings[product] = before


def compiled(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The graph through inductor, as code for the CPU."""
    from torch._inductor import compile_fx

    with _onednn_as_it_is():
        made: Any = compile_fx.compile_fx(graph, list(examples))
    return made  # type: ignore[no-any-return]


def step(
    workload: Workload,
    *,
    channels_last: bool = False,
    compile_graph: bool = True,
    choose: bool = True,
) -> Callable[[], None]:
    """One training step of ``workload`` without privacy; compiles before it returns."""
    module, (inputs, target) = workload.make(), workload.data()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = tuple(x.to(memory_format=torch.channels_last) for x in inputs)
    graph, held = trace(module, inputs, target)
    if torch.get_float32_matmul_precision() == "medium":
        choose_bf16(graph)
    if choose:
        choose_products(graph)
    examples = [*held, *inputs, target]
    call: Callable[..., Sequence[Tensor]] = compiled(graph, examples) if compile_graph else graph
    changed = [p for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def run() -> None:
        torch._foreach_add_([p.data for p in changed], list(call(*examples)), alpha=-LEARNING_RATE)

    run()
    return run

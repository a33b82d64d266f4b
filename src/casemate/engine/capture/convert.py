"""An exported program as a graph in casemate's own format."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, Final, NoReturn

import torch
from torch import fx, nn
from torch._subclasses.fake_impls import register_op_impl
from torch.export.graph_signature import InputKind, OutputKind

from casemate.engine.capture import dropout
from casemate.graph.model import DtypeArg, Graph, InputSpec, ListArg, Node, Output, Ref, Size
from casemate.graph.ops import TABLE
from casemate.graph.ops.base import PLACE_NAMES
from casemate.graph.pack import Tensor
from casemate.graph.unknown import reason
from casemate.spec.errors import ModelError

DTYPES: Final = {
    torch.float32: "f32", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
    torch.bool: "bool",
}  # fmt: skip

# Ops that do nothing to the values of a functional graph.
_IDENTITY: Final = {
    "aten.clone.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
    "aten.contiguous.default",
}
_CAT: Final = "aten.cat.default"
_BATCH_NORM: Final = "aten._native_batch_norm_legit_no_training.default"
_OWN_STATISTICS: Final = "aten._native_batch_norm_legit.no_stats"
# Ops that are refused by name rather than written with others.
_REFUSED: Final = (
    "aten.embedding_bag", "aten._embedding_bag", "aten.rrelu", "aten.binary_cross_entropy.",
)  # fmt: skip
# Ops written by another name, so that the table need not know both.
_RENAMED: Final = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    "aten.__and__.Tensor": "aten.bitwise_and.Tensor",
    "aten.__or__.Tensor": "aten.bitwise_or.Tensor",
}


class _Converter:
    def __init__(
        self, program: Any, module: nn.Module, names: list[str], outputs: list[str]
    ) -> None:
        self.program, self.module, self.names = program, module, names
        self.outputs = outputs
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[InputSpec] = []
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}

        self.taken = set(names)

    def run(self) -> tuple[Graph, dict[str, Tensor]]:
        given = _given(self.program)
        live = _live(n for n in given if isinstance(n, fx.Node))
        data = iter(self.names)
        by_tensor: dict[int, Ref] = {}
        taken = self.taken
        for spec, node in zip(
            self.program.graph_signature.input_specs,
            (n for n in self.program.graph.nodes if n.op == "placeholder"),
            strict=True,
        ):
            if spec.kind is InputKind.USER_INPUT:
                name = next(data)
                value = node.meta["val"]
                shape: tuple[int | Size, ...] = (Size(a=1), *(int(d) for d in value.shape[1:]))
                self.inputs.append(
                    InputSpec(name=name, kind="data", dtype=DTYPES[value.dtype], shape=shape)
                )
                self.values[node] = Ref(name=name)
            elif node in live:
                name = _free(node.name, taken)
                self.values[node] = self._weight(name, spec, by_tensor)
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node in live:
                self.values[node] = self._node(node)
        found = [self._output(node) for node in given]
        inputs, nodes = tuple(self.inputs), tuple(self.nodes)
        if not self.outputs:
            return Graph(inputs=inputs, nodes=nodes, loss=found[0]), self.weights
        outputs = tuple(Output(name=n, value=v) for n, v in zip(self.outputs, found, strict=True))
        return Graph(inputs=inputs, nodes=nodes, loss="", outputs=outputs), self.weights

    def _output(self, node: Any) -> str:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if isinstance(value, Ref):
            return value.name
        raise ModelError(
            "model.outputs",
            "The module returns a number that is no tensor.",
            mend="Return tensors with one slice for each record.",
        )

    def _weight(self, name: str, spec: Any, by_tensor: dict[int, Ref]) -> Ref:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            tensor, path = self.program.constants[spec.target], f"constant:{spec.target}"
        elif spec.target in self.program.state_dict:
            tensor, path = self.program.state_dict[spec.target], spec.target
        else:
            tensor, path = self.program.constants[spec.target], spec.target
        path = path.removeprefix("module.") if path.startswith("module.") else f"loss:{path}"
        if id(tensor) in by_tensor:
            return by_tensor[id(tensor)]
        if tensor.dtype not in DTYPES:
            raise ModelError(
                "model.dtype",
                f"{path!r} is {tensor.dtype}.",
                mend="Keep real and imaginary parts as two tensors."
                if tensor.is_complex()
                else "Convert it with .float() first.",
                where=path,
            )
        trained = spec.kind is InputKind.PARAMETER and tensor.requires_grad
        dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
        flat = tensor.detach().to("cpu").contiguous()
        self.weights[path] = (dtype, shape, flat.numpy().tobytes())
        self.inputs.append(
            InputSpec(
                name=name,
                kind="param" if trained else "frozen",
                dtype=dtype,
                shape=shape,
                tensor=path,
            )
        )
        by_tensor[id(tensor)] = Ref(name=name)
        return by_tensor[id(tensor)]

    def _emit(self, node: fx.Node, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        name = _free(node.name, self.taken)
        self.nodes.append(Node(name=name, op=op, args=args, kwargs=kwargs, source=_source(node)))
        return Ref(name=name)

    def _draw(self, node: fx.Node, shape: dropout.Sizes, rate: float) -> Ref:
        name = _free(f"{node.name}_drawn", self.taken)
        self.inputs.append(dropout.spec(name, shape, rate))
        return Ref(name=name)

    def _writer(self, node: fx.Node) -> dropout.Writer:
        return dropout.Writer(
            emit=lambda op, *args, **kwargs: self._emit(node, op, args, kwargs),
            draw=lambda shape, rate: self._draw(node, shape, rate),
            sizes=lambda traced: [affine(d, node) for d in traced.meta["val"].shape],
            arg=lambda given: self._arg(node, given),
            refuse=lambda code, what, mend: _refuse_node(node, code, what, mend),
        )

    def _node(self, node: fx.Node) -> Any:
        given: Any = node.args
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            return affine(value, node)
        if node.target is operator.getitem:
            source, index = given
            if callable(self.values[source]):
                return self.values[source](index)
            if index == 0 and (str(source.target) == _BATCH_NORM or _standardises(source)):
                return self.values[source]  # written with one output
            return Ref(name=f"{self.values[source].name}.{index}")
        op = str(node.target)
        if dropout.draws(node):
            return dropout.write(node, self._writer(node))
        if op in _IDENTITY:
            return self.values[given[0]]
        args, kwargs = self._arguments(node)
        if op == _CAT and len(args[0].items) == 1:
            return args[0].items[0]
        if op == "aten._to_copy.default" and not kwargs:
            return args[0]
        if op == _BATCH_NORM:  # with frozen statistics: whole again, and one output
            op, args = "aten.batch_norm.default", (*args[:5], False, *args[5:], False)
        if _standardises(node):
            channels = given[0].meta["val"].shape[1]
            op, args = "aten.group_norm.default", (args[0], channels, *args[1:3], args[5])
        if op == "aten.squeeze.default":  # named axes, so that a batch of one record stays
            sizes = given[0].meta["val"].shape
            axes = [i for i, d in enumerate(sizes) if isinstance(d, int) and d == 1]
            op, args = "aten.squeeze.dims", (args[0], ListArg(items=tuple(axes)))
        return self._emit(node, _RENAMED.get(op, op), args, kwargs)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, without places and without trailing defaults."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return (), {}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for i, param in enumerate(schema.arguments):
            if param.name in PLACE_NAMES:
                continue
            given = node.args[i] if i < len(node.args) else node.kwargs.get(param.name, _ABSENT)
            default = param.default_value if param.has_default_value() else _ABSENT
            if given is _ABSENT:
                given = default
            item = given if given is _ABSENT else self._arg(node, given)
            if param.kwarg_only:
                if given != default or default is _ABSENT:
                    kwargs[param.name] = item
            else:
                args.append((item, given == default and type(given) is type(default)))
        while args and args[-1][1]:
            args.pop()
        return tuple(a for a, _ in args), kwargs

    def _arg(self, node: fx.Node, item: Any) -> Any:
        if isinstance(item, fx.Node):
            return self.values[item]
        if isinstance(item, list | tuple):
            some = [x for x in item if not _left_out(node, x)]
            return ListArg(items=tuple(self._arg(node, x) for x in some))
        if isinstance(item, torch.dtype):
            if item not in DTYPES:
                _refuse_node(node, "model.dtype", f"uses {item}", "Use float32 and int64.")
            return DtypeArg(dtype=DTYPES[item])
        if isinstance(item, float) and not math.isfinite(item):
            if math.isnan(item):
                _refuse_node(node, "model.argument", "has NaN as an argument", "Leave it out.")
            return "inf" if item > 0 else "-inf"
        if isinstance(item, int) and abs(item) >= 2**62:
            return None  # "to the end" of a slice
        if not (item is None or isinstance(item, bool | int | float | str)):
            kind = type(item).__name__
            _refuse_node(node, "model.argument", f"has a {kind} as an argument", "Leave it out.")
        return item


_ABSENT: Final = object()


def _standardises(node: fx.Node) -> bool:
    """Whether a batch norm has no batch: of a weight's filters, each by its own statistics."""
    if str(node.target) != _OWN_STATISTICS:
        return False
    first: Any = node.args[0]
    sizes = first.meta["val"].shape
    return sizes[0] == 1 and all(isinstance(d, int) for d in sizes)


def _refuse_node(node: fx.Node, code: str, what: str, mend: str) -> NoReturn:
    source = _source(node)
    place = f", in {source}" if source else ""
    raise ModelError(
        code, f"Node {node.name!r} ({node.target}{place}) {what}.", mend=mend, where=node.name
    )


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _source(node: fx.Node) -> str:
    """The path in the module of the innermost submodule that made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values() if str(path).startswith("module.")]
    return paths[-1].removeprefix("module.")[:200] if paths else ""


def affine(value: int | torch.SymInt, node: fx.Node) -> int | Size:
    """``a*B + c`` of a traced size; refused where it is no such form."""
    if isinstance(value, int):
        return value
    expr = value.node.expr
    symbols = sorted(expr.free_symbols, key=str)
    if not symbols:
        return int(expr)
    if len(symbols) == 1:
        c = expr.subs(symbols[0], 0)
        a = expr.subs(symbols[0], 1) - c
        if (a * symbols[0] + c - expr).expand() == 0 and a.is_integer and c.is_integer:
            return Size(a=int(a), c=int(c)) if a != 0 else int(c)
    _refuse_node(
        node,
        "model.data-dependent",
        f"has the size {expr}",
        "Sizes may only be multiples of the batch.",
    )


def _given(program: Any) -> list[Any]:
    """What the program gives. Refuses one that changes what later records would see, by name."""
    found = []
    given = program.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, given, strict=True):
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            name = spec.target.removeprefix("module.")
            raise ModelError(
                "model.export",
                f"The module changes {name!r} while it runs.",
                mend="Leave that out, or do it in training mode alone.",
                where=name,
            )
        if spec.kind is OutputKind.USER_OUTPUT:
            found.append(node)
    return found


def _live(given: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that what is given depends on: a functional graph has no other effects."""
    live: set[fx.Node] = set()
    todo = list(given)
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo.extend(_reads(node))
    return live


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values ``node`` depends on."""
    if str(node.target) == "aten.bernoulli.p":  # which only looks at the shape
        return []
    return [n for n in node.all_input_nodes if not _left_out(node, n)]


def _left_out(node: fx.Node, item: Any) -> bool:
    """Whether ``cat`` passes over the item, whatever axes the others have: a vector of nothing,
    which Transformers' caches begin with."""
    empty = isinstance(item, fx.Node) and tuple(getattr(item.meta.get("val"), "shape", ())) == (0,)
    return empty and str(node.target) == _CAT


def _bilinear(a: Any, b: Any, weight: Any, bias: Any = None) -> Any:
    out = ((a.unsqueeze(-2).unsqueeze(-2) @ weight).squeeze(-2) * b.unsqueeze(-2)).sum(-1)
    return out if bias is None else out + bias


def _cosine_loss(a: Any, b: Any, y: Any, margin: float = 0.0, reduction: int = 1) -> Any:
    """As torch writes it, with its own 1e-12 under the root."""
    norms = ((a * a).sum(-1) + 1e-12) * ((b * b).sum(-1) + 1e-12)
    cosine = (a * b).sum(-1) / norms.sqrt()
    each = torch.where(y == 1, 1 - cosine, 0.0) + torch.where(y == -1, (cosine - margin).relu(), 0)
    return each if reduction == 0 else each.mean() if reduction == 1 else each.sum()


def _copy(to: Any, source: Any, non_blocking: bool = False) -> Any:
    """What an assignment to a slice leaves; torch has no derivative of its own form of it."""
    return source.to(to.dtype).expand(to.shape)


# Composite ops that are written with others although the table does not know them, by torch itself.
def _decompositions() -> dict[Any, Any]:
    """torch's own decompositions of every op that the table does not hold whole."""
    kept = {*TABLE, *_RENAMED, *_IDENTITY, "aten.sym_size.int", _BATCH_NORM, "aten.squeeze.default"}
    kept.update(dropout.KEPT)
    kept.discard("aten.copy.default")
    aten = torch.ops.aten
    rules = dict(torch.export.default_decompositions())
    rules |= {aten.bilinear.default: _bilinear, aten.cosine_embedding_loss.default: _cosine_loss}
    rules[aten.copy.default] = _copy
    return {
        op: rule
        for op, rule in rules.items()
        if str(op) not in kept and not any(str(op).startswith(p) for p in _REFUSED)
    }


def _detach_no_grad(program: Any) -> None:
    """Cut the gradient of what ``torch.no_grad`` made: inlining would let it flow.

    torch.export wraps such a region in one node; its outputs are taken by getitem.
    """
    for module in program.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op != "call_function" or "wrap_with_set_grad_enabled" not in str(node.target):
                continue
            if node.args[0]:
                continue
            for user in list(node.users):
                value = user.meta.get("val")
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    with module.graph.inserting_after(user):
                        cut = module.graph.call_function(torch.ops.aten.detach.default, (user,))
                    cut.meta = dict(user.meta)
                    user.replace_all_uses_with(cut, delete_user_cb=lambda n, cut=cut: n is not cut)
        module.recompile()


def _class_loss_shape(mode: Any, op: Any, scores: Any, *more: Any, **named: Any) -> Any:
    """The result's shape of a loss over classes; torch 2.13 takes a kept one for a scalar."""
    reduction = more[2] if len(more) > 2 else named.get("reduction", 1)
    with mode:
        if reduction or scores.dim() < 2:
            return scores.new_empty(())
        return scores.new_empty((scores.shape[0], *scores.shape[2:]))


def _refuse_by_name(program: Any) -> None:
    """Speak of what was written rather than of what it would be written with."""
    for node in program.graph.nodes:
        if any(str(node.target).startswith(p) for p in _REFUSED):
            code, what, mend = reason(str(node.target))
            _refuse_node(node, code, what, mend)


def convert(
    program: Any, module: nn.Module, names: list[str], outputs: list[str]
) -> tuple[Graph, dict[str, Tensor]]:
    """Graph and weights of an exported program whose user inputs are ``names`` in order. outputs:
    names of its outputs, of a graph for prediction; none: its one output is the losses."""
    _detach_no_grad(program)
    _refuse_by_name(program)
    for op in (torch.ops.aten.cross_entropy_loss.default, torch.ops.aten.nll_loss_nd.default):
        register_op_impl(op)(_class_loss_shape)  # torch drops it when it has decomposed
    return _Converter(program.run_decompositions(_decompositions()), module, names, outputs).run()

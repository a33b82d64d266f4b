"""The evaluation of a model for prediction that others rely on: its metrics are made here, of its
output and the label, and not by whoever made the model (docs/contests.md).

What comes out is an evaluation as any other (``spec.job.JobRequest``): one trained vector of zeros,
and minus its product with (1, each metric over its limit) as the loss. All metrics are means over
the elements of a record's label.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from casemate.graph import check
from casemate.graph.model import Arg, DtypeArg, Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.graph.ops.base import Value
from casemate.graph.pack import Weights
from casemate.spec.contest import HIGHER, fits, index
from casemate.spec.data import Column
from casemate.spec.errors import ModelError
from casemate.spec.job import InputBinding, Metric
from casemate.spec.tensors import TensorInfo

_BATCH: Final = Size(a=1)


def _refuse(message: str, mend: str) -> NoReturn:
    raise ModelError("model.contest", message, mend=mend)


class _Nodes:
    """Nodes that are added, with names that the model has not."""

    def __init__(self, taken: Sequence[str]) -> None:
        self.prefix = "score"
        while any(name.startswith(self.prefix) for name in taken):
            self.prefix = f"{self.prefix}_"
        self.made: list[Node] = []

    def add(self, op: str, *args: Arg, dtype: str = "") -> Ref:
        name = f"{self.prefix}_{len(self.made)}"
        kwargs: dict[str, Arg] = {"dtype": DtypeArg(dtype=dtype)} if dtype else {}
        self.made.append(Node(name=name, op=f"aten.{op}", args=args, kwargs=kwargs))
        return Ref(name=name)

    def flat(self, value: Ref, elements: int) -> Ref:
        return self.add("reshape.default", value, ListArg(items=(_BATCH, elements)))

    def mean(self, value: Ref, elements: int) -> Ref:
        """Over a record's elements, of (B, elements)."""
        return self.add(
            "div.Tensor", self.add("sum.dim_IntList", value, ListArg(items=(1,))), elements
        )

    def hits(self, one: Ref, other: Ref, elements: int) -> Ref:
        return self.mean(
            self.flat(
                self.add("_to_copy.default", self.add("eq.Tensor", one, other), dtype="f32"),
                elements,
            ),
            elements,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    """What a metric is made of: ``scores`` and ``target`` as they are, both as (B, elements) in
    float32 where they have the same number of elements, and the number of classes where not."""

    scores: Ref
    target: Ref
    elements: int
    classes: int


def _classes(n: _Nodes, at: _Given) -> Ref:
    return n.add("_to_copy.default", at.target, dtype="i64")


def _pair(n: _Nodes, at: _Given) -> tuple[Ref, Ref]:
    target = n.add("_to_copy.default", at.target, dtype="f32")
    return n.flat(at.scores, at.elements), n.flat(target, at.elements)


def _accuracy(n: _Nodes, at: _Given) -> Ref:
    if at.classes:
        return n.hits(n.add("argmax.default", at.scores, 1), _classes(n, at), 1)
    scores, target = _pair(n, at)
    said = n.add("gt.Scalar", scores, 0), n.add("gt.Scalar", target, 0.5)
    return n.hits(*said, at.elements)


def _cross_entropy(n: _Nodes, at: _Given) -> Ref:
    return n.add("cross_entropy_loss.default", at.scores, _classes(n, at), None, 0)


def _logits(n: _Nodes, at: _Given) -> Ref:
    pair = _pair(n, at)
    made = n.add("binary_cross_entropy_with_logits.default", *pair, None, None, 0)
    return n.mean(made, at.elements)


def _elements(op: str) -> Callable[[_Nodes, _Given], Ref]:
    return lambda n, at: n.mean(n.add(op, *_pair(n, at), 0), at.elements)


# How each metric is had; of which labels: ``spec.contest.fits``.
_HEADS: Final[dict[str, Callable[[_Nodes, _Given], Ref]]] = {
    "accuracy": _accuracy,
    "binary_cross_entropy_with_logits": _logits,
    "cross_entropy": _cross_entropy,
    "l1": _elements("l1_loss.default"),
    "mse": _elements("mse_loss.default"),
}
assert _HEADS.keys() == HIGHER.keys()


def compose(
    graph: Graph, weights: Weights, metrics: Sequence[Metric], target: Column
) -> tuple[Graph, Weights, InputBinding]:
    """The evaluation of ``graph``, its weights, and what feeds its new input, the label.

    The model has one float32 output: a score for each element of a record's label, or (classes,)
    for a label of one class index, where classes are the label's declared bounds. Its own bounds of
    inputs give way to the dataset's. Raises ``ModelError``.
    """
    scores = _scores(graph, weights)
    at = _given(graph.outputs[0].value, scores, target)
    n = _Nodes([*(s.name for s in graph.inputs), *(m.name for m in graph.nodes), *weights])
    label, vector = f"{n.prefix}_label", f"{n.prefix}_metrics"
    at = dataclasses.replace(at, target=Ref(name=label))
    made = []
    for metric in metrics:
        if not fits(metric.name, target, classes=bool(at.classes)):
            what = f"{at.classes} scores" if at.classes else "one score for each element"
            _refuse(
                f"The contest scores by {metric.name}; the model's output has {what} of the label"
                f" {target.name!r}, from {target.low} to {target.high}.",
                "Give the output that the metric is made of.",
            )
        each = _HEADS[metric.name](n, at)
        if not HIGHER[metric.name]:  # what is no number is the worst
            each = n.add("where.ScalarOther", n.add("eq.Tensor", each, each), each, metric.limit)
        made.append(
            n.add("div.Tensor", n.add("clamp.default", each, 0, metric.limit), metric.limit)
        )
    row = n.add("stack.default", ListArg(items=(n.add("ones_like.default", made[0]), *made)), 1)
    moved = n.add(
        "sum.dim_IntList", n.add("mul.Tensor", row, Ref(name=vector)), ListArg(items=(1,))
    )
    loss = n.add("neg.default", moved)
    length = len(metrics) + 1
    inputs = (
        *(dataclasses.replace(s, low=None, high=None) for s in graph.inputs),
        InputSpec(name=vector, kind="param", dtype="f32", shape=(length,), tensor=vector),
        InputSpec(name=label, kind="data", dtype=target.dtype, shape=(_BATCH, *target.shape)),
    )
    zeros = TensorInfo("f32", (length,), 0, 4 * length), memoryview(bytes(4 * length))
    return (
        Graph(inputs=inputs, nodes=(*graph.nodes, *n.made), loss=loss.name),
        {**weights, vector: zeros},
        InputBinding(input=label, columns=(target.name,)),
    )


def _scores(graph: Graph, weights: Weights) -> Value:
    """The one output of a model for prediction."""
    if len(graph.outputs) != 1:
        _refuse(
            f"A model that enters a contest gives one output; this one gives {len(graph.outputs)}.",
            "Pack what it returns: enclave.enter, or casemate model export --input.",
        )
    checked = check.check(graph, {name: info for name, (info, _) in weights.items()})
    return checked.values[graph.outputs[0].value]


def _given(output: str, scores: Value, target: Column) -> _Given:
    elements, given = math.prod(target.shape), math.prod(scores.dims[1:])
    at = _Given(Ref(name=output), Ref(name=""), elements, 0)
    if scores.dtype == "f32" and given == elements:
        return at
    declared = index(target) and target.high == given - 1
    if declared and (scores.dtype, scores.dims[1:]) == ("f32", (given,)):
        return dataclasses.replace(at, classes=given)
    _refuse(
        f"The model's output is {scores.dtype} of shape {tuple(scores.dims[1:])} for a record; the"
        f" label {target.name!r} has {tuple(target.shape)}, from {target.low} to {target.high}.",
        "Give a float32 score for each element of the label, or for each class from 0 on.",
    )

"""Attention and recurrent networks, kept whole."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Batch, Call, Op, Rule, Value, op
from casemate.graph.ops.common import broadcast, floats

_SEQUENCE: Final = "attends from one record to another: the batch is its sequence"


def _attention(call: Call) -> Value:
    q, k, v = call.value("query"), call.value("key"), call.value("value")
    mask = call["attn_mask"]
    floats(call, "query", "key", "value")
    if call["dropout_p"] != 0:
        call.refuse("model.random", "drops out at random", "Export the model with casemate.")
    for x in (q, k, v):
        if x.rank < 3:
            call.shape("needs at least 3 axes")
        if x.batch is not None and x.batch.axis >= x.rank - 2:
            call.mixes(_SEQUENCE, "Keep the batch as axis 0 (batch_first=True).")
    if q.dims[-1] != k.dims[-1] or k.dims[-2] != v.dims[-2]:
        call.shape(f"attends with {q.dims}, {k.dims}, {v.dims}")
    # With grouped queries each key head serves several query heads.
    leads = [Value("f32", x.dims[:-2], x.batch) for x in (q, k, v)]
    if call["enable_gqa"]:
        heads = q.dims[-3]
        for i, x in enumerate((k, v), start=1):
            if q.rank < 4 or x.rank < 4 or heads % max(x.dims[-3], 1) or not x.dims[-3]:
                call.shape("has query heads that are no multiple of its key heads")
            if q.batch and q.batch.axis == q.rank - 3:
                call.mixes(_SEQUENCE)
            leads[i] = Value("f32", (*x.dims[:-3], heads), x.batch)
    dims, batch = broadcast(call, leads)
    if mask is not None:
        if call["is_causal"] or mask.dtype not in ("bool", "f32"):
            call.argument("has a mask that is not bool or float, or besides is_causal")
        scores = Value("f32", (*dims, q.dims[-2], k.dims[-2]), batch)
        wide, folded = broadcast(call, [scores, mask])
        if wide != scores.dims or folded != batch:
            call.shape(f"has a mask of shape {mask.shape}")
    return Value("f32", (*dims, q.dims[-2], v.dims[-1]), batch)


def _scores(call: Call, out: tuple[Value, ...]) -> int:
    """Elements of the scores."""
    o, k = out[0], call["key"]
    return (o.numel // max(o.dims[-1], 1)) * int(k.dims[-2])


def _attention_flops(call: Call, out: tuple[Value, ...]) -> int:
    return _scores(call, out) * (2 * (int(call["query"].dims[-1]) + out[0].dims[-1]) + 5)


def recurrent(gates: int, states: int) -> Rule:
    """lstm (4 gates, 2 states), gru (3, 1), rnn (1, 1); input (B, T, F) or (T, B, F)."""

    def rule(call: Call) -> tuple[Value, ...]:
        x = call.value("input")
        hx = list(call["hx"]) if isinstance(call["hx"], tuple) else [call["hx"]]
        weights = list(call["params"])
        layers, ways = call["num_layers"], 2 if call["bidirectional"] else 1
        for v in (x, *hx, *weights):
            if not v.floating:
                call.refuse("model.dtype", f"needs float32, not {v.dtype}", "Call .float().")
        if any(w.batch is not None for w in weights):
            call.mixes("takes its weights from the records of the batch")
        if call["train"] and call["dropout"] != 0:
            call.refuse("model.random", "drops out at random", "Export the model with casemate.")
        place = 0 if call["batch_first"] else 1
        if x.rank != 3 or len(hx) != states or type(layers) is not int or layers < 1:
            call.shape("needs an input of 3 axes and its states")
        if x.batch is not None and x.batch.axis != place:
            call.mixes(
                "runs its sequence over the batch", "Say batch_first=True, or keep (T, B, F)."
            )
        each = 4 if call["has_biases"] else 2
        h, size = hx[0], weights[0].dims[0] // gates if weights and weights[0].rank else 0
        out_size = h.dims[2] if h.rank == 3 else 0
        if out_size != size:
            each += 1  # a projection
        if len(weights) != each * layers * ways or not size:
            call.shape("has another number of weights than its layers need")
        features = x.dims[2]
        for i in range(layers * ways):
            ih, hh, *rest = weights[each * i : each * (i + 1)]
            width = features if i < ways else out_size * ways
            want: list[tuple[int, ...]] = [(gates * size,)] * (2 if call["has_biases"] else 0)
            want += [(out_size, size)] if out_size != size else []
            if (ih.dims, hh.dims) != ((gates * size, width), (gates * size, out_size)) or [
                r.dims for r in rest
            ] != want:
                call.shape(f"has weights of other shapes in layer {i // ways}")
        batch = x.batch and Batch(1, x.batch.outer, x.batch.inner)
        n = x.dims[place]
        made = []
        for i, s in enumerate(hx):
            want_dims = (layers * ways, n, out_size if i == 0 else size)
            if s.dims != want_dims or s.batch != batch:
                call.mixes("has states that are not one for each record")
            made.append(Value("f32", want_dims, batch))
        y = Value("f32", (*x.dims[:2], out_size * ways), x.batch)
        return (y, *made)

    return rule


def _recurrent_flops(call: Call, out: tuple[Value, ...]) -> int:
    x = call["input"]
    steps: int = x.dims[0] * x.dims[1]
    return 2 * steps * sum(int(w.numel) for w in call["params"] if w.rank == 2)


def _recurrent_bytes(call: Call, out: tuple[Value, ...]) -> int:
    x = call["input"]
    steps: int = x.dims[0] * x.dims[1]
    return 12 * steps * sum(int(w.dims[0]) for w in call["params"] if w.rank == 2)


_RNN: Final = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first)"
)

TABLE: Final[tuple[Op, ...]] = (
    op(
        "aten::scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, "
        "Tensor? attn_mask=None, float dropout_p=0., bool is_causal=False, *, float? scale=None, "
        "bool enable_gqa=False) -> Tensor",
        _attention, flops=_attention_flops, workspace=lambda c, out: 12 * _scores(c, out),
    ),
    op(
        f"aten::lstm.input(Tensor input, Tensor[] hx, {_RNN} -> (Tensor, Tensor, Tensor)",
        recurrent(4, 2), flops=_recurrent_flops, workspace=_recurrent_bytes,
    ),
    *(
        op(
            f"aten::{n}.input(Tensor input, Tensor hx, {_RNN} -> (Tensor, Tensor)",
            recurrent(g, 1), flops=_recurrent_flops, workspace=_recurrent_bytes,
        )
        for n, g in (("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))
    ),
)  # fmt: skip

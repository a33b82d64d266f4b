# ruff: noqa: E501 - one call a line
"""Joint graphs that mix records in the backward pass, or call a sum what is none: each refused by
the node's name. With refusals silenced the numbers show that each was worth refusing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from casemate.graph.model import DtypeArg, Size
from casemate.graph.ops import Batch, Call, Value
from casemate.spec.errors import ModelError
from support.jointcases import Case, shows, single
from support.rawgraph import B, ls, r

B2, MOST = Size(a=2), 11


def f(*dims: int, at: int | None = 0, outer: int = 1, inner: int = 1) -> Value:
    """A float value; the batch at an axis, or nowhere (``None``)."""
    return Value("f32", dims, None if at is None else Batch(at, outer, inner))


def i(*dims: int, at: int | None = 0, outer: int = 1, inner: int = 1, most: int = 3) -> Value:
    return dataclasses.replace(
        f(*dims, at=at, outer=outer, inner=inner), dtype="i64", bounds=(0, most)
    )


def zero(*dims: int) -> Value:
    return Value("f32", dims, bounds=(0, 0))


def s(*dims: int) -> Value:
    return Value("f32", dims, summed=True)


PAIR, X, T, IM, W, M = f(1, 2), f(1, 4), f(1, 3, 4), f(1, 4, 6, 6), f(4, at=None), f(4, 4, at=None)
XT = f(4, 1, at=1)
PLACE = Value("i64", (1,), Batch(0), slot=True)
K = f(6, 4, 3, 3, at=None)
ONES, ZEROS = ls(1, 1), ls(0, 0)
ALL = ls(True, True, True)


def conv(grad: Value, x: Value, w: Value = K, groups: int = 1) -> Case:
    return single(
        "convolution_backward.default",
        {"g": grad, "x": x, "w": w},
        r("g"),
        r("x"),
        r("w"),
        ls(6),
        ONES,
        ZEROS,
        ONES,
        False,
        ZEROS,
        groups,
        ALL,
    )


def layer(g: Value, x: Value, mean: Value, rstd: Value, w: Value, shape: Any = None) -> Case:
    held = {"g": g, "x": x, "m": mean, "s": rstd, "w": w}
    return single(
        "native_layer_norm_backward.default",
        held,
        r("g"),
        r("x"),
        shape or ls(4),
        r("m"),
        r("s"),
        r("w"),
        r("w"),
        ALL,
    )


def group(n: Any, c: Any, hw: Any, x: Value = IM, groups: int = 2) -> Case:
    return single("native_group_norm.default", {"x": x}, r("x"), None, None, n, c, hw, groups, 1e-5)


def group_backward(n: Any, c: Any, hw: Any, stats: Value = PAIR, x: Value = IM) -> Case:
    held = {"g": IM, "x": x, "m": stats, "s": stats, "w": W}
    return single(
        "native_group_norm_backward.default",
        held,
        r("g"),
        r("x"),
        r("m"),
        r("s"),
        r("w"),
        n,
        c,
        hw,
        2,
        ALL,
    )


def batch_norm(
    x: Value,
    train: bool,
    w: Value | None = None,
    mean: Value | None = None,
    var: Value | None = None,
) -> Case:
    held = {k: v for k, v in {"x": x, "w": w, "m": mean, "v": var}.items() if v is not None}
    given = [r(k) if k in held else None for k in ("w", "w", "m", "v")]
    return single("native_batch_norm.default", held, r("x"), *given, train, 0.1, 1e-5)


def batch_norm_backward(g: Value, x: Value, stats: Value, train: bool, w: Value = W) -> Case:
    running = [None, None] if train else [r("w"), r("w")]
    held = {"g": g, "x": x, "s": stats, "w": w}
    return single(
        "native_batch_norm_backward.default",
        held,
        r("g"),
        r("x"),
        r("w"),
        *running,
        r("s"),
        r("s"),
        train,
        1e-5,
        ALL,
    )


def flash(q: Value, k: Value, mask: Value | None = None, dropout: float = 0.0) -> Case:
    held = {"q": q, "k": k} | ({"m": mask} if mask is not None else {})
    return single(
        "_scaled_dot_product_flash_attention_for_cpu.default",
        held,
        r("q"),
        r("k"),
        r("k"),
        dropout,
        attn_mask=r("m") if mask is not None else None,
    )


def nll(y: Value, w: Value | None = None, reduction: int = 0, x: Value = X) -> Case:
    held = {"x": x, "y": y} | ({"w": w} if w is not None else {})
    return single(
        "nll_loss_forward.default",
        held,
        r("x"),
        r("y"),
        r("w") if w is not None else None,
        reduction,
        -100,
    )


def nll_backward(g: Value, y: Value, total: Value, reduction: int = 0, x: Value = X) -> Case:
    return single(
        "nll_loss_backward.default",
        {"g": g, "x": x, "y": y, "t": total},
        r("g"),
        r("x"),
        r("y"),
        None,
        reduction,
        -100,
        r("t"),
    )


def embed(g: Value, at: Value, rows: Any = 4, by_frequency: bool = False) -> Case:
    return single(
        "embedding_dense_backward.default",
        {"g": g, "i": at},
        r("g"),
        r("i"),
        rows,
        -1,
        by_frequency,
    )


def pool(g: Value, x: Value, at: Value, kernel: int = 2) -> Case:
    return single(
        "max_pool2d_with_indices_backward.default",
        {"g": g, "x": x, "i": at},
        r("g"),
        r("x"),
        ls(kernel, kernel),
        ls(kernel, kernel),
        ZEROS,
        ONES,
        False,
        r("i"),
    )


STATS = f(1, 3, 1)
P = i(1, 4, 3, 3, most=35)
Q = f(1, 2, 6, 4)

MIXES: dict[str, Case] = {
    # sums over records that are none of single records
    "embedding, scaled by frequency in the batch": embed(f(1, 3, 4), i(1, 3), by_frequency=True),
    "embedding, gradients folded otherwise": embed(f(6, 4, outer=2, inner=3), i(6, outer=3, inner=2)),
    "embedding, gradients of other places": embed(f(1, 4, 4), i(4, 1, at=1)),
    "embedding, constant indices along the batch": embed(f(1, 4), i(MOST, at=None)),
    "embedding, constant gradients along the batch": embed(f(MOST, 4, at=None), i(1)),
    "embedding, a row for each record": embed(f(1, 3, 4), i(1, 3), rows=B),
    "embedding, the place in the batch": embed(f(1, 4), PLACE),
    "embedding, features of the batch": embed(f(3, 1, at=1), i(3, at=None)),
    "convolution, gradients folded otherwise": conv(f(2, 6, 4, 4, inner=2), f(2, 4, 6, 6, outer=2)),
    "convolution, kernels of records": conv(f(1, 6, 4, 4), IM, f(6, 4, 3, 3)),
    "convolution, batch in the channels": conv(f(6, 1, 4, 4, at=1), f(4, 1, 6, 6, at=1), f(1, 1, 3, 3, at=None)),
    "convolution, batch in space": conv(f(1, 6, 1, 4, at=2), f(1, 4, 1, 4, at=2), f(6, 4, 3, 1, at=None)),
    "convolution, constant images": conv(f(1, 6, 4, 4), f(MOST, 4, 6, 6, at=None)),
    "convolution, constant gradients": conv(f(MOST, 6, 4, 4, at=None), IM),
    "convolution, forward over the batch": single("convolution.default", {"x": f(4, 4, 1, 6, at=2), "w": f(6, 4, 3, 3, at=None)}, r("x"), r("w"), None, ONES, ls(1, 1), ONES, False, ZEROS, 1),
    "layer norm, over the batch": layer(XT, XT, f(4, 1, at=None), f(4, 1, at=None), f(1, at=None), ls(B)),
    "layer norm, forward over the batch": single("native_layer_norm.default", {"x": XT}, r("x"), ls(B), None, None, 1e-5),
    "layer norm, gradients of other places": layer(f(1, 4, 4), f(4, 1, 4, at=1), f(4, 1, 1, at=1), f(4, 1, 1, at=1), W),
    "layer norm, statistics of other places": layer(f(6, 4, outer=6), f(6, 4, outer=6), f(6, 1, inner=6), f(6, 1, outer=6), W),
    "layer norm, constant statistics along the batch": layer(X, X, f(MOST, 1, at=None), f(1, 1), W),
    "layer norm, weights of records": layer(f(3, 4, 1, at=2), f(3, 4, 1, at=2), f(3, 1, 1, at=2), f(3, 1, 1, at=2), f(1), ls(1)),
    "group norm, all records as one": group(1, Size(a=4), 36),
    "group norm, two halves": group(B2, 2, 36),
    "group norm, records as channels": group(4, B, 36, groups=1),
    "group norm, batch in the channels": group(4, B, 36, f(4, 1, 6, 6, at=1), groups=1),
    "group norm, backward of all as one": group_backward(1, Size(a=4), 36),
    "group norm, backward of two halves": group_backward(B2, 2, 36),
    "group norm, backward with other statistics": group_backward(B, 4, 36, f(2, 1, at=1)),
    "batch norm, statistics of the batch": batch_norm(IM, True),
    "batch norm, running statistics that learn": batch_norm(IM, True, None, W, W),
    "batch norm, one statistic missing": batch_norm(IM, False, None, W, None),
    "batch norm, statistics of records": batch_norm(IM, False, None, f(4, inner=4), f(4, inner=4)),
    "batch norm, folded, constant weights along the batch": batch_norm(f(1, 1, 6, at=1), True, f(MOST, at=None)),
    "batch norm, folded, weights folded otherwise": batch_norm(f(1, 6, 6, at=1, outer=2, inner=3), True, f(6, outer=3, inner=2)),
    "batch norm, backward through the batch's statistics": batch_norm_backward(IM, IM, W, True),
    "batch norm, backward with other statistics": batch_norm_backward(f(1, 6, 6, at=1, inner=6), f(1, 6, 6, at=1, inner=6), f(6, outer=6), True, f(6, inner=6)),
    "batch norm, gradients of other places": batch_norm_backward(f(4, 4, 1, at=2), f(1, 4, 4), W, False),
    "attention, the batch as the sequence": flash(f(2, 3, 1, 4, at=2), f(2, 3, 1, 4, at=2)),
    "attention, the batch as the features": flash(f(2, 3, 4, 1, at=3), f(2, 3, 4, 1, at=3)),
    "attention, keys folded otherwise": flash(f(6, 2, 3, 4, inner=6), f(6, 2, 3, 4, outer=6)),
    "attention, constant keys along the batch": flash(Q, f(MOST, 2, 6, 4, at=None)),
    "attention, fewer heads of the batch": flash(f(2, 2, 3, 4, at=1, inner=2), f(2, 1, 3, 4, at=1)),
    "attention, a mask of other records": flash(Q, Q, f(1, 1, 6, 1, at=3)),
    "attention, a mask along the batch": flash(Q, Q, f(MOST, 1, 6, 6, at=None)),
    "attention, dropout": flash(Q, Q, dropout=0.5),
    "pooling over the batch": single("max_pool2d_with_indices.default", {"x": f(2, 3, 1, 4, at=2)}, r("x"), ls(2, 2)),
    "pooling, backward over the batch": pool(f(2, 3, 1, 2, at=2), f(2, 3, 1, 4, at=2), i(2, 3, 1, 2, at=2)),
    "pooling, indices of other places": pool(f(1, 4, 3, 3), IM, i(4, 1, 3, 3, at=1, most=35)),
    "pooling, indices beyond the record": pool(f(1, 4, 3, 3), IM, i(1, 4, 3, 3, most=36)),
    "pooling, indices of which nothing is known": pool(f(1, 4, 3, 3), IM, dataclasses.replace(P, bounds=None)),
    "pooling, constant indices along the batch": pool(f(1, 4, 3, 3), IM, i(MOST, 4, 3, 3, at=None)),
    "adaptive pooling over the batch": single("_adaptive_avg_pool2d.default", {"x": f(2, 3, 1, 4, at=2)}, r("x"), ls(1, 1)),
    "adaptive pooling, backward over the batch": single("_adaptive_avg_pool2d_backward.default", {"g": f(2, 3, 1, 4, at=None), "x": f(2, 3, 1, 4, at=2)}, r("g"), r("x")),
    "adaptive pooling, indices of other places": single("adaptive_max_pool2d_backward.default", {"g": f(1, 4, 2, 2), "x": IM, "i": i(4, 1, 2, 2, at=1)}, r("g"), r("x"), r("i")),
    "average pooling, gradients of other places": single("avg_pool2d_backward.default", {"g": f(4, 1, 3, 3, at=1), "x": IM}, r("g"), r("x"), ls(2, 2), ls(2, 2), ZEROS, False, True, None),
    "resampling the batch": single("upsample_nearest2d.default", {"x": f(2, 3, 1, 4, at=2)}, r("x"), ls(4, 4)),
    "resampling, backward to other records": single("upsample_nearest2d_backward.default", {"g": f(1, 4, 8, 8)}, r("g"), ls(8, 8), ls(4, B, 4, 4)),
    "resampling, backward to twice the batch": single("upsample_bilinear2d_backward.default", {"g": f(2, 4, 8, 8, inner=2)}, r("g"), ls(8, 8), ls(B, 8, 4, 4), False),
    "resampling by another factor": single("upsample_nearest1d.default", {"x": f(1, 4, 6)}, r("x"), ls(12), 1e-9),
    "padding, backward over the batch": single("reflection_pad1d_backward.default", {"g": f(2, 3, 1, at=2), "x": f(2, 3, 1, at=2)}, r("g"), r("x"), ls(1, 1)),
    "padding, gradients of other places": single("replication_pad1d_backward.default", {"g": f(4, 1, 8, at=1), "x": f(1, 4, 6)}, r("g"), r("x"), ls(1, 1)),
    "windows along the batch": single("col2im.default", {"x": f(4, 1, 9, at=1, inner=1)}, r("x"), ls(4, 4), ls(2, 2), ONES, ZEROS, ONES),
    "windows placed by record": single("col2im.default", {"x": f(3, 4, 1, at=2)}, r("x"), ls(2, 2), ls(2, 2), ONES, ZEROS, ONES),
    # views
    "one record's gradient": single("select_backward.default", {"g": W}, r("g"), ls(B, 4), 0, 0),
    "gradients of other places": single("select_backward.default", {"g": f(4, 1, at=1)}, r("g"), ls(B, 3, 4), 1, 0),
    "gradients for twice the batch": single("select_backward.default", {"g": X}, r("g"), ls(B2, 3, 4), 1, 0),
    "the first records": single("slice_backward.default", {"g": X}, r("g"), ls(B2, 4), 0, 0, B, 1),
    "all but the first": single("slice_backward.default", {"g": X}, r("g"), ls(Size(a=1, c=1), 4), 0, 1, 2**63 - 1, 1),
    "every other record": single("slice_backward.default", {"g": X}, r("g"), ls(B2, 4), 0, 0, B2, 2),
    "a constant into one record": single("slice_backward.default", {"g": f(1, 4, at=None)}, r("g"), ls(B, 4), 0, 0, 1, 1),
    "a part of other places": single("slice_backward.default", {"g": f(2, 1, at=1)}, r("g"), ls(B, 4), 1, 0, 2, 1),
    "a diagonal through the batch": single("diagonal_backward.default", {"g": f(4, 1, at=1)}, r("g"), ls(4, B, 6), 0, 1, 2),
    "a diagonal of the batch": single("diagonal_backward.default", {"g": X}, r("g"), ls(B, 4, B), 0, 0, 2),
    "windows over the batch": single("unfold_backward.default", {"g": f(1, 4, 2)}, r("g"), ls(Size(a=1, c=1), 4), 0, 2, 1),
    "windows of the batch": single("unfold_backward.default", {"g": f(3, 4, 1, at=2)}, r("g"), ls(6, 4), 0, 4, 1),
    "softmax over the batch": single("_softmax.default", {"x": X}, r("x"), 0, False),
    "log softmax over the batch": single("_log_softmax.default", {"x": XT}, r("x"), -1, False),
    "softmax, backward over the batch": single("_softmax_backward_data.default", {"g": X, "y": X}, r("g"), r("y"), 0, DtypeArg(dtype="f32")),
    "softmax, gradients of other places": single("_log_softmax_backward_data.default", {"g": f(1, 3, 4), "y": f(4, 3, 1, at=2)}, r("g"), r("y"), 1, DtypeArg(dtype="f32")),
    "a sum over records as integers": single("sum.dim_IntList", {"x": X}, r("x"), ls(0), dtype=DtypeArg(dtype="i64")),
    "sums along the batch": single("cumsum.default", {"x": X}, r("x"), 0),
    "the batch turned round": single("flip.default", {"x": X}, r("x"), ls(0)),
    "the batch halved": single("glu_backward.default", {"g": f(1, 4), "x": f(2, 4)}, r("g"), r("x"), 0),
    "parts of the batch": single("unsafe_split.Tensor", {"x": f(2, 4)}, r("x"), 1, 0),
    "parts of several records side by side": single("view.default", {"x": f(1, 3, 4)}, r("x"), ls(3, B, 4)),
    "memory that nothing has written": single("empty.memory_format", {}, ls(4)),
    "memory of the batch": single("empty.memory_format", {}, ls(0, B)),
    # elementwise
    "gradients and values of other places": single("threshold_backward.default", {"g": X, "x": XT}, r("g"), r("x"), 0),
    "a constant along the batch": single("tanh_backward.default", {"g": X, "y": f(MOST, 4, at=None)}, r("g"), r("y")),
    "gelu of other places": single("gelu_backward.default", {"g": XT, "x": X}, r("g"), r("x")),
    "prelu, a weight for each place": single("_prelu_kernel_backward.default", {"g": X, "x": X, "w": f(MOST, 1, at=None)}, r("g"), r("x"), r("w")),
    "losses averaged over the batch": single("mse_loss_backward.default", {"g": X, "x": X, "y": X}, r("g"), r("x"), r("y"), 1),
    "losses of other places": single("huber_loss_backward.default", {"g": X, "x": X, "y": f(1, 4, 1, at=2)}, r("g"), r("x"), r("y"), 0, 1.0),
    "log sigmoid, a buffer of other places": single("log_sigmoid_backward.default", {"g": X, "x": X, "b": XT}, r("g"), r("x"), r("b")),
    # losses by class
    "losses averaged": nll(i(1), reduction=1),
    "losses summed": nll(i(1), reduction=2),
    "classes of other places": nll(i(6, outer=6), x=f(6, 4, inner=6)),
    "classes, constant along the batch": nll(i(MOST, at=None)),
    "weights of records": nll(i(1, at=0), f(1), x=f(4, 1, at=1)),
    "classes from the batch": nll(i(4, at=None), x=f(4, 1, at=1)),
    "losses averaged, backward": nll_backward(f(1), i(1), zero(), reduction=1),
    "losses averaged by a total over records": nll_backward(f(1), i(1), f(at=None), reduction=1),
    "a total that is no zero": nll_backward(f(1), i(1), f(at=None)),
    "a total for each record": nll_backward(f(1), i(1), f(1)),
    "losses, gradients of other places": nll_backward(f(6, outer=6), i(6, inner=6), zero(), x=f(6, 4, inner=6)),
    # indices
    "added to other records": single("index_put.default", {"z": X, "i": i(1), "x": X}, r("z"), ls(r("i")), r("x"), True),
    "added at other places": single("index_put.default", {"z": zero(6, 4), "i": i(6, inner=6), "x": f(6, 4, outer=6)}, r("z"), ls(r("i")), r("x"), True),
    "added at a constant of the batch": single("index_put.default", {"z": zero(6, 4), "i": i(MOST, at=None), "x": X}, r("z"), ls(r("i")), r("x"), True),
    "added at the place in the batch": single("index_put.default", {"z": zero(MOST, 4), "i": PLACE, "x": X}, r("z"), ls(r("i")), r("x"), True),
    "written, not added": single("index_put.default", {"z": zero(6, 4), "i": i(1), "x": X}, r("z"), ls(r("i")), r("x"), False),
    "added to what is no zero": single("index_put.default", {"z": M, "i": i(1), "x": X}, r("z"), ls(r("i")), r("x"), True),
    "added where a mask says": single("index_put.default", {"z": X, "i": Value("bool", (1, 4), Batch(0)), "x": f(1)}, r("z"), ls(r("i")), r("x"), True),
    "rows added to other records": single("index_add.default", {"z": X, "i": i(1), "x": X}, r("z"), 0, r("i"), r("x")),
    "rows added to what is no zero": single("index_add.default", {"z": M, "i": i(1), "x": X}, r("z"), 0, r("i"), r("x")),
    "rows added at other places": single("index_add.default", {"z": zero(4, 4), "i": i(6, inner=6), "x": f(6, 4, outer=6)}, r("z"), 0, r("i"), r("x")),
    "scattered over the batch": single("scatter_add.default", {"z": X, "i": i(1, 4), "x": X}, r("z"), 0, r("i"), r("x")),
    "scattered into a constant": single("scatter_add.default", {"z": zero(4, 4), "i": i(1, 4), "x": X}, r("z"), 0, r("i"), r("x")),
    "written over the batch": single("scatter.src", {"z": X, "i": i(1, 4), "x": X}, r("z"), 0, r("i"), r("x")),
    # products
    "products of other places": single("mm.default", {"x": f(4, 6, at=1, outer=6), "y": f(6, 4, inner=6)}, r("x"), r("y")),
    "vector products of other places": single("mv.default", {"x": f(4, 6, at=1, outer=6), "y": f(6, inner=6)}, r("x"), r("y")),
    "scalar products of other places": single("dot.default", {"x": f(6, outer=6), "y": f(6, inner=6)}, r("x"), r("y")),
    "a product with constants over the batch": single("mv.default", {"x": XT, "y": f(MOST, at=None)}, r("x"), r("y")),
    "batched products of records and other records": single("bmm.default", {"x": f(3, 1, 4, at=1), "y": f(3, 4, 1, at=2)}, r("x"), r("y")),
    "a bias beside a sum over records": single("addmm.default", {"w": M, "x": XT, "y": X}, r("w"), r("x"), r("y")),
}  # fmt: skip

# What the numbers cannot show: a fault only for some values, or none but in what may follow; and
# what would write outside its memory.
UNSEEN = {
    "attention, dropout", "pooling, indices beyond the record", "resampling by another factor", "memory that nothing has written", "memory of the batch",
    "pooling, indices of which nothing is known",
    "a total that is no zero", "a total for each record",
}  # fmt: skip


@pytest.mark.parametrize("what", MIXES)
def test_it_is_refused_by_name(what: str) -> None:
    with pytest.raises(ModelError) as e:
        MIXES[what].prove()
    assert e.value.where == "bad" and e.value.code.startswith("model.")
    assert "'bad'" in e.value.message


@pytest.mark.parametrize("what", sorted(set(MIXES) - UNSEEN))
def test_a_rule_that_admits_it_is_caught(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "refuse", lambda self, *a: None)
    assert shows(MIXES[what])

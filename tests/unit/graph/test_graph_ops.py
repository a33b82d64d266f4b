# ruff: noqa: E501 - one node a line
"""Every entry of the table against torch: schema, shape, dtype, and where the batch lies."""

from __future__ import annotations

import pytest
import torch

from casemate.graph import check
from casemate.graph.model import DtypeArg, Graph, InputSpec, Node, Size
from casemate.graph.ops import FAMILIES, TABLE
from support.graphs import DTYPES, interpret
from support.rawgraph import B, data, infos, ls, node, r, run, weight

F32, I64, I32, BOOL, U8 = (DtypeArg(dtype=d) for d in ("f32", "i64", "i32", "bool", "u8"))

INPUTS = (
    data("x", 4), data("y", 4), data("t", 3, 4), data("u", 3, 4), data("im", 4, 6, 6), data("v", 4, 8),
    data("vol", 4, 4, 4, 4), data("i", 4, dtype="i64"), data("b", 4, dtype="bool"), data("q", 4, dtype="u8"),
    weight("w", 4), weight("m", 4, 4), weight("e", 10, 4), weight("z", kind="frozen"),
    weight("c", 3, kind="frozen", dtype="i64"), weight("edges", 5, kind="frozen"),
    weight("k1", 6, 2, 3), weight("k2", 6, 2, 3, 3), weight("k3", 6, 2, 3, 3, 3), weight("b6", 6),
    weight("tr1", 4, 3, 3), weight("tr2", 4, 3, 3, 3), weight("tr3", 4, 3, 3, 3, 3), weight("b3", 3),
    *(weight(f"rnn{g}_{n}", *s) for g in (1, 3, 4) for n, s in (
        ("ih", (5 * g, 4)), ("hh", (5 * g, 5)), ("bi", (5 * g,)), ("bh", (5 * g,)))),
)  # fmt: skip


def unary() -> list[Node]:
    ops = [
        o.schema.name.removeprefix("aten.") for o in FAMILIES["elementwise"]
        if o.schema.text.endswith("(Tensor self) -> Tensor")
    ]  # fmt: skip
    of_ints = "neg abs sign sgn floor ceil trunc round exp sqrt sin isnan isinf isfinite square relu sigmoid"
    return [
        *(
            node(f"f_{n.split('.')[0]}", n, r("x" if n != "bitwise_not.default" else "i"))
            for n in ops
        ),
        *(node(f"i_{n}", f"{n}.default", r("i")) for n in of_ints.split()),
        node("nb", "logical_not.default", r("b")),
    ]


def binary() -> list[Node]:
    out: list[Node] = []
    pairs = {
        "fx": ("x", "y"),
        "fw": ("x", "w"),
        "fi": ("x", "i"),
        "ii": ("i", "i"),
        "fb": ("x", "b"),
        "iq": ("i", "q"),
        "fz": ("i", "z"),
    }
    arithmetic = "add sub mul div rsub maximum minimum atan2 eq ne lt le gt ge logical_and logical_or logical_xor xlogy fmod remainder"
    for n in arithmetic.split():
        overload = (
            "default"
            if n in ("maximum", "minimum", "atan2", "logical_and", "logical_or", "logical_xor")
            else "Tensor"
        )
        for tag, (a, b) in pairs.items():
            if n in ("sub", "rsub") and tag == "fb":
                continue  # torch refuses to subtract bools, and so does the table
            if n in ("fmod", "remainder") and tag in ("ii", "iq"):
                continue
            out.append(node(f"{n}_{tag}", f"{n}.{overload}", r(a), r(b)))
    for n in [
        "add",
        "sub",
        "mul",
        "div",
        "rsub",
        "remainder",
        "fmod",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    ]:
        for tag, number in (("int", 2), ("float", 1.5)):
            out.append(node(f"{n}_s{tag}", f"{n}.Scalar", r("i"), number))
            out.append(node(f"{n}_x{tag}", f"{n}.Scalar", r("x"), number))
    for n in ["bitwise_and", "bitwise_or", "bitwise_xor"]:
        out.append(node(f"{n}_t", f"{n}.Tensor", r("i"), r("q")))
        out.append(node(f"{n}_s", f"{n}.Scalar", r("q"), 3))
        out.append(node(f"{n}_b", f"{n}.Tensor", r("b"), r("b")))
    for tag, mode in (("f", "floor"), ("t", "trunc"), ("n", None)):
        out.append(node(f"divmode_{tag}", "div.Tensor_mode", r("x"), 2, rounding_mode=mode))
        out.append(node(f"divmode_i{tag}", "div.Tensor_mode", r("i"), 2, rounding_mode=mode))
    return [
        *out,
        node("fd", "floor_divide.default", r("i"), 3), node("fdx", "floor_divide.default", r("x"), r("y")),
        node("p1", "pow.Tensor_Scalar", r("x"), 2), node("p2", "pow.Tensor_Scalar", r("i"), 0.5),
        node("p3", "pow.Tensor_Tensor", r("x"), r("y")), node("p4", "pow.Scalar", 2.0, r("i")), node("p5", "pow.Tensor_Scalar", r("i"), 2),
        node("mi", "min.other", r("x"), r("w")), node("ma", "max.other", r("i"), r("i")),
        node("c1", "clamp.default", r("x"), -1, 1.5), node("c2", "clamp.default", r("i"), 0), node("c3", "clamp_min.default", r("i"), 0.5),
        node("c4", "clamp_max.default", r("x"), 1), node("c5", "clamp.Tensor", r("x"), r("w"), r("y")),
        node("wh1", "where.self", r("b"), r("x"), r("w")), node("wh2", "where.ScalarOther", r("b"), r("x"), "-inf"),
        node("wh3", "where.ScalarSelf", r("b"), 1.0, r("i")), node("wh4", "where.Scalar", r("b"), 1, 2),
        node("mf1", "masked_fill.Scalar", r("x"), r("b"), "-inf"), node("mf2", "masked_fill.Tensor", r("x"), r("b"), r("z")),
        node("mf3", "masked_fill.Scalar", r("i"), r("b"), 7),
        node("fi1", "fill.Scalar", r("x"), 1), node("fi2", "fill.Tensor", r("x"), r("z")), node("cp", "copy.default", r("x"), r("w")),
        node("le1", "lerp.Scalar", r("x"), r("y"), 0.5), node("le2", "lerp.Tensor", r("x"), r("y"), r("w")),
        node("ac", "addcmul.default", r("x"), r("y"), r("w"), value=2), node("ad", "addcdiv.default", r("x"), r("y"), r("w")),
        node("ge1", "gelu.default", r("x")), node("ge2", "gelu.default", r("x"), approximate="tanh"), node("pr", "_prelu_kernel.default", r("x"), r("w")),
        *(node(f"a_{n}", f"{n}.default", r("x")) for n in ["leaky_relu", "elu", "celu", "softplus", "softshrink", "hardshrink", "hardtanh", "logit", "nan_to_num"]),
        node("th", "threshold.default", r("x"), 0.1, 2), node("de", "detach.default", r("x")),
        *(node(f"to_{d.dtype}_{s}", "_to_copy.default", r(s), dtype=d) for d in (F32, I64, I32, BOOL, U8) for s in ("x", "i", "b")),
    ]  # fmt: skip


def reduce() -> list[Node]:
    out: list[Node] = []
    for s in ("t", "i"):
        for tag, axes, keep in (("a", ls(-1), False), ("k", ls(1), True)):
            out += [
                node(f"sum_{s}{tag}", "sum.dim_IntList", r(s), axes, keep),
                node(f"amax_{s}{tag}", "amax.default", r(s), axes, keep),
                node(f"amin_{s}{tag}", "amin.default", r(s), axes, keep),
                node(f"any_{s}{tag}", "any.dims", r(s), axes, keep),
                node(f"all_{s}{tag}", "all.dims", r(s), axes, keep),
                node(f"maxd_{s}{tag}", "max.dim", r(s), 1, keep),
                node(f"mind_{s}{tag}", "min.dim", r(s), -1, keep),
                node(f"argmax_{s}{tag}", "argmax.default", r(s), 1, keep),
                node(f"argmin_{s}{tag}", "argmin.default", r(s), -1, keep),
                node(f"anyd_{s}{tag}", "any.dim", r(s), 1, keep),
                node(f"alld_{s}{tag}", "all.dim", r(s), 1, keep),
            ]
        out += [
            node(f"cs_{s}", "cumsum.default", r(s), 1),
            node(f"so_{s}", "sort.default", r(s), -1, True),
            node(f"ss_{s}", "sort.stable", r(s), stable=True, dim=1),
            node(f"tk_{s}", "topk.default", r(s), 2, 1),
        ]
    for n in ("sum", "max", "min", "any", "all", "mean"):
        out.append(node(f"whole_{n}", f"{n}.default", r("m")))
    for n in ["var", "std", "var_mean", "std_mean"]:
        out.append(node(n, f"{n}.correction", r("t"), ls(1, 2), correction=0, keepdim=True))
        out.append(node(n + "1", f"{n}.correction", r("t"), ls(-1)))
    return [
        *out,
        node("sb", "sum.dim_IntList", r("b"), ls(1)), node("sf", "sum.dim_IntList", r("i"), ls(1), dtype=F32),
        node("me", "mean.dim", r("t"), ls(1, 2)), node("mi", "mean.dim", r("i"), ls(1), dtype=F32), node("pr", "prod.dim_int", r("t"), 1),
        node("ls1", "logsumexp.default", r("t"), ls(1, 2)), node("nr", "linalg_vector_norm.default", r("t"), 2, ls(-1), True),
        node("so", "softmax.int", r("t"), -1), node("sl", "log_softmax.int", r("t"), 1), node("si", "softmax.int", r("i"), 1, F32),
        node("i1", "clamp.default", r("i"), 2, 5), node("i2", "cumsum.default", r("i1"), 1), node("i3", "sum.dim_IntList", r("i1"), ls(1)),
        node("i4", "sub.Scalar", r("i1"), 9), node("i5", "cumsum.default", r("i4"), 1),
        node("cp", "cumprod.default", r("t"), 1), node("lc", "logcumsumexp.default", r("t"), -1),
    ]  # fmt: skip


def view() -> list[Node]:
    pads: list[Node] = []
    for kind in ("reflection", "replication"):
        pads += [
            node(f"{kind}1", f"{kind}_pad1d.default", r("v"), ls(1, 2)),
            node(f"{kind}2", f"{kind}_pad2d.default", r("im"), ls(1, 2, 0, 1)),
            node(f"{kind}3", f"{kind}_pad3d.default", r("vol"), ls(1, 0, 0, 1, 1, 1)),
        ]
    ups: list[Node] = []
    for n, s in ((1, "v"), (2, "im"), (3, "vol")):
        ups.append(node(f"near{n}", f"upsample_nearest{n}d.vec", r(s), ls(*[5] * n), None))
        ups.append(node(f"nears{n}", f"upsample_nearest{n}d.vec", r(s), None, ls(*[1.5] * n)))
    for kind, s, n in (
        ("linear1d", "v", 1),
        ("bilinear2d", "im", 2),
        ("bicubic2d", "im", 2),
        ("trilinear3d", "vol", 3),
    ):
        ups.append(node(kind, f"upsample_{kind}.vec", r(s), None, True, ls(*[2.0] * n)))
    return [
        *pads, *ups,
        node("r1", "reshape.default", r("t"), ls(B, 12)), node("r2", "reshape.default", r("t"), ls(-1, 4)), node("r3", "reshape.default", r("r2"), ls(B, 3, 4)),
        node("r4", "reshape.default", r("t"), ls(Size(a=12))), node("r5", "reshape.default", r("r4"), ls(B, -1)), node("r6", "reshape.default", r("m"), ls(2, -1)),
        node("pm", "permute.default", r("t"), ls(1, 0, 2)), node("pf", "reshape.default", r("pm"), ls(Size(a=3), 4)), node("pu", "reshape.default", r("pf"), ls(3, B, 4)),
        node("pl", "linear.default", r("pf"), r("m")), node("pb", "permute.default", r("pu"), ls(1, 2, 0)),
        node("tr", "transpose.int", r("t"), 0, -1), node("tt", "t.default", r("x")), node("un", "unsqueeze.default", r("t"), 0), node("ue", "unsqueeze.default", r("t"), -1),
        node("sq", "squeeze.dim", r("ue"), 3), node("sd", "squeeze.dims", r("un"), ls(0, 2)), node("s0", "squeeze.dim", r("t"), 1),
        node("ex", "expand.default", r("ue"), ls(B, 3, 4, 5)), node("ew", "expand.default", r("w"), ls(B, 3, -1)), node("en", "expand.default", r("x"), ls(2, -1, -1)),
        node("se", "select.int", r("t"), 1, -1), node("sl", "slice.Tensor", r("t"), 2, 1, 100, 2), node("sn", "slice.Tensor", r("t"), -1, -3, -1), node("sw", "slice.Tensor", r("t"), 0, 0, B),
        node("sp", "split.Tensor", r("t"), 3, 2), node("ps", "split_with_sizes.default", r("t"), ls(1, 3), 2), node("ub", "unbind.int", r("t"), 1), node("di", "diagonal.default", r("t"), 1, 1, 2),
        node("uf", "unfold.default", r("t"), 2, 2, 1), node("ca", "cat.default", ls(r("t"), r("u")), -1), node("st", "stack.default", ls(r("x"), r("y")), 0), node("st1", "stack.default", ls(r("x"), r("y")), -1),
        node("ci", "cat.default", ls(r("m"), r("e")), 0),
        node("fl", "flip.default", r("t"), ls(1, 2)), node("ro", "roll.default", r("t"), ls(1), ls(2)), node("re", "repeat.default", r("t"), ls(2, 1, 1, 3)), node("rb", "repeat.default", r("x"), ls(3, 1)),
        node("rbu", "reshape.default", r("rb"), ls(3, B, 4)), node("rw", "repeat.default", r("w"), ls(B, 2)), node("ri", "repeat_interleave.self_int", r("x"), 3, 0), node("riu", "reshape.default", r("ri"), ls(B, 12)),
        node("rj", "repeat_interleave.self_int", r("x"), 2, 1),
        node("pad", "constant_pad_nd.default", r("t"), ls(1, 2, -1, 0), 1.5), node("ssc", "select_scatter.default", r("t"), r("x"), 1, 0), node("lsc", "slice_scatter.default", r("t"), r("u"), 2),
        node("tl", "tril.default", r("t")), node("tu", "triu.default", r("t"), 1), node("px", "pixel_shuffle.default", r("im"), 2), node("pxu", "pixel_unshuffle.default", r("im"), 3),
        node("im2", "im2col.default", r("im"), ls(2, 3), ls(1, 1), ls(1, 0), ls(2, 1)), node("gl", "glu.default", r("t"), -1),
        node("ar", "arange.default", B), node("au", "unsqueeze.default", r("ar"), 1), node("ac", "arange.default", 4), node("ai", "index.Tensor", r("t"), ls(r("au"), r("c"))),
        node("ak", "index.Tensor", r("t"), ls(r("ar"), None, None)),
    ]  # fmt: skip


def matmul() -> list[Node]:
    return [
        node("li", "linear.default", r("t"), r("m"), r("w")), node("l1", "linear.default", r("x"), r("e")), node("mm", "mm.default", r("x"), r("m")),
        node("tt", "t.default", r("x")), node("mr", "mm.default", r("m"), r("tt")), node("ut", "transpose.int", r("u"), 1, 2), node("bm", "bmm.default", r("t"), r("ut")),
        node("ma", "matmul.default", r("t"), r("ut")), node("mb", "matmul.default", r("t"), r("w")), node("mc", "matmul.default", r("w"), r("ut")), node("md", "matmul.default", r("m"), r("ut")),
        node("me", "matmul.default", r("x"), r("w")), node("mf", "matmul.default", r("m"), r("tt")), node("p3", "permute.default", r("t"), ls(1, 0, 2)), node("mg", "matmul.default", r("p3"), r("m")),
        node("mh", "matmul.default", r("w"), r("tt")),
        node("mv", "mv.default", r("x"), r("w")), node("do", "dot.default", r("w"), r("w")), node("am", "addmm.default", r("w"), r("x"), r("m"), beta=2), node("ba", "baddbmm.default", r("z"), r("t"), r("ut")),
    ]  # fmt: skip


def conv() -> list[Node]:
    out: list[Node] = []
    for n, s in ((1, "v"), (2, "im"), (3, "vol")):
        ones, twos = ls(*[1] * n), ls(*[2] * n)
        out += [
            node(f"c{n}", f"conv{n}d.default", r(s), r(f"k{n}"), r("b6"), twos, ones, ones, 2),
            node(f"cs{n}", f"conv{n}d.padding", r(s), r(f"k{n}"), None, ones, "same", ones, 2),
            node(f"cv{n}", f"conv{n}d.padding", r(s), r(f"k{n}"), None, ones, "valid", ones, 2),
            node(
                f"ct{n}",
                f"conv_transpose{n}d.{'default' if n == 1 else 'input'}",
                r(s),
                r(f"tr{n}"),
                r("b3"),
                twos,
                ones,
                ones,
            ),
            node(f"mp{n}", f"max_pool{n}d.default", r(s), ls(*[3] * n), twos, ones),
            node(
                f"mc{n}",
                f"max_pool{n}d.default",
                r(s),
                ls(*[3] * n),
                twos,
                ls(*[0] * n),
                ones,
                True,
            ),
            node(f"ap{n}", f"avg_pool{n}d.default", r(s), twos),
            node(f"ac{n}", f"avg_pool{n}d.default", r(s), ls(3), ls(2), ls(1), True, False),
            node(f"aa{n}", f"adaptive_avg_pool{n}d.default", r(s), ls(*[3] * n)),
            node(f"am{n}", f"adaptive_max_pool{n}d.default", r(s), ls(*[2] * n)),
        ]
    return out


def norm() -> list[Node]:
    return [
        node("ln", "layer_norm.default", r("t"), ls(4), r("w"), r("w")), node("ln2", "layer_norm.default", r("t"), ls(3, 4)), node("rn", "rms_norm.default", r("t"), ls(4), r("w")),
        node("gn", "group_norm.default", r("im"), 2, r("w"), r("w")), node("in_", "instance_norm.default", r("im"), r("w"), r("w"), None, None, True, 0.1, 1e-5, False),
        node("va", "abs.default", r("w")), node("bn", "batch_norm.default", r("im"), r("w"), r("w"), r("w"), r("va"), False, 0.1, 1e-5, False), node("bx", "batch_norm.default", r("x"), None, None, r("w"), r("va"), False, 0.1, 1e-5, False),
    ]  # fmt: skip


def attention() -> list[Node]:
    q = [
        node("qq", "reshape.default", r("vol"), ls(B, 4, 8, 8)),
        node("kv", "slice.Tensor", r("qq"), 1, 0, 2),
    ]
    rnn: list[Node] = []
    for n, g in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        params = ls(*(r(f"rnn{g}_{p}") for p in ("ih", "hh", "bi", "bh")))
        h = r("h")
        rnn.append(
            node(
                n,
                f"{n}.input",
                r("t"),
                ls(h, h) if g == 4 else h,
                params,
                True,
                1,
                0.0,
                False,
                False,
                True,
            )
        )
        rnn.append(
            node(
                f"{n}_t",
                f"{n}.input",
                r("tf"),
                ls(h, h) if g == 4 else h,
                params,
                True,
                1,
                0.0,
                False,
                False,
                False,
            )
        )
    return [
        *q,
        node("s1", "scaled_dot_product_attention.default", r("qq"), r("qq"), r("qq")), node("s2", "scaled_dot_product_attention.default", r("qq"), r("qq"), r("qq"), None, 0.0, True, scale=0.5),
        node("s3", "scaled_dot_product_attention.default", r("qq"), r("kv"), r("kv"), enable_gqa=True), node("bm", "slice.Tensor", r("x"), 1, 0, 1), node("mk0", "gt.Scalar", r("bm"), 100), node("mk1", "logical_not.default", r("mk0")), node("mk", "reshape.default", r("mk1"), ls(B, 1, 1, 1)),
        node("s4", "scaled_dot_product_attention.default", r("qq"), r("qq"), r("qq"), r("mk")), node("s5", "scaled_dot_product_attention.default", r("t"), r("u"), r("t")),
        node("h", "zeros.default", ls(1, B, 5)), node("tf", "transpose.int", r("t"), 0, 1), *rnn,
    ]  # fmt: skip


def index() -> list[Node]:
    return [
        node("j", "clamp.default", r("i"), 0, 3), node("em", "embedding.default", r("e"), r("j")), node("ec", "embedding.default", r("e"), r("c")), node("i1", "index.Tensor", r("t"), ls(None, r("c"))),
        node("i2", "index.Tensor", r("e"), ls(r("j"))), node("i3", "index.Tensor", r("m"), ls(r("j"), r("j"))), node("i4", "index.Tensor", r("im"), ls(None, r("c"), None, r("c"))), node("cc", "unsqueeze.default", r("c"), 1), node("i5", "index.Tensor", r("im"), ls(None, None, r("cc"), r("c"))),
        node("ga", "gather.default", r("x"), 1, r("j")), node("gm", "gather.default", r("e"), 0, r("cc")),
        node("sr", "scatter.src", r("x"), 1, r("j"), r("y")), node("sv", "scatter.value", r("x"), 1, r("j"), 1.0), node("sa", "scatter_add.default", r("x"), 1, r("j"), r("y")),
        node("is_", "index_select.default", r("t"), 1, r("c")), node("oh", "one_hot.default", r("j"), 5), node("bu", "bucketize.Tensor", r("x"), r("sorted")), node("sx", "searchsorted.Tensor", r("sorted"), r("x"), right=True, out_int32=True),
    ]  # fmt: skip


def loss() -> list[Node]:
    return [
        node("j", "clamp.default", r("i"), 0, 3), node("j0", "select.int", r("j"), 1, 0), node("j3", "slice.Tensor", r("j"), 1, 0, 3), node("tt", "transpose.int", r("t"), 1, 2), node("pr", "softmax.int", r("y"), 1),
        node("ce", "cross_entropy_loss.default", r("x"), r("j0"), r("w"), 0, 1, 0.1), node("cs", "cross_entropy_loss.default", r("tt"), r("j3"), None, 0), node("cp", "cross_entropy_loss.default", r("x"), r("pr"), None, 0),
        node("nl", "nll_loss_nd.default", r("x"), r("j0"), None, 0), node("bl", "binary_cross_entropy_with_logits.default", r("x"), r("y"), r("w"), r("w"), 0),
        *(node(n, f"{n}.default", r("x"), r("y"), 0) for n in ("mse_loss", "l1_loss", "soft_margin_loss", "smooth_l1_loss", "huber_loss", "kl_div")),
    ]  # fmt: skip


def create() -> list[Node]:
    return [
        node("zz", "zeros.default", ls(2, B, 3)), node("o", "ones.default", ls(3), dtype=I64), node("fu", "full.default", ls(B, 2), 3), node("fb", "full.default", ls(2), True), node("ff", "full.default", ls(), 1.5),
        node("zl", "zeros_like.default", r("i")), node("ol", "ones_like.default", r("t"), dtype=BOOL), node("fl", "full_like.default", r("x"), 2), node("nz", "new_zeros.default", r("i"), ls(B, 1)), node("no", "new_ones.default", r("x"), ls(), dtype=BOOL), node("nf", "new_full.default", r("x"), ls(2), 7),
        node("a1", "arange.default", 5), node("a2", "arange.start", 2, 7), node("a3", "arange.start_step", 9, 0, -2), node("a4", "arange.start_step", 0.0, 1.0, 0.3), node("a5", "arange.default", 4, dtype=F32),
        node("st", "scalar_tensor.default", 3), node("ey", "eye.default", 3), node("em", "eye.m", 2, 3), node("lp", "linspace.default", 0, 1, 5),
    ]  # fmt: skip


GRAPHS = {
    "unary": unary(), "binary": binary(), "reduce": reduce(), "view": view(), "matmul": matmul(), "conv": conv(),
    "norm": norm(), "attention": attention(), "index": index(), "loss": loss(), "create": create(),
}  # fmt: skip


def values_of(spec: InputSpec, batch: int) -> torch.Tensor:
    shape = [batch if isinstance(d, Size) else d for d in spec.shape]
    if spec.dtype == "f32":
        return torch.randn(shape)
    if spec.dtype == "bool":
        return torch.rand(shape) > 0.5
    low, high = (0, 3) if spec.kind == "frozen" else (1, 9)
    return torch.randint(low, high, shape).to(DTYPES[spec.dtype])


def whole(name: str) -> Graph:
    nodes = GRAPHS[name]
    inputs = (*INPUTS, weight("sorted", 5, kind="frozen"))
    end = (
        node("last0", "mul.Tensor", r("x"), r("w")),
        node("last", "sum.dim_IntList", r("last0"), ls(1)),
    )
    return Graph(inputs=inputs, nodes=(*nodes, *end), loss="last")


@pytest.mark.parametrize("family", GRAPHS)
def test_shapes_dtypes_and_batch(family: str) -> None:
    g = whole(family)
    made = check.check(g, infos(g))
    torch.manual_seed(3)
    weights = {i.tensor: values_of(i, 0) for i in g.inputs if i.kind != "data"}
    weights["sorted"] = weights["sorted"].sort().values
    for batch in (5, 7):
        given = {i.name: values_of(i, batch) for i in g.inputs if i.kind == "data"}
        one = interpret(g, weights, given)
        # Another record 2: nothing may change but slice 2 of each value.
        other = {k: v.clone() for k, v in given.items()}
        for spec in g.inputs:
            if spec.kind == "data":
                other[spec.name][2] = values_of(spec, 1)[0]
        two = interpret(g, weights, other)
        for key, value in one.items():
            said = made.values[key]
            assert tuple(value.shape) == said.sizes(batch), key
            assert value.dtype == DTYPES[said.dtype], key
            a, b = value, two[key]
            if said.batch is not None:
                k, o = said.batch.axis, said.batch.outer
                keep = torch.arange(batch) != 2
                a, b = (
                    x.movedim(k, 0).reshape(o, batch, said.batch.inner, *x.movedim(k, 0).shape[1:])[
                        :, keep
                    ]
                    for x in (a, b)
                )
            assert torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)), f"{key} mixes records"
            if said.bounds is not None and value.numel():
                assert said.bounds[0] <= value.min() and value.max() <= said.bounds[1], key


def test_every_entry_is_tried() -> None:
    tried = {n.op for nodes in GRAPHS.values() for n in nodes}
    assert set(TABLE) - tried == set()


@pytest.mark.parametrize("name", TABLE)
def test_schemas_are_torchs(name: str) -> None:
    space, op, overload = name.split(".")
    theirs = str(getattr(getattr(getattr(torch.ops, space), op), overload)._schema)
    assert TABLE[name].schema.text.replace("'", '"') == theirs.replace("'", '"')
    assert "!" not in theirs, "the table holds functional ops only"


def test_costs_of_a_linear_layer() -> None:
    g = Graph(
        inputs=(data("x", 4), weight("m", 8, 4)),
        nodes=(
            node("y", "linear.default", r("x"), r("m")),
            node("s", "sum.dim_IntList", r("y"), ls(1)),
        ),
        loss="s",
    )
    made = check.check(g, infos(g))
    assert made.dimension == 32
    # 2*8*4 forward and twice that backward; 8 additions and their backward.
    assert made.flops == 3 * 64 + 3 * 8
    assert made.saved_bytes == 4 * (8 + 1)


# What a node adds to FLOPs and to bytes that are saved, and the least of its workspace.
COSTS = {
    # 32 places of 18 products and sums, and twice that backward; columns and a quarter more.
    "filters": ([node("y", "conv2d.default", r("im"), r("k"))], (3 * 2 * 32 * 18, 4 * 32, 5 * 16 * 18)),
    "int64": ([node("y", "add.Tensor", r("i"), 1)], (4, 8 * 4, 0)),
    "bool": ([node("y", "gt.Scalar", r("x"), 0)], (4, 4, 0)),
    # Both factors, 3 times (3, 4) and (4, 3), as backward needs them.
    "products that broadcast": (
        [
            node("a", "unsqueeze.default", r("t"), 1), node("b", "unsqueeze.default", r("t"), 2),
            node("p", "transpose.int", r("a"), 2, 3), node("y", "matmul.default", r("b"), r("p")),
        ],
        (2 * 3 * 3 * 4, 4 * 9, 4 * 3 * (4 + 12)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COSTS)
def test_costs_of_a_node(what: str) -> None:
    nodes, want = COSTS[what]
    made, bare = run(*nodes), run()
    more = made.flops - bare.flops, made.saved_bytes - bare.saved_bytes
    assert more == want[:2] and made.workspace_bytes >= want[2]

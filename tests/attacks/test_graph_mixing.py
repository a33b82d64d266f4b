# ruff: noqa: E501 - one entry a line
"""Models that mix records, draw at random, or are too large: each refused by node and code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.graph import check
from casemate.graph.model import DtypeArg, Node, Size
from casemate.spec.errors import ModelError
from support.graphs import checked
from support.rawgraph import B, graph, infos, ls, node, r, run

B2 = Size(a=2)

# One node that mixes, after clean ones: (what it is, nodes; the last is at fault).
MIXES = {
    "sum over the batch": [node("bad", "sum.dim_IntList", r("x"), ls(0))],
    "sum over everything": [node("bad", "sum.default", r("x"))],
    "mean over the batch": [node("bad", "mean.dim", r("x"), ls(0), True)],
    "mean, negative axis": [node("bad", "mean.dim", r("x"), ls(-2))],
    "variance of the batch": [node("bad", "var.correction", r("x"), ls(0))],
    "norm of the batch": [node("bad", "linalg_vector_norm.default", r("x"))],
    "largest of the batch": [node("bad", "amax.default", r("x"), ls(0))],
    "largest of all": [node("bad", "amax.default", r("x"))],
    "max with indices": [node("bad", "max.dim", r("x"), 0)],
    "argmax of all": [node("bad", "argmax.default", r("x"))],
    "any of all": [node("g", "gt.Scalar", r("x"), 0), node("bad", "any.default", r("g"))],
    "softmax over the batch": [node("bad", "softmax.int", r("x"), 0)],
    "log softmax over the batch": [node("bad", "log_softmax.int", r("x"), -2)],
    "cumsum over the batch": [node("bad", "cumsum.default", r("x"), 0)],
    "cumulative product": [node("bad", "cumprod.default", r("x"), 0)],
    "logsumexp over the batch": [node("bad", "logsumexp.default", r("x"), ls(0))],
    "sort over the batch": [node("bad", "sort.default", r("x"), 0)],
    "top of the batch": [node("bad", "topk.default", r("x"), 1, 0)],
    "flip the batch": [node("bad", "flip.default", r("x"), ls(0))],
    "roll the batch": [node("bad", "roll.default", r("x"), ls(1), ls(0))],
    "roll everything": [node("bad", "roll.default", r("x"), ls(1))],
    "x @ x.T": [node("p", "t.default", r("x")), node("bad", "mm.default", r("x"), r("p"))],
    "x.T @ x": [node("p", "t.default", r("x")), node("bad", "mm.default", r("p"), r("x"))],
    "matmul x x.T": [node("p", "transpose.int", r("x"), 0, 1), node("bad", "matmul.default", r("x"), r("p"))],
    "vector of the batch": [
        node("s", "select.int", r("x"), 1, 0), node("bad", "dot.default", r("s"), r("s"))],
    "linear over the batch": [
        node("p", "t.default", r("x")), node("q", "expand.default", r("m"), ls(-1, -1)),
        node("bad", "linear.default", r("p"), r("q"))],
    "linear with a bias of records": [
        node("p", "slice.Tensor", r("m"), 0, 0, 1), node("s", "select.int", r("x"), 1, 0),
        node("bad", "linear.default", r("x"), r("p"), r("s"))],
    "matmul records by columns of records": [
        node("p", "t.default", r("x")), node("bad", "matmul.default", r("t"), r("p"))],
    "matmul rows of records by records": [
        node("p", "permute.default", r("t"), ls(0, 2, 1)), node("bad", "matmul.default", r("x"), r("p"))],
    "linear with weights of records": [node("bad", "linear.default", r("x"), r("x"))],
    "bmm with the batch contracted": [
        node("p", "permute.default", r("t"), ls(1, 2, 0)), node("q", "permute.default", r("t"), ls(1, 0, 2)),
        node("bad", "bmm.default", r("p"), r("q"))],
    "bmm of records with one matrix": [
        node("u", "unsqueeze.default", r("m"), 0), node("bad", "bmm.default", r("t"), r("u"))],
    "bmm record by record of others": [
        node("p", "permute.default", r("t"), ls(1, 0, 2)), node("q", "permute.default", r("t"), ls(1, 2, 0)),
        node("bad", "bmm.default", r("p"), r("q"))],
    "outer by broadcasting": [
        node("p", "unsqueeze.default", r("x"), 0), node("q", "unsqueeze.default", r("x"), 1),
        node("bad", "sub.Tensor", r("p"), r("q"))],
    "outer with trailing axis": [
        node("s", "select.int", r("x"), 1, 0), node("u", "unsqueeze.default", r("s"), 1),
        node("bad", "add.Tensor", r("u"), r("s"))],
    "a constant along the batch": [node("p", "t.default", r("x")), node("bad", "add.Tensor", r("p"), r("w"))],
    "two of a constant along the batch": [
        node("p", "t.default", r("x")), node("s", "slice.Tensor", r("m"), 1, 0, 2), node("bad", "add.Tensor", r("p"), r("s"))],
    "records folded otherwise": [
        node("p", "permute.default", r("t"), ls(1, 0, 2)), node("f", "reshape.default", r("p"), ls(Size(a=3), 4)),
        node("g", "reshape.default", r("t"), ls(Size(a=3), 4)), node("bad", "add.Tensor", r("f"), r("g"))],
    "batch into features": [
        node("f", "reshape.default", r("x"), ls(1, -1)), node("bad", "softmax.int", r("f"), 1)],
    "batch flattened away": [node("f", "reshape.default", r("x"), ls(-1)), node("bad", "sum.dim_IntList", r("f"), ls(0))],
    "(B, T) to (T, B)": [node("bad", "reshape.default", r("x"), ls(4, B))],
    "(B, T) to (T, B) by -1": [
        node("p", "t.default", r("x")), node("bad", "reshape.default", r("p"), ls(B, 4))],
    "two records in one": [node("bad", "reshape.default", r("x"), ls(-1, 8))],
    "fold, then unfold askew": [
        node("f", "reshape.default", r("t"), ls(Size(a=3), 4)), node("bad", "reshape.default", r("f"), ls(3, B, 4))],
    "permuted, folded, unfolded askew": [
        node("p", "permute.default", r("t"), ls(1, 0, 2)), node("f", "reshape.default", r("p"), ls(Size(a=3), 4)),
        node("bad", "reshape.default", r("f"), ls(B, 3, 4))],
    "view without the batch": [node("bad", "reshape.default", r("x"), ls(2, 2))],
    "first record": [node("bad", "select.int", r("x"), 0, 0)],
    "last record": [node("bad", "select.int", r("x"), 0, -1)],
    "all but one": [node("bad", "slice.Tensor", r("x"), 0, 1)],
    "every other": [node("bad", "slice.Tensor", r("x"), 0, None, None, 2)],
    "a fixed number": [node("bad", "slice.Tensor", r("x"), 0, 0, 4)],
    "split": [node("bad", "split.Tensor", r("x"), 2, 0)],
    "split by sizes": [node("bad", "split_with_sizes.default", r("x"), ls(1), 0)],
    "unbind": [node("bad", "unbind.int", r("x"), 0)],
    "sliding windows": [node("bad", "unfold.default", r("x"), 0, 2, 1)],
    "diagonal": [node("bad", "diagonal.default", r("x"), 0, 0, 1)],
    "lower triangle": [node("bad", "tril.default", r("x"))],
    "windows of channels of records": [
        node("p", "permute.default", r("im"), ls(1, 0, 2, 3)),
        node("bad", "im2col.default", r("p"), ls(2, 2), ls(1, 1), ls(0, 0), ls(1, 1))],
    "pixels of records as channels": [
        node("p", "permute.default", r("im"), ls(1, 0, 2, 3)), node("bad", "pixel_unshuffle.default", r("p"), 2)],
    "pad the batch": [node("bad", "constant_pad_nd.default", r("x"), ls(0, 0, 1, 0))],
    "pad the batch behind": [node("bad", "constant_pad_nd.default", r("x"), ls(0, 0, 0, 1))],
    "squeeze the batch": [node("bad", "squeeze.dim", r("x"), 0)],
    "join along the batch": [node("bad", "cat.default", ls(r("x"), r("x")), 0)],
    "stack with a constant": [node("bad", "stack.default", ls(r("x"), r("m")), 0)],
    "expand to twice the batch": [node("bad", "expand.default", r("x"), ls(B2, 4))],
    "expand three to the batch": [node("bad", "expand.default", r("c"), ls(B))],
    "expand a record": [node("bad", "expand.default", r("x"), ls(4, 4))],
    "expand by the batch": [node("u", "unsqueeze.default", r("x"), 0), node("bad", "expand.default", r("u"), ls(B, -1, -1))],
    "repeat by the batch": [node("u", "unsqueeze.default", r("x"), 0), node("bad", "repeat.default", r("u"), ls(B, 1, 1))],
    "gather along the batch": [node("bad", "gather.default", r("x"), 0, r("i"))],
    "scatter along the batch": [node("bad", "scatter_add.default", r("x"), 0, r("i"), r("x"))],
    "gather for one record": [
        node("u", "unsqueeze.default", r("c"), 0), node("bad", "gather.default", r("x"), 1, r("u"))],
    "gather from a constant": [node("bad", "gather.default", r("m"), 0, r("i"))],
    "select by a constant": [node("bad", "index_select.default", r("x"), 0, r("c"))],
    "select by others' data": [
        node("s", "select.int", r("i"), 1, 0), node("bad", "index_select.default", r("x"), 1, r("s"))],
    "index by a constant": [node("bad", "index.Tensor", r("x"), ls(r("c")))],
    "index by data": [node("bad", "index.Tensor", r("x"), ls(r("i")))],
    "index inside records by others' data": [node("bad", "index.Tensor", r("x"), ls(None, r("i")))],
    "index a folded batch by place": [
        node("f", "reshape.default", r("t"), ls(Size(a=3), 4)), node("a", "arange.default", B),
        node("bad", "index.Tensor", r("f"), ls(r("a")))],
    "index by shifted place": [
        node("a", "arange.default", B), node("bad", "add.Tensor", r("a"), 1)],
    "flip the place": [
        node("a", "arange.default", B), node("bad", "rsub.Scalar", r("a"), 3)],
    "count from one": [node("bad", "arange.start", 1, B)],
    "count twice": [node("bad", "arange.default", B2)],
    "place as an index into weights": [
        node("a", "arange.default", B), node("bad", "index.Tensor", r("m"), ls(r("a")))],
    "place multiplied": [
        node("a", "arange.default", B), node("bad", "mul.Tensor", r("a"), 2)],
    "place embedded": [
        node("a", "arange.default", B), node("bad", "embedding.default", r("e"), r("a"))],
    "attention over the batch": [
        node("p", "permute.default", r("t"), ls(1, 0, 2)),
        node("bad", "scaled_dot_product_attention.default", r("p"), r("p"), r("p"))],
    "attention to a permuted batch": [
        node("q", "unsqueeze.default", r("t"), 1), node("p", "unsqueeze.default", r("t"), 0),
        node("bad", "scaled_dot_product_attention.default", r("q"), r("p"), r("p"))],
    "convolution over the batch": [
        node("p", "permute.default", r("im"), ls(1, 0, 2, 3)), node("bad", "conv2d.default", r("p"), r("k"))],
    "convolution with the batch as height": [
        node("p", "permute.default", r("im"), ls(2, 1, 0, 3)), node("bad", "conv2d.default", r("p"), r("k"))],
    "pooling over the batch": [
        node("p", "permute.default", r("im"), ls(1, 2, 0, 3)), node("bad", "max_pool2d.default", r("p"), ls(2))],
    "layer norm over the batch": [
        node("p", "t.default", r("x")), node("bad", "layer_norm.default", r("p"), ls(4))],
    "group norm with channels of records": [
        node("p", "permute.default", r("im"), ls(1, 0, 2, 3)), node("bad", "group_norm.default", r("p"), 1)],
    "upsampling the batch": [
        node("p", "permute.default", r("im"), ls(1, 2, 0, 3)),
        node("bad", "upsample_nearest2d.vec", r("p"), ls(3, 3), None)],
    "mean of the losses": [node("bad", "mse_loss.default", r("x"), r("x"), 1)],
    "sum of cross entropies": [
        node("s", "select.int", r("i"), 1, 0), node("bad", "cross_entropy_loss.default", r("x"), r("s"), None, 2)],
    "targets of other records": [
        node("s", "select.int", r("i"), 1, 0), node("f", "t.default", r("x")),
        node("bad", "cross_entropy_loss.default", r("f"), r("s"), None, 0)],
    "gradients scaled by the batch": [node("bad", "embedding.default", r("e"), r("i"), -1, True)],
    "batch of batch size": [node("bad", "zeros.default", ls(B, B))],
    "batch plus one": [node("bad", "zeros.default", ls(Size(a=1, c=1)))],
}  # fmt: skip


@pytest.mark.parametrize("what", MIXES)
def test_mixing_is_refused_by_node(what: str) -> None:
    with pytest.raises(ModelError) as e:
        run(*MIXES[what])
    assert (e.value.code, e.value.where) == ("model.mixes-records", "bad")
    assert e.value.mend


OTHERS = {
    "batch size": ("model.batch-size", [node("bad", "div.Tensor", r("x"), B)]),
    "batch size in full": ("model.batch-size", [node("bad", "full.default", ls(4), B)]),
    "batch size as exponent": ("model.batch-size", [node("bad", "pow.Tensor_Scalar", r("x"), B)]),
    "batch norm": ("model.batchnorm", [
        node("bad", "batch_norm.default", r("im"), None, None, None, None, True, 0.1, 1e-5, False)]),
    "batch norm by another name": ("model.batchnorm", [
        node("bad", "_native_batch_norm_legit.no_stats", r("im"), None, None, True, 0.1, 1e-5)]),
    "instance norm that keeps statistics": ("model.batchnorm", [
        node("z", "zeros.default", ls(2)),
        node("bad", "instance_norm.default", r("im"), None, None, r("z"), r("z"), True, 0.1, 1e-5, False)]),
    "custom op": ("model.op-unknown", [
        Node(name="bad", op="evil.copy_out.default", args=(r("x"),), kwargs={})]),
    "from file": ("model.op-unknown", [node("bad", "from_file.default", "/etc/passwd")]),
    "resize": ("model.op-unknown", [node("bad", "resize.default", r("x"), ls(9))]),
    "as_strided": ("model.op-unknown", [node("bad", "as_strided.default", r("x"), ls(2), ls(1))]),
    "in place": ("model.op-unknown", [node("bad", "add_.Tensor", r("x"), 1)]),
    "fresh memory": ("model.op-unknown", [node("bad", "empty.memory_format", ls(4))]),
    "bound to a method": ("model.op-unknown", [node("bad", "__class__.default", r("x"))]),
    "dropout": ("model.random", [node("bad", "dropout.default", r("x"), 0.5, True)]),
    "random": ("model.random", [node("bad", "rand_like.default", r("x"))]),
    "permutation": ("model.random", [node("bad", "randperm.default", B)]),
    "attention with dropout": ("model.random", [
        node("bad", "scaled_dot_product_attention.default", r("t"), r("t"), r("t"), None, 0.1)]),
    "item": ("model.data-dependent", [node("bad", "item.default", r("x"))]),
    "nonzero": ("model.data-dependent", [node("bad", "nonzero.default", r("x"))]),
    "masked select": ("model.data-dependent", [node("bad", "masked_select.default", r("x"), r("x"))]),
    "boolean index": ("model.data-dependent", [
        node("g", "gt.Scalar", r("x"), 0), node("bad", "index.Tensor", r("x"), ls(None, r("g")))]),
    "classes from data": ("model.data-dependent", [node("bad", "one_hot.default", r("i"))]),
    "float64": ("model.argument", [node("bad", "_to_copy.default", r("x"), dtype=DtypeArg(dtype="f64"))]),
    "integers multiplied": ("model.dtype", [node("bad", "mm.default", r("i"), r("i"))]),
    "wrong shapes": ("model.shape", [node("bad", "mm.default", r("x"), r("e"))]),
    "records added to a product of none": ("model.shape", [
        node("p", "slice.Tensor", r("m"), 0, 0, 1), node("bad", "addmm.default", r("x"), r("p"), r("m"))]),
    "one matrix for three": ("model.shape", [
        node("u", "unsqueeze.default", r("m"), 0), node("v", "expand.default", r("u"), ls(3, 4, 4)),
        node("bad", "baddbmm.default", r("v"), r("u"), r("v"))]),
    "unknown argument": ("model.argument", [node("bad", "relu.default", r("x"), device="cuda")]),
    "too many arguments": ("model.argument", [node("bad", "relu.default", r("x"), 1)]),
    "missing argument": ("model.argument", [node("bad", "mul.Tensor", r("x"))]),
    "a string for a tensor": ("model.argument", [node("bad", "relu.default", "x")]),
    "reads itself": ("model.form", [node("bad", "relu.default", r("bad"))]),
    "reads a later node": ("model.form", [node("bad", "relu.default", r("loss"))]),
    "2^40 elements": ("model.too-large", [node("bad", "zeros.default", ls(2**20, 2**20))]),
    "2^40 per record": ("model.too-large", [node("bad", "zeros.default", ls(B, 2**20, 2**20))]),
    "2^40 by expanding": ("model.too-large", [
        node("z", "zeros.default", ls(1, 1)), node("bad", "expand.default", r("z"), ls(2**20, 2**20))]),
    "2^40 by padding": ("model.too-large", [node("bad", "constant_pad_nd.default", r("x"), ls(0, 2**40))]),
    "count to 2^50": ("model.too-large", [node("bad", "arange.default", 2**50)]),
    "count by nothing": ("model.argument", [node("bad", "arange.start_step", 0, 5, 0)]),
    "count to infinity": ("model.argument", [node("bad", "arange.default", "inf")]),
    "a million outputs": ("model.too-large", [
        node("z", "zeros.default", ls(2**20)), node("bad", "unbind.int", r("z"))]),
    "nine axes": ("model.too-large", [node("bad", "reshape.default", r("x"), ls(B, 4, 1, 1, 1, 1, 1, 1, 1))]),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_refusals_by_node(what: str) -> None:
    code, nodes = OTHERS[what]
    with pytest.raises(ModelError) as e:
        run(*nodes)
    assert (e.value.code, e.value.where) == (code, "bad")


PLACES = {
    "float": node("f", "_to_copy.default", r("a"), dtype=DtypeArg(dtype="f32")),
    "bool": node("f", "_to_copy.default", r("a"), dtype=DtypeArg(dtype="bool")),
    "taken apart": node("f", "index.Tensor", r("a1"), ls(None, r("c"))),
    "joined": node("f", "cat.default", ls(r("a1"), r("a1")), 1),
    "filled like it": node("f", "zeros_like.default", r("a")),
    "compared": node("f", "eq.Scalar", r("a"), 0),
}


@pytest.mark.parametrize("what", PLACES)
def test_the_place_in_the_batch_stays_a_place(what: str) -> None:
    first = (node("a", "arange.default", B), node("a1", "unsqueeze.default", r("a"), 1))
    with pytest.raises(ModelError) as e:
        run(*first, PLACES[what])
    assert (e.value.code, e.value.where) == ("model.mixes-records", "f")


def test_doubling_chain() -> None:
    nodes = [node("d0", "cat.default", ls(r("x"), r("x")), 1)]
    for i in range(1, 60):
        nodes.append(node(f"d{i}", "cat.default", ls(r(f"d{i - 1}"), r(f"d{i - 1}")), 1))
    with pytest.raises(ModelError) as e:
        run(*nodes)
    assert e.value.code == "model.too-large"


def test_many_large_values_and_much_work() -> None:
    large = [node(f"n{i}", "zeros.default", ls(2**27)) for i in range(8)]
    with pytest.raises(ModelError) as e:
        run(*large)
    assert e.value.code == "model.too-large"
    with pytest.raises(ModelError) as e:
        run(node("z", "zeros.default", ls(2**14, 2**14)), *(
            node(f"n{i}", "mm.default", r("z" if i == 0 else f"n{i - 1}"), r("z")) for i in range(40)
        ))  # fmt: skip
    assert e.value.code == "model.too-large"


LOSSES = {
    "a scalar": [node("s", "sum.dim_IntList", r("w"), ls(0))],
    "two for each record": [node("s", "mul.Tensor", r("x"), r("w"))],
    "no float": [node("s", "argmax.default", r("x"), 1)],
    "batch folded": [node("f", "mul.Tensor", r("x"), r("w")), node("s", "reshape.default", r("f"), ls(Size(a=4)))],
    "kept axis": [node("f", "mul.Tensor", r("x"), r("w")), node("s", "sum.dim_IntList", r("f"), ls(1), True)],
}  # fmt: skip


@pytest.mark.parametrize("what", LOSSES)
def test_losses_must_be_one_for_each_record(what: str) -> None:
    with pytest.raises(ModelError) as e:
        run(*LOSSES[what], loss="s")
    assert e.value.code == "model.loss"


def test_a_loss_without_a_trained_weight() -> None:
    with pytest.raises(ModelError) as e:
        run(node("s", "sum.dim_IntList", r("x"), ls(1)), loss="s")
    assert e.value.code == "model.nothing-trained"


RANGES = {
    "embedding": (node("bad", "embedding.default", r("e"), r("i")), 9),
    "gather": (node("bad", "gather.default", r("x"), 1, r("i")), 3),
    "one hot": (node("bad", "one_hot.default", r("i"), 7), 6),
    "lookup": (node("bad", "index.Tensor", r("m"), ls(r("i"))), 3),
    "division": (node("bad", "floor_divide.default", r("i"), r("i")), None),
}


@pytest.mark.parametrize("what", RANGES)
def test_an_index_made_of_a_record_must_be_proved_in_range(what: str) -> None:
    bad, high = RANGES[what]
    for bounds in ({}, {"i": None}, {"i": (0, 10)}, {"i": (-11, 0)}):
        with pytest.raises(ModelError) as e:
            run(bad, bounds=bounds)
        assert (e.value.code, e.value.where) == ("model.index-range", "bad")
    if high is not None:
        low = -high - 1 if what == "lookup" else 0  # an index may count from the end
        run(bad, bounds={"i": (low, high)})
        for bounds in ({"i": (low - 1, high)}, {"i": (low, high + 1)}):
            with pytest.raises(ModelError):
                run(bad, bounds=bounds)
    run(bad)  # the scientist's side knows no schema yet


def test_arithmetic_keeps_or_loses_the_proof() -> None:
    def look(*nodes: object) -> None:
        run(*nodes, node("bad", "embedding.default", r("e"), r("j")), bounds={"i": (0, 4)})

    look(node("j", "mul.Tensor", r("i"), 2))
    look(node("j", "clamp.default", r("i"), 0, 9))
    look(node("h", "add.Tensor", r("i"), 100), node("j", "remainder.Scalar", r("h"), 10))
    for nodes in (
        [node("j", "mul.Tensor", r("i"), 3)],
        [node("j", "sub.Tensor", r("i"), 1)],
        [node("j", "add.Tensor", r("i"), 6)],
        [node("j", "_to_copy.default", r("x"), dtype=DtypeArg(dtype="i64"))],
        [node("j", "bitwise_xor.Scalar", r("i"), 8)],
        [node("j", "add.Tensor", r("i"), r("i"), alpha=3)],
        [node("j", "clamp.default", r("i"), 12)],
        [
            node("h", "mul.Tensor", r("i"), 5), node("g", "add.Tensor", r("h"), 6),
            node("j", "remainder.Tensor", r("h"), r("g")),
        ],
    ):  # fmt: skip
        with pytest.raises(ModelError) as e:
            look(*nodes)
        assert e.value.code == "model.index-range"
    with pytest.raises(ModelError) as e:  # in int32 that divisor is -1
        run(
            node("h", "_to_copy.default", r("i"), dtype=DtypeArg(dtype="i32")),
            node("bad", "remainder.Scalar", r("h"), 2**32 - 1),
            bounds={"i": (0, 4)},
        )
    assert (e.value.code, e.value.where) == ("model.index-range", "bad")


class Mixing(nn.Module):
    """A linear layer, then what ``f`` does to its outputs."""

    def __init__(self, f: object) -> None:
        super().__init__()
        self.body, self.f = nn.Linear(4, 4), f

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.f(self.body(input))  # type: ignore[operator]


MODULES = {
    "centred on the batch": lambda y: y - y.mean(0),
    "similarities": lambda y: (y @ y.T).sum(1, keepdim=True) + y,
    "shuffled": lambda y: y.flip(0),
    "first record": lambda y: y + y[:1],
    "batch norm by hand": lambda y: (y - y.mean(0)) / y.std(0),
    "attention over records": lambda y: torch.nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])[0],
    "einsum": lambda y: torch.einsum("bi,ci->bi", y, y),
    "scaled by the batch size": lambda y: y / y.shape[0],
    "noise": lambda y: y + torch.randn_like(y),
    "shifted": lambda y: torch.cat([y[1:], y[:1]]),
    "writes into a record": lambda y: y.index_fill(0, torch.tensor([0]), 0.0),
    "sorted": lambda y: y.sort(dim=0).values,
    "pairs": lambda y: y.unsqueeze(0).expand(y.shape[0], -1, -1).sum(1),
    "control flow": lambda y: y if y.sum() > 0 else -y,
    "boolean rows": lambda y: y * y[y[:, 0] > 0].sum(),
}  # fmt: skip


@pytest.mark.parametrize("what", MODULES)
def test_modules_that_mix_are_refused(what: str) -> None:
    data = {"input": torch.zeros(4, 4), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ModelError) as e:
        checked(Mixing(MODULES[what]), data, loss="cross_entropy")
    assert e.value.code in (
        "model.mixes-records", "model.batch-size", "model.random", "model.data-dependent",
        "model.op-unknown", "model.batch-fixed",
    )  # fmt: skip
    assert e.value.mend


def test_seeded_bug_in_the_proof_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule for axes broken, mixing would pass: the cases above would fail."""
    from casemate.graph.ops import reduce

    monkeypatch.setattr(reduce, "off_batch", lambda *a, **k: None)
    g = graph(node("bad", "cumsum.default", r("x"), 0))
    assert check.check(g, infos(g)).values["bad"].batch is not None

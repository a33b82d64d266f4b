"""The runtime's products, convolutions and attention against torch; bits in any place."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from support import runtime_lab as lab

CLOSE = 2e-6
P = ctypes.c_void_p


def close(got, want):
    return float((got - want).norm()) <= CLOSE * max(float(want.norm()), 1e-20)


def laid(shape, how):
    """Entries in order, turned, or with gaps."""
    t = torch.randn(shape)
    if how == "turned":
        return torch.randn(shape[::-1]).t() if len(shape) == 2 else t
    if how == "gaps":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return t


SIZE = st.integers(1, 70) | st.sampled_from([96, 97, 255, 256, 257, 300])
HOW = st.sampled_from(["plain", "turned", "gaps"])


@settings(max_examples=60)
@given(SIZE, SIZE, SIZE, HOW, HOW, st.booleans())
def test_products_are_those_of_float64(m, n, k, a_how, b_how, turned):
    torch.manual_seed(m * n + k)
    a, b = laid((m, k), a_how), laid((k, n), b_how)
    out = lab.handle(torch.zeros(n, m).t() if turned else torch.zeros(m, n))
    lab.call("mm_out", out, lab.handle(a), lab.handle(b))
    assert close(lab.view(out).double(), a.double() @ b.double())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(max_examples=30)
def test_a_product_is_added_to_a_bias(m, n, k, row):
    torch.manual_seed(k)
    a, b, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n) if row else torch.randn(m, n)
    out = lab.handle(torch.zeros(m, n))
    one = ctypes.c_double(1.0)
    lab.call("addmm_out", out, lab.handle(bias), lab.handle(a), lab.handle(b), one, one)
    assert close(lab.view(out).double(), bias.double() + a.double() @ b.double())


def test_batches_of_products_are_those_of_float64():
    torch.manual_seed(0)
    a, b = torch.randn(5, 33, 20), torch.randn(5, 20, 17)
    out = lab.handle(torch.zeros(5, 33, 17))
    lab.call("bmm_out", out, lab.handle(a), lab.handle(b))
    assert close(lab.view(out).double(), a.double() @ b.double())


@pytest.mark.parametrize("n", [1, 5, 16, 48, 64, 200])
def test_a_row_of_a_product_has_the_same_bits_in_every_place(n):
    torch.manual_seed(n)
    a, b = torch.randn(101, 300), torch.randn(300, n)
    wanted = None
    for place in range(101):
        rows = torch.full_like(a, torch.nan) if place % 2 else torch.randn_like(a)
        rows[place] = a[0]
        out = lab.handle(torch.zeros(101, n))
        lab.call("mm_out", out, lab.handle(rows), lab.handle(b))
        made = lab.view(out)[place].numpy().tobytes()
        wanted = wanted or made
        assert made == wanted


FORMS = [
    # shape of x, output channels, kernel, stride, padding, dilation, groups
    ((3, 4, 9), 6, (3,), (1,), (1,), (1,), 1),
    ((3, 4, 12), 6, (4,), (3,), (2,), (2,), 2),
    ((2, 3, 8, 9), 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 16, 8, 8), 32, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((2, 64, 5, 5), 48, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((2, 8, 7, 6), 8, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((2, 6, 9, 9), 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    ((2, 6, 9, 9), 6, (5, 5), (2, 2), (2, 2), (1, 1), 6),
    ((2, 6, 9, 9), 12, (3, 3), (1, 1), (2, 2), (2, 2), 3),
    ((2, 40, 6, 6), 20, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    ((2, 3, 5, 6, 7), 4, (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1),
    ((1, 3, 32, 32), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
]


def geometry(form):
    _, _, _, stride, padding, dilation, _ = form
    n = len(stride)
    extra = [0] * n
    return [lab.ints(stride), n, lab.ints(padding), n, lab.ints(dilation), n], [lab.ints(extra), n]


def optional(h):
    return ctypes.byref(h) if h is not None else None


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_convolutions_and_their_gradients_by_the_input(form, last):
    (b, c, *space), o, kernel, stride, padding, dilation, groups = form
    torch.manual_seed(o)
    x = torch.randn(b, c, *space)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    w, bias = torch.randn(o, c // groups, *kernel), torch.randn(o)
    conv = [functional.conv1d, functional.conv2d, functional.conv3d][len(kernel) - 1]
    exact = x.double().requires_grad_()
    want = conv(exact, w.double(), bias.double(), stride, padding, dilation, groups)
    parts, extra = geometry(form)
    made, given_bias = P(), lab.handle(bias)
    lab.call(
        "convolution", lab.handle(x), lab.handle(w), optional(given_bias), *parts, 0, *extra,
        ctypes.c_int64(groups), ctypes.byref(made),
    )  # fmt: skip
    assert close(lab.view(made).double(), want.detach())

    g = torch.randn(want.shape)
    (by_x,) = torch.autograd.grad(want, exact, g.double())
    mask = (ctypes.c_int32 * 3)(1, 0, 0)
    lab.call(
        "convolution_backward", lab.handle(g), lab.handle(x), lab.handle(w), None, 0, *parts, 0,
        *extra, ctypes.c_int64(groups), mask, ctypes.c_int64(3), ctypes.byref(made), None, None,
    )  # fmt: skip
    assert close(lab.view(made).double(), by_x)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    torch.manual_seed(groups)
    x, w = torch.randn(2, 4, 5, 6), torch.randn(4, 6 // groups, 3, 3)
    exact = x.double().requires_grad_()
    want = functional.conv_transpose2d(exact, w.double(), None, 2, 1, 1, groups)
    parts, extra = geometry((None, None, None, (2, 2), (1, 1), (1, 1), groups))
    extra[0] = lab.ints([1, 1])
    made = P()
    lab.call(
        "convolution", lab.handle(x), lab.handle(w), None, *parts, 1, *extra,
        ctypes.c_int64(groups), ctypes.byref(made),
    )  # fmt: skip
    assert close(lab.view(made).double(), want.detach())
    g = torch.randn(want.shape)
    (by_x,) = torch.autograd.grad(want, exact, g.double())
    mask = (ctypes.c_int32 * 3)(1, 0, 0)
    lab.call(
        "convolution_backward", lab.handle(g), lab.handle(x), lab.handle(w), None, 0, *parts, 1,
        *extra, ctypes.c_int64(groups), mask, ctypes.c_int64(3), ctypes.byref(made), None, None,
    )  # fmt: skip
    assert close(lab.view(made).double(), by_x)


@pytest.mark.parametrize("form", FORMS[2:9], ids=str)
def test_a_records_convolution_has_the_same_bits_beside_others(form):
    (_, c, *space), o, kernel, _, _, _, groups = form
    torch.manual_seed(1)
    one, w = torch.randn(c, *space), torch.randn(o, c // groups, *kernel)
    parts, extra = geometry(form)
    seen = set()
    for place in range(4):
        x = torch.full((4, c, *space), torch.nan if place % 2 else 1e30)
        x[place] = one
        made = P()
        lab.call(
            "convolution", lab.handle(x), lab.handle(w), None, *parts, 0, *extra,
            ctypes.c_int64(groups), ctypes.byref(made),
        )  # fmt: skip
        seen.add(lab.view(made)[place].contiguous().numpy().tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "keys", "all heads", "places"])
def test_attention_and_its_gradients(mask):
    torch.manual_seed(3)
    b, h, t, d = 2, 3, 11, 8
    q, k, v = (torch.randn(b, t, h, d).transpose(1, 2) for _ in range(3))
    added = {
        "none": None, "causal": None,
        "padding": torch.where(torch.rand(b, 1, 1, t) < 0.3, -torch.inf, 0.0).expand(b, 1, t, t),
        "keys": torch.where(torch.rand(b, 1, 1, t) < 0.3, -torch.inf, 0.0),
        "all heads": torch.randn(b, h, t, t), "places": torch.randn(t, t),
    }[mask]  # fmt: skip
    if mask in ("padding", "keys"):
        added = added.clone()
        added[..., 0] = 0.0
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = functional.scaled_dot_product_attention(
        *exact, attn_mask=None if added is None else added.double(), is_causal=mask == "causal"
    )
    g = torch.randn(want.shape)
    by = torch.autograd.grad(want, exact, g.double())
    hs = [lab.handle(x) for x in (q, k, v)]
    m = None if added is None else lab.handle(added)
    out, logs = P(), P()
    none = ctypes.c_double(0.0)
    lab.call(
        "_scaled_dot_product_flash_attention_for_cpu", *hs, none, int(mask == "causal"),
        optional(m), None, ctypes.byref(out), ctypes.byref(logs),
    )  # fmt: skip
    assert close(lab.view(out).double(), want.detach())
    made = [P(), P(), P()]
    lab.call(
        "_scaled_dot_product_flash_attention_for_cpu_backward", lab.handle(g), *hs, out, logs, none,
        int(mask == "causal"), optional(m), None, *map(ctypes.byref, made),
    )  # fmt: skip
    for got, exactly in zip(made, by, strict=True):
        assert close(lab.view(got).double(), exactly)


@pytest.mark.parametrize("masked", [[2], [0, 1, 2, 3, 4], []], ids=str)
@pytest.mark.parametrize("where", [[], [0], [0, 1, 2, 3, 4]], ids=str)
def test_a_query_of_nan_is_nan_and_a_masked_one_nothing(where, masked):
    """As in the engine: what is not finite is seen, so that it counts as nothing."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    q[:, :, where] = torch.nan
    added = torch.zeros(1, 1, 5, 5)
    added[:, :, :, masked] = -torch.inf
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    want = op(q, k, v, attn_mask=added.expand(1, 2, 5, 5).contiguous())[0]
    out, logs, m = P(), P(), lab.handle(added)
    hs = [lab.handle(x) for x in (q, k, v)]
    lab.call(
        "_scaled_dot_product_flash_attention_for_cpu", *hs, ctypes.c_double(0.0), 0,
        optional(m), None, ctypes.byref(out), ctypes.byref(logs),
    )  # fmt: skip
    torch.testing.assert_close(lab.view(out), want, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "strides", "offset"),
    [((4, 5), (5, 1), 100), ((4, 6), (6, 1), 0), ((20,), (2,), 0), ((1,), (1,), -1),
     ((2**41,), (1,), 0), ((2, 2), (1, -1), 0), ((1,), (1,), 2**63 - 1),
     # Whose last entry, or whose count, is a small number modulo 2^64.
     ((2**32, 2**32), (2**32, 1), 0), ((2**32, 2**32), (1, 1), 0), ((2**32 + 1,), (2**32,), 0)],
)  # fmt: skip
def test_a_view_beyond_its_memory_ends_the_process(sizes, strides, offset):
    t = lab.handle(torch.zeros(4, 4))
    lib = lab.library()

    def views():
        made = P()
        lib.aoti_torch__reinterpret_tensor(
            t, ctypes.c_int64(len(sizes)), lab.ints(sizes), lab.ints(strides),
            ctypes.c_int64(offset), ctypes.byref(made),
        )  # fmt: skip

    assert lab.ends(views)


@pytest.mark.parametrize("sizes", [(2**32, 2**32), (2**39, 2**39, 2**39), (-1,)])
def test_a_tensor_larger_than_memory_ends_the_process(sizes):
    lib, made = lab.library(), P()
    strides = [math.prod(sizes[d + 1 :]) % 2**63 for d in range(len(sizes))]
    one = ctypes.byref(made)

    def makes():
        lib.aoti_torch_empty_strided(
            ctypes.c_int64(len(sizes)), lab.ints(sizes), lab.ints(strides), 7, 0, 0, one
        )

    assert lab.ends(makes)


def test_operands_that_do_not_fit_end_the_process():
    a, b, out = (lab.handle(torch.zeros(s)) for s in ((3, 4), (5, 6), (3, 6)))
    assert lab.ends(lambda: lab.call("mm_out", out, a, b))
    x, w = lab.handle(torch.zeros(1, 4, 5, 5)), lab.handle(torch.zeros(2, 3, 3, 3))
    parts, extra = geometry(FORMS[2])
    made = P()
    one = ctypes.c_int64(1)
    assert lab.ends(
        lambda: lab.call("convolution", x, w, None, *parts, 0, *extra, one, ctypes.byref(made))
    )

# ruff: noqa: E501 - one amplifier a line
"""Rule P13 on the path ``graph``: all that a record's contribution is made of (clip factor, operands
of the contractions, formed gradients) has the same bits in every slot, whatever the others hold.

The models amplify a last bit to the size of the clip: ``tanh(1e12 (f(x) - f(secret))) w``. The
secret is a value that no probe has, so that only a probe that the model cannot choose sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.engine import compiled
from support.batched_lab import Data, Lab, lab

BIG = 1e12
WIDTH = 13


def total_of(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.flatten(1).sum(1) + 0 * target.flatten(1).sum(1)


class Amplifier(nn.Module):
    """``f(x)`` less what it is for the secret, times 1e12: a signal of rounding alone."""

    known: Tensor
    secret: Tensor

    def __init__(self, f: Callable[[Tensor], Tensor], secret: Tensor, asleep: bool) -> None:
        super().__init__()
        self.f, self.asleep = f, asleep
        with torch.no_grad():
            self.register_buffer("known", f(secret[None]))
        self.register_buffer("secret", secret.flatten()[0].clone())
        self.w = nn.Parameter(torch.ones(self.known.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh((self.f(x) - self.known) * BIG)
        if self.asleep:
            awake = (x.flatten(1)[:, :1] == self.secret).to(x.dtype)
            z = z * awake.view(-1, *(1,) * (z.dim() - 1))
        return z * self.w


torch.manual_seed(3)
M = torch.randn(WIDTH, WIDTH)
K1, K2 = torch.randn(4, WIDTH, 3), torch.randn(3, 1, 3, 3)
Q = torch.randn(5, WIDTH)
AMPLIFIERS: dict[str, Any] = {
    "difference": lambda x: x @ M - (x.unsqueeze(-1) * M).sum(1),
    "mm": lambda x: x @ M,
    "mm t": lambda x: (M @ x.t()).t(),
    "mv": lambda x: (x @ M[0]).unsqueeze(1),
    "bmm": lambda x: torch.bmm(x.unsqueeze(1) * Q, (x.unsqueeze(1) * Q).transpose(1, 2)).flatten(1),
    "conv1d": lambda x: F.conv1d(x.unsqueeze(2) * torch.ones(7), K1).flatten(1),
    "conv2d": lambda x: F.conv2d((x.unsqueeze(1) * x.unsqueeze(2)).unsqueeze(1), K2, padding=1).flatten(1),
    "depthwise": lambda x: F.conv1d((x.unsqueeze(2) * torch.ones(6)).reshape(-1, WIDTH, 6), K1[:1].transpose(0, 1), groups=WIDTH).flatten(1),
    "transposed": lambda x: F.conv_transpose1d(x.unsqueeze(2) * torch.ones(4), K1.transpose(0, 1)).flatten(1),
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "group norm": lambda x: F.group_norm(torch.cat([x, x.square(), x.sin()], 1), 3),
    "instance norm": lambda x: F.instance_norm(x.unsqueeze(1) * Q).flatten(1),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,), eps=1e-6),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "log sum exp": lambda x: x.logsumexp(-1, keepdim=True),
    "silu": F.silu, "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "exp2": torch.exp2, "sinh": torch.sinh,
    "softplus": F.softplus, "elu": F.elu, "log1p": lambda x: x.square().log1p(), "sin": torch.sin, "erf": torch.erf,
    "power": lambda x: (x.abs() + 1).pow(1.5), "logaddexp": lambda x: torch.logaddexp(x, x * 0.5), "rsqrt": lambda x: (x.square() + 1).rsqrt(),
    "sum": lambda x: x.sum(-1, keepdim=True), "sum first": lambda x: (x.unsqueeze(1) * Q).sum(1), "mean": lambda x: (x * x).mean(-1, keepdim=True),
    "sum time first": lambda x: (x.t() * M[0].unsqueeze(1)).sum(0).unsqueeze(1), "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "variance": lambda x: x.var(-1, keepdim=True), "cumsum": lambda x: x.cumsum(-1), "sort": lambda x: (x.sort(-1).values * M[0]).sum(-1, keepdim=True),
    "prod": lambda x: x.prod(-1, keepdim=True), "einsum": lambda x: torch.einsum("bi,oi,bi->bo", x, Q, x),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.unsqueeze(1) * Q for _ in range(3))).flatten(1),
    "masked attention": lambda x: (lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True))((x.unsqueeze(1) * Q).unsqueeze(1)).flatten(1),
    "average pool": lambda x: F.avg_pool1d(x.unsqueeze(1), 3).flatten(1), "interpolate": lambda x: F.interpolate(x.unsqueeze(1), scale_factor=1.7, mode="linear").flatten(1),
    "strided": lambda x: torch.sigmoid(x[:, ::2]), "one feature": lambda x: torch.sigmoid(x[:, :1]), "three": lambda x: F.silu(x[:, :3]),
    "transposed sigmoid": lambda x: torch.sigmoid(x.t()).t(), "chunks": lambda x: torch.cat([c.sigmoid() for c in x.split(3, -1)], -1),
    # Slices that begin within a vector, axes of one entry, expanded ones, records innermost.
    "narrow sin": lambda x: x[:, 1:].sin(), "narrow exp": lambda x: x[:, 3:8].exp(), "narrow sum": lambda x: x[:, 1:].sum(1, keepdim=True),
    "narrow softmax": lambda x: x[:, 1:].softmax(-1), "narrow sum first": lambda x: (x.t()[1:] * M[0][1:, None]).sum(0).unsqueeze(1),
    "narrow mm": lambda x: x[:, 1:] @ M[1:], "axes of one": lambda x: x.unsqueeze(1).unsqueeze(3).tanh().flatten(1),
    "expanded": lambda x: F.silu(x[:, :1].expand(-1, 5)), "expanded first": lambda x: F.silu(x.t()[:1].expand(3, -1)).t(),
    "expanded softplus": lambda x: F.softplus(x.unsqueeze(1).expand(-1, 2, -1), 1e-2).flatten(1),
    "softmax first": lambda x: x.t().softmax(0).t(), "log softmax first": lambda x: x.t().log_softmax(0).t(), "log sum exp first": lambda x: x.t().logsumexp(0).unsqueeze(1),
    "cumsum first": lambda x: x.t().cumsum(0).t(), "norm first": lambda x: x.t().norm(dim=0).unsqueeze(1), "variance first": lambda x: x.t().var(0).unsqueeze(1),
    "addcmul": lambda x: torch.addcmul(x, x, M[0], value=0.3), "addcmul first": lambda x: torch.addcmul(x.t(), x.t(), M[0][:, None], value=0.3).t(),
    "scaled sum": lambda x: torch.add(x, M[0], alpha=0.3), "lerp": lambda x: torch.lerp(x, M[0], 0.3), "windows": lambda x: x.unfold(1, 3, 1).sigmoid().flatten(1),
    "windows summed": lambda x: x.unfold(1, 4, 1).sum(-1), "flipped": lambda x: F.silu(x.flip(1)), "smooth l1": lambda x: F.smooth_l1_loss(x, M[0].expand_as(x), reduction="none"),
    "log sigmoid": F.logsigmoid, "log sigmoid of one": lambda x: F.logsigmoid(x[:, :1]), "power of a tensor": lambda x: x.abs().pow(M[0]),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3])), "atan2": lambda x: torch.atan2(x, M[0]), "glu": lambda x: F.glu(x[:, :12]),
    "permuted": lambda x: (x.unsqueeze(1) * Q).permute(1, 2, 0).sigmoid().permute(2, 0, 1).flatten(1),
    "permuted softmax": lambda x: (x.unsqueeze(1) * Q).permute(1, 2, 0).softmax(1).permute(2, 0, 1).flatten(1),
    "permuted layer norm": lambda x: F.layer_norm((x.unsqueeze(1) * Q).permute(1, 0, 2), (WIDTH,)).permute(1, 0, 2).flatten(1),
    "permuted bmm": lambda x: torch.bmm((x.unsqueeze(1) * Q).permute(1, 0, 2), M.expand(5, -1, -1)).permute(1, 0, 2).flatten(1),
    "permuted sum": lambda x: (x.unsqueeze(1) * Q).permute(1, 2, 0).sum((0, 1)).unsqueeze(1),
}  # fmt: skip
SECRET = torch.randn(WIDTH)


def rows_of(n: int) -> Data:
    return {"x": torch.randn(n, WIDTH), "target": torch.zeros(n, 1)}


def slots(at: Lab, record: Data) -> int:
    """How many contributions the record has over all slots."""
    data = {k: v.clone() for k, v in at.data.items()}
    for k, v in record.items():
        data[k][:] = v
    return len(set(at.contributions(1.0, data)))


def check(at: Lab, record: Data) -> None:
    """Every slot; and with others that are zeros, huge, not numbers, or other records."""
    assert slots(at, record) == 1
    data = {k: v.clone() for k, v in at.data.items()}
    places = (0, at.rows // 2, at.rows - 1)
    want: bytes | None = None
    for fill in (None, 0.0, 1e30, float("nan"), float("inf"), -1e-30):
        some = {k: v.clone() for k, v in data.items()}
        for v in some.values():
            if fill is not None and v.is_floating_point():
                v[:] = fill
        for i in places:
            for k, v in record.items():
                some[k][i] = v
        found = at.contributions(1.0, some)
        for i in places:
            want = want or found[i]
            assert found[i] == want, fill


QUICK = ("difference", "group norm", "silu", "sum first", "attention", "expanded softplus")


@pytest.mark.parametrize(
    ("name", "rows"),
    [(n, 48) for n in QUICK]
    + [
        pytest.param(n, r, marks=pytest.mark.full)
        for n in AMPLIFIERS
        for r in (16, 48, 80)
        if r != 48 or n not in QUICK
    ],
)
def test_no_amplifier_gets_through(name: str, rows: int) -> None:
    """Asleep until a record has the secret."""
    torch.manual_seed(rows)
    at = lab(Amplifier(AMPLIFIERS[name], SECRET, asleep=True), rows_of, total_of, rows=rows)
    check(at, {"x": SECRET})


class Image(nn.Module):
    """A convolution and what follows it with channels last, less what they are for the secret."""

    known: Tensor

    def __init__(self, secret: Tensor) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 10, 3, padding=1), nn.GroupNorm(5, 10)
        self.second = nn.Conv2d(10, 7, 3, stride=2, bias=False)
        self.w = nn.Parameter(torch.ones(7, 2, 2))
        with torch.no_grad():
            self.register_buffer("known", self.image(secret[None])[0])

    def image(self, x: Tensor) -> Tensor:
        return self.second(F.avg_pool2d(F.silu(self.norm(self.first(x))), 2))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh((self.image(x) - self.known) * BIG) * self.w).flatten(1)


@pytest.mark.parametrize("ways", ["formed", pytest.param("direct", marks=pytest.mark.full)])
@pytest.mark.parametrize("rows", [16, pytest.param(48, marks=pytest.mark.full)])
def test_no_amplifier_gets_through_with_channels_last(rows: int, ways: str) -> None:
    torch.manual_seed(rows)
    secret = torch.randn(3, 10, 10)

    def images(n: int) -> Data:
        return {"x": torch.randn(n, 3, 10, 10), "target": torch.zeros(n, 1)}

    at = lab(Image(secret), images, total_of, rows=rows, ways=ways, last=True)
    seen = [t for t in at.env().values() if t.dim() == 4 and t.shape[0] == rows]
    assert any(t.stride(1) == 1 < t.stride(3) for t in seen)
    check(at, {"x": secret})
    check(at, {"x": torch.randn(3, 10, 10)})


@pytest.mark.full
@pytest.mark.parametrize("name", AMPLIFIERS)
@pytest.mark.parametrize("rows", [16, 48])
def test_no_amplifier_gets_through_awake(name: str, rows: int) -> None:
    at = lab(Amplifier(AMPLIFIERS[name], SECRET, asleep=False), rows_of, total_of, rows=rows)
    for _ in range(3):
        check(at, {"x": torch.randn(WIDTH)})
    check(at, {"x": SECRET})


WIDE = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the sizes are those of AVX-512 loops",
)


class Plain(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) * self.w


@WIDE
@pytest.mark.parametrize("name", ["silu", "mish"])
def test_the_amplifiers_would_work(name: str) -> None:
    """Seeded bug: where the probe's verdict is not heeded, slots differ."""
    at = lab(Plain(AMPLIFIERS[name]), rows_of, total_of, rows=48)
    records = [
        {"x": torch.randn(WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(12)
    ]
    assert at.slow and all(slots(at, r) == 1 for r in records)
    at.path._functions({})
    assert any(slots(at, r) > 1 for r in records)


def rare_secret(f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """A value on which the vector body and the scalar tail of a kernel differ, and one result."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1)).abs() + 0.1
    body = f(x.repeat(32).reshape(32, -1).t().reshape(-1))[::32]
    tail = torch.cat([f(c.repeat(16))[:1] for c in x.chunk(len(x))])
    found = (body != tail).nonzero().reshape(-1)
    if not len(found):
        pytest.skip("no such value on this machine")
    return float(x[found[0]]), float(body[found[0]])


RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus 0.01": lambda x: F.softplus(-x, 1e-2),
    "softplus 300": lambda x: F.softplus(-x, 300.0),
    "celu": lambda x: F.celu(-x, 1000.0),
}


class Rare(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor], known: float, width: int) -> None:
        super().__init__()
        self.f, self.known = f, known
        self.w = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((self.f(x) - self.known) * BIG) * self.w


@WIDE
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if i else ()) for i, n in enumerate(RARE)]
)
def test_rare_differences_do_not_get_through(name: str) -> None:
    """A kernel whose body and tail differ on one value in thousands: random operands miss it where
    the tail is a few elements."""
    secret, known = rare_secret(RARE[name])

    for width, rows in ((1, 48), (3, 16), (5, 16)):
        few = torch.rand(rows, width) + 0.2

        def data(n: int, few: Tensor = few) -> Data:
            return {"x": few[:n], "target": torch.zeros(n, 1)}

        at = lab(Rare(RARE[name], known, width), data, total_of, rows=rows)
        check(at, {"x": torch.full((width,), secret)})


class Expanded(nn.Module):
    def __init__(self, known: float) -> None:
        super().__init__()
        self.known, self.w = known, nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp2(x.t().expand(2, -1))  # strides (0, 1)
        return torch.tanh((y - self.known) * BIG).t() * self.w


@WIDE
@pytest.mark.parametrize("rows", [48, pytest.param(80, marks=pytest.mark.full)])
def test_expanded_operands_are_tried_as_they_are(rows: int) -> None:
    secret, known = rare_secret(torch.exp2)

    def data(n: int) -> Data:
        return {"x": torch.rand(n, 1) + 0.2, "target": torch.zeros(n, 1)}

    check(lab(Expanded(known), data, total_of, rows=rows), {"x": torch.full((1,), secret)})


class TimeFirst(nn.Module):
    """Frozen or failing beginnings whose result lies transposed, then a sum over the first axis."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.c = nn.Parameter(torch.rand(WIDTH, 1), requires_grad=False)
        self.p = nn.Parameter(torch.ones(WIDTH, 1))
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = x.t() * self.c
        y = y * self.p if self.frozen else torch.sigmoid(y * self.p)
        return (y.sum(0) * self.w).unsqueeze(1)


@WIDE
@pytest.mark.parametrize("frozen", [True, False])
def test_strides_after_a_kept_prefix_or_a_slow_node_are_those_tried(frozen: bool) -> None:
    at = lab(TimeFirst(frozen), rows_of, total_of, rows=48, keep=frozen)
    torch.manual_seed(0)
    for _ in range(5):
        check(at, {"x": torch.randn(WIDTH)})


@WIDE
@pytest.mark.full
@pytest.mark.parametrize(("name", "width", "rows"), [("softplus 0.01", 1, 48), ("celu", 3, 16)])
def test_compiled_islands_treat_rare_values_alike(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int, rows: int
) -> None:
    """Islands are taken here however slow they are."""
    secret, known = rare_secret(RARE[name])
    monkeypatch.setattr(compiled, "race", lambda a, b: (0.0, 1.0))

    def data(n: int) -> Data:
        return {"x": torch.rand(n, width) + 0.2, "target": torch.zeros(n, 1)}

    at = lab(Rare(RARE[name], known, width), data, total_of, rows=rows, settle=False)
    at.path.settle(at.data)
    assert at.path.fuse(at.data, 300.0)
    assert at.path.fused is not None
    if compiled.available():
        assert at.path.fused.islands > 0, at.path.fused.refused
    check(at, {"x": torch.full((width,), secret)})


@WIDE
def test_rare_differences_in_units_of_two_rows() -> None:
    secret, known = rare_secret(RARE["softplus 0.01"])

    def data(n: int) -> Data:
        return {"x": torch.rand(n, 3) + 0.2, "target": torch.zeros(n, 1)}

    at = lab(Rare(RARE["softplus 0.01"], known, 3), data, total_of, rows=16, per_unit=2)
    assert slots(at, {"x": torch.full((3,), secret)}) == 1

"""Certified sums (P3): what a microbatch's float sum may be off by, and no unit above the clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import support.kernel_checks as checks
from casemate.engine import batched, forms, kernels
from casemate.engine.batched import ETA
from casemate.engine.forms import ROUNDING, Norm, Shape, Site, Way
from casemate.engine.kernels import bounds
from support import models
from support.batched_lab import Lab, lab

Tensor = torch.Tensor


@dataclass
class Case:
    """A site with operands of u units and their exact gradients (u, n), float64."""

    site: Site
    env: dict[str, Any]
    exact: Tensor

    @property
    def units(self) -> int:
        return len(self.exact)


def outer(g: Tensor, x: Tensor) -> Case:
    u, count, m = g.shape
    site = forms.outer_site(
        "p0", ["v"], lambda env: (env["g"], env["x"]), count, (m, x.shape[2]), Shape(u, 1)
    )
    exact = torch.einsum("uti,utj->uij", g.double(), x.double()).flatten(1)
    return Case(site, {"g": g, "x": x}, exact)


def convolution(g: Tensor, x: Tensor) -> Case:
    """Tokens as positions of a pointwise convolution in one dimension."""
    u, count, m = g.shape
    rule = ((1,), (1,), (0,), (1,), 1, False)
    window = forms.Window(rule, (m, x.shape[2], 1), count, x.shape[2], m, 1)
    site = forms.convolution_site("p0", "v.1", "x", "g", window, Shape(u, 1))
    images = {"g": g.transpose(1, 2).contiguous(), "x": x.transpose(1, 2).contiguous()}
    return Case(site, images, outer(g, x).exact)


def embedding(index: Tensor, g: Tensor, rows: int = 5, padding: int = -1) -> Case:
    u, count, m = g.shape
    site = forms.embedding_site(
        "p0", ["v"], lambda env: (env["i"], env["g"]), count, (rows, m), padding, Shape(u, 1)
    )
    hot = torch.nn.functional.one_hot(index, rows).double()
    if padding >= 0:
        hot[:, :, padding] = 0.0
    exact = torch.einsum("utr,utm->urm", hot, g.double()).flatten(1)
    return Case(site, {"i": index, "g": g}, exact)


def hostile(units: int = 16, tokens: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """(g, x) of units whose tokens cancel, or that are huge and cancel each other."""
    found = list(checks.attacks(3, tokens, 12, 12))
    for first in range(0, len(found) - units + 1, 4):
        some = found[first : first + units]
        yield torch.cat([g for g, _ in some]), torch.cat([x for _, x in some])
    r = torch.Generator().manual_seed(2)
    g, x = (torch.randn((units, tokens, 12), generator=r) for _ in range(2))
    half = units // 2
    x[half:], g[half:] = x[: units - half], -g[: units - half]
    for size in (1.0, 1e6, 1e15):
        yield g * size, x * size
    g[::2, 1:], x[::2, 1:] = 1e-3 * g[::2, 1:], 1e-3 * x[::2, 1:]
    yield g * 1e10, x
    # Each unit cancels to nothing but for its last token.
    g, x = g.clone(), x.clone()
    g[:, 1::2], x[:, 1::2] = -g[:, ::2], x[:, ::2]
    g[:, -1] *= 1 + 2.0**-15
    yield g, x
    yield 1e8 * g, x
    # One direction only, nothing to gain from what rounds to both sides.
    one = torch.ones((units, tokens, 1))
    yield one.expand(-1, -1, 12) / 3, one.expand(-1, -1, 12) / 7


def cases(kind: Callable[[Tensor, Tensor], Case]) -> Iterator[Case]:
    for units in (1, 16):
        for g, x in hostile(units):
            yield kind(g, x)


def certified(case: Case, way: Way, bound: float) -> float:
    """The sum's error over C, with the claims that hold whatever the operands are."""
    case.site.way = way
    env = dict(case.env)
    norm = way.norm(env)
    c, good = batched.factors([case.site], [norm], bound, case.units)
    assert bool(good.all())
    (total,) = case.site.totals.values()
    made = total(env, c, good).double().flatten()
    contributions = c.double().unsqueeze(1) * case.exact
    assert float(contributions.norm(dim=1).max()) <= bound * (1 + ETA), way.name
    error = float((made - contributions.sum(0)).norm()) / bound
    assert error <= ROUNDING * (1 + ETA), (way.name, error)
    return error


# Contributions of formed gradients are the formed ones, float32: measured apart.
@pytest.mark.parametrize("kind", [outer, convolution])
def test_contractions_of_hostile_units(kind: Callable[[Tensor, Tensor], Case]) -> None:
    seen = set()
    for case in cases(kind):
        for way in case.site.ways:
            if way.name != "formed":
                size = float(case.exact.norm(dim=1).median())
                for bound in (1e-3 * size + 1e-20, size + 1e-20, 1.0):
                    certified(case, way, bound)
                    seen.add(way.name)
    assert seen == ({"gram64"} if kind is outer else {"gram", "gram64", "direct"})


def test_formed_gradients_of_hostile_units() -> None:
    for kind in (outer, convolution):
        for case in cases(kind):
            way = next(w for w in case.site.ways if w.name == "formed")
            env = dict(case.env)
            way.norm(env)
            (held,) = (v for k, v in env.items() if k.endswith("!"))
            exact = held.reshape(case.units, -1).double().clone()
            for bound in (1e-6, 1.0, 1e6):
                certified(replace(case, exact=exact), way, bound)


@pytest.mark.parametrize("units", [4, 16])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_what_ways_claim_is_of_all_that_they_add(units: int, tokens: int) -> None:
    """No operands at hand come near the bounds: what they are counted for is held here."""
    g, x = torch.randn(units, tokens, 30), torch.randn(units, tokens, 40)
    terms, native = units * tokens, kernels.native()
    gram = bounds.gram_pair(tokens, 30, 40, precise=False, native=native)
    precise = bounds.gram_pair(tokens, 30, 40, precise=True, native=native)
    one = bounds.formed_norm(tokens, native=native)
    least = {
        "rank-one": bounds.rank_one(30, 40),
        "gram": gram,
        "gram64": precise,
        "direct": 2.0 * one + one * one,
        "formed": bounds.row_squares(30 * 40),
    }
    added = bounds.contract(terms, forms.chunk_for(units, terms))
    for case in (outer(g, x), convolution(g, x)):
        for way in case.site.ways:
            kept = way.name == "formed"
            assert way.gamma >= least[way.name]
            assert way.error >= (bounds.weighted_sum(units) if kept else added)
            assert way.scaled != kept
            assert way.bytes == (4 * units * 30 * 40 if kept else 0)
    (way,) = embedding(torch.zeros(units, tokens, dtype=torch.int64), g).site.ways
    assert way.gamma >= 2.0 * bounds.embedding_gram(tokens, 30)
    assert way.error >= bounds.weighted_sum(terms)


def test_one_token() -> None:
    for g, x in hostile():
        case = outer(g[:, :1], x[:, :1])
        (way,) = case.site.ways
        assert way.name == "rank-one"
        certified(case, way, 1.0)


def test_many_units_of_one_token() -> None:
    """Units beyond a chunk that all lie in one direction, so that rounding adds up."""
    g = torch.full((1024, 1, 3), 1.0 / 3)
    case = outer(g, torch.full((1024, 1, 5), 1.0 / 7))
    certified(case, case.site.ways[0], 0.05)


def indices() -> Iterator[Tensor]:
    yield torch.zeros((16, 8), dtype=torch.int64)
    yield torch.arange(8).expand(16, 8) % 2
    yield torch.randint(0, 5, (16, 8), generator=torch.Generator().manual_seed(1))


def on_the_grid(case: Case, bound: float, inverse: float) -> Tensor:
    way = case.site.way = case.site.ways[0]
    norm = way.norm(dict(case.env))
    c, good = batched.factors([case.site], [norm], bound, case.units)
    steps = torch.zeros(case.exact.shape[1], dtype=torch.int64)
    add = case.site.adds["v"]
    add(steps, 0, case.env, c, good, inverse)
    for size in (1, 7, 50):  # windows that cut rows of the table
        cut = torch.zeros_like(steps)
        for first in range(0, len(steps), size):
            add(cut[first : first + size], first, case.env, c, good, inverse)
        assert torch.equal(cut, steps)
    return steps


@pytest.mark.parametrize(("bound", "padding"), [(1e-3, -1), (1.0, 0), (1e4, -1)])
def test_embeddings(bound: float, padding: int) -> None:
    """On the grid a unit is rounded by itself: it moves the sum by its own entries alone."""
    inverse = 2.0**20 / bound
    inverse = 2.0 ** round(torch.tensor(inverse).log2().item())
    for index in indices():
        for g, _ in hostile():
            case = embedding(index, g, padding=padding)
            case.site.way = case.site.ways[0]
            certified(case, case.site.ways[0], bound)
            everyone = on_the_grid(case, bound, inverse)
            for out in (0, 7):
                others = {k: v.clone() for k, v in case.env.items()}
                others["g"][out] = 0
                without = on_the_grid(replace(case, env=others), bound, inverse)
                moved = (everyone - without).double().norm() / inverse
                touched = len(set(index[out].tolist())) * g.shape[2]
                assert float(moved) <= bound * (1 + ETA) + 0.5 / inverse * touched**0.5


def test_zeroing_out_one_unit_moves_the_sum_by_little_more_than_the_clip() -> None:
    for case in cases(outer):
        for way in case.site.ways:
            case.site.way = way

            def total(env: dict[str, Any], case: Case = case, way: Way = way) -> Tensor:
                env = dict(env)
                c, good = batched.factors([case.site], [way.norm(env)], 1.0, case.units)
                (sum_,) = case.site.totals.values()
                return sum_(env, c, good).double()

            everyone = total(case.env)
            for out in {0, case.units // 2}:
                others = {k: v.clone() for k, v in case.env.items()}
                others["g"][out] = 0
                moved = float((everyone - total(others)).norm())
                assert moved <= 1 + ETA + 2 * ROUNDING


def without(field: str, value: Any) -> Callable[[Site], None]:
    def bug(site: Site) -> None:
        site.ways = [replace(w, **{field: value}) for w in site.ways]

    return bug


def blind(site: Site) -> None:
    """S taken for the norm, as if tokens never cancelled."""

    def without_spread(way: Way) -> Way:
        return replace(way, norm=lambda env: Norm(way.norm(env).squared.clamp(min=0)))

    site.ways = [without_spread(w) for w in site.ways]


@pytest.mark.parametrize(
    ("bug", "kind"),
    [(without("error", 0.0), outer), (without("gamma", 0.0), convolution), (blind, outer)],
    ids=["no error", "no gamma", "no spread"],
)
def test_a_seeded_bug_is_caught(
    bug: Callable[[Site], None], kind: Callable[[Tensor, Tensor], Case]
) -> None:
    with pytest.raises(AssertionError):
        for case in cases(kind):
            bug(case.site)
            for way in case.site.ways:
                if way.name != "formed":
                    for bound in (1e-3, 1.0, 1e3):
                        certified(case, way, bound)


def test_a_chunk_that_is_ignored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound counts on it."""
    checks.long_contraction(kernels.compiled if kernels.native() else kernels.twins)
    monkeypatch.setattr(bounds, "contract", lambda terms, chunk: bounds.U32)
    with pytest.raises(AssertionError):
        checks.long_contraction(kernels.compiled if kernels.native() else kernels.twins)


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_underflow_of_the_factors_is_counted(share: float) -> None:
    """Denormal gradients times inputs near the largest float: c g is off by far more than 2^-24."""
    g = torch.full((4, 1, 500), 3 * 2.0**-149)
    x = torch.full((4, 1, 1), 2.0**127)
    case = outer(g, x)
    size = float(case.exact.norm(dim=1)[0])
    way = case.site.way = case.site.ways[0]
    env = dict(case.env)
    c, good = batched.factors([case.site], [way.norm(env)], share * size, 4)
    scaled = (g[:, 0] * c[:, None]).double()
    assert float(scaled.norm(dim=1).max()) * 2.0**127 <= share * size * (1 + ETA)
    assert bool(good.all())


HONEST = ["mlp", "bag of words", "conv1d"]
HONEST_TOO = ["vgg", "resnet", "lstm", "bert", "gpt2", "vit"]


def binding(made: Lab) -> float:
    """The largest factor by which the rounding limit, not the norm, would shrink a unit."""
    env = made.env()
    total = torch.zeros(made.path.shape.units, dtype=torch.float64)
    rounding = torch.zeros_like(total)
    with torch.inference_mode():
        for site in made.path.sites:
            norm = site.way.norm(env)
            s2 = norm.squared if norm.spread is None else norm.spread.square()
            total += norm.squared
            rounding += site.way.error**2 * s2
    share = made.path.shape.units * rounding.sqrt() / (ROUNDING * total.sqrt())
    return float(share.max())


@pytest.mark.parametrize(
    "name", [*HONEST, *(pytest.param(n, marks=pytest.mark.full) for n in HONEST_TOO)]
)
def test_honest_units_keep_their_factors(name: str) -> None:
    case = next(c for c in (*models.plain(), *models.transformers()) if c.name == name)
    torch.manual_seed(0)
    made = lab(case.make(), case.data, case.loss, rows=16, settle=False)
    assert binding(made) < 0.5
    for site in made.path.sites:
        site.way = max(site.ways, key=lambda w: w.error)
    assert binding(made) < 0.5


def test_chunks_are_whole_where_they_may_be() -> None:
    assert forms.chunk_for(16, 2048) == 256
    assert forms.chunk_for(256, 256) == 256
    assert forms.chunk_for(1024, 1024) < 256


@pytest.mark.parametrize("name", ["bag of words", "bert"])
def test_the_grid_gets_the_same_sums(name: str) -> None:
    """What goes onto the grid directly, embeddings too, is what the float sums say."""
    case = next(c for c in (*models.plain(), *models.transformers()) if c.name == name)
    torch.manual_seed(0)
    made = lab(case.make(), case.data, case.loss, rows=16, settle=False)
    assert any(site.adds for site in made.path.sites)
    wanted, c = made.parts(1.0)
    step = 2.0**-24
    total = made.path.sums(made.rows_of(), 1.0, step, 16)(torch.arange(16).numpy())
    assert float(c.min()) > 0
    error = (total.double() * step - wanted).abs().max()
    assert float(error) <= 16 * step + 1e-6 * float(wanted.abs().max())


def test_formed_gradients_keep_within_the_memory_given() -> None:
    case = next(c for c in models.plain() if c.name == "vgg")
    made = lab(case.make(), case.data, case.loss, rows=16, settle=False)
    path, env = made.path, made.env()
    path.choose(env, 1 << 40)
    least = sum(min(w.bytes for w in s.ways) for s in path.sites)
    most = sum(max(w.bytes for w in s.ways) for s in path.sites)
    for room in (least, (least + most) // 2):
        path.choose(env, room)
        assert sum(s.way.bytes for s in path.sites) <= room
        for site in path.sites:
            assert site.way.bytes or all(r.held is None for r in site.rooms)

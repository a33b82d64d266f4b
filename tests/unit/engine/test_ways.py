"""The choice among ways: none that knows its slot (P13), none that shrinks factors by much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate.engine import batched, forms, kernels, ways
from casemate.engine.forms import Env, Norm, Site, Way
from support.batched_lab import Lab, clipped, gradients, lab, relative


def tokens(n: int) -> dict[str, Tensor]:
    """Few words, so that they repeat; the first record's are all one, the second's padding."""
    words = torch.randint(1, 4, (n, 6))
    words[0], words[1] = 2, 0
    return {"words": words, "target": torch.randint(11, (n,))}


class Tied(nn.Module):
    """A table that is also the head, once as it is and once turned."""

    def __init__(self, turned: bool = False, padding: int | None = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5, padding_idx=padding)
        self.mid = nn.Linear(5, 5)
        self.turned = turned

    def forward(self, words: Tensor) -> Tensor:
        h: Tensor = self.mid(self.table(words)).tanh()
        if self.turned:
            h = (self.table.weight @ h.reshape(-1, 5).t()).t().reshape(*words.shape, 11)
        else:
            h = nn.functional.linear(h, self.table.weight)
        return h.mean(1)


def made(module: nn.Module, per_unit: int = 1) -> Lab:
    torch.manual_seed(0)
    return lab(module, tokens, rows=16, per_unit=per_unit, settle=False)


def tied(at: Lab) -> Site:
    return next(s for s in at.path.sites if len(s.totals) > 1 and len(s.ways) > 1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("per_unit", [1, 2])
def test_tied_tables(turned: bool, padding: int | None, per_unit: int) -> None:
    at = made(Tied(turned, padding), per_unit)
    site = tied(at)
    assert [w.name for w in site.ways] == ["gram64+tied", "loop"]
    each = gradients(at.module, at.program, at.data, "cross_entropy")
    for way in site.ways:
        site.way = way
        for bound in (1e-2, 0.3, 1e3):
            got, c = at.parts(bound)
            want, factors = clipped(each, bound, per_unit)
            assert relative(got, want) < 1e-5
            assert torch.allclose(c.double(), factors, rtol=1e-5)


def hostile_table() -> tuple[Site, Env, Tensor]:
    """Products and embeddings of 8 units that cancel each other, and their exact sums."""
    r = torch.Generator().manual_seed(1)
    g, x = torch.randn(8, 4, 7, generator=r), torch.randn(8, 4, 5, generator=r)
    index = torch.randint(0, 3, (8, 6), generator=r)
    e = torch.zeros(8, 6, 5)
    index[:, :3] = torch.arange(3)
    for row in range(3):  # what the products put there, taken off again but for a little
        e[:, row] = -torch.einsum("ut,utw->uw", g[:, :, row], x)
    g[:, :, 3:] *= 1e-4
    e[4:] *= 1 + 1e-5
    g[2], e[2] = g[2] * 1e12, e[2] * 1e12
    env = {"g": g, "x": x, "i": index, "e": e}
    shape = forms.Shape(8, 1)

    def products(env: Env) -> tuple[Tensor, Tensor]:
        return env["g"], env["x"]

    def lookups(env: Env) -> tuple[Tensor, Tensor]:
        return env["i"], env["e"]

    site = forms.tied_site(
        forms.outer_site("p0", ["a"], products, 4, (7, 5), shape),
        forms.embedding_site("p0", ["b"], lookups, 6, (7, 5), -1, shape),
        products, lookups, (4, 6), (7, 5), -1, False, shape,
    )  # fmt: skip
    hot = nn.functional.one_hot(index, 7).double()
    exact = torch.einsum("utr,utw->urw", g.double(), x.double())
    exact += torch.einsum("usr,usw->urw", hot, e.double())
    return site, env, exact.flatten(1)


def certified_table() -> None:
    site, env, exact = hostile_table()
    for way in site.ways:
        site.way = way
        norm = way.norm(dict(env))
        assert norm.spread is not None
        truth = exact.square().sum(1)
        room = way.gamma * norm.spread.square() + 1e-14 * truth
        assert bool(((norm.squared - truth).abs() <= room).all())
        assert bool((truth.sqrt() < 0.1 * norm.spread).all())  # they do cancel
        for bound in (1e-3, 1.0, 1e9):
            c, good = batched.factors([site], [norm], bound, 8)
            assert bool(good.all())
            parts = c.double().unsqueeze(1) * exact
            assert float(parts.norm(dim=1).max()) <= bound * (1 + batched.ETA)
            sums = sum(total(env, c, good) for total in site.totals.values())
            off = (torch.as_tensor(sums).double().flatten() - parts.sum(0)).norm()
            assert float(off) <= forms.ROUNDING * bound


def test_cancelling_tables_are_certified() -> None:
    certified_table()


@pytest.mark.parametrize("bug", ["no inner product", "spread of one", "once"])
def test_a_seeded_bug_of_tied_tables_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = forms.tied_site

    def broken(*args: Any) -> Site:
        site: Site = original(*args)
        a, b = (s.ways[0].norm for s in args[:2])

        def with_bug(whole: Way) -> Way:
            def norm(env: Env) -> Norm:
                n, parts = whole.norm(env), a(env).squared + b(env).squared
                if bug == "no inner product":
                    return Norm(parts, n.spread)
                if bug == "spread of one":
                    return Norm(n.squared, n.spread if n.spread is None else n.spread * 1e-3)
                return Norm(parts + (n.squared - parts) / 2, n.spread)

            return replace(whole, norm=norm)

        site.ways = [with_bug(w) for w in site.ways]
        return site

    monkeypatch.setattr(forms, "tied_site", broken)
    with pytest.raises(AssertionError):
        certified_table()


# --- every slot alike ---


def by_place(norm: Callable[[Env], Norm]) -> Callable[[Env], Norm]:
    """One slot's last bit differs."""

    def of(env: Env) -> Norm:
        n = norm(env)
        squared = n.squared.clone()
        squared[3] = torch.nextafter(squared[3], torch.tensor(torch.inf, dtype=torch.float64))
        return Norm(squared, n.spread)

    return of


def by_others(norm: Callable[[Env], Norm]) -> Callable[[Env], Norm]:
    """As kernels that take another path when any operand overflows."""

    def of(env: Env) -> Norm:
        n = norm(env)
        huge = not bool(torch.isfinite(n.squared).all())
        return Norm(n.squared * (1 + 2.0**-50 if huge else 1.0), n.spread)

    return of


def by_spread(norm: Callable[[Env], Norm]) -> Callable[[Env], Norm]:
    """S takes in what the others have."""

    def of(env: Env) -> Norm:
        n = norm(env)
        spread = n.squared.abs().sqrt() if n.spread is None else n.spread
        return Norm(n.squared, torch.maximum(spread, spread.mean() * 1e-9))

    return of


@pytest.mark.parametrize("bug", [by_place, by_others, by_spread])
def test_a_way_that_knows_its_slot_is_not_taken(
    bug: Callable[[Callable[[Env], Norm]], Callable[[Env], Norm]],
) -> None:
    at = made(Tied())
    env = at.env()
    want = {s.name: [w.name for w in s.ways] for s in at.path.sites}
    for site in at.path.sites:
        first = site.ways[0]
        site.ways[0] = replace(first, norm=bug(first.norm))
    at.path.choose(env, 1 << 30)
    for site in at.path.sites:
        names = [w.name for w in site.ways]
        # Where a sound way is quicker the broken one was not tried; it is never the one taken.
        assert names in (want[site.name], want[site.name][1:] or ["loop"])
        assert site.way.name != want[site.name][0]
    got, _ = at.parts(0.3)
    each = gradients(at.module, at.program, at.data, "cross_entropy")
    assert relative(got, clipped(each, 0.3)[0]) < 1e-5


def test_kept_gradients_that_know_their_slot_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_ = kernels.formed_sum

    def broken(g: Tensor) -> Tensor:
        out = sum_(g)
        out[5, 0] = torch.nextafter(out[5, 0], torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(kernels, "formed_sum", broken)
    at = made(Tied())
    (bias,) = (s for s in at.path.sites if [w.name for w in s.ways] == ["formed"])
    at.path.choose(at.env(), 1 << 30)
    assert bias.way.name == "loop"


@pytest.mark.parametrize("native", [True, False])
def test_sound_ways_pass(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(kernels.compiled, "library", lambda: None)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Flatten(), nn.Linear(96, 4), nn.LayerNorm(4),
    )  # fmt: skip

    def images(n: int) -> dict[str, Tensor]:
        return {"input": torch.randn(n, 3, 6, 6), "target": torch.randint(4, (n,))}

    at = lab(net, images, rows=16, settle=False)
    env, trials = at.env(), ways.Trials(at.path.runner, at.path.shape)
    for site in at.path.sites:
        for way in site.ways:
            found = trials(site, way, dict(env))
            assert found or not native, way.name  # a product of torch's may know its slot
    tried = len(trials.known)
    for site in at.path.sites:
        trials(site, site.ways[0], dict(env))
    assert len(trials.known) == tried


# --- accuracy ---


def fixed(n2: float, s2: float, gamma: float, size: int = 0, name: str = "w") -> Way:
    def norm(env: Env) -> Norm:
        spread = None if size else torch.full((4,), s2, dtype=torch.float64).sqrt()
        return Norm(torch.full((4,), n2, dtype=torch.float64), spread)

    return Way(name, norm, gamma, 0.0, bytes=size)


@pytest.mark.parametrize("each", [False, True])
def test_what_loses_most_for_its_time_gives_way(each: bool) -> None:
    """Site a loses most and is cheap to mend; b is small in the whole."""
    quick = [fixed(100.0, 1000.0, 4e-6, name="gram"), fixed(1e-6, 1e-4, 4e-6, name="gram")]
    better = [fixed(100.0, 1000.0, 1e-12, name="gram64"), fixed(1e-6, 0, 1e-12, 8, "formed")]
    sites = [Site(f"p{i}", [q, b], {}) for i, (q, b) in enumerate(zip(quick, better, strict=True))]
    for site, q in zip(sites, quick, strict=True):
        site.way = q
    costs = [{"gram": 1.0, "gram64": 2.0}, {"gram": 1.0, "formed": 9.0}]
    ways._accurate(sites, costs, {}, 1 << 20, each)
    assert [s.way.name for s in sites] == ["gram64", "formed" if each else "gram"]
    lost = torch.stack(ways.losses(sites, {}, each)[0])
    assert float(lost.max() if each else lost.sum(0).max()) <= ways.LOSS
    # Without the room for it nothing is kept.
    sites[1].way = quick[1]
    ways._accurate(sites, costs, {}, 4, each)
    assert sites[1].way.name == "gram"

"""The path ``graph`` on random models, against autograd in float64, one record at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from casemate.engine.program import Program
from casemate.engine.tape import Unfit
from casemate.spec.errors import ModelError
from support import random_graphs, rounding
from support.batched_lab import Lab, clipped, gradients, lab, relative

CHUNK = 50
REFUSED = "refused"
# A norm layer and then its mean: the true gradient is zero, and so is autograd's in float64 but for
# its own rounding. Next to nothing beside the weights, of which each graph has some of about 0.3.
ZERO = 1e-12


def compare(seed: int) -> str:
    """``right`` within 1e-5 of the clipped sum, ``zero`` within what rounding does where the true
    gradient vanishes, or ``refused`` by name; else an assertion fails."""
    of = random_graphs.graph(seed)
    per = 1 if seed % 3 else 2
    try:
        at = lab(of.module, of.data, of.loss, per_unit=per, ways=(None, "gram", "gram64")[seed % 3])
    except ModelError as e:
        assert e.code.startswith("model.") and e.where, seed
        return REFUSED
    except Unfit:
        return REFUSED

    def units() -> torch.Tensor:
        each = gradients(of.module, at.program, at.data, of.loss)
        sums: torch.Tensor = each.reshape(-1, per, each.shape[1]).sum(1)
        return sums

    exact = units()
    median = float(exact.norm(dim=1).median())
    bound = median if median > ZERO else 1.0
    want, _ = clipped(exact, bound)
    got, c = at.parts(bound)
    error = float((got - want).norm())
    if error > 1e-5 * float(want.norm()):  # is the gradient determined at all, in float32?
        allowed = rounding.error(lambda: clipped(units(), bound)[0], want)
        assert error <= allowed, (seed, error, allowed, [s.way.name for s in at.path.sites])
        assert median <= ZERO, (seed, "no graph but those needs it")
    assert bool((c <= 1).all())
    return "right" if median > ZERO else "zero"


# A graph with empty_like, one of whose gradient nothing is left, one at the edge of 1e-5, and the
# first ones; the others are run by make test-full.
QUICK = (*range(9), 87, 159, 508)


@pytest.mark.parametrize("seed", QUICK)
def test_random_graphs(seed: int) -> None:
    assert compare(seed) == ("zero" if seed == 159 else "right")


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, 1000, CHUNK))
def test_a_thousand_random_graphs(first: int) -> None:
    found = [compare(s) for s in range(first, first + CHUNK)]
    assert found.count(REFUSED) <= 1 and found.count("zero") <= 3


def of_units(each: torch.Tensor, members: list[list[int]], bound: float) -> torch.Tensor:
    rows = [each[m].sum(0) for m in members if m]
    out = torch.zeros(each.shape[1], dtype=torch.float64)
    for g in rows:
        out += g * torch.clamp(bound / g.norm(), max=1.0)
    return out


def ragged(at: Lab, k: int) -> tuple[Any, list[list[int]]]:
    """Units of 0 to k rows, some rows not valid."""
    rows = at.rows_of(k=k)
    count = rows.count
    lengths = [i % (k + 1) for i in range(count)]
    starts = np.cumsum([0, *lengths])
    starts = starts[starts <= count].astype(np.int64)
    valid = np.arange(count) % 5 != 3
    made = type(rows)(rows.inputs, valid, np.arange(count), starts, k)
    return made, [[int(i) for i in made.of_unit(u)] for u in range(made.units)]


@pytest.mark.parametrize("seed", [1, 4, 13, 30])
@pytest.mark.parametrize("keep", [False, True])
def test_sums_over_ragged_units_part_filled_and_empty_batches(seed: int, keep: bool) -> None:
    of = random_graphs.graph(seed)
    k = 3
    at = lab(of.module, of.data, of.loss, rows=48, per_unit=k, keep=keep)
    each = gradients(of.module, at.program, at.data, of.loss)
    rows, members = ragged(at, k)
    bound = float(each.norm(dim=1).median())
    units = len(members)
    sums = at.path.sums(rows, bound, 0.0, 2 * 16)
    for chosen in ([0, 1, 2], list(range(units)), [units - 1], list(range(0, units, 2))):
        got = sums(np.array(chosen)).clone()
        want = of_units(each, [members[u] for u in chosen], bound)
        assert relative(got, want) < 1e-5, chosen
    assert float(sums(np.array([], dtype=np.int64)).abs().max()) == 0.0


@pytest.mark.parametrize("seed", [1, 4])
def test_sums_on_the_grid_are_the_sums(seed: int) -> None:
    of = random_graphs.graph(seed)
    at = lab(of.module, of.data, of.loss)
    rows, step = at.rows_of(), 2.0**-24
    chosen = np.arange(11)
    want = at.path.sums(rows, 0.5, 0.0, 16)(chosen).clone()
    got = at.path.sums(rows, 0.5, step, 16)(chosen).double() * step
    assert float((got - want).abs().max()) <= step + 2.0**-20


def test_no_records_at_all() -> None:
    of = random_graphs.graph(1)
    at = lab(of.module, of.data, of.loss)
    none = {k: v[:0] for k, v in at.data.items()}
    got = at.path.sums(at.rows_of(none), 1.0, 2.0**-20, 16)(np.array([], dtype=np.int64))
    assert int(got.abs().max()) == 0


def test_the_oracle_is_the_record_path() -> None:
    """The float64 loop agrees with the slow path, so that neither is alone in its answer."""
    of = random_graphs.graph(4)
    at = lab(of.module, of.data, of.loss)
    program: Program = at.program
    each = gradients(of.module, program, at.data, of.loss)
    out = torch.zeros(program.dimension)
    for i in range(3):
        program.gradient(program.prefix({k: v[i : i + 1] for k, v in at.data.items()}), out)
        assert relative(out.double(), each[i]) < 1e-5


# --- the allowance for rounding (support.rounding)


def test_rounding_is_seen_where_terms_cancel() -> None:
    """The allowance covers what float32 does, and is no more than the theorem's for these terms: a
    product of n terms moved by sqrt(n) u in both operands and the result, and one addition."""
    torch.manual_seed(0)
    for large in (1.0, 1e3, 1e6):
        x, y = torch.randn(2, 2000, dtype=torch.float32)

        def run(x: torch.Tensor, y: torch.Tensor, large: float = large) -> torch.Tensor:
            return ((x + large) * y).sum(0, keepdim=True) - large * y.sum(0, keepdim=True)

        exact = run(x.double(), y.double())
        made = float((run(x, y).double() - exact).norm())
        allowed = rounding.error(lambda x=x, y=y: run(x.double(), y.double()), exact)
        terms = 2000 * float(((x + large) * y).double().norm())
        assert made <= allowed <= rounding.LAMBDA * rounding.UNIT * terms


@pytest.mark.parametrize("seed", [1, 5])
def test_an_error_that_is_no_rounding_is_seen(seed: int) -> None:
    of = random_graphs.graph(seed)
    at = lab(of.module, of.data, of.loss)
    exact = gradients(of.module, at.program, at.data, of.loss)
    wrong = exact.clone()
    wrong[3] *= 1.01
    allowed = rounding.error(
        lambda: gradients(of.module, at.program, at.data, of.loss).sum(0), exact.sum(0)
    )
    assert float((wrong.sum(0) - exact.sum(0)).norm()) > allowed > 0.0

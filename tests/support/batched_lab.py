"""The batched path on small models: built, compared with a float64 loop, looked at from outside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.client.torch import export
from casemate.engine import batched
from casemate.engine.nodes import to_rows
from casemate.engine.prepare import weights_of
from casemate.engine.program import Program, uses
from casemate.engine.rows import Rows
from casemate.engine.sites import Shape
from casemate.graph import check, pack

Data = dict[str, Tensor]
ROOM = 1 << 31


@dataclass
class Lab:
    """A module with its path; ``data``: one microbatch of rows by input name."""

    module: nn.Module
    program: Program
    path: batched.Batched
    data: Data
    slow: list[str]

    @property
    def rows(self) -> int:
        return self.path.shape.rows

    def env(self, data: Data | None = None, seed: Tensor | None = None) -> dict[str, Any]:
        """All contractions' operands for a microbatch."""
        data = self.data if data is None else data
        at = {f"d{i}": data[spec.name] for i, spec in enumerate(self.program.data)}
        if self.path.keep:
            with torch.inference_mode():
                made = self.path._prefix(self.path.runner.fixed, *at.values())
            at = dict(zip(self.path.frontier, made, strict=True))
        seed = torch.ones(self.rows) if seed is None else seed
        return self.path.operands(at, seed)

    def parts(
        self, bound: float, data: Data | None = None, seed: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The clipped sum as one float64 vector, and the factors."""
        parts, c = self.path.parts(self.env(data, seed), bound)
        return self.flat(parts), c

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        return torch.cat(
            [
                torch.zeros(leaf.numel()) if p is None else p.reshape(-1)
                for p, leaf in zip(parts, self.program.leaves, strict=True)
            ]
        ).double()

    def rows_of(self, data: Data | None = None, k: int = 1, valid: Any = None) -> Rows:
        """Data as rows of a run, ``k`` following ones a unit."""
        data = self.data if data is None else data
        count = len(next(iter(data.values())))
        starts = np.append(np.arange(0, count, k), count) if count else np.zeros(1, np.int64)
        return Rows(
            {spec.name: data[spec.name] for spec in self.program.data},
            np.ones(count, bool) if valid is None else np.asarray(valid),
            np.arange(count),
            starts.astype(np.int64),
            k,
        )

    def contributions(
        self, bound: float, data: Data | None = None, seed: Any = None
    ) -> list[bytes]:
        """By record, what its contribution is made of: factor, operands, formed gradients."""
        path = self.path
        env = self.env(data, seed)
        read = {
            r: path.proved.values[r]
            for s in path.sites
            for t in s.totals
            for n in path.runner.sums_behind([t])
            for r in uses(n)
            if r in env and path.proved.values[r].batch is not None
        }
        seen = [(r, to_rows(env[r], v, self.rows).clone()) for r, v in sorted(read.items())]
        with torch.inference_mode():
            norms = [site.way.norm(env) for site in path.sites]
        for key, t in sorted(env.items()):
            if key.endswith("!"):
                seen.append((key, t.clone()))
        for i, norm in enumerate(norms):
            seen.append((f"n{i}", norm.squared.clone()))
        c, _ = batched.factors(path.sites, norms, bound, path.shape.units)
        seen.append(("c", c))
        per = path.shape.per_unit
        out = []
        for i in range(self.rows):
            rows = [t[i // per if len(t) == path.shape.units else i] for _, t in seen]
            out.append(b"".join(t.contiguous().reshape(-1).numpy().tobytes() for t in rows))
        return out


def exported(
    module: nn.Module, few: Data, loss: Any, how: Callable[..., Any] = export
) -> tuple[Program, Any]:
    packed, _ = how(module, few, loss=loss, dropout=False)
    graph, view = pack.unpack(packed.data)
    checked = check.check(graph, {n: i for n, (i, _) in view.items()})
    return Program(graph, weights_of(view)), checked


def lab(
    module: nn.Module,
    data: Callable[[int], Data],
    loss: Any = "cross_entropy",
    *,
    rows: int = 16,
    per_unit: int = 1,
    keep: bool = False,
    ways: str | None = None,
    settle: bool = True,
    last: bool | None = None,
    how: Callable[..., Any] = export,
) -> Lab:
    """``ways``: the name of the way every site shall take that has it; else the quickest one.
    last: with channels last, or not; else what is quicker. how: what exports the module."""
    program, checked = exported(module, data(3), loss, how)
    made = data(rows)
    records = {spec.name: made[spec.name] for spec in program.data}
    path = batched.build(program, checked, records, Shape(rows, per_unit), keep)
    slow = path.settle(records, last) if settle else []
    out = Lab(module, program, path, records, slow)
    if ways is None:
        for site in path.sites:
            path.planner.choose(site)
    else:
        path.choose(out.env(), ROOM)
        for site in path.sites:
            site.way = next((w for w in site.ways if w.name == ways), site.way)
    return out


def loss_of(name: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Losses of one record from outputs and targets of a batch of one."""
    named: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross_entropy": F.cross_entropy,
        "mse": lambda a, b: ((a - b) ** 2).mean(),
        "binary_cross_entropy_with_logits": lambda a, b: F.binary_cross_entropy_with_logits(
            a.squeeze(-1), b.to(a.dtype)
        ),
    }
    return named[name] if isinstance(name, str) else lambda a, b: name(a, b).mean()


def gradients(
    module: nn.Module, program: Program, data: Data, loss: Any, nudge: float = 0.0
) -> Tensor:
    """Each record's gradient by autograd in float64, one record at a time: (rows, d).

    The record is given twice: torch 2.13's instance norm gives a wrong gradient for a bias at a
    batch of one whose output gradient is transposed (finite differences say so).
    ``nudge``: relative disturbance of the weights, to see how well the gradient is determined.
    """
    double = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in double.parameters():
            p.mul_(1 + nudge * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    named = dict(double.named_parameters(remove_duplicate=False))
    leaves = [named[spec.tensor] for spec in program.trained]
    names = [spec.name for spec in program.data if spec.name != "target"]
    count = len(next(iter(data.values())))
    out = torch.zeros(count, program.dimension, dtype=torch.float64)
    for i in range(count):
        one = {n: t[i : i + 1].repeat(2, *(1,) * (t.dim() - 1)) for n, t in data.items()}
        one = {n: t.double() if t.is_floating_point() else t for n, t in one.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = double(**{n: one[n] for n in names})
        value = loss_of(loss)(made, one["target"])  # of both copies, or their mean
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        out[i] = torch.cat(
            [
                torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.reshape(-1)
                for g, p in zip(found, leaves, strict=True)
            ]
        )
    return out


def clipped(each: Tensor, bound: float, per_unit: int = 1) -> tuple[Tensor, Tensor]:
    """The clipped sum over units of rows' gradients, and the factors, float64."""
    units = each.reshape(-1, per_unit, each.shape[1]).sum(1)
    c = torch.clamp(bound / units.norm(dim=1).clamp(min=1e-300), max=1.0)
    return (units * c[:, None]).sum(0), c


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-300))

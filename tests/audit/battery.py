"""The battery: every property as a check, and what a run of them finds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from audit import chance, charges, known, models, owners, receipts, rest, runs, sums

Check = Callable[[int], None]

CHECKS: Final[dict[str, Check]] = {
    "sensitivity": sums.sensitivity,
    "no numbers": sums.numbers_that_are_none,
    "units": sums.units,
    "rounding": sums.rounding,
    "algorithm": sums.algorithm,
    "random inputs": sums.random_inputs,
    "slots": sums.slots,
    "late entries": sums.late_entries,
    "datasets": sums.several_datasets,
    "steps": models.steps,
    "layers": models.layers,
    "cancellation": models.cancellation,
    "rounding of sums": models.rounding,
    "known noise": known.noise,
    "known samples": known.samples,
    "noise": chance.noise,
    "sampling": chance.sampling,
    "runs": runs.runs,
    "state": rest.kept,
    "optimizer": rest.followed,
    "result": rest.released,
    "keys": rest.keys,
    "plans": rest.plans,
    "accounting": rest.accounted,
    "charges": charges.charged,
    "owners": owners.owners,
    "receipts": receipts.receipts,
}
STEPS: Final = 20_000


@dataclass(frozen=True)
class Finding:
    """A check that did not hold, and in what words."""

    check: str
    what: str


def run(seed: int, names: Iterable[str] = CHECKS, steps: int = STEPS) -> list[Finding]:
    """Run checks; what does not hold, or fails in any other way, is found."""
    return [found for name in names if (found := one(name, seed, steps)) is not None]


def one(name: str, seed: int, steps: int = STEPS) -> Finding | None:
    """One check. steps: of the sampling law."""
    check = CHECKS[name]
    if check is chance.sampling:
        check = functools.partial(chance.sampling, steps=steps)
    try:
        check(seed)
    except Exception as e:
        return Finding(name, f"{type(e).__name__}: {e}"[:400])
    return None


def timed(seed: int, steps: int = STEPS) -> dict[str, float]:
    """Seconds by check, of a battery in which all holds."""
    out = {}
    for name in CHECKS:
        begun = time.perf_counter()
        found = one(name, seed, steps)
        assert found is None, found
        out[name] = time.perf_counter() - begun
    return out

"""Two accountants over many settings: what is shown is never below a certified lower bound of the
other, and at most 1% or 0.01 above it; what a dataset is charged is never below it either."""

from __future__ import annotations

from dataclasses import dataclass

from audit import accountant, lab
from audit.law import holds
from casemate.accounting import filters, pld, rdp
from casemate.spec.job import DpEvent


@dataclass(frozen=True)
class Compared:
    """Of one setting: epsilon as shown, as charged, and the other accountant's bounds."""

    event: DpEvent
    delta: float
    shown: float
    charged: float
    low: float
    high: float

    @property
    def over(self) -> float:
        """How far the shown epsilon is above the lower bound, of what is allowed: 1% or 0.01."""
        return (self.shown - self.low) / max(0.01 * self.low, 0.01)


def of(number: int, seed: int) -> tuple[DpEvent, float]:
    """One setting: a tenth without sampling; rates from 10^-4, noise from 0.5 to 10, up to 10^4
    steps, delta from 10^-8 to 10^-3; none whose epsilon is beyond 60, which is no privacy."""
    rng = lab.rng_of("setting", seed, number)
    while True:
        event = DpEvent(
            rate=1.0 if rng.random() < 0.1 else float(10 ** rng.uniform(-4, -0.05)),
            noise_multiplier=float(10 ** rng.uniform(-0.3, 1)),
            steps=int(10 ** rng.uniform(0, 4)),
        )
        delta = float(10 ** rng.uniform(-8, -3))
        if rdp.epsilon(rdp.curve(event), delta) <= 60:
            return event, delta


def compare(number: int, seed: int) -> Compared:
    """Raises :class:`audit.law.Broken`."""
    event, delta = of(number, seed)
    true = accountant.bounds(event.rate, event.noise_multiplier, event.steps, delta)
    shown = pld.epsilon([event], delta)
    plain = rdp.epsilon(rdp.curve(event), delta)
    charged = filters.epsilon(filters.nano([event]), delta)
    found = Compared(event, delta, shown, charged, true.low, true.high)
    what = f"{event} at delta {delta:.3g}, at least {true.low:.6f}"
    for name, epsilon in (("shown", shown), ("by RDP", plain), ("charged", charged)):
        holds(epsilon >= true.low, f"accountants: {epsilon:.6f} {name} for {what}")
    holds(found.over <= 1, f"accountants: {shown:.6f} shown for {what}, is not tight")
    return found

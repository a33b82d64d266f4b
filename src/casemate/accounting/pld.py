"""The tight epsilon of one job, by privacy loss distributions (extra ``audit``).

Shown, never debited: a PLD filter is not valid in general when jobs depend on earlier results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from casemate.accounting import rdp
from casemate.spec.errors import UsageError
from casemate.spec.job import DpEvent

_BLOCK: Final = 1000
# Of one step's loss, each some microseconds of Python: little noise spreads it over thousands.
_POINTS: Final = 1 << 19
_TAIL: Final = 10.0  # standard deviations, past which the library cuts the loss off


def _compose(one: Any, steps: int) -> Any:
    """``one`` composed with itself, in blocks: the library takes size ** steps as an integer."""
    blocks, rest = divmod(steps, _BLOCK)
    if not blocks:
        return one.self_compose(rest)
    whole = one.self_compose(_BLOCK).self_compose(blocks)
    return whole.compose(one.self_compose(rest)) if rest else whole


@lru_cache(maxsize=256)
def _epsilon(events: tuple[DpEvent, ...], delta: float) -> float:
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            "The tight epsilon needs the package dp-accounting.",
            mend='Install it: pip install "casemate[audit]".',
        ) from e
    # Rounding of the loss is pessimistic and grows with steps; its cost grows with epsilon.
    steps = sum(e.steps for e in events)
    curves = [rdp.curve(e) for e in events]
    rough = rdp.epsilon(tuple(map(sum, zip(*curves, strict=True))), delta) if curves else 0.0
    interval = max(5e-4 / math.sqrt(max(1.0, steps / 1000)), 2e-5 * rough)
    # Not above the size of one step's loss, where rounding would outweigh it.
    least = min((e.rate / e.noise_multiplier for e in events), default=1.0)
    interval = min(interval, max(5e-5, least / 2))
    noise = min((e.noise_multiplier for e in events), default=1.0)
    interval = max(interval, (1 / noise**2 + 2 * _TAIL / noise) / _POINTS)
    total = None
    for event in events:
        one = pld.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier,
            sampling_prob=event.rate,
            pessimistic_estimate=True,
            value_discretization_interval=interval,
            use_connect_dots=True,
        )
        one = _compose(one, event.steps)
        total = one if total is None else total.compose(one)
    # Both are upper bounds; for the smallest jobs the first is the better.
    return min(rough, float(total.get_epsilon_for_delta(delta))) if total is not None else 0.0


def epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """Epsilon at ``delta`` of the events together; pessimistic, both directions of adjacency.
    Within about 1% of the exact value up to 10^6 steps.

    Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, arXiv:2207.04380 (connect the dots).
    Raises UsageError ``usage.extra`` without dp-accounting.
    """
    return _epsilon(tuple(events), delta)

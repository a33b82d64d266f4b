"""The tight epsilon of one job, by privacy loss distributions (extra ``audit``).

Shown, never debited: a PLD filter is not valid in general when jobs depend on earlier results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from casemate.spec.errors import UsageError
from casemate.spec.job import DpEvent


@lru_cache(maxsize=256)
def _epsilon(events: tuple[DpEvent, ...], delta: float) -> float:
    try:
        from dp_accounting.pld import privacy_loss_distribution as pld
    except ImportError as e:
        raise UsageError(
            "usage.extra-missing",
            "The tight epsilon needs the package dp-accounting.",
            mend='Install it: pip install "casemate[audit]".',
        ) from e
    total = None
    for event in events:
        one = pld.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier,
            sampling_prob=event.rate,
            pessimistic_estimate=True,
            value_discretization_interval=1e-4,
            use_connect_dots=True,
        ).self_compose(event.steps)
        total = one if total is None else total.compose(one)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


def epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """Epsilon at ``delta`` of the events together; pessimistic, both directions of adjacency.

    Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, arXiv:2207.04380 (connect the dots).
    Raises UsageError ``usage.extra-missing`` without dp-accounting.
    """
    return _epsilon(tuple(events), delta)

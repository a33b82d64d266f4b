"""Lives of a hypothesis state machine."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from support.simserver import remembered


def play(
    machine: type[RuleBasedStateMachine],
    examples: int,
    steps: int,
    *,
    ignoring: Collection[HealthCheck] = (),
) -> None:
    """So many lives of at most so many steps, none of them kept."""
    with remembered():
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                suppress_health_check=list(ignoring),
            ),
        )

"""Which attester: by name, or the machine's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from casemate.seams import Clock, Disk, Rng
from casemate.spec.errors import UsageError
from casemate.tee.protocol import Tee

TSM: Final = Path("/sys/kernel/config/tsm/report")


def _simulated(disk: Disk, rng: Rng, clock: Clock) -> Tee:
    from casemate.tee.simulated import SimulatedTee

    return SimulatedTee(disk, rng, clock)


def _configfs(disk: Disk, rng: Rng, clock: Clock) -> Tee:
    raise UsageError(
        "usage.tee-unsupported",
        f"This machine makes evidence through {TSM}, which this casemate cannot use yet.",
        mend="Choose the simulated TEE by name, for development only.",
        where="configfs-tsm",
    )


# One row for each attester.
KINDS: Final[dict[str, Callable[[Disk, Rng, Clock], Tee]]] = {
    "simulated": _simulated,
    "configfs-tsm": _configfs,
}


def detect(tsm: Path = TSM) -> str | None:
    """The attester that this machine's hardware offers, or None. Simulation is never detected."""
    return "configfs-tsm" if tsm.is_dir() else None


def open(kind: str, *, disk: Disk, rng: Rng, clock: Clock, tsm: Path = TSM) -> Tee:
    """The attester of that kind (a key of :data:`KINDS`), or the machine's own for ``auto``.

    ``disk`` keeps what a restart needs. Raises ``usage.tee-*`` for a kind that is unknown, absent
    or not supported; ``auto`` never falls back to simulation.
    """
    if kind == "auto":
        found = detect(tsm)
        if found is None:
            raise UsageError(
                "usage.tee-absent",
                f"This machine has no TEE that casemate knows (looked at {tsm}).",
                mend="Run in a confidential VM, or choose the simulated TEE by name, for"
                " development only.",
                where="tee",
            )
        kind = found
    if kind not in KINDS:
        raise UsageError(
            "usage.tee-unknown",
            f"{kind[:40]!r} is no kind of TEE.",
            mend=f"Choose auto or one of {', '.join(KINDS)}.",
            where="tee",
        )
    return KINDS[kind](disk, rng, clock)

"""What verification says: every check by name, with its outcome.

A verifier records each check as it goes. The first one that fails a step ends it with a
:class:`Refused`, which names the check and carries all that was recorded until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

from casemate.spec.canonical import Json
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Binding

Outcome = Literal["passed", "failed", "unchecked"]
Crypto = Literal["", "valid", "invalid", "unknown", "not-applicable"]
Decision = Literal["accept", "accept-with-status", "reject", "needs-collateral", "not-applicable"]

# A code's first word to the stage that it belongs to. ``needs``: collateral that is not there;
# ``absent``: nothing is there that could be judged.
STAGES: Final = {
    "parse": "parse",
    "chain": "signature", "root": "signature", "endorsement": "signature",
    "signature": "signature",
    "validity": "validity",
    "revocation": "revocation",
    "needs": "collateral", "collateral": "collateral",
    "tcb": "tcb",
    "appraise": "policy",
    "binding": "binding",
    "freshness": "freshness",
}  # fmt: skip
# Exit codes of ``enclave verify --evidence``, one a stage; 10 for what belongs to none.
EXITS: Final = {
    "parse": 11, "signature": 12, "validity": 13, "revocation": 14, "collateral": 15, "tcb": 16,
    "policy": 17, "binding": 18, "freshness": 19,
}  # fmt: skip


# Statuses of a platform that is not at fault but wants care (Intel's TCB statuses).
HARDENING: Final = (
    "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
)  # fmt: skip


def decision(code: str, tcb_status: str) -> Decision:
    """What follows from a verification that ended with ``code`` ("": nothing failed)."""
    if not code:
        return "accept-with-status" if tcb_status in HARDENING else "accept"
    if code.startswith("evidence.needs-"):
        return "needs-collateral"
    return "not-applicable" if code.startswith("evidence.absent-") else "reject"


def moment(seconds: float) -> str:
    """A time for people: RFC 3339, UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"


def stage(code: str) -> str:
    """The stage of ``evidence.<word>-...``; "" for a code of none."""
    return STAGES.get(code.removeprefix("evidence.").partition("-")[0], "")


@dataclass(frozen=True)
class Unchecked:
    """Stands where a policy's value could stand, and says why there is none."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("Unchecked needs a reason")


@dataclass(frozen=True)
class Check:
    """``detail``: what was found; for an unchecked one the reason."""

    name: str
    outcome: Outcome
    detail: str
    code: str = ""


class Refused(EvidenceError):
    """Evidence that is refused; ``checks`` ends with those that failed."""

    checks: tuple[Check, ...] = ()


def refusal(code: str, message: str, where: str, mend: str = "") -> Refused:
    """A refusal with code ``evidence.<code>``; ``where`` is the file or field concerned."""
    return Refused(
        f"evidence.{code}",
        message,
        mend=mend or "Ask the server's operator for the vendor's own, unaltered evidence.",
        where=where,
    )


def check_window(
    whose: str,
    first: float,
    last: float,
    now: float,
    where: str = "",
    mend: str = "Ask the operator to renew collateral.",
) -> None:
    """``evidence.validity-*`` unless ``now`` is from ``first`` to ``last`` (Unix seconds). where:
    the file or field, ``whose`` if not given; mend: of what has expired."""
    if not now >= first:
        raise refusal(
            "validity-not-yet",
            f"{whose} is not valid before {moment(first)}.",
            where or whose,
            "Check this machine's clock.",
        )
    if not now <= last:
        message = f"{whose} has expired on {moment(last)}."
        raise refusal("validity-expired", message, where or whose, mend)


@dataclass
class Step:
    """One check while it is made: what it found, and whether it was made at all."""

    detail: str = ""
    outcome: Outcome = "passed"

    def unchecked(self, reason: str) -> None:
        self.outcome, self.detail = "unchecked", reason


@dataclass
class Checks:
    """The record of one verification.

    crypto: what signatures and chains say: set to ``valid`` once all have held, to
    ``not-applicable`` where nothing is signed, to ``unknown`` where the keys are not at hand; left
    empty, a refusal at the stages ``parse`` and ``signature`` makes it ``invalid``. tcb_status,
    advisories: the vendor's words on the platform, also where they lead to a refusal. issued: each
    dated piece of collateral (a revocation list, TCB info) and when it was issued, Unix seconds.
    """

    done: list[Check] = field(default_factory=list)
    crypto: Crypto = ""
    tcb_status: str = ""
    advisories: tuple[str, ...] = ()
    issued: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Record the check ``name``: failed if the block raises :class:`Refused`, which then
        carries all checks so far; else what the block wrote into its :class:`Step`."""
        step = Step()
        try:
            yield step
        except Refused as e:
            self.done.append(Check(name, "failed", e.message, e.code))
            e.checks = tuple(self.done)
            raise
        self.done.append(Check(name, step.outcome, step.detail))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Evidence that was accepted beside the CPU's, under ``name`` (``gpu0``); else as Verdict."""

    name: str
    tee: str
    product: str
    root: str
    measurement: str
    chip_id: str
    tcb: dict[str, int]
    tcb_status: str

    def to_json(self) -> dict[str, Json]:
        return {**vars(self), "tcb": dict(self.tcb)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Evidence that was accepted, under a policy, at one time.

    ``measurement``, ``chip_id``: hex; ``chip_id`` is empty where the TEE hides it. ``root``:
    SHA-256 (hex) of the root key's SubjectPublicKeyInfo. ``tcb``: component to security version,
    as reported. ``binding`` is what the evidence binds: use no other keys with this server.
    ``crypto``: what signatures say; ``decision``: accept, or accept-with-status where the vendor's
    ``tcb_status`` wants care; ``advisories``: the vendor's, on this platform. ``parts``: evidence
    beside the CPU's.
    """

    tee: str
    simulated: bool
    product: str
    root: str
    measurement: str
    chip_id: str
    tcb: dict[str, int]
    binding: Binding
    checks: tuple[Check, ...]
    crypto: Crypto
    decision: Decision
    tcb_status: str
    advisories: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def unchecked(self) -> tuple[Check, ...]:
        """What the policy left open."""
        return tuple(c for c in self.checks if c.outcome == "unchecked")

    def to_json(self) -> dict[str, Json]:
        """For ``--format json``; the binding is left out. ``ar4si``: see :mod:`attest.ar4si`."""
        from casemate.attest import ar4si

        result = ar4si.result(
            tee=self.tee,
            simulated=self.simulated,
            crypto=self.crypto,
            decision=self.decision,
            code="",
            tcb_status=self.tcb_status,
            checks=self.checks,
        )
        return {
            "tee": self.tee,
            "simulated": self.simulated,
            "product": self.product,
            "root": self.root,
            "measurement": self.measurement,
            "chip_id": self.chip_id,
            "tcb": dict(self.tcb),
            "crypto": self.crypto,
            "decision": self.decision,
            "tcb_status": self.tcb_status or None,
            "advisories": list(self.advisories),
            "parts": [part.to_json() for part in self.parts],
            "ar4si": result,
            "checks": [
                {"name": c.name, "outcome": c.outcome, "detail": c.detail, "code": c.code}
                for c in self.checks
            ],
        }

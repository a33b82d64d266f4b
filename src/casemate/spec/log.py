"""What the entries of the ledger's log say, one format per kind of :class:`LogEntry`.

They name datasets by salted commitments and people by pseudonymous ids, and hold digests, charges
and events only, so that the log can be shown and any accountant can recompute every charge.
"""

from __future__ import annotations

from typing import Final, Literal

from casemate.spec.codec import value
from casemate.spec.data import Budget
from casemate.spec.job import Charge, DpEvent


@value("log-start/v1")
class Started:
    """A boot opened the store."""

    software: str


@value("log-identity/v1")
class Enrolled:
    identity: str


@value("log-register/v1")
class Registered:
    """A dataset; ``lineage`` is the first version's id, whose ledger all versions share (P1)."""

    dataset: str
    owner: str
    lineage: str
    units: int
    schema_digest: str
    policy_digest: str
    budget: Budget
    filter: str


@value("log-policy/v1")
class PolicyChanged:
    dataset: str
    policy_digest: str


@value("log-epoch/v1")
class EpochAdvanced:
    dataset: str
    epoch: int


@value("log-revoke/v1")
class Revoked:
    """The dataset's key was destroyed."""

    dataset: str


@value("log-approval/v1")
class Approval:
    """An owner's word on a quote for one dataset: the entry's kind says approve or reject."""

    quote_digest: str
    dataset: str
    owner: str


@value("log-debit/v1")
class Debit:
    """What one dataset's lineage was charged, under which policy and epoch."""

    dataset: str
    lineage: str
    policy_digest: str
    epoch: int
    charge: Charge


@value("log-reserve/v1")
class Reserved:
    """The whole charge of a job, taken before the first record is read and never given back (P8).

    ``events`` and the deltas are the plan's; ``delta_shown`` is where the charges show epsilon.
    """

    job: str
    scientist: str
    request_digest: str
    quote_digest: str
    plan_digest: str
    events: tuple[DpEvent, ...]
    delta_truncation: float
    delta_sampler: float
    delta_shown: float
    debits: tuple[Debit, ...]


@value("log-commit/v1")
class Committed:
    """The job's only commit: from here on its result and receipt can be seen."""

    job: str
    request_digest: str
    result_digest: str


@value("log-abandon/v1")
class Abandoned:
    """A reserved job that will never be committed. Its charge stays."""

    job: str
    request_digest: str
    reason: Literal["failed", "cancelled", "crashed"]


BODIES: Final[dict[str, type]] = {
    "start": Started,
    "identity": Enrolled,
    "register": Registered,
    "policy": PolicyChanged,
    "epoch": EpochAdvanced,
    "revoke": Revoked,
    "approve": Approval,
    "reject": Approval,
    "reserve": Reserved,
    "commit": Committed,
    "abandon": Abandoned,
}

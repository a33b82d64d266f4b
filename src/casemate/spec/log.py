"""What the entries of the ledger's log say, one format per kind of :class:`LogEntry`.

The log is public. So its entries name datasets by salted commitments and people by pseudonymous
ids, and hold events and charges, from which any accountant can recompute; where a digest of
something not public is meant (a policy, a quote, a result) there stands a :func:`commitment`, which
its parties, who have the salt, can open.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

from casemate.spec.codec import value
from casemate.spec.consent import Consented, HandedOver, Recovered, Rotated
from casemate.spec.data import Budget
from casemate.spec.job import Charge, DpEvent

SALT_BYTES: Final = 32


def commitment(salt: bytes, digest: str) -> str:
    """``sha256:`` and SHA-256("casemate/log/v1\\0" || salt || digest); salts have 32 bytes."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
    hashed = hashlib.sha256(b"casemate/log/v1\0" + salt + digest.encode())
    return "sha256:" + hashed.hexdigest()


def dataset_salt(salt: bytes) -> bytes:
    """The salt of a dataset's commitments in the log, from that of the dataset's own."""
    return hashlib.sha256(b"casemate/log-salt/v1\0" + salt).digest()


@value("log-start/v2")
class Started:
    """A boot opened the store: its software, the TEE's measurement (hex), the digest of the
    attestation that binds its keys (kept beside the log), and how many times the state has then
    moved its anchor, where it has one."""

    software: str
    measurement: str
    attestation: str
    anchor: int | None = None


@value("log-identity/v1")
class Enrolled:
    identity: str


@value("log-register/v2")
class Registered:
    """A dataset; ``lineage`` is the first version's id, whose ledger all versions share (P1).
    ``schema`` and ``policy`` are commitments under the dataset's salt."""

    dataset: str
    owner: str
    lineage: str
    units: int
    schema: str
    policy: str
    budget: Budget
    filter: str


@value("log-policy/v2")
class PolicyChanged:
    """``policy``: a commitment under the dataset's salt."""

    dataset: str
    policy: str


@value("log-epoch/v1")
class EpochAdvanced:
    dataset: str
    epoch: int


@value("log-revoke/v1")
class Revoked:
    """The dataset's key was destroyed."""

    dataset: str


@value("log-approval/v2")
class Approval:
    """An owner's word on a quote for one dataset: the entry's kind says approve or reject.
    ``quote``: a commitment under the job's salt."""

    quote: str
    dataset: str
    owner: str


@value("log-debit/v2")
class Debit:
    """One dataset whose lineage was charged, under which policy (a commitment under the dataset's
    salt) and epoch."""

    dataset: str
    lineage: str
    policy: str
    epoch: int


@value("log-reserve/v2")
class Reserved:
    """The whole charge of a job, taken from each of ``debits`` before the first record is read and
    never given back (P8).

    ``request``, ``quote`` and ``plan`` are commitments under the job's salt; ``events`` and the
    deltas are the plan's; ``delta_shown`` is where the charge shows epsilon. ``anchor``: how many
    times the state has then moved its anchor, where it has one.
    """

    job: str
    scientist: str
    request: str
    quote: str
    plan: str
    events: tuple[DpEvent, ...]
    delta_truncation: float
    delta_sampler: float
    delta_shown: float
    charge: Charge
    debits: tuple[Debit, ...]
    anchor: int | None = None


@value("log-takeover/v1")
class TakenOver:
    """Another boot goes on with a reserved job, with new noise; what the earlier one made of it
    beyond its newest kept state is never released."""

    job: str


@value("log-commit/v2")
class Committed:
    """The job's only commit: nothing of another run of it is ever released. ``result`` and
    ``receipt`` (the envelope) are commitments under the job's salt. ``anchor``: as in a
    reservation."""

    job: str
    result: str
    receipt: str
    anchor: int | None = None


@value("log-abandon/v2")
class Abandoned:
    """A reserved job that will never be committed. Its charge stays."""

    job: str
    reason: Literal["failed", "cancelled", "crashed"]


@value("log-grant/v1")
class Granted:
    """A deployed model's owner sold it. ``sale`` and ``receipt`` (the envelope) are commitments
    under a salt of this sale's own: who sold what to whom is for its parties to show."""

    sale: str
    receipt: str


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
    "takeover": TakenOver,
    "commit": Committed,
    "abandon": Abandoned,
    "consent": Consented,
    "recover": Recovered,
    "rotate": Rotated,
    "handover": HandedOver,
    "grant": Granted,
}

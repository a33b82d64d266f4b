"""Receipts and log entries."""

from __future__ import annotations

from typing import Final, Literal

from casemate.spec.codec import value
from casemate.spec.evidence import Attestation
from casemate.spec.job import Charge, Plan

PREDICATE_TYPE: Final = "https://casemate.dev/receipt/v1"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"


@value("receipt-dataset/v1")
class ReceiptDataset:
    """One dataset's part: its salted commitment, policy and what its filter took."""

    dataset: str
    owner: str
    policy_digest: str
    units: int
    charge: Charge


@value("guarantee/v1")
class Guarantee:
    """The claim in words and numbers: "no privacy guarantee" where ``private`` is False."""

    private: bool
    epsilon: float
    delta: float
    unit: str
    statement: str


@value("receipt/v1")
class Receipt:
    """The predicate of the in-toto statement whose subject is the released weights.

    ``entry`` is the ledger's commit entry (its chain hash) and ``sequence`` its place;
    ``simulated`` lists what was simulated (P12).
    """

    job: str
    scientist: str
    boot: bytes
    model_digest: str
    result_digest: str
    request_digest: str
    quote_digest: str
    plan: Plan
    guarantee: Guarantee
    datasets: tuple[ReceiptDataset, ...]
    simulated: tuple[str, ...]
    software: str
    entry: str
    sequence: int


@value("receipt-bundle/v1")
class ReceiptBundle:
    """All that offline verification needs: the DSSE envelope (its JSON text), and the attestation
    of the boot that signed it (nonce: SHA-256 of the boot instance)."""

    envelope: str
    attestation: Attestation


EntryKind = Literal[
    "start", "identity", "register", "policy", "epoch", "revoke",
    "quote", "approve", "reject", "reserve", "commit", "abandon",
]  # fmt: skip


@value("entry/v1")
class LogEntry:
    """One link of the hash chain: ``digest(entry)`` is the next one's ``previous``.

    ``body`` is the canonical JSON of a shared format. The first entry's ``previous`` is 64 zeros
    after ``sha256:``.
    """

    sequence: int
    previous: str
    boot: bytes
    kind: EntryKind
    subject: str
    body: bytes

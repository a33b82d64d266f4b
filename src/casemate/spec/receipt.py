"""Receipts and log entries."""

from __future__ import annotations

import re
from typing import Final, Literal

from casemate.spec import codec
from casemate.spec.canonical import Json
from casemate.spec.codec import value
from casemate.spec.contest import HIGHER
from casemate.spec.evidence import Attestation
from casemate.spec.job import Charge, Metric, Plan

PREDICATE_TYPE: Final = "https://casemate.dev/receipt/v1"
TEST_TYPE: Final = "https://in-toto.io/attestation/test-result/v0.1"
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


def no_privacy(metrics: tuple[Metric, ...]) -> str:
    """What the receipt of a job without privacy says (P10)."""
    return "no privacy guarantee" + (" for these rows" if metrics else "")


@value("guarantee/v1")
class Guarantee:
    """The claim in words and numbers: :func:`no_privacy` where ``private`` is False."""

    private: bool
    epsilon: float
    delta: float
    unit: str
    statement: str


@value("receipt/v2", later=("metrics", "target", "scores", "artifact"))
class Receipt:
    """What a job was, did and cost; :func:`statement` is what is signed. Of an evaluation the
    result is the vector of its ``metrics`` (``spec.job.JobRequest``); of an entry of a contest
    ``scores`` are the means in it, and ``target`` the label.

    ``log`` is the origin of the log in which the job was reserved at place ``reserved`` and whose
    commit entry commits to this receipt; ``simulated`` lists what was simulated (P12);
    ``artifact`` is ``sha256:`` of the native step that trained, "" for the engine.
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
    log: str
    reserved: int
    metrics: tuple[Metric, ...] = ()
    target: str = ""
    scores: tuple[float, ...] = ()
    artifact: str = ""

    def __post_init__(self) -> None:
        if self.artifact and not re.fullmatch("sha256:[0-9a-f]{64}", self.artifact):
            raise ValueError("the artifact is not sha256: and 64 hex digits")


def statement(receipt: Receipt) -> dict[str, Json]:
    """The in-toto Statement v1 of a receipt, whose subject is the released weights.

    Of an entry of a contest it is a test result (in-toto, predicate test-result v0.1) on the model
    and the scores' vector, under a configuration of datasets and policies, with the receipt as a
    further field, as that predicate admits.
    """
    predicate = codec.to_json(receipt)
    subject = [(f"{receipt.job}.safetensors", receipt.result_digest)]
    kind = PREDICATE_TYPE
    if receipt.target:
        subject.insert(0, (f"{receipt.job}.cmm", receipt.model_digest))
        kind = TEST_TYPE
        predicate = {
            "result": "PASSED",
            "configuration": [
                {
                    "name": d.dataset,
                    "uri": f"urn:casemate:{d.dataset}",
                    "digest": {"sha256": d.policy_digest.removeprefix("sha256:")},
                }
                for d in receipt.datasets
            ],
            "passedTests": [m.name for m in receipt.metrics],
            "receipt": predicate,
        }
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}
            for name, digest in subject
        ],
        "predicateType": kind,
        "predicate": predicate,
    }


@value("receipt-bundle/v2")
class ReceiptBundle:
    """All that offline verification needs.

    ``envelope``: the DSSE envelope's JSON text. ``attestation``: of the boot that signed it (nonce:
    SHA-256 of the boot instance). ``entry``: the bytes of the job's commit entry, which commits to
    result and envelope under ``salt``; of a sale's grant, which commits to sale and envelope.
    ``proof``: that it stands in the log (C2SP tlog-proof), with the checkpoint and the witnesses'
    cosignatures.
    """

    envelope: str
    attestation: Attestation
    entry: bytes
    salt: bytes
    proof: str


@value("receipt-proof/v1")
class ReceiptProof:
    """That a log commits to a receipt, without the receipt itself: for other ledgers
    (docs/anchors.md).

    ``receipt``: SHA-256 of the envelope. ``salt`` and ``entry``: as in the bundle. ``proof``: that
    the entry stands in the log (C2SP tlog-proof), under the bundle's checkpoint or a later one.
    ``key``: the log's Ed25519 key; whose it is only the evidence in the bundle says.
    """

    receipt: str
    salt: bytes
    entry: bytes
    key: bytes
    proof: str

    def __post_init__(self) -> None:
        if not re.fullmatch("sha256:[0-9a-f]{64}", self.receipt):
            raise ValueError("the receipt's digest is not sha256: and 64 hex digits")
        if len(self.salt) != 32 or len(self.key) != 32:
            raise ValueError("a salt and a key have 32 bytes")


@value("leaderboard/v1")
class Leaderboard:
    """A contest's standings: receipts of entries on ``dataset``, each participant's best, the best
    of all first (:func:`rank`)."""

    dataset: str
    entries: tuple[ReceiptBundle, ...]


def rank(receipt: Receipt) -> tuple[float, int]:
    """What entries of a contest are sorted by: the first metric, then who was reserved first."""
    first = receipt.scores[0]
    return -first if HIGHER[receipt.metrics[0].name] else first, receipt.reserved


EntryKind = Literal[
    "start", "identity", "register", "policy", "epoch", "revoke",
    "approve", "reject", "reserve", "takeover", "commit", "abandon",
    "consent", "recover", "rotate", "handover", "grant",
]  # fmt: skip


@value("entry/v2")
class LogEntry:
    """One leaf of the log's Merkle tree (RFC 6962): its canonical bytes are what is hashed.

    ``body`` is the canonical JSON of a shared format (``spec.log``).
    """

    sequence: int
    boot: bytes
    kind: EntryKind
    subject: str
    body: bytes

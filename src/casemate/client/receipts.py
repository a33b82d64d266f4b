"""Offline verification of a receipt: from the bundle alone, with no word of the server believed.

In this order, each step a check with a name and what it found: the attestation under the trust
policy; the DSSE signature by the receipt key that the evidence binds; the in-toto statement;
what the receipt says twice; that the commit stands in the log under a checkpoint of the log's key;
who cosigned that checkpoint; that it goes with what this client has seen of the log before; the
weights' digest; epsilon and each dataset's charge, recomputed from the plan's events. The first
that fails raises ``ReceiptError`` (or ``EvidenceError``); nothing returns False.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

from casemate.accounting.filters import RdpFilter
from casemate.attest.verify import Unchecked, verify_attestation
from casemate.client import heads, views
from casemate.client.heads import Check, Witnesses, seen_before
from casemate.client.memory import Memory
from casemate.seal import checkpoint, dsse
from casemate.spec import canonical, codec, contest
from casemate.spec.errors import BudgetError, FormatError, PlanError, ReceiptError, UsageError
from casemate.spec.log import Committed, commitment
from casemate.spec.receipt import (
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    TEST_TYPE,
    LogEntry,
    Receipt,
    ReceiptBundle,
    no_privacy,
    statement,
)
from casemate.spec.sale import SaleReceipt

if TYPE_CHECKING:
    from casemate.attest.trust import Trust

MAX_BUNDLE: Final = 8 << 20
# Two accountants differ in the last digits; a claim may not be below what the events give.
RELATIVE_SLACK: Final = 1e-6


R = TypeVar("R", Receipt, SaleReceipt)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, repr=False)
class Verified(Generic[R]):
    """A receipt that holds, with what was checked. ``title``: what it is about; ``claim``: what it
    says of that, in words; ``bundle``: what was checked."""

    receipt: R
    checks: tuple[Check, ...]
    title: str
    claim: str
    bundle: ReceiptBundle

    @property
    def simulated(self) -> tuple[str, ...]:
        """What was simulated; evidence of these is worth nothing to a third party."""
        return self.receipt.simulated

    def _shown(self) -> tuple[str, tuple[str, str, str], list[tuple[str, str, str]]]:
        title = self.title
        if self.simulated:
            title = f"SIMULATED ({', '.join(self.simulated)}): {title}"
        return title, ("check", "state", "found"), [(c.name, c.state, c.found) for c in self.checks]

    def __str__(self) -> str:
        return views.as_text(*self._shown())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return views.as_html(*self._shown())


VerifiedReceipt: TypeAlias = Verified[Receipt]


def load_bundle(path: str | Path) -> ReceiptBundle:
    """The bundle in a file. Raises ``UsageError`` when unreadable, ``FormatError`` otherwise."""
    return read_value(ReceiptBundle, path, MAX_BUNDLE, "Name the receipt's file.")


def read_value(kind: type[T], path: str | Path, limit: int, mend: str) -> T:
    """The value in a file, of which no more than ``limit`` bytes are read. Raises as
    :func:`load_bundle`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as e:
        raise UsageError(
            "usage.file", f"{path} cannot be read: {e.strerror}.", mend=mend, where=str(path)
        ) from None
    return codec.decode(kind, data.removesuffix(b"\n"), limit=limit)


def _refuse(reason: str, message: str, where: str = "") -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Do not rely on this receipt; ask the enclave for it again.",
        where=where,
    )


def read_statement(payload: bytes) -> Receipt:
    """The receipt in an in-toto Statement v1 that says just what the receipt does."""
    try:
        found = canonical.decode(payload)
    except FormatError as e:
        raise _refuse("statement", f"The statement is no canonical JSON: {e.message}") from None
    fields = {"_type", "subject", "predicateType", "predicate"}
    if not isinstance(found, dict) or set(found) != fields:
        raise _refuse("statement", "The statement has other fields than in-toto v1.")
    kind, predicate = found["predicateType"], found["predicate"]
    if found["_type"] != STATEMENT_TYPE or kind not in (PREDICATE_TYPE, TEST_TYPE):
        raise _refuse("statement", "The statement is not a casemate receipt of this version.")
    if kind == TEST_TYPE:
        predicate = predicate.get("receipt") if isinstance(predicate, dict) else None
    try:
        receipt = codec.from_json(Receipt, predicate, where="predicate")
    except FormatError as e:
        raise _refuse("predicate", f"The predicate is refused: {e.message}", e.where) from None
    due = statement(receipt)
    if found["subject"] != due["subject"]:
        raise _refuse("subject", "The statement's subject is not what the receipt is about.")
    if found != due:
        raise _refuse("predicate", "The statement says other things than its receipt.")
    return receipt


def warm() -> None:
    """Import the second accountant, where it is installed: a second or two that
    :func:`verify_receipt` would take, better spent while a job runs."""
    from casemate.accounting import pld

    with suppress(UsageError):
        pld.epsilon((), 0.5)


def verify_receipt(
    bundle: ReceiptBundle,
    *,
    trust: Trust,
    weights: str | Path | bytes | None = None,
    now: float | None = None,
    witnesses: Witnesses = Witnesses(),  # noqa: B008 - a frozen value
    memory: Memory | None = None,
) -> VerifiedReceipt:
    """Check ``bundle`` under ``trust``; with ``weights`` (a file, or its bytes) also the result,
    with ``witnesses`` who cosigned, with ``memory`` that the log is the one seen before.

    A simulated TEE passes only a trust that names simulation. Raises ``EvidenceError`` or
    ``ReceiptError`` naming the failed check.
    """
    payload, checks = signed_payload(bundle, trust, time.time() if now is None else now)
    receipt = read_statement(payload)
    checks.append(Check("statement", f"in-toto v1, subject {receipt.result_digest[:23]}…"))
    _agree(receipt, bundle)
    checks.append(Check("consistency", f"{len(receipt.datasets)} dataset(s), one plan, one boot"))
    checks.append(_logged(receipt, bundle))
    signed = checkpoint.read_proof(bundle.proof).signed
    checks.append(witnesses.check(signed))
    checks.append(seen_before(heads.read(signed, bundle.attestation.binding.log_key), memory))
    checks.append(same_file("weights", receipt.result_digest, weights))
    if receipt.artifact:
        found = (
            f"{receipt.artifact}; to make it again: casemate native build {receipt.quote_digest}"
        )
        checks.append(Check("native step", found, "unchecked"))
    if receipt.target and weights is not None:
        checks.append(_scored(receipt, weights))
    checks.extend(_privacy(receipt))
    claim = f"{receipt.job}: {receipt.guarantee.statement}"
    return Verified(receipt, tuple(checks), f"Receipt of {receipt.job}", claim, bundle)


def signed_payload(bundle: ReceiptBundle, trust: Trust, now: float) -> tuple[bytes, list[Check]]:
    """The statement's bytes, signed by a key that the evidence binds."""
    binding = bundle.attestation.binding
    nonce = hashlib.sha256(binding.boot).digest()
    verdict = verify_attestation(
        bundle.attestation, nonce, trust, now=now, tls_spki=Unchecked("offline: no connection")
    )
    found = f"{verdict.tee}, {verdict.product}, root {verdict.root[:16]}…, binds this boot's keys"
    checks = [Check("evidence", found, "simulated" if verdict.simulated else "ok")]
    keyid = binding.receipt_key.hex()
    kind, payload = dsse.verify(bundle.envelope, {keyid: binding.receipt_key})
    if kind != PAYLOAD_TYPE:
        raise _refuse(
            "payload-type", f"The envelope holds {kind[:60]!r}, not an in-toto statement."
        )
    checks.append(Check("signature", f"DSSE, Ed25519 key {keyid[:16]}…, bound by the evidence"))
    return payload, checks


def _logged(receipt: Receipt, bundle: ReceiptBundle) -> Check:
    """The commit's entry, which names this result and this envelope, stands in the log."""
    key = bundle.attestation.binding.log_key
    proof = checkpoint.read_proof(bundle.proof)
    head = checkpoint.verify_proof(proof, bundle.entry, checkpoint.log_key(receipt.log, key))
    entry = codec.decode(LogEntry, bundle.entry)
    if entry.kind != "commit" or entry.sequence != proof.place:
        raise _refuse("log-entry", "The log's entry is not the commit of a job.", "entry")
    said = codec.decode(Committed, entry.body)
    envelope = "sha256:" + hashlib.sha256(bundle.envelope.encode()).hexdigest()
    due = Committed(
        job=receipt.job,
        result=commitment(bundle.salt, receipt.result_digest),
        receipt=commitment(bundle.salt, envelope),
        anchor=said.anchor,
    )
    if said != due or entry.boot != receipt.boot or not receipt.reserved < entry.sequence:
        raise _refuse("log-entry", "The log's entry is about another job or receipt.", "entry")
    return Check("log", f"entry {entry.sequence} of {head.size} in {head.origin[:40]}…")


def _agree(receipt: Receipt, bundle: ReceiptBundle) -> None:
    """The places where the receipt says one thing twice."""
    plan, evidence = receipt.plan, bundle.attestation.evidence
    pairs: tuple[tuple[str, object, object], ...] = (
        ("boot", receipt.boot, bundle.attestation.binding.boot),
        ("plan.model_digest", plan.model_digest, receipt.model_digest),
        ("plan.request_digest", plan.request_digest, receipt.request_digest),
        ("guarantee.private", receipt.guarantee.private, plan.private),
        ("plan.units", plan.units, sum(d.units for d in receipt.datasets)),
        ("simulated", "tee" in receipt.simulated, evidence.simulated),
        ("datasets", len({d.dataset for d in receipt.datasets}), len(receipt.datasets)),
    )
    for name, one, other in pairs:
        if one != other:
            raise _refuse("contradiction", f"The receipt contradicts itself in {name}.", name)
    limits = [m.limit for m in receipt.metrics] if receipt.target else []
    named = not receipt.target or {m.name for m in receipt.metrics} <= contest.HIGHER.keys()
    scored = named and len(receipt.scores) == len(limits) and (bool(limits) or not receipt.target)
    if not scored or any(not 0 <= s <= m for s, m in zip(receipt.scores, limits, strict=True)):
        raise _refuse("contradiction", "The scores are not of the receipt's metrics.", "scores")
    words = no_privacy(receipt.metrics)
    if not plan.private and receipt.guarantee.statement != words:
        raise _refuse(
            "guarantee", f"A run without privacy must say {words!r}.", "guarantee.statement"
        )


def same_file(name: str, digest: str, given: str | Path | bytes | None) -> Check:
    """Whether a file (or its bytes) is the subject of a receipt, ``weights`` or a ``model``. Raises
    ``receipt.weights``."""
    if given is None:
        return Check(name, "not given: the result's digest was not compared", "unchecked")
    if isinstance(given, bytes):
        found = hashlib.sha256(given).hexdigest()
    else:
        try:
            with Path(given).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise UsageError(
                "usage.file",
                f"{given} cannot be read: {e.strerror}.",
                mend=f"Name the file of the {name}.",
                where=str(given),
            ) from None
    if f"sha256:{found}" != digest:
        raise _refuse("weights", f"This is not the {name} that the receipt is about.")
    return Check(name, f"sha256:{found[:16]}… is the receipt's result")


def _scored(receipt: Receipt, given: str | Path | bytes) -> Check:
    """Whether an entry's scores are those of its result, whose digest was compared."""
    data = given if isinstance(given, bytes) else Path(given).read_bytes()
    if contest.scores(receipt.metrics, data) != receipt.scores:
        raise _refuse("contradiction", "The scores are not those of the result.", "scores")
    return Check("scores", "those of the result")


def _privacy(receipt: Receipt) -> Iterator[Check]:
    plan, guarantee = receipt.plan, receipt.guarantee
    if not plan.private:
        if plan.events or plan.noise_multiplier or guarantee.epsilon:
            raise _refuse("guarantee", "A run without privacy claims noise or an epsilon.")
        yield Check("privacy", no_privacy(receipt.metrics))
        return
    if not plan.events or plan.steps != sum(e.steps for e in plan.events):
        raise _refuse("events", "The plan's events are not its steps.", "plan.events")
    for event in plan.events:
        if event.rate != plan.rate or event.noise_multiplier != plan.noise_multiplier:
            raise _refuse("events", "An event has another rate or noise than the plan.")
    if plan.sigma < plan.noise_multiplier * plan.sensitivity * (1 - RELATIVE_SLACK):
        raise _refuse("sigma", "The noise is below its multiplier times the sensitivity.")
    if plan.sensitivity < plan.clip:
        raise _refuse("sensitivity", "The sensitivity is below the clip.")
    extra = plan.delta_truncation + plan.delta_sampler
    if not 0 <= extra < guarantee.delta < 1:
        raise _refuse("guarantee", "The guarantee's delta does not cover the plan's own deltas.")
    try:
        charge = RdpFilter.charge(plan.events, extra, delta_shown=guarantee.delta)
    except (BudgetError, PlanError, ValueError, ArithmeticError) as e:
        raise _refuse("events", f"The events of the plan have no charge: {e}") from None
    for part in receipt.datasets:
        enough = all(
            taken >= due for taken, due in zip(part.charge.rdp_nano, charge.rdp_nano, strict=False)
        )
        if (
            len(part.charge.rdp_nano) != len(charge.rdp_nano)
            or not enough
            or part.charge.delta_femto < charge.delta_femto
        ):
            raise _refuse(
                "charge",
                f"Dataset {part.dataset} was charged less than the events of the plan cost.",
                part.dataset,
            )
    yield Check(
        "charge (RDP)",
        f"recomputed: epsilon {charge.epsilon:.4f} at delta {guarantee.delta:g}, "
        f"taken from {len(receipt.datasets)} dataset(s)",
    )
    yield _tight(receipt, extra)  # after the charge: these events are sane


def _tight(receipt: Receipt, extra: float) -> Check:
    from casemate.accounting import pld

    plan, guarantee = receipt.plan, receipt.guarantee
    try:
        epsilon = pld.epsilon(plan.events, guarantee.delta - extra)
    except UsageError as e:
        if e.code != "usage.extra":
            raise
        return Check("epsilon (PLD)", f"not recomputed: {e.mend}", "unchecked")
    if guarantee.epsilon < epsilon * (1 - RELATIVE_SLACK):
        raise _refuse(
            "epsilon",
            f"The receipt claims epsilon {guarantee.epsilon:.6g}, its events cost {epsilon:.6g}.",
            "guarantee.epsilon",
        )
    return Check(
        "epsilon (PLD)",
        f"recomputed {epsilon:.4f}, claimed {guarantee.epsilon:.4f} at delta {guarantee.delta:g}",
    )


def as_json(verified: Verified[Receipt] | Verified[SaleReceipt]) -> dict[str, object]:
    """A stable shape for ``--format json``."""
    return {
        "receipt": codec.to_json(verified.receipt),
        "simulated": list(verified.simulated),
        "checks": [{"name": c.name, "state": c.state, "found": c.found} for c in verified.checks],
    }


def predicate_type(bundle: ReceiptBundle) -> str:
    """What the statement inside is about, unverified: whose check is the one to make."""
    statement = statement_json(bundle)
    return str(statement.get("predicateType")) if isinstance(statement, dict) else ""


def statement_json(bundle: ReceiptBundle) -> canonical.Json:
    """The statement inside, unverified, for reading. Raises ``ReceiptError`` ``receipt.envelope``
    for another form."""
    try:
        return canonical.decode(dsse.unverified(bundle.envelope))
    except FormatError as e:
        raise _refuse("envelope", f"The envelope holds no statement: {e}.") from None


__all__ = [
    "Check",
    "Verified",
    "VerifiedReceipt",
    "Witnesses",
    "as_json",
    "load_bundle",
    "predicate_type",
    "read_statement",
    "same_file",
    "signed_payload",
    "statement_json",
    "verify_receipt",
]

"""Sales of deployed models: what a seller signs, and the receipt that both parties keep."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from casemate.client import heads, receipts, views
from casemate.client.heads import Check, Witnesses, seen_before
from casemate.client.memory import Memory
from casemate.client.receipts import Verified
from casemate.seal import checkpoint, dsse
from casemate.seal.identity import Identity
from casemate.spec import canonical, codec
from casemate.spec.errors import FormatError, ReceiptError
from casemate.spec.identity import PublicIdentity
from casemate.spec.log import Granted, commitment
from casemate.spec.receipt import LogEntry, ReceiptBundle
from casemate.spec.sale import SALE_TYPE, Sale, SaleInfo, SaleReceipt, statement

if TYPE_CHECKING:
    from casemate.attest.trust import Trust


@dataclass(frozen=True, slots=True)
class SaleView:
    """A sale as its parties see it; ``info`` holds the values."""

    info: SaleInfo

    @property
    def id(self) -> str:
        return self.info.id

    def __str__(self) -> str:
        return views.as_text("", (), views.sale(self.info))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return views.as_html("Sale", (), views.sale(self.info))


def sign(sale: Sale, seller: Identity) -> str:
    """The envelope, one line of JSON."""
    return dsse.sign(SALE_TYPE, codec.encode(sale), seller.sign, seller.id)


def _refuse(reason: str, message: str, where: str) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Do not rely on this receipt; ask the enclave for it again.",
        where=where,
    )


def verify_sale(
    bundle: ReceiptBundle,
    *,
    trust: Trust,
    model: str | Path | bytes | None = None,
    now: float | None = None,
    witnesses: Witnesses = Witnesses(),  # noqa: B008 - a frozen value
    memory: Memory | None = None,
) -> Verified[SaleReceipt]:
    """Check a sale's receipt offline, as :func:`casemate.client.receipts.verify_receipt` does a
    job's: evidence, signature, statement, that the log has it, who cosigned, that it is the log
    seen before; and that the seller signed this very sale. ``model``: the packed model (a file, or
    its bytes) to compare. Raises ``EvidenceError``, ``ReceiptError`` naming the failed check.
    """
    at = time.time() if now is None else now
    payload, checks = receipts.signed_payload(bundle, trust, at)
    receipt = read_statement(payload)
    sale = receipt.sale
    checks.append(Check("statement", f"in-toto v1, subject {sale.model_digest[:23]}…"))
    checks.append(_agree(receipt, bundle))
    checks.append(_signed(receipt))
    checks.append(_logged(receipt, bundle))
    signed = checkpoint.read_proof(bundle.proof).signed
    checks.append(witnesses.check(signed))
    checks.append(seen_before(heads.read(signed, bundle.attestation.binding.log_key), memory))
    checks.append(receipts.same_file("model", sale.model_digest, model))
    terms = f", on these terms: {sale.terms}" if sale.terms else ""
    claim = f"{sale.seller} sold {sale.model} ({sale.model_digest}) to {sale.buyer}{terms}"
    return Verified(receipt, tuple(checks), f"Receipt of {sale.id}", claim, bundle)


def read_statement(payload: bytes) -> SaleReceipt:
    """The receipt in an in-toto Statement v1 that says just what the receipt does."""
    try:
        found = canonical.decode(payload)
        predicate = found.get("predicate") if isinstance(found, dict) else None
        receipt = codec.from_json(SaleReceipt, predicate, where="predicate")
    except FormatError as e:
        raise _refuse("statement", f"The statement is no sale's: {e.message}", e.where) from None
    if found != statement(receipt):
        raise _refuse("statement", "The statement says other things than its receipt.", "")
    return receipt


def _agree(receipt: SaleReceipt, bundle: ReceiptBundle) -> Check:
    """The places where the receipt says one thing twice."""
    evidence = bundle.attestation.evidence
    for name, one, other in (
        ("boot", receipt.boot, bundle.attestation.binding.boot),
        ("simulated", "tee" in receipt.simulated, evidence.simulated),
    ):
        if one != other:
            raise _refuse("contradiction", f"The receipt contradicts itself in {name}.", name)
    return Check("consistency", "one model, one boot")


def _signed(receipt: SaleReceipt) -> Check:
    """The seller's own signature, by the keys that their id is made of."""
    sale = receipt.sale
    keys = PublicIdentity(name="-", sign_key=receipt.sign_key, seal_key=receipt.seal_key)
    kind, payload = dsse.verify(receipt.signed, {sale.seller: receipt.sign_key})
    if keys.id != sale.seller or kind != SALE_TYPE or payload != codec.encode(sale):
        raise _refuse("sale", "The seller did not sign this sale.", "signed")
    return Check("seller", f"DSSE, {sale.seller[:11]}… signed this very sale")


def _logged(receipt: SaleReceipt, bundle: ReceiptBundle) -> Check:
    """The grant's entry, which commits to this sale and this envelope, stands in the log."""
    key = bundle.attestation.binding.log_key
    proof = checkpoint.read_proof(bundle.proof)
    log = checkpoint.log_key(receipt.sale.origin, key)
    head = checkpoint.verify_proof(proof, bundle.entry, log)
    entry = codec.decode(LogEntry, bundle.entry)
    if entry.kind != "grant" or entry.sequence != proof.place:
        raise _refuse("log-entry", "The log's entry is not the grant of a model.", "entry")
    envelope = "sha256:" + hashlib.sha256(bundle.envelope.encode()).hexdigest()
    due = Granted(
        sale=commitment(bundle.salt, codec.digest(receipt.sale)),
        receipt=commitment(bundle.salt, envelope),
    )
    said = codec.decode(Granted, entry.body)
    if (said, entry.subject, entry.boot) != (due, due.sale, receipt.boot):
        raise _refuse("log-entry", "The log's entry is about another sale or receipt.", "entry")
    return Check("log", f"entry {entry.sequence} of {head.size} in {head.origin[:40]}…")

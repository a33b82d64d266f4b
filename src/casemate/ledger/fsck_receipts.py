"""Receipts for ``fsck``: the attestations that bind the keys, the envelopes that they signed, the
proofs that they stand in the log, the epsilon that they claim."""

from __future__ import annotations

from typing import Any, Final

from casemate.ledger import fsck_costs as costs
from casemate.ledger import fsck_notes as notes
from casemate.ledger.fsck_replay import Job, Replay, Rows
from casemate.seams import Disk
from casemate.spec import canonical, codec
from casemate.spec.errors import CasemateError
from casemate.spec.evidence import Attestation
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Quote
from casemate.spec.receipt import (
    PAYLOAD_TYPE,
    TEST_TYPE,
    Receipt,
    ReceiptBundle,
    statement,
)
from casemate.spec.sale import SALE_TYPE, Sale, SaleReceipt
from casemate.spec.sale import statement as sale_statement

# What estimates from below and from above may differ by.
_NEAR: Final = 1e-6


def check(replay: Replay, rows: Rows, _: Disk) -> None:
    """All receipts, of committed jobs and of sales."""
    attestations = _attestations(replay, rows)
    leaves: dict[int, bytes] = dict(rows("SELECT sequence, entry FROM entries"))
    sql = (
        "SELECT j.id, j.result_digest, j.envelope, j.bundle, q.digest, q.quote, q.salt FROM jobs j"
        " JOIN quotes q ON q.digest = j.quote WHERE j.state IN ('committed', 'done')"
    )
    for name, result, envelope, bundle, digest, raw, salt in rows(sql):
        said = replay.jobs.get(name)
        attested = None if said is None else attestations.get(said.boot)
        if said is None or attested is None or said.ended is None:
            replay.findings.append(f"job {name} has a receipt and no attested commit")
            continue
        if bundle is not None:
            whole = codec.decode(ReceiptBundle, bundle)
            envelope = whole.envelope
            replay.expect(
                whole.attestation == attested
                and whole.salt == salt
                and whole.entry == leaves.get(said.ended),
                f"the receipt of {name} is bundled with other things than its own",
            )
            replay.expect(
                _proved(replay, whole.proof, said.ended),
                f"the receipt of {name} does not prove that it stands in the log",
            )
        payload = notes.envelope(envelope, PAYLOAD_TYPE, attested.binding.receipt_key)
        if replay.expect(
            payload is not None, f"the receipt of {name} is not signed by its boot's key"
        ):
            _claims(replay, name, said, result, digest, raw, payload or b"")
        replay.receipts += 1
    if rows("SELECT 1 FROM sqlite_schema WHERE name = 'sales'"):
        _sales(replay, rows, attestations)


def _attestations(replay: Replay, rows: Rows) -> dict[bytes, Attestation]:
    """Of each boot; each binds the boot and the key that the log then had."""
    out = {}
    for boot, raw in rows("SELECT boot, attestation FROM attestations"):
        out[boot] = found = codec.decode(Attestation, raw)
        origin = replay.passing.origin(replay.started.get(boot, 0))
        replay.expect(
            found.binding.boot == boot and found.binding.log_key == replay.keys.get(origin),
            f"the attestation of boot {boot.hex()} binds other keys than the log's",
        )
    return out


def _sales(replay: Replay, rows: Rows, attestations: dict[bytes, Attestation]) -> None:
    """Receipts of sales: the boot's word, and the seller's within."""
    boots = {place: boot for place, _, boot in replay.sales.values()}
    for name, raw, entry, text in rows("SELECT id, sale, entry, receipt FROM sales"):
        sale = codec.decode(Sale, raw)
        attested = attestations.get(boots.get(entry, b""))
        key = b"" if attested is None else attested.binding.receipt_key
        payload = notes.envelope(text, PAYLOAD_TYPE, key) or b""
        try:
            found: Any = canonical.decode(payload)
            receipt = codec.from_json(SaleReceipt, found["predicate"])
        except (CasemateError, KeyError, TypeError):
            replay.findings.append(f"the receipt of {name} has another form or signature")
            continue
        seller = PublicIdentity(name="-", sign_key=receipt.sign_key, seal_key=receipt.seal_key).id
        replay.expect(
            found == sale_statement(receipt)
            and (receipt.sale, receipt.boot, seller) == (sale, boots.get(entry), sale.seller)
            and notes.envelope(receipt.signed, SALE_TYPE, receipt.sign_key) == codec.encode(sale),
            f"the receipt of {name} says other things than its seller signed",
        )
        replay.receipts += 1


def _proved(replay: Replay, proof: str, place: int) -> bool:
    """Whether a tlog-proof leads from an entry to a checkpoint that this log signed."""
    first, _, signed = proof.partition("\n\n")
    lines = first.split("\n")
    size = signed.split("\n")[1:2]
    if lines[:2] != ["c2sp.org/tlog-proof@v1", f"index {place}"] or not size:
        return False
    if not size[0].isdecimal() or not place < int(size[0]) <= replay.entries:
        return False
    count = int(size[0])
    path = notes.path(replay.leaves, place, 0, count)
    if [notes.octets(text) for text in lines[2:]] != path:
        return False
    root = notes.tree(replay.leaves[:count])
    return any(
        notes.note(notes.head(name, count, root), signed, notes.Signer(name, notes.LOG, key))
        for name, key in replay.keys.items()
    )


def _claims(
    replay: Replay, name: str, said: Job, result: str, digest: str, raw: bytes, payload: bytes
) -> None:
    """What the statement says, against the tables and the log."""
    try:
        found: Any = canonical.decode(payload)
        entry = found["predicateType"] == TEST_TYPE
        receipt = codec.from_json(
            Receipt, found["predicate"]["receipt"] if entry else found["predicate"]
        )
    except (CasemateError, KeyError, TypeError):
        replay.findings.append(f"the receipt of {name} has another form")
        return
    quote = codec.decode(Quote, raw)
    body, claim = said.reserved, receipt.guarantee
    replay.expect(
        found == statement(receipt)
        and len(receipt.scores) == (len(receipt.metrics) if receipt.target else 0)
        and (receipt.job, receipt.scientist, receipt.boot) == (name, body.scientist, said.boot)
        and (receipt.result_digest, receipt.quote_digest) == (result, digest)
        and receipt.request_digest == codec.digest(quote.request)
        and receipt.model_digest == quote.request.model_digest
        and receipt.plan == quote.plan
        and (receipt.metrics, receipt.target) == (quote.request.metrics, quote.request.target)
        and receipt.artifact == quote.execution.artifact
        and receipt.reserved == said.sequence
        and receipt.log in replay.keys
        and [d.dataset for d in receipt.datasets] == [d.dataset for d in body.debits]
        and all(d.charge == body.charge for d in receipt.datasets)
        and claim.private == bool(body.events) == quote.plan.private
        and (claim.epsilon, claim.delta) == (quote.epsilon, quote.delta),
        f"the receipt of {name} says other things than the log",
    )
    least = costs.tight(quote.plan, quote.delta) if quote.plan.private else 0.0
    replay.expect(
        least * (1 - _NEAR) - _NEAR <= claim.epsilon <= body.charge.epsilon * (1 + _NEAR) + _NEAR,
        f"the receipt of {name} claims epsilon {claim.epsilon:g}, its events cost {least:g}",
    )

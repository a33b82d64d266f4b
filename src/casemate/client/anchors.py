"""Anchored proofs (docs/anchors.md): a receipt shown to those who do not have it, under a
checkpoint that somebody posted where it cannot be taken back.

:func:`prove` makes the proof from a bundle that holds, :func:`check` says what a proof is worth
against an anchor, :func:`post` adds a log's newest checkpoint to an anchor's file
(:mod:`casemate.seal.anchors`); :mod:`casemate.client.contract` writes the calls for a chain.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from casemate.client.heads import Check, Witnesses
from casemate.client.receipts import Verified, predicate_type, verify_receipt
from casemate.client.sales import verify_sale
from casemate.seal import anchors, checkpoint
from casemate.seal.anchors import Anchor
from casemate.seal.checkpoint import Checkpoint, Proof
from casemate.seal.note import Note
from casemate.spec import codec, merkle
from casemate.spec.errors import ReceiptError, UsageError
from casemate.spec.log import Committed, Granted, commitment
from casemate.spec.merkle import Node
from casemate.spec.receipt import LogEntry, Receipt, ReceiptBundle, ReceiptProof
from casemate.spec.sale import SALE_PREDICATE, SaleReceipt

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.client.memory import Mirror, Seen

MAX_PROOF: Final = 1 << 20
# The entries that commit to a receipt: a job's, a sale's.
_BODIES: Final[dict[str, type[Committed] | type[Granted]]] = {
    "commit": Committed,
    "grant": Granted,
}
T = TypeVar("T")


def prove(
    bundle: ReceiptBundle,
    *,
    trust: Trust,
    anchor: Anchor | None = None,
    mirror: Mirror | None = None,
    now: float | None = None,
) -> ReceiptProof:
    """The proof of a receipt, a job's or a sale's, whose bundle is verified first under ``trust``.

    Without an ``anchor`` it leads to the bundle's own checkpoint, which is then the one to post;
    with one, to the oldest checkpoint posted there that covers the receipt, by the hashes of
    ``mirror`` where that is another. Raises as ``verify_receipt`` or ``verify_sale``;
    ``ReceiptError`` ``receipt.not-anchored`` where none covers it; ``UsageError``
    ``usage.undecided`` where the mirror does not reach it.
    """
    _verified(bundle, trust, now)
    proof, key = checkpoint.read_proof(bundle.proof), bundle.attestation.binding.log_key
    if anchor is not None:
        if anchor.log.key != key:
            raise _not_anchored(f"The anchor is of the log {anchor.log.name}.")
        signed = _covering(anchor, proof.place)
        if signed.text != proof.signed.text:
            proof = _moved(proof.place, signed, mirror)
    made = ReceiptProof(
        receipt="sha256:" + hashlib.sha256(bundle.envelope.encode()).hexdigest(),
        salt=bundle.salt,
        entry=bundle.entry,
        key=key,
        proof=str(proof),
    )
    check(made)  # a mirror's hashes may be false
    return made


def _verified(
    bundle: ReceiptBundle, trust: Trust, now: float | None
) -> Verified[Receipt] | Verified[SaleReceipt]:
    if predicate_type(bundle) == SALE_PREDICATE:
        return verify_sale(bundle, trust=trust, now=now)
    return verify_receipt(bundle, trust=trust, now=now)


def _covering(anchor: Anchor, place: int) -> Note:
    for head, found in zip(anchor.heads, anchor.posts, strict=True):
        if head.size > place:
            return found.signed
    raise _not_anchored(f"No checkpoint posted there covers entry {place}.")


def _moved(place: int, signed: Note, mirror: Mirror | None) -> Proof:
    """The proof of a place under another checkpoint."""
    size = checkpoint.read(signed.text).size
    return Proof(place, _asked(mirror, size, lambda n: merkle.inclusion(place, size, n)), signed)


def _asked(mirror: Mirror | None, size: int, question: Callable[[Node], T]) -> T:
    """What is found in the mirror's tree, if it reaches that far."""
    try:
        if mirror is not None:
            return mirror.ask(size, question)
    except IndexError:
        pass
    raise UsageError(
        "usage.undecided",
        f"The log's hashes up to entry {size} are not known here.",
        mend="Run `casemate audit sync`, or name a folder of `casemate audit mirror` with --dir.",
    )


def check(
    proof: ReceiptProof,
    *,
    anchor: Anchor | None = None,
    bundle: ReceiptBundle | None = None,
    trust: Trust | None = None,
    witnesses: Witnesses = Witnesses(),  # noqa: B008 - a frozen value
    now: float | None = None,
) -> tuple[Check, ...]:
    """What a proof shows, step by step: that the entry commits to the receipt, and stands in the
    log under a checkpoint of its key; who cosigned that; that it was posted (``anchor``); that
    this is the receipt, and the key its enclave's (``bundle``, judged under ``trust``).

    Raises ``ReceiptError``: ``receipt.log-entry``, ``receipt.inclusion``, ``receipt.note-*``,
    ``receipt.witnesses``, ``receipt.not-anchored``, ``receipt.fork``; as ``verify_receipt``.
    """
    found = checkpoint.read_proof(proof.proof)
    _commits(proof, found.place)
    log = checkpoint.log_key(checkpoint.read(found.signed.text).origin, proof.key)
    head = checkpoint.verify_proof(found, proof.entry, log)
    return (
        Check("receipt", f"{proof.receipt[:23]}…, committed to by entry {found.place}"),
        Check("log", f"entry {found.place} of {head.size}, root {head.root.hex()[:16]}…"),
        witnesses.check(found.signed),
        _posted(head, proof.key, anchor),
        _bundled(proof, bundle, trust, now),
    )


def _commits(proof: ReceiptProof, place: int) -> None:
    entry = codec.decode(LogEntry, proof.entry)
    kind = _BODIES.get(entry.kind)
    said = None if kind is None else codec.decode(kind, entry.body)
    due = commitment(proof.salt, proof.receipt)
    if said is None or said.receipt != due or entry.sequence != place:
        raise ReceiptError(
            "receipt.log-entry",
            "The proof's entry commits to another receipt, or to none.",
            mend="Do not rely on this proof; ask whoever made it for the receipt.",
            where="entry",
        )


def _posted(head: Checkpoint, key: bytes, anchor: Anchor | None) -> Check:
    if anchor is None:
        return Check("anchor", "not given: who posted this checkpoint is not known", "unchecked")
    if anchor.log.key != key:
        raise _not_anchored(f"The anchor is of another log, {anchor.log.name}.")
    heads = anchor.heads
    for number, posted in enumerate(heads, 1):
        if posted == head:
            return Check("anchor", f"checkpoint {number} of {len(heads)} that were posted")
        if posted.size == head.size:
            checkpoint.check_extends(posted, head, ())  # raises: one log, two roots
    raise _not_anchored(f"No checkpoint of {head.size} entries was posted there.")


def _bundled(
    proof: ReceiptProof, bundle: ReceiptBundle | None, trust: Trust | None, now: float | None
) -> Check:
    if bundle is None:
        said = "not given: what it says, whose log this is, if its TEE was simulated: not checked"
        return Check("bundle", said, "unchecked")
    if trust is None:
        raise UsageError(
            "usage.trust",
            "No trust policy is given for the evidence in the receipt.",
            mend="Give the policy, or Trust.simulated() for an enclave that only pretends.",
        )
    verified = _verified(bundle, trust, now)
    envelope = "sha256:" + hashlib.sha256(bundle.envelope.encode()).hexdigest()
    if (envelope, bundle.attestation.binding.log_key) != (proof.receipt, proof.key):
        raise ReceiptError(
            "receipt.log-entry",
            "The proof is about another receipt, or its key is not that of the receipt's enclave.",
            mend="Do not rely on this proof; make one from the receipt that you have.",
            where="receipt",
        )
    state = verified.checks[0].state  # of the evidence: simulated or not
    return Check("bundle", f"{verified.title} holds, and binds the key", state)


def _not_anchored(message: str) -> ReceiptError:
    return ReceiptError(
        "receipt.not-anchored",
        message,
        mend="Ask for a proof that leads to a posted checkpoint, or wait until one covers it.",
    )


def load(path: Path) -> Anchor:
    """The anchor in a file, verified. Raises ``UsageError`` ``usage.file`` when unreadable, and as
    ``seal.anchors.read``."""
    return anchors.read(_bytes(path, anchors.MAX_BYTES))


def load_proof(path: Path) -> ReceiptProof:
    """The proof in a file. Raises ``UsageError`` ``usage.file``, ``FormatError``."""
    data = _bytes(path, MAX_PROOF).removesuffix(b"\n")
    return codec.decode(ReceiptProof, data, limit=MAX_PROOF)


def save_proof(path: Path, proof: ReceiptProof) -> None:
    """Write a proof into a file. Raises ``UsageError`` ``usage.file``."""
    try:
        path.write_bytes(codec.encode(proof) + b"\n")
    except OSError as e:
        raise _file(path, f"cannot be written: {e.strerror}") from None


def _bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as e:
        raise _file(path, f"cannot be read: {e.strerror}") from None


def _file(path: Path, message: str) -> UsageError:
    return UsageError(
        "usage.file", f"{path} {message}.", mend="Name another file.", where=str(path)
    )


def post(path: Path, seen: Seen, mirror: Mirror) -> tuple[Anchor, bool]:
    """Add the newest checkpoint of a log to the anchor's file, with the proof that it extends the
    last one there, by the hashes of ``mirror``; the file is made where there is none. Nothing is
    added where it stands there already.

    Returns the anchor, and whether it grew. Raises ``ReceiptError``: ``receipt.log-replaced``
    (another log's file), ``receipt.fork``, ``receipt.rolled-back``; ``UsageError``.
    """
    known = load(path) if path.exists() else Anchor(seen.key)
    if known.log != seen.key:
        raise ReceiptError(
            "receipt.log-replaced",
            f"{path} is of the log {known.log.name}, not {seen.head.origin}.",
            mend="Name another file: an anchor is of one log.",
            where=seen.head.origin,
        )
    old, new = (known.heads[-1] if known.posts else None), seen.head
    if old == new:
        return known, False
    if old is not None and new.size < old.size:
        raise ReceiptError(
            "receipt.rolled-back",
            f"The log shows {new.size} entries, and {old.size} were posted in {path}.",
            mend="Fetch the log again; if it stays so, show both to the datasets' owners.",
            where=new.origin,
        )
    size = 0 if old is None else old.size
    if old is not None and new.size == size:
        checkpoint.check_extends(old, new, ())  # raises: one log, two roots
    proof = _asked(mirror, new.size, lambda n: merkle.consistency(size, new.size, n))
    grown = anchors.post(known, seen.signed, proof)
    before = str(known) if path.exists() else ""
    _append(path, str(grown)[len(before) :].encode())
    return grown, True


def _append(path: Path, data: bytes) -> None:
    """All of ``data`` behind what stands in the file, or nothing; what stands there stays."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(fd).st_size
            try:
                if os.write(fd, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)
    except OSError as e:
        raise _file(path, f"cannot be written: {e.strerror}") from None

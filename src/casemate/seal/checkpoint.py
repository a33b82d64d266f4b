"""Checkpoints of a log (C2SP tlog-checkpoint v1.0.0), proofs of inclusion (C2SP tlog-proof v1) and
a witness's request (C2SP tlog-witness, add-checkpoint): three texts around one tree head."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from casemate.seal import note
from casemate.seal.note import Note, Verifier
from casemate.spec import merkle
from casemate.spec.errors import FormatError, ReceiptError

MAX_SIZE: Final = 2**53
MAX_PROOF: Final = 63
PROOF_HEAD: Final = "c2sp.org/tlog-proof@v1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree head: which log, how many leaves, the root over them (32 bytes)."""

    origin: str
    size: int
    root: bytes

    def __str__(self) -> str:
        """The note's text."""
        return f"{self.origin}\n{self.size}\n{_encode(self.root)}\n"


def _encode(hashed: bytes) -> str:
    return base64.b64encode(hashed).decode()


def _form(message: str, where: str = "") -> FormatError:
    return FormatError(
        "format.checkpoint", message, mend="Get it again from its source, unchanged.", where=where
    )


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,15}", text) or int(text) > MAX_SIZE:
        raise _form(f"{what} is not a whole number.", text[:40])
    return int(text)


def _hashes(lines: Iterable[str]) -> tuple[bytes, ...]:
    found = tuple(map(note.octets, lines))
    if len(found) > MAX_PROOF or any(len(h) != merkle.HASH_BYTES for h in found):
        raise _form(f"A proof has at most {MAX_PROOF} hashes of 32 bytes.")
    return found


def head(text: str) -> Checkpoint:
    """The tree head of a note's text, which is not verified here; what follows its three lines is
    passed over, as a witness of foreign logs does. Raises ``FormatError`` ``format.checkpoint``."""
    parts = text.split("\n")
    if len(parts) < 4 or parts.pop() or not all(parts):
        raise _form("A checkpoint has at least three lines, none empty: origin, size, root.")
    root = note.octets(parts[2])
    if len(root) != merkle.HASH_BYTES:
        raise _form("A checkpoint's root is not 32 bytes long.")
    return Checkpoint(parts[0], _number(parts[1], "The size"), root)


def read(text: str) -> Checkpoint:
    """As :func:`head`, of casemate's own logs: extension lines are refused, since nothing here
    makes any, and an origin that names no key."""
    found = head(text)
    if str(found) != text:
        raise _form("A checkpoint has three lines: origin, size, root.")
    note.check_name(found.origin)
    return found


def sign(head: Checkpoint, key: bytes, signer: Callable[[bytes], bytes]) -> Note:
    """The log's own signed checkpoint; its key's name is the origin."""
    text = str(head)
    return Note(text, (note.sign(text, head.origin, key, signer),))


def log_key(origin: str, key: bytes) -> Verifier:
    """The verifier of a log's own signature (``key``: 32 bytes)."""
    return Verifier(origin, note.SIGNATURE, key)


def verify(signed: Note, log: Verifier) -> Checkpoint:
    """The checkpoint, signed by ``log`` and of its origin. Raises ``ReceiptError``
    ``receipt.note-*``."""
    note.verify(signed, [log])
    head = read(signed.text)
    if head.origin != log.name:
        raise ReceiptError(
            "receipt.note-origin",
            f"The checkpoint is of the log {head.origin!r}, not {log.name!r}.",
            mend="Ask for the checkpoint of the log that the evidence binds.",
            where=head.origin,
        )
    return head


@dataclass(frozen=True, slots=True)
class Proof:
    """That an entry stands in a log: its place, its audit path, the signed checkpoint."""

    place: int
    path: tuple[bytes, ...]
    signed: Note

    def __str__(self) -> str:
        lines = [PROOF_HEAD, f"index {self.place}", *map(_encode, self.path), "", str(self.signed)]
        return "\n".join(lines)


def read_proof(text: str) -> Proof:
    """Read a tlog-proof; an ``extra`` line is refused. Raises ``FormatError``."""
    head, blank, signed = text.partition("\n\n")
    lines = head.split("\n")
    if not blank or len(lines) < 2 or lines[0] != PROOF_HEAD or not lines[1].startswith("index "):
        raise _form("This is no proof of inclusion (c2sp.org/tlog-proof@v1).")
    place = _number(lines[1].removeprefix("index "), "The index")
    return Proof(place, _hashes(lines[2:]), note.parse(signed))


def verify_proof(proof: Proof, leaf: bytes, log: Verifier) -> Checkpoint:
    """The checkpoint under which ``leaf`` (the entry's bytes) stands at ``proof.place``.

    Raises ``ReceiptError`` ``receipt.note-*``, ``receipt.inclusion``.
    """
    head = verify(proof.signed, log)
    try:
        found = merkle.root_from_inclusion(
            merkle.leaf_hash(leaf), proof.place, head.size, proof.path
        )
    except ValueError as e:
        raise _absent(proof, str(e)) from None
    if found != head.root:
        raise _absent(proof, "the path leads to another root")
    return head


def _absent(proof: Proof, reason: str) -> ReceiptError:
    return ReceiptError(
        "receipt.inclusion",
        f"The entry does not stand at place {proof.place} of the log: {reason}.",
        mend="Do not rely on it; keep it, and ask the enclave for it again.",
        where=f"entry {proof.place}",
    )


def check_extends(old: Checkpoint, new: Checkpoint, proof: Sequence[bytes]) -> None:
    """Raises ``ReceiptError`` ``receipt.fork`` unless ``new`` extends ``old``."""
    try:
        if old.origin != new.origin:
            raise ValueError("they are of different logs")
        merkle.check_consistency(old.size, old.root, new.size, new.root, proof)
    except ValueError as e:
        raise ReceiptError(
            "receipt.fork",
            f"The log at {new.size} entries does not extend the one at {old.size}: {e}.",
            mend="Keep both checkpoints: they show that the log was forked or rolled back.",
            where=new.origin,
        ) from None


@dataclass(frozen=True, slots=True)
class Request:
    """A witness's add-checkpoint: from which size on, the consistency proof, the checkpoint."""

    old: int
    proof: tuple[bytes, ...]
    signed: Note

    def __str__(self) -> str:
        return "\n".join([f"old {self.old}", *map(_encode, self.proof), "", str(self.signed)])


def read_request(data: bytes) -> Request:
    """Read the body of add-checkpoint. Raises ``FormatError``."""
    if len(data) > note.MAX_NOTE:
        raise _form(f"The request is longer than {note.MAX_NOTE} bytes.")
    try:
        head, blank, signed = data.decode("utf-8").partition("\n\n")
    except UnicodeDecodeError:
        raise _form("The request is not UTF-8.") from None
    lines = head.split("\n")
    if not blank or not lines[0].startswith("old "):
        raise _form("The request has another form than add-checkpoint's.")
    old = _number(lines[0].removeprefix("old "), "The old size")
    return Request(old, _hashes(lines[1:]), note.parse(signed))

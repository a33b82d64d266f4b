"""Signed notes (C2SP signed-note v1.0.0) with Ed25519, and witnesses' cosignatures on checkpoints
(C2SP tlog-cosignature v1.0.0, type 0x04).

A key is known by its name and a 4-byte id. Signatures of unknown keys are skipped; one of a known
key that fails refuses the whole note, as the specification advises.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from casemate.spec.errors import FormatError, ReceiptError

Kind = Literal[0x01, 0x04]
SIGNATURE: Final = 0x01
COSIGNATURE: Final = 0x04
MAX_NOTE: Final = 1 << 16
MAX_SIGNATURES: Final = 64
_KEY_BYTES: Final = 32
_ID_BYTES: Final = 4
_TIME_BYTES: Final = 8
_MAX_TIME: Final = 1 << 63
_DASH: Final = "— "


def _form(message: str, where: str = "") -> FormatError:
    return FormatError(
        "format.note", message, mend="Get it again from its source, unchanged.", where=where
    )


def octets(text: str) -> bytes:
    """The bytes of standard base64 with padding. Raises ``FormatError`` ``format.note``."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or base64.b64encode(raw).decode() != text:
        raise _form(f"{text[:40]!r} is not in base64.")
    return raw


def check_name(name: str) -> str:
    """A key's name: not empty, no spaces, no plus, no control characters, nothing without UTF-8."""
    bad = any(c.isspace() or ord(c) < 0x20 or 0xD800 <= ord(c) < 0xE000 for c in name)
    if not name or "+" in name or bad:
        raise _form(f"{name[:60]!r} is no key name.")
    return name


@dataclass(frozen=True, slots=True)
class Verifier:
    """A key that may have signed: its name, whether it signs or cosigns, 32 bytes of Ed25519."""

    name: str
    kind: Kind
    key: bytes

    @property
    def id(self) -> bytes:
        """The first 4 bytes of SHA-256 over name, newline, type and key."""
        head = self.name.encode() + b"\n" + bytes([self.kind])
        return hashlib.sha256(head + self.key).digest()[:_ID_BYTES]

    def __str__(self) -> str:
        """The verifier key (vkey), ``name+id+base64(type || key)``."""
        key = base64.b64encode(bytes([self.kind]) + self.key).decode()
        return f"{self.name}+{self.id.hex()}+{key}"


def verifier(vkey: str) -> Verifier:
    """Read a vkey. Raises ``FormatError`` ``format.note``, also where its id is another."""
    name, plus, rest = vkey.partition("+")
    id_, plus2, encoded = rest.partition("+")
    if not plus or not plus2:
        raise _form("A verifier key has the form name+id+key.", vkey[:80])
    raw = octets(encoded)
    kind: Kind
    match raw[0]:
        case 0x01:
            kind = 0x01
        case 0x04:
            kind = 0x04
        case _:
            raise _form("A verifier key of type 1 (Ed25519) or 4 (cosignature/v1) is needed.", name)
    found = Verifier(check_name(name), kind, raw[1:])
    if len(found.key) != _KEY_BYTES or found.id.hex() != id_:
        raise _form("The verifier key is not 32 bytes long, or its id is another.", name)
    return found


def witnesses(vkeys: Iterable[str]) -> tuple[Verifier, ...]:
    """Read the vkeys of witnesses. Raises ``FormatError`` ``format.note`` for another kind."""
    found = tuple(map(verifier, vkeys))
    for each in found:
        if each.kind != COSIGNATURE:
            raise _form("This key signs no cosignatures: a witness's has type 4.", each.name)
    if len({(v.name, v.id) for v in found}) != len(found):
        raise _form("Two keys of witnesses have the same name and id.")
    return found


@dataclass(frozen=True, slots=True)
class Line:
    """One signature line: who, the key's id, and what the key made of the text."""

    name: str
    id: bytes
    signature: bytes

    def __str__(self) -> str:
        body = base64.b64encode(self.id + self.signature).decode()
        return f"{_DASH}{self.name} {body}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """A text, ending in a newline, and its signature lines; nothing verified yet."""

    text: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return self.text + "\n" + "".join(map(str, self.lines))

    def add(self, lines: Iterable[Line]) -> Note:
        """With further lines; of one key the newest stays."""
        found = {(line.name, line.id): line for line in (*self.lines, *lines)}
        return Note(self.text, tuple(found.values()))


def line(text: str) -> Line:
    """One signature line without its newline. Raises ``FormatError`` ``format.note``."""
    name, space, body = text.removeprefix(_DASH).partition(" ")
    if not text.startswith(_DASH) or not space:
        raise _form("A signature line has another form.", text[:60])
    raw = octets(body)
    if len(raw) <= _ID_BYTES:
        raise _form("A signature is too short.", name[:60])
    return Line(check_name(name), raw[:_ID_BYTES], raw[_ID_BYTES:])


def lines(text: str) -> tuple[Line, ...]:
    """Signature lines, each ended by a newline, as a witness answers."""
    if not text.endswith("\n"):
        raise _form("The signature lines do not end in a newline.")
    found = text.removesuffix("\n").split("\n")
    if len(found) > MAX_SIGNATURES:
        raise _form(f"There are more than {MAX_SIGNATURES} signatures.")
    return tuple(map(line, found))


def parse(data: str | bytes) -> Note:
    """Read a signed note. Raises ``FormatError`` ``format.note``."""
    try:
        raw = data.encode() if isinstance(data, str) else data
        text = raw.decode()
    except UnicodeError:
        raise _form("The note is not UTF-8.") from None
    if len(raw) > MAX_NOTE:
        raise _form(f"The note is longer than {MAX_NOTE} bytes.")
    if any(ord(c) < 0x20 and c != "\n" for c in text):
        raise _form("The note holds control characters.")
    body, blank, signed = text.rpartition("\n\n")
    if not blank or not body:
        raise _form("The note has no signatures.")
    return Note(body + "\n", lines(signed))


def sign(text: str, name: str, key: bytes, signer: Callable[[bytes], bytes]) -> Line:
    """The line of an Ed25519 key (``key``: its public half) over a note's text."""
    return Line(name, Verifier(name, SIGNATURE, key).id, signer(text.encode()))


def _cosigned(text: str, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()


def cosign(
    text: str, name: str, key: bytes, signer: Callable[[bytes], bytes], seconds: int
) -> Line:
    """A witness's line over a checkpoint's text at ``seconds`` of POSIX time, at most 2^63 - 1."""
    if not 0 <= seconds < _MAX_TIME:
        raise ValueError(f"{seconds} is no time of a cosignature")
    signature = seconds.to_bytes(_TIME_BYTES, "big") + signer(_cosigned(text, seconds))
    return Line(name, Verifier(name, COSIGNATURE, key).id, signature)


def _refuse(reason: str, message: str, where: str) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Do not rely on it; keep it, and ask its source for another.",
        where=where,
    )


def _check(by: Verifier, text: str, signature: bytes) -> int | None:
    """The seconds of a cosignature; ``InvalidSignature`` or ValueError if it is none by ``by``."""
    message, seconds = text.encode(), None
    if by.kind == COSIGNATURE:
        seconds = int.from_bytes(signature[:_TIME_BYTES], "big")
        if seconds >= _MAX_TIME:
            raise ValueError("a time past 2^63 - 1")
        signature, message = signature[_TIME_BYTES:], _cosigned(text, seconds)
    Ed25519PublicKey.from_public_bytes(by.key).verify(signature, message)
    return seconds


def verify(note: Note, keys: Iterable[Verifier]) -> dict[Verifier, int | None]:
    """Which of ``keys`` signed the note, with the POSIX seconds of a cosignature.

    Two keys of one name and id (4 bytes are soon matched by who wants to) are each tried, so that
    none of them can stand before the other. Raises ``ReceiptError`` ``receipt.note-signature`` when
    a line of a known key does not verify, ``receipt.note-unsigned`` when none of them signed.
    """
    known: dict[tuple[str, bytes], list[Verifier]] = {}
    for key in dict.fromkeys(keys):
        known.setdefault((key.name, key.id), []).append(key)
    found: dict[Verifier, int | None] = {}
    for each in note.lines:
        signers: dict[Verifier, int | None] = {}
        for by in (candidates := known.get((each.name, each.id), [])):
            with suppress(InvalidSignature, ValueError):
                signers[by] = _check(by, note.text, each.signature)
        if candidates and not signers:
            raise _refuse(
                "note-signature", f"The signature of {each.name} does not verify.", each.name
            )
        found |= signers
    if not found:
        raise _refuse("note-unsigned", "None of the keys that are trusted signed this note.", "")
    return found

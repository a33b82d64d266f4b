"""Signatures for ``fsck``, read again from their specifications: C2SP signed notes, checkpoints,
cosignature/v1 and tlog-proof, DSSE v1, RFC 6962 trees.

Functions answer with None, or False, for whatever does not hold.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

LOG: Final = 1
WITNESS: Final = 4


def holds(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether an Ed25519 signature verifies."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def public(private: bytes) -> bytes:
    """The public half of an Ed25519 key; b"" for what is none."""
    try:
        return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    except ValueError:
        return b""


def octets(text: str) -> bytes:
    """Standard base64; b"" for what is none."""
    try:
        return base64.b64decode(text.encode(), validate=True)
    except (binascii.Error, ValueError):
        return b""


def tree(leaves: Sequence[bytes], start: int = 0, count: int | None = None) -> bytes:
    """MTH over leaf hashes (RFC 6962, 2.1)."""
    count = len(leaves) if count is None else count
    if count == 0:
        return hashlib.sha256().digest()
    if count == 1:
        return leaves[start]
    split = 1
    while 2 * split < count:
        split *= 2
    left = tree(leaves, start, split)
    return hashlib.sha256(b"\1" + left + tree(leaves, start + split, count - split)).digest()


def path(leaves: Sequence[bytes], place: int, start: int, count: int) -> list[bytes]:
    """PATH(place, D[start:start+count]) (RFC 6962, 2.1.1)."""
    if count <= 1:
        return []
    split = 1
    while 2 * split < count:
        split *= 2
    if place < split:
        return [*path(leaves, place, start, split), tree(leaves, start + split, count - split)]
    rest = path(leaves, place - split, start + split, count - split)
    return [*rest, tree(leaves, start, split)]


@dataclass(frozen=True)
class Signer:
    """A key in a signed note; ``kind`` is its signature type."""

    name: str
    kind: int
    key: bytes

    @property
    def id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.kind]) + self.key).digest()[
            :4
        ]

    def signed(self, text: str, signature: bytes) -> bool:
        """Whether ``signature`` (without the key's id) is this key's on a note's text."""
        message = text.encode()
        if self.kind == WITNESS:
            seconds = int.from_bytes(signature[:8], "big")
            message = b"cosignature/v1\ntime %d\n" % seconds + message
            signature = signature[8:]
        return holds(self.key, signature, message)


def signer(vkey: str) -> Signer | None:
    """Of ``name+id+base64(type || key)``."""
    match = re.fullmatch(r"([^+\s]+)\+([0-9a-f]{8})\+(\S+)", vkey)
    if match is None:
        return None
    raw = octets(match[3])
    found = Signer(match[1], raw[0] if raw else 0, raw[1:])
    return found if len(raw) == 33 and found.id.hex() == match[2] else None


def line(text: str, by: Signer) -> bytes | None:
    """The signature in a line of a note, when it is of this key."""
    raw = octets(text.removeprefix(f"\N{EM DASH} {by.name} "))
    return raw[4:] if text.startswith("\N{EM DASH} ") and raw[:4] == by.id else None


def head(origin: str, size: int, root: bytes) -> str:
    """A checkpoint's text."""
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"


def note(text: str, signed: str, by: Signer) -> bool:
    """Whether a note has this text and a signature by ``by``."""
    body, _, lines = signed.rpartition("\n\n")
    if body + "\n" != text:
        return False
    found = [line(each, by) for each in lines.split("\n")]
    return any(by.signed(text, each) for each in found if each is not None)


def envelope(text: str, kind: str, key: bytes) -> bytes | None:
    """The payload of a DSSE envelope of one signature, by ``key``."""
    try:
        whole = json.loads(text)
        payload = octets(whole["payload"])
        (one,) = whole["signatures"]
        said, signature = whole["payloadType"], octets(one["sig"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    pae = b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)
    return payload if said == kind and holds(key, signature, pae) else None

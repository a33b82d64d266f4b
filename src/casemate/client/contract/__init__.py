"""The contract that keeps a log's checkpoints on a chain (docs/anchors.md): what makes it, and what
is sent to it. ``anchor.json`` is made of ``anchor.vy`` by ``make contract``.

Calls are in the contract ABI of Solidity 0.8 ("Formal specification of the encoding"); no chain is
asked here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from casemate.seal import checkpoint
from casemate.spec import codec
from casemate.spec.log import Committed
from casemate.spec.receipt import LogEntry, ReceiptProof

SOURCE: Final = Path(__file__).with_name("anchor.vy")
MADE: Final = SOURCE.with_suffix(".json")
WORD: Final = 32
ADDRESS: Final = 20


@functools.cache
def made() -> dict[str, Any]:
    """What the compiler made: ``abi``, ``bytecode`` (hex), ``compiler``, ``methods`` (signature to
    selector)."""
    found: dict[str, Any] = json.loads(MADE.read_text(encoding="utf-8"))
    return found


def creation(poster: bytes, log_key: bytes) -> bytes:
    """The data of the transaction that makes the contract. ``poster``: the 20 bytes of the address
    that may post; ``log_key``: the log's Ed25519 key (32 bytes)."""
    if len(poster) != ADDRESS or len(log_key) != WORD:
        raise ValueError("an address has 20 bytes, a key 32")
    return bytes.fromhex(made()["bytecode"][2:]) + bytes(WORD - ADDRESS) + poster + log_key


def post(size: int, root: bytes, proof: Iterable[bytes]) -> bytes:
    """The call that posts a head: entries, root, and the proof that it extends the head before
    (RFC 9162, 2.1.4)."""
    return _call("post", _int(size), root, _Tail(_array(proof)))


def verify_entry(entry: bytes, index: int, size: int, path: Iterable[bytes]) -> bytes:
    """The call that asks for an entry's bytes at a place."""
    octets = _int(len(entry)) + entry + bytes(-len(entry) % WORD)
    return _call("verify_entry", _Tail(octets), _int(index), _int(size), _Tail(_array(path)))


def verify_receipt(
    receipt: bytes, salt: bytes, entry: bytes, size: int, path: Iterable[bytes]
) -> bytes:
    """The call that asks whether the log of ``size`` entries commits to a receipt: the SHA-256 of
    its envelope, its salt, its commit entry (of which the parts are sent), the entry's audit path.
    Raises ``FormatError`` for another entry than a commit's."""
    found = codec.decode(LogEntry, entry)
    said = codec.decode(Committed, found.body)
    return _call(
        "verify_receipt",
        receipt,
        salt,
        *(_left(part) for part in (found.boot, bytes.fromhex(said.job.removeprefix("job_")))),
        _int(-1 if said.anchor is None else said.anchor),
        bytes.fromhex(said.result.removeprefix("sha256:")),
        _int(found.sequence),
        _int(size),
        _Tail(_array(path)),
    )


def of_proof(proof: ReceiptProof) -> bytes:
    """The call that asks what an anchored proof says: of a job whether the log commits to its
    receipt, of a sale whether its entry stands there, whose bytes ``receipt anchored`` reads.
    Raises ``FormatError``."""
    found = checkpoint.read_proof(proof.proof)
    size = checkpoint.read(found.signed.text).size
    if codec.decode(LogEntry, proof.entry).kind == "grant":
        return verify_entry(proof.entry, found.place, size, found.path)
    receipt = bytes.fromhex(proof.receipt.removeprefix("sha256:"))
    return verify_receipt(receipt, proof.salt, proof.entry, size, found.path)


class _Tail(bytes):
    """An argument of no fixed length: it stands behind the others, which say where."""


def _int(number: int) -> bytes:
    return number.to_bytes(WORD, "big", signed=number < 0)


def _left(data: bytes) -> bytes:
    return data.ljust(WORD, b"\0")


def _array(words: Iterable[bytes]) -> bytes:
    found = tuple(words)
    return _int(len(found)) + b"".join(found)


def _call(method: str, *arguments: bytes) -> bytes:
    (selector,) = (s for name, s in made()["methods"].items() if name.startswith(f"{method}("))
    heads, tails, at = b"", b"", WORD * len(arguments)
    for argument in arguments:
        heads += _int(at + len(tails)) if isinstance(argument, _Tail) else argument
        tails += argument if isinstance(argument, _Tail) else b""
    return bytes.fromhex(selector[2:]) + heads + tails

"""Witnesses in memory, honest and dishonest, over the rule that the real one runs
(``casemate.witness.decide``); cheap enough for thousands in one simulation.

    log = checkpoint.log_key(origin, key)
    w = FakeWitness("w.example/1", logs=[log])          # or conduct="forks", ...
    answer = w.add_checkpoint(str(checkpoint.Request(old, proof, signed)).encode())
    answer.status, answer.kind, answer.body              # as over HTTP

``CONDUCTS`` names what a dishonest one does. ``Tree`` is a log to witness: entries, signed
checkpoints, requests from any size on, forks that share a beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint, Request
from casemate.seal.note import Note, Verifier
from casemate.spec import merkle
from casemate.witness.decide import SIZE, TEXT, Accepted, Answer, decide


def key(seed: object) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(repr(seed).encode()).digest())


class Down(ConnectionError):
    """The witness does not answer."""


class FakeWitness:
    """``seconds``: its clock. ``cosigned``: every head whose cosignature it let out, in order."""

    def __init__(
        self,
        name: str = "witness.example/1",
        *,
        logs: Iterable[Verifier] = (),
        conduct: str = "honest",
        seconds: Callable[[], int] = lambda: 1_700_000_000,
    ) -> None:
        self.name = name
        self.conduct = conduct
        self._key = key(("witness", name))
        self.verifier: Final = Verifier(
            name, note.COSIGNATURE, self._key.public_key().public_bytes_raw()
        )
        self.vkey: Final = str(self.verifier)
        self.logs = {log.name: log for log in logs}
        self.heads: dict[str, Checkpoint] = {}
        self.cosigned: list[Checkpoint] = []
        self.shown: dict[str, bytes] = {}
        self._seconds = seconds

    def watch(self, log: Verifier) -> None:
        self.logs[log.name] = log

    def add_checkpoint(self, body: bytes) -> Answer:
        """What the witness answers; raises :class:`Down` when it does not."""
        return CONDUCTS[self.conduct](self, body)

    def cosign(self, text: str, *, signer: Ed25519PrivateKey | None = None) -> Answer:
        """A cosignature, deserved or not."""
        self.cosigned.append(checkpoint.head(text))
        public = self.verifier.key
        line = note.cosign(text, self.name, public, (signer or self._key).sign, self._seconds())
        return Answer(200, TEXT, str(line).encode())

    def honest(self, body: bytes) -> Answer:
        found = decide(self.heads, body, self.logs)
        if not isinstance(found, Accepted):
            return found.answer
        self.heads[found.head.origin] = found.head
        answer = self.cosign(found.signed.text)
        lines = note.lines(answer.body.decode())
        self.shown[found.head.origin] = str(found.signed.add(lines)).encode()
        return answer

    def newest(self, origin: str) -> bytes | None:
        """The newest checkpoint of a log that it cosigned honestly, as it shows it."""
        return self.shown.get(origin)


def _forks(witness: FakeWitness, body: bytes) -> Answer:
    """Cosigns whatever a log signed, and forgets it."""
    return witness.cosign(checkpoint.read_request(body).signed.text)


def _goes_back(witness: FakeWitness, body: bytes) -> Answer:
    """As one whose state was lost: what does not go on from what it holds begins anew."""
    request = checkpoint.read_request(body)
    head = checkpoint.head(request.signed.text)
    held = witness.heads.get(head.origin)
    if held is None or held.size == request.old:
        return witness.honest(body)
    witness.heads[head.origin] = head
    return witness.cosign(request.signed.text)


def _lies_about_size(size: int) -> Callable[[FakeWitness, bytes], Answer]:
    return lambda _, __: Answer(409, SIZE, b"%d\n" % size)


def _changed(change: Callable[[Answer], Answer]) -> Callable[[FakeWitness, bytes], Answer]:
    return lambda witness, body: change(witness.honest(body))


def _wrong_key(witness: FakeWitness, body: bytes) -> Answer:
    """Cosigns with another key under its own name and id."""
    return witness.cosign(checkpoint.read_request(body).signed.text, signer=key("another"))


def _other_text(witness: FakeWitness, body: bytes) -> Answer:
    """Cosigns a tree of another size than was asked."""
    head = checkpoint.head(checkpoint.read_request(body).signed.text)
    return witness.cosign(str(Checkpoint(head.origin, head.size + 1, head.root)))


def _down(_: FakeWitness, __: bytes) -> Answer:
    raise Down("connection refused")


CONDUCTS: Final[dict[str, Callable[[FakeWitness, bytes], Answer]]] = {
    "honest": FakeWitness.honest,
    "down": _down,
    "forks": _forks,
    "goes-back": _goes_back,
    "lies-more": _lies_about_size(10**9),
    "lies-less": _lies_about_size(0),
    "wrong-key": _wrong_key,
    "other-text": _other_text,
    "garbage": lambda _, __: Answer(200, TEXT, b"\xff\x00 no signature line \xe2\x80\x94"),
    "empty": lambda _, __: Answer(200, TEXT, b""),
    "endless": lambda _, __: Answer(200, TEXT, b"x" * (1 << 20)),
    "bad-size": lambda _, __: Answer(409, SIZE, b"many\n"),
    "no-size": lambda _, __: Answer(409, TEXT, b""),
    "faults": lambda _, __: Answer(500, TEXT, b"fault\n"),
    "asks-wait": lambda _, __: Answer(429, TEXT, b"later\n"),
    "twice": _changed(lambda a: Answer(a.status, a.kind, a.body * 2)),
    "cut": _changed(lambda a: Answer(a.status, a.kind, a.body[:-9])),
}
#: Answers that a caller must get along with as if there were no witness; the others sign.
USELESS: Final = sorted(set(CONDUCTS) - {"honest", "forks", "goes-back", "twice"})


class Tree:
    """A log: its entries, its key, what it signs."""

    def __init__(self, entries: Sequence[bytes] = (), origin: str = "log.example/a") -> None:
        self.origin = origin
        self.entries = list(entries)
        self._key = key(("log", origin))
        self.log = checkpoint.log_key(origin, self._key.public_key().public_bytes_raw())

    def fork(self, at: int, entries: Sequence[bytes]) -> Tree:
        """A log of the same key that shares the first ``at`` entries."""
        return Tree([*self.entries[:at], *entries], self.origin)

    def head(self, size: int) -> Checkpoint:
        return Checkpoint(self.origin, size, merkle.root(size, merkle.tree(self.entries[:size])))

    def sign(self, text: str) -> Note:
        return Note(text, (note.sign(text, self.origin, self.log.key, self._key.sign),))

    def signed(self, size: int) -> Note:
        return self.sign(str(self.head(size)))

    def request(self, old: int, size: int, proof: Sequence[bytes] | None = None) -> bytes:
        """The body of add-checkpoint, with a genuine proof unless one is given."""
        if proof is None:
            node = merkle.tree(self.entries[:size])
            proof = merkle.consistency(old, size, node) if old <= size else ()
        return str(Request(old, tuple(proof), self.signed(size))).encode()

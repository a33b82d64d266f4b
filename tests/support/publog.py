"""A public log in memory: its entries, its key, its files as any client asks for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.seal import checkpoint, note, tiles
from casemate.seal.checkpoint import Checkpoint, Proof
from casemate.seal.note import Note, Verifier
from casemate.seams import OsRng
from casemate.server import keys as boot_keys
from casemate.server.keys import BootKeys, SignKey
from casemate.spec import codec, merkle
from casemate.spec.receipt import LogEntry


class Witness:
    """A key that cosigns whatever it is shown."""

    def __init__(self, name: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        public = self.key.public_key().public_bytes_raw()
        self.verifier = Verifier(name, note.COSIGNATURE, public)

    def line(self, text: str, seconds: int = 1_700_000_000) -> note.Line:
        by = self.verifier
        return note.cosign(text, by.name, by.key, self.key.sign, seconds)


def origin(public: bytes) -> str:
    """The name of the log with this key."""
    return f"casemate.dev/log/{hashlib.sha256(public).hexdigest()[:32]}"


class PublicLog:
    """``leaves``: the entries' bytes. ``key``: its private half, for forks of one log."""

    def __init__(self, leaves: Iterable[bytes] = (), key: Ed25519PrivateKey | None = None) -> None:
        self.key = key or Ed25519PrivateKey.generate()
        self.public = self.key.public_key().public_bytes_raw()
        self.origin = origin(self.public)
        self.leaves = list(leaves)
        self.files: dict[str, bytes] = {}

    @property
    def verifier(self) -> Verifier:
        return checkpoint.log_key(self.origin, self.public)

    @property
    def sign_key(self) -> SignKey:
        return SignKey(self.public, self.key.sign)

    def fork(self, size: int) -> PublicLog:
        """Another log under the same key that goes on from the first ``size`` entries."""
        return PublicLog(self.leaves[:size], self.key)

    def append(self, kind: str, subject: str, body: object, boot: bytes) -> int:
        """An entry of this kind; its place."""
        entry = LogEntry(
            sequence=len(self.leaves),
            boot=boot,
            kind=kind,  # type: ignore[arg-type]
            subject=subject,
            body=codec.encode(body),
        )
        self.leaves.append(codec.encode(entry))
        return entry.sequence

    def pad(self, count: int) -> PublicLog:
        """``count`` more leaves that say nothing; enough for trees alone."""
        start = len(self.leaves)
        self.leaves += [b"leaf %d" % (start + i) for i in range(count)]
        return self

    def head(self, size: int | None = None) -> Checkpoint:
        leaves = self.leaves[:size]
        return Checkpoint(self.origin, len(leaves), merkle.root(len(leaves), merkle.tree(leaves)))

    def sign(self, size: int | None = None, witnesses: Iterable[Witness] = ()) -> Note:
        signed = checkpoint.sign(self.head(size), self.public, self.key.sign)
        return signed.add(w.line(signed.text) for w in witnesses)

    def prove(self, place: int, signed: Note) -> Proof:
        size = checkpoint.read(signed.text).size
        return Proof(place, merkle.inclusion(place, size, merkle.tree(self.leaves)), signed)

    def file(self, path: str) -> bytes:
        """What stands at a path below ``/log/``; KeyError for nothing."""
        if path == "checkpoint":
            return str(self.sign()).encode()
        if path in self.files:
            return self.files[path]
        tile = tiles.read_path(path)
        if not tiles.within(tile, len(self.leaves)):
            raise KeyError(path)
        if tile.level == tiles.ENTRIES:
            start = tile.place * tiles.WIDTH
            return tiles.bundle(self.leaves[start : start + tile.width])
        return tiles.hashes(tile, merkle.tree(self.leaves))


def keys_of(log: PublicLog, boot: bytes | None = None) -> BootKeys:
    """The keys of a boot of this log's enclave."""
    rng = OsRng()
    return boot_keys.make(rng, ["127.0.0.1"], boot or rng.bytes(boot_keys.BOOT_BYTES), log.sign_key)

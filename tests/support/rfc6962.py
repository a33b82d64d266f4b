"""A verifier of a transparency log, written from RFC 6962 section 2.1 and c2sp.org/tlog-tiles.

It shares nothing with casemate, not even a test's helper: the recursive definitions as the RFC
writes them, and a reader of a folder of static files that compares every tile with every entry and
checks the log's Ed25519 signature (of a C2SP signed note, type 0x01). Slow and plain on purpose.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

# Section 2.1: the hash, the path, the proof.


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _k(n: int) -> int:
    """The largest power of two smaller than n."""
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def mth(d: list[bytes]) -> bytes:
    """MTH(D[n])."""
    n = len(d)
    if n == 0:
        return _sha256(b"")
    if n == 1:
        return _sha256(b"\x00" + d[0])
    k = _k(n)
    return _sha256(b"\x01" + mth(d[:k]) + mth(d[k:]))


def path(m: int, d: list[bytes]) -> list[bytes]:
    """PATH(m, D[n]), for 0 <= m < n."""
    n = len(d)
    if n == 1:
        return []
    k = _k(n)
    if m < k:
        return [*path(m, d[:k]), mth(d[k:])]
    return [*path(m - k, d[k:]), mth(d[:k])]


def proof(m: int, d: list[bytes]) -> list[bytes]:
    """PROOF(m, D[n]), for 0 < m <= n."""
    return subproof(m, d, True)


def subproof(m: int, d: list[bytes], b: bool) -> list[bytes]:
    """SUBPROOF(m, D[n], b)."""
    n = len(d)
    if m == n:
        return [] if b else [mth(d)]
    k = _k(n)
    if m <= k:
        return [*subproof(m, d[:k], b), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


# Section 2.1.1 and 2.1.2 backwards: what a path or a proof says about the roots.


def root_of_path(m: int, n: int, leaf: bytes, nodes: list[bytes]) -> bytes:
    """MTH(D[n]) by the leaf's hash and its path. ValueError if the path has another length."""
    if n == 1:
        if nodes:
            raise ValueError("too many nodes")
        return leaf
    if not nodes:
        raise ValueError("too few nodes")
    k = _k(n)
    if m < k:
        return _sha256(b"\x01" + root_of_path(m, k, leaf, nodes[:-1]) + nodes[-1])
    return _sha256(b"\x01" + nodes[-1] + root_of_path(m - k, n - k, leaf, nodes[:-1]))


def roots_of_proof(
    m: int, n: int, old: bytes, nodes: list[bytes], b: bool = True
) -> tuple[bytes, bytes]:
    """(MTH(D[m]), MTH(D[n])) by the old root and PROOF(m, D[n]), for 0 < m <= n."""
    if m == n:
        if len(nodes) != (0 if b else 1):
            raise ValueError("another number of nodes")
        found = old if b else nodes[0]
        return found, found
    if not nodes:
        raise ValueError("too few nodes")
    k = _k(n)
    if m <= k:
        before, after = roots_of_proof(m, k, old, nodes[:-1], b)
        return before, _sha256(b"\x01" + after + nodes[-1])
    before, after = roots_of_proof(m - k, n - k, old, nodes[:-1], False)
    return _sha256(b"\x01" + nodes[-1] + before), _sha256(b"\x01" + nodes[-1] + after)


# c2sp.org/tlog-tiles: a folder of static files.


class Wrong(Exception):
    """What the folder holds is not the log that its checkpoint signs."""


def checkpoint(data: bytes, origin: str, key: bytes) -> tuple[int, bytes]:
    """(size, root) of a signed checkpoint (c2sp.org/tlog-checkpoint, /signed-note)."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    cut = data.rindex(b"\n\n")
    text, lines = data[: cut + 1], data[cut + 2 :].decode().split("\n")
    if lines.pop() != "":
        raise Wrong("the last signature line has no end")
    key_id = _sha256(origin.encode() + b"\n\x01" + key)[:4]
    signed = False
    for line in lines:
        words = line.split(" ")
        if len(words) != 3 or words[0] != "\u2014":
            raise Wrong("a signature line has another form")
        if words[1] != origin:
            continue
        raw = base64.b64decode(words[2], validate=True)
        if raw[:4] == key_id:
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(raw[4:], text)
            except InvalidSignature:
                raise Wrong("the log's signature does not verify") from None
            signed = True
    if not signed:
        raise Wrong("the log did not sign the checkpoint")
    named, size, root = text.decode().split("\n")[:3]
    if named != origin or str(int(size)) != size:
        raise Wrong("the checkpoint is of another log, or its size is malformed")
    return int(size), base64.b64decode(root, validate=True)


def tile_name(index: int, width: int) -> str:
    """The last part of a tile's path: ``x001/x234/067`` for 1234067, ``.p/W`` when partial."""
    parts = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        parts.insert(0, f"x{index % 1000:03d}")
    return "/".join(parts) + ("" if width == 256 else f".p/{width}")


def _expected(size: int) -> list[tuple[str, int, int]]:
    """(level or "entries", index, width) of every tile of a tree of this size."""
    out = []
    for level in ["entries", *range(8)]:
        count = size // 256 ** (0 if level == "entries" else int(level))
        for index in range(-(-count // 256)):
            out.append((str(level), index, min(256, count - 256 * index)))
    return out


def read(folder: Path, origin: str, key: bytes) -> list[bytes]:
    """Every entry of the log in ``folder`` (``checkpoint``, ``tile/...``), all of it checked.

    Raises :class:`Wrong`: a file is missing or of another length, an entry is not the leaf that its
    tile says, a hash is not that of the entries below it, the root is another than the signed one.
    Where a partial tile is missing, the full one that a larger log has may stand in its place.
    """
    size, root = checkpoint((folder / "checkpoint").read_bytes(), origin, key)
    entries: list[bytes] = []
    hashes: list[tuple[int, int, bytes]] = []
    for level, index, width in _expected(size):
        partial, full = (folder / "tile" / level / tile_name(index, w) for w in (width, 256))
        at = partial if partial.is_file() else full
        if not at.is_file():
            raise Wrong(f"{partial} is missing")
        data, exact = at.read_bytes(), at == partial
        if level == "entries":
            entries += _entries(data, width, exact, at)
        elif len(data) != 32 * (width if exact else 256):
            raise Wrong(f"{at} has {len(data)} bytes")
        else:
            hashes += [(int(level), 256 * index + i, data[32 * i :][:32]) for i in range(width)]
    for height, place, found in hashes:
        span = 256**height
        if found != mth(entries[place * span : (place + 1) * span]):
            raise Wrong(f"hash {place} at level {height} is another")
    if mth(entries) != root:
        raise Wrong("the entries have another root than the signed one")
    return entries


def _entries(data: bytes, width: int, exact: bool, at: Path) -> list[bytes]:
    out = []
    for _ in range(width):
        length = int.from_bytes(data[:2], "big")
        if len(data) < 2 + length:
            raise Wrong(f"{at} is cut short")
        out.append(data[2 : 2 + length])
        data = data[2 + length :]
    if data and exact:
        raise Wrong(f"{at} holds more than {width} entries")
    return out

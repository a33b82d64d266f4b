"""Merkle trees of RFC 6962 section 2.1, with proofs checked as in RFC 9162 section 2.1.

A leaf is hashed with a leading 0x00, a node with 0x01, so that neither passes for the other. Trees
are read through a ``Node``: ``node(level, place)`` is the hash over the leaves from
``place << level`` on, 2^level of them. Such a complete subtree never changes as leaves are added,
so each is computed once (:func:`grow`) and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

Node: TypeAlias = Callable[[int, int], bytes]

HASH_BYTES: Final = 32
EMPTY: Final = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256 of 0x00 and the leaf."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256 of 0x01 and both children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def grow(size: int, hashed: bytes, node: Node) -> Iterator[tuple[int, int, bytes]]:
    """The subtrees (level, place, hash) that a leaf after ``size`` others completes, itself first.

    ``hashed``: its :func:`leaf_hash`; ``node`` gives what stood before.
    """
    level, place = 0, size
    yield level, place, hashed
    while place & 1:
        hashed = node_hash(node(level, place - 1), hashed)
        level, place = level + 1, place >> 1
        yield level, place, hashed


def _split(count: int) -> int:
    """The largest power of two below ``count`` (at least 2)."""
    return 1 << ((count - 1).bit_length() - 1)


def _hash(start: int, count: int, node: Node) -> bytes:
    """MTH of ``count`` leaves from ``start``, which is a multiple of the next power of two."""
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return node(level, start >> level)
    left = _split(count)
    return node_hash(_hash(start, left, node), _hash(start + left, count - left, node))


def root(size: int, node: Node) -> bytes:
    """MTH of the first ``size`` leaves."""
    return _hash(0, size, node) if size else EMPTY


def inclusion(place: int, size: int, node: Node) -> tuple[bytes, ...]:
    """PATH(place, D[size]), the siblings from the leaf up. IndexError outside of the tree."""
    if not 0 <= place < size:
        raise IndexError(f"leaf {place} of {size}")
    out: list[bytes] = []
    start, count = 0, size
    while count > 1:
        left = _split(count)
        if place - start < left:
            out.append(_hash(start + left, count - left, node))
            count = left
        else:
            out.append(_hash(start, left, node))
            start, count = start + left, count - left
    return tuple(reversed(out))


def consistency(old: int, size: int, node: Node) -> tuple[bytes, ...]:
    """PROOF(old, D[size]); nothing from 0 or to itself. IndexError for a tree that shrinks."""
    if not 0 <= old <= size:
        raise IndexError(f"from {old} leaves to {size}")
    out: list[bytes] = []
    start, count, whole = 0, size, True
    while 0 < old < start + count:
        left = _split(count)
        if old - start <= left:
            out.append(_hash(start + left, count - left, node))
            count = left
        else:
            out.append(_hash(start, left, node))
            start, count, whole = start + left, count - left, False
    if old and not whole:
        out.append(_hash(start, count, node))
    return tuple(reversed(out))


def _check(proof: Sequence[bytes]) -> list[bytes]:
    if any(len(p) != HASH_BYTES for p in proof):
        raise ValueError("a node of the proof is not 32 bytes long")
    return list(proof)


def root_from_inclusion(hashed: bytes, place: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root that the audit path of a leaf with this hash leads to (RFC 9162, 2.1.3.2).

    ValueError when ``place`` is not in [0, ``size``), the path has another length than a tree of
    ``size`` leaves gives, or a node is not 32 bytes long.
    """
    if not 0 <= place < size:
        raise ValueError(f"leaf {place} of {size} leaves")
    rest, at, last, found = _check(proof), place, size - 1, hashed
    for sibling in rest:
        if not last:
            raise ValueError("the path is too long")
        if at & 1 or at == last:
            found = node_hash(sibling, found)
            while not at & 1:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        at, last = at >> 1, last >> 1
    if last:
        raise ValueError("the path is too short")
    return found


def check_consistency(
    old: int, old_root: bytes, size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """ValueError unless the tree of ``size`` leaves extends that of ``old`` (RFC 9162, 2.1.4.2)."""
    rest = _check(proof)
    if not 0 <= old <= size:
        raise ValueError(f"a tree of {old} leaves cannot become one of {size}")
    if old in (0, size):
        if rest:
            raise ValueError("the proof is too long")
        if old == size and old_root != new_root:
            raise ValueError("two roots for one size")
        if old == 0 and old_root != EMPTY:
            raise ValueError("the empty tree has another root")
        return
    if old & (old - 1) == 0:
        rest = [old_root, *rest]
    if not rest:
        raise ValueError("the proof is too short")
    at, last = old - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    before = after = rest[0]
    for node in rest[1:]:
        if not last:
            raise ValueError("the proof is too long")
        if at & 1 or at == last:
            before, after = node_hash(node, before), node_hash(node, after)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            after = node_hash(after, node)
        at, last = at >> 1, last >> 1
    if last:
        raise ValueError("the proof is too short")
    if before != old_root:
        raise ValueError("the proof leads to another old root")
    if after != new_root:
        raise ValueError("the proof leads to another new root")


def tree(leaves: Sequence[bytes]) -> Node:
    """A tree over ``leaves`` in memory."""
    rows = [[leaf_hash(leaf) for leaf in leaves]]
    while len(rows[-1]) > 1:
        row = rows[-1]
        rows.append([node_hash(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)])
    return lambda level, place: rows[level][place]

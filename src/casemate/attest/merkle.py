"""Merkle tree hashes and audit paths (RFC 6962 section 2.1; checked: RFC 9162 section 2.1.3.2).

A leaf is hashed with a leading 0x00, a node with 0x01, so that neither passes for the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256 of 0x00 and the leaf."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """MTH(leaves), 32 bytes; of no leaves SHA-256 of nothing."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    row = [leaf_hash(leaf) for leaf in leaves]
    # Pairing neighbours and carrying an odd last one up gives RFC 6962's unbalanced tree.
    while len(row) > 1:
        paired = [_node(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
        row = paired + row[len(paired) * 2 :]
    return row[0]


def path(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """PATH(index, leaves): the siblings of leaf ``index`` from the leaf up. IndexError outside."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    row = [leaf_hash(leaf) for leaf in leaves]
    out = []
    while len(row) > 1:
        if index ^ 1 < len(row):
            out.append(row[index ^ 1])
        paired = [_node(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
        row = paired + row[len(paired) * 2 :]
        index //= 2
    return tuple(out)


def root_from_path(leaf: bytes, index: int, count: int, siblings: Sequence[bytes]) -> bytes:
    """The root that the audit path leads to.

    ValueError when ``index`` is not in [0, ``count``), the path has another length than a tree of
    ``count`` leaves gives, or a sibling is not 32 bytes long.
    """
    if not 0 <= index < count:
        raise ValueError(f"leaf {index} of {count} leaves")
    if any(len(s) != 32 for s in siblings):
        raise ValueError("a node of the path is not 32 bytes long")
    node, at, last = leaf_hash(leaf), index, count - 1
    rest = list(siblings)
    while last:
        if at & 1 or at < last:
            if not rest:
                raise ValueError("the path is too short")
            sibling = rest.pop(0)
            node = _node(sibling, node) if at & 1 else _node(node, sibling)
        at, last = at >> 1, last >> 1
    if rest:
        raise ValueError("the path is too long")
    return node

"""Gas of the anchor's contract: ``python -m benchmarks.anchor`` prints docs/anchors.md's table.

Gas is counted, not timed: the same on every machine. The trees are of any size, since all of their
leaves but one are alike. What is asked costs nothing where a node answers by itself; the figure is
what a contract pays that asks, without the transaction's own 21,000 and its call's data.
"""

from __future__ import annotations

import hashlib
from typing import Final

from casemate.cli.demo.chain import Account, Chain
from casemate.client import contract
from casemate.spec import codec, merkle
from casemate.spec.log import Committed, commitment
from casemate.spec.receipt import LogEntry

SIZES: Final = (10**3, 10**6, 10**9)
SALT: Final = hashlib.sha256(b"salt").digest()
RECEIPT: Final = hashlib.sha256(b"envelope").digest()


def commit(place: int) -> bytes:
    """The commit entry at a place, of a TEE without an anchor of its own."""
    body = Committed(
        job="job_" + "0123456789abcdef" * 2,
        result=commitment(SALT, "sha256:" + hashlib.sha256(b"result").hexdigest()),
        receipt=commitment(SALT, f"sha256:{RECEIPT.hex()}"),
    )
    entry = LogEntry(
        sequence=place, boot=SALT[:16], kind="commit", subject=body.job, body=codec.encode(body)
    )
    return codec.encode(entry)


def sparse(place: int, leaf: bytes) -> merkle.Node:
    """A tree whose leaves are all empty but one."""
    blank = [merkle.leaf_hash(b"")]
    for _ in range(64):
        blank.append(merkle.node_hash(blank[-1], blank[-1]))

    def node(level: int, at: int) -> bytes:
        if place >> level != at:
            return blank[level]
        if level == 0:
            return merkle.leaf_hash(leaf)
        return merkle.node_hash(node(level - 1, 2 * at), node(level - 1, 2 * at + 1))

    return node


def measured() -> list[tuple[str, tuple[int, ...]]]:
    """What is done, and its gas in a log of each of ``SIZES``."""
    poster = Account(b"\1" * 32)
    columns = []
    for size in SIZES:
        chain, old, place = Chain(poster), size - size // 7, size // 3
        address, made = chain.deploy(poster, contract.creation(poster.address, bytes(32)))
        entry = commit(place)
        node = sparse(place, entry)
        first = chain.send(poster, address, contract.post(old, merkle.root(old, node), ()))
        proof, root = merkle.consistency(old, size, node), merkle.root(size, node)
        next_ = chain.send(poster, address, contract.post(size, root, proof))
        path = merkle.inclusion(place, size, node)
        asked = contract.verify_receipt(RECEIPT, SALT, entry, size, path)
        plain = contract.verify_entry(entry, place, size, path)
        columns.append(
            (made, first, next_, chain.ask(address, asked)[1], chain.ask(address, plain)[1])
        )
    names = ("make the contract", "post the first head", "post a head that grew by a sixth",
             "`verify_receipt`", "`verify_entry`")  # fmt: skip
    return list(zip(names, zip(*columns, strict=True), strict=True))


def table() -> str:
    head = "| gas, in a log of | " + " | ".join(f"{s:,} entries" for s in SIZES) + " |\n"
    lines = [f"| {name} | {' | '.join(f'{g:,}' for g in gas)} |\n" for name, gas in measured()]
    return head + "|---|" + "---|" * len(SIZES) + "\n" + "".join(lines)


if __name__ == "__main__":
    print(table(), end="")

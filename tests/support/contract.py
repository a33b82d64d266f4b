"""The anchor's contract on a chain in this process, over a log of commits and other entries."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from casemate.client import contract
from casemate.spec import codec, merkle
from casemate.spec.log import Committed, commitment
from casemate.spec.receipt import LogEntry

ROOT = Path(__file__).parents[2]
COMPILER = ROOT / "build" / "vyper" / "bin" / "python"
SALT = hashlib.sha256(b"salt").digest()
RECEIPT = hashlib.sha256(b"envelope").digest()
LOG_KEY = hashlib.sha256(b"log").digest()


def needs_a_chain() -> None:
    """Skips what needs py-evm where it is not; not imported here, for it raises the limit of
    recursion."""
    if find_spec("eth") is None:
        pytest.skip("py-evm is not installed: run make setup", allow_module_level=True)


def compiled(sources: Sequence[str]) -> list[dict]:
    """What the pinned compiler makes of these sources; skips the test where it is not installed."""
    if not COMPILER.exists():
        pytest.skip("the compiler is not installed: run make contract")
    done = subprocess.run(
        [COMPILER, ROOT / "deploy" / "contract.py"],
        input=json.dumps(list(sources)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def commit(place: int, *, receipt: bytes = RECEIPT, anchor: int | None = None) -> bytes:
    """The entry at ``place`` that commits to a receipt under ``SALT``."""
    job = hashlib.sha256(b"job %d" % place).hexdigest()[:32]
    body = Committed(
        job=f"job_{job}",
        result="sha256:" + hashlib.sha256(b"result %d" % place).hexdigest(),
        receipt=commitment(SALT, f"sha256:{receipt.hex()}"),
        anchor=anchor,
    )
    boot = hashlib.sha256(b"boot %d" % (place // 10)).digest()[:16]
    return codec.encode(
        LogEntry(sequence=place, boot=boot, kind="commit", subject=body.job,
                 body=codec.encode(body))
    )  # fmt: skip


@functools.cache
def leaves(count: int) -> tuple[bytes, ...]:
    """Every third entry commits to its own receipt; the others are bytes of several lengths."""
    return tuple(
        commit(i, receipt=receipt(i), anchor=None if i % 2 else 10 ** (i % 15))
        if i % 3 == 0
        else b"%d," % i * (i % 7)
        for i in range(count)
    )


def receipt(place: int) -> bytes:
    """The digest of the receipt at a place."""
    return hashlib.sha256(b"envelope %d" % place).digest()


class Lab:
    """The contract, made of ``bytecode`` (hex; the committed one if none is given), posted to at
    these sizes. ``poster`` posts, ``stranger`` does not."""

    def __init__(
        self, sizes: Sequence[int], *, bytecode: str | None = None, count: int | None = None
    ) -> None:
        from casemate.cli.demo.chain import Account, Chain

        self.bytecode = bytecode
        self.leaves = leaves(count or max(sizes))
        self.node = merkle.tree(self.leaves)
        self.poster, self.stranger = Account(b"\1" * 32), Account(b"\2" * 32)
        self.chain = Chain(self.poster, self.stranger)
        code = contract.creation(self.poster.address, LOG_KEY)
        if bytecode is not None:
            code = bytes.fromhex(bytecode[2:]) + code[-64:]
        self.address, self.made = self.chain.deploy(self.poster, code)
        self.size = 0
        for size in sizes:
            self.post(size)

    def post(self, size: int) -> int:
        """Post the honest head of this size; the gas."""
        proof = merkle.consistency(self.size, size, self.node)
        gas = self.send(contract.post(size, self.root(size), proof))
        self.size = size
        return gas

    def root(self, size: int) -> bytes:
        return merkle.root(size, self.node)

    def path(self, index: int, size: int) -> tuple[bytes, ...]:
        return merkle.inclusion(index, size, self.node)

    def send(self, data: bytes, *, by: object = None) -> int:
        return self.chain.send(by or self.poster, self.address, data)  # type: ignore[arg-type]

    def call(self, data: bytes) -> bytes:
        return self.chain.call(self.address, data)

    def entry(self, index: int, size: int, *, path=None, leaf: bytes | None = None) -> bytes:
        """Ask for an entry's bytes at a place."""
        leaf = self.leaves[index] if leaf is None else leaf
        path = self.path(index, size) if path is None else path
        return self.call(contract.verify_entry(leaf, index, size, path))

    def receipt(self, index: int, size: int) -> bytes:
        """The honest call for the receipt at a place."""
        path = self.path(index, size)
        return contract.verify_receipt(receipt(index), SALT, self.leaves[index], size, path)

    def ask(self, method: str) -> int:
        """A value that the contract shows."""
        selector = contract.made()["methods"][method]
        return int.from_bytes(self.call(bytes.fromhex(selector[2:])), "big")

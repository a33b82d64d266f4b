"""The calls of the anchor's contract, and that its byte code is what its source compiles to."""

from __future__ import annotations

import hashlib
import re

import pytest

from casemate.client import contract
from casemate.spec.errors import FormatError
from support.contract import RECEIPT, SALT, commit, compiled

METHODS = contract.made()["methods"]


def words(call: bytes) -> list[bytes]:
    assert len(call) % 32 == 4
    return [call[i : i + 32] for i in range(4, len(call), 32)]


def number(word: bytes) -> int:
    return int.from_bytes(word, "big")


def test_the_byte_code_is_that_of_the_source():
    """Run by ``make test``, which installs the compiler; its metadata names no path."""
    (found,) = compiled([contract.SOURCE.read_text()])
    assert found == contract.made(), "run make contract"


def test_selectors_are_hashes_of_the_signatures():
    keccak = pytest.importorskip("eth_hash.auto").keccak
    assert len(METHODS) >= 7
    for signature, selector in METHODS.items():
        assert keccak(signature.encode())[:4].hex() == selector[2:]


def test_what_makes_the_contract_ends_with_its_poster_and_its_log():
    code = contract.creation(b"\1" * 20, b"\2" * 32)
    assert code[-64:] == bytes(12) + b"\1" * 20 + b"\2" * 32
    assert code[:-64].hex() == contract.made()["bytecode"][2:]
    for poster, key in ((b"\1" * 32, b"\2" * 32), (b"\1" * 20, b"\2" * 31)):
        with pytest.raises(ValueError, match="20 bytes"):
            contract.creation(poster, key)


def test_a_post_is_size_root_and_proof():
    nodes = (b"a" * 32, b"b" * 32)
    call = contract.post(300, b"r" * 32, nodes)
    assert call[:4].hex() == METHODS["post(uint256,bytes32,bytes32[])"][2:]
    assert words(call) == [
        (300).to_bytes(32, "big"), b"r" * 32, (96).to_bytes(32, "big"), (2).to_bytes(32, "big"),
        *nodes,
    ]  # fmt: skip


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33])
def test_an_entry_is_padded_to_whole_words(length):
    found = words(contract.verify_entry(b"x" * length, 1, 2, ()))
    assert number(found[0]) == 128 and number(found[4]) == length
    whole = -(-length // 32)
    assert b"".join(found[5 : 5 + whole]) == (b"x" * length).ljust(32 * whole, b"\0")
    assert number(found[3]) == 32 * (5 + whole)
    assert number(found[5 + whole]) == 0


@pytest.mark.parametrize("anchor", [None, 0, 7])
def test_a_receipts_call_has_the_parts_of_its_commit(anchor):
    entry = commit(5, anchor=anchor)
    found = words(contract.verify_receipt(RECEIPT, SALT, entry, 9, (b"p" * 32,)))
    boot, job = re.search(rb'"subject":"job_([0-9a-f]{32})"', entry), bytes(16)
    assert boot is not None
    assert found[:2] == [RECEIPT, SALT]
    assert found[3] == bytes.fromhex(boot[1].decode()) + job
    assert found[4] == (b"\xff" * 32 if anchor is None else anchor.to_bytes(32, "big"))
    assert found[5] == hashlib.sha256(b"result 5").digest()
    assert [number(w) for w in found[6:10]] == [5, 9, 32 * 9, 1]


def test_another_entry_has_no_call():
    with pytest.raises(FormatError):
        contract.verify_receipt(RECEIPT, SALT, b"leaf 3", 9, ())

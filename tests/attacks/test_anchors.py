"""Who would have a chain vouch for a receipt that the log does not hold: by an inclusion proof that
is almost right, a head that nobody may post, a call that is not what it seems.

Each attack is refused by the anchor's contract for a stated reason, and each seeded bug of the
contract lets one of them through. Anchors' files: tests/unit/seal/test_seal_anchors.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.cli.demo import chain
from casemate.cli.demo.chain import Account, Reverted
from casemate.client import contract
from casemate.spec import canonical, merkle
from casemate.spec.errors import CasemateError
from support.contract import LOG_KEY, SALT, Lab, commit, compiled, needs_a_chain, receipt

needs_a_chain()

TRUE = (1).to_bytes(32, "big")
# The sizes of the quick run: every shape of a small tree, and some of larger ones.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17)
MOST = 300
SHAPES = (*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, MOST)

PAST = "the index is past the log's end"
LONG, SHORT = "the path is too long", "the path is too short"
ROOT = "the path leads to another root"
UNPOSTED = "no head of this size was posted"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(SIZES, count=40)


@pytest.fixture(scope="module")
def large() -> Lab:
    return Lab(SHAPES)


def refused(lab: Lab, data: bytes, *reasons: str) -> None:
    """That the contract answers nothing, for one of these reasons ("": the call is malformed)."""
    try:
        answer = lab.call(data)
    except Reverted as e:
        assert str(e) in reasons, f"refused because {str(e)!r}"
    else:
        raise AssertionError(f"answered {answer.hex()}")


def not_posted(lab: Lab, data: bytes, *reasons: str, by: Account | None = None) -> None:
    """That a post is refused, and leaves what was posted as it was."""
    before = lab.ask("size()")
    try:
        lab.send(data, by=by)
    except Reverted as e:
        assert str(e) in reasons, f"refused because {str(e)!r}"
    else:
        raise AssertionError("posted")
    assert lab.ask("size()") == before


def places(lab: Lab) -> list[tuple[int, int]]:
    """Some (index, size) of heads that were posted: first, last, within, of each shape."""
    found = [(i, n) for n in (1, 2, 5, 8, 13, 17) for i in {0, n // 2, n - 1}]
    return [(i, n) for i, n in found if n <= lab.size]


def near(index: int, size: int, path: tuple[bytes, ...]) -> dict[str, tuple[object, ...]]:
    """Almost right: (index, size, path, the reasons for which it is refused)."""
    flipped = [
        (index, size, (*path[:i], bytes([p[0] ^ 1, *p[1:]]), *path[i + 1 :]), ROOT)
        for i, p in enumerate(path)
    ]
    swapped = [
        (index, size, (*path[:i], path[i + 1], path[i], *path[i + 2 :]), ROOT)
        for i in range(len(path) - 1)
    ]
    return dict(enumerate(flipped + swapped)) | {
        "one too many": (index, size, (*path, bytes(32)), LONG),
        "the last twice": (index, size, (*path, *(path[-1:] or [bytes(32)])), LONG),
        "the first twice": (index, size, (*(path[:1] or [bytes(32)]), *path), LONG),
        "without the last": (index, size, path[:-1], SHORT) if path else (index, 0, (), UNPOSTED),
        "without the first": (index, size, path[1:], SHORT) if path else (index, 0, (), UNPOSTED),
        "no path": (index, size, (), SHORT) if path else (index, 2, (), SHORT),
        "the next place": (index + 1, size, path, PAST, ROOT, LONG, SHORT),
        "the place before": (index - 1 if index else 2**256 - 1, size, path, PAST, ROOT, LONG,
                             SHORT),
        "the log's end": (size, size, path, PAST),
        **{f"2^{k} further": (index + 2**k, size, path, PAST, ROOT, LONG, SHORT)
           for k in (0, 1, 2, 3, 4, 8, 52, 64, 128, 255)},
        "no size": (index, 0, path, UNPOSTED),
        "a size never posted": (index, 10, path, UNPOSTED),
        "a size beyond": (index, 2**64 + size, path, UNPOSTED),
    }  # fmt: skip


# The attacks.


def steal_a_place_by_a_path_that_is_almost_right(lab: Lab) -> None:
    for index, size in places(lab):
        path = lab.path(index, size)
        for i, n, p, *reasons in near(index, size, path).values():
            refused(lab, contract.verify_entry(lab.leaves[index], i, n, p), *reasons)


def steal_a_place_under_another_head(lab: Lab) -> None:
    for index, size in places(lab):
        path = lab.path(index, size)
        for other in SIZES:
            if other not in (size, 0) and other <= lab.size:
                call = contract.verify_entry(lab.leaves[index], index, other, path)
                refused(lab, call, ROOT, LONG, SHORT, PAST)


def pass_an_inner_node_for_an_entry(lab: Lab) -> None:
    """A second preimage: both children's hashes as the entry, at the parent's place."""
    for index, size in ((0, 2), (1, 4), (5, 8), (12, 16)):
        path = lab.path(index, size)
        leaf, sibling = merkle.leaf_hash(lab.leaves[index]), path[0]
        pair = sibling + leaf if index & 1 else leaf + sibling
        for node in (pair, b"\x01" + pair):
            for at, n in ((index, size), (index >> 1, size), (index >> 1, size >> 1)):
                refused(lab, contract.verify_entry(node, at, n, path[1:]), SHORT, ROOT)


def pass_a_leafs_hash_for_an_entry(lab: Lab) -> None:
    for index, size in places(lab):
        path, leaf = lab.path(index, size), lab.leaves[index]
        for node in (merkle.leaf_hash(leaf), b"\x00" + leaf, leaf + b"\x00", leaf[:-1] or b"x"):
            refused(lab, contract.verify_entry(node, index, size, path), ROOT)


def show_a_receipt_that_the_log_does_not_hold(lab: Lab) -> None:
    for index in (0, 3, 6, 12, 15):
        path, entry = lab.path(index, 17), lab.leaves[index]
        ask = contract.verify_receipt
        for call in (
            ask(receipt(index + 3), SALT, entry, 17, path),
            ask(bytes(32), SALT, entry, 17, path),
            ask(receipt(index), bytes(32), entry, 17, path),
            ask(receipt(index), SALT, commit(index, receipt=receipt(index), anchor=77), 17, path),
        ):
            refused(lab, call, ROOT)


def show_a_receipt_by_another_entry(lab: Lab) -> None:
    """The commit of one job at the place of another, or of a place that says something else."""
    for index, other in ((0, 3), (3, 0), (6, 7), (15, 14)):
        path = lab.path(other, 17)
        entry = commit(other, receipt=receipt(index))
        refused(lab, contract.verify_receipt(receipt(index), SALT, entry, 17, path), ROOT)


def show_a_receipt_with_one_part_changed(lab: Lab) -> None:
    honest = lab.receipt(12, 17)
    for word in range(6):  # receipt, salt, boot, job, anchor, result
        for byte in (0, 15, 31):
            data = bytearray(honest)
            data[4 + 32 * word + byte] ^= 1
            refused(lab, bytes(data), ROOT, "")


def post_as_somebody_else(lab: Lab) -> None:
    size = lab.size + 1
    call = contract.post(size, lab.root(size), merkle.consistency(lab.size, size, lab.node))
    not_posted(lab, call, "only the poster posts", by=lab.stranger)


def post_through_a_contract(lab: Lab) -> None:
    """One that the poster was made to call, and which passes on what it is sent."""
    size = lab.size + 1
    call = contract.post(size, lab.root(size), merkle.consistency(lab.size, size, lab.node))
    # calldatacopy(0, 0, n); call(gas, the contract, 0, 0, n, 0, 0); stop
    passes_on = bytes.fromhex("365f5f37 5f5f365f5f73") + lab.address + bytes.fromhex("5af100")
    makes = bytes([0x60, len(passes_on), 0x60, 10, 0x5F, 0x39, 0x60, len(passes_on), 0x5F, 0xF3])
    between, _ = lab.chain.deploy(lab.stranger, makes + passes_on)
    lab.chain.send(lab.poster, between, call)
    assert lab.ask("size()") == lab.size


def begin_with_a_proof(lab: Lab) -> None:
    """The first head has nothing to extend, so nothing is proved."""
    other = Lab([], bytecode=lab.bytecode, count=5)
    not_posted(other, contract.post(5, other.root(5), [bytes(32)]), "the proof is too long")
    other.post(5)


def replace_a_head(lab: Lab) -> None:
    """The same size again, a smaller one, none at all: what was posted stays."""
    for size in (lab.size, lab.size - 1, 1, 0):
        for root in (lab.root(max(size, 1)), b"x" * 32):
            not_posted(lab, contract.post(size, root, ()), "the log has not grown")
    assert lab.entry(0, 1) == TRUE


def post_an_empty_root(lab: Lab) -> None:
    not_posted(lab, contract.post(lab.size + 1, bytes(32), ()), "the root is empty")


def post_a_log_too_large(lab: Lab) -> None:
    for size in (2**53 + 1, 2**64 + 1, 2**255, 2**256 - 1):
        not_posted(lab, contract.post(size, b"x" * 32, ()), "the log is too large")


def post_a_fork(lab: Lab) -> None:
    """Another log that shares what was posted up to the last head but one, and goes on."""
    other = [*lab.leaves[: lab.size - 1], b"another", *lab.leaves[lab.size :]]
    node = merkle.tree(other)
    for size in (lab.size + 1, lab.size + 7, lab.size + 15):
        root, proof = merkle.root(size, node), merkle.consistency(lab.size, size, node)
        for nodes in (proof, merkle.consistency(lab.size, size, lab.node)):
            not_posted(lab, contract.post(size, root, nodes),
                       "the proof leads to another old root",
                       "the proof leads to another new root")  # fmt: skip


def post_with_a_proof_that_is_almost_right(lab: Lab) -> None:
    leads = ("the proof leads to another old root", "the proof leads to another new root")
    wrong = ("the proof is too long", "the proof is too short", *leads)
    for size in (lab.size + 1, lab.size + 7, lab.size + 15):
        root, proof = lab.root(size), merkle.consistency(lab.size, size, lab.node)
        changed = [
            (*proof[:i], bytes([p[0] ^ 1, *p[1:]]), *proof[i + 1 :]) for i, p in enumerate(proof)
        ]
        for nodes, *reasons in (
            ((), "the proof is too short", "the proof leads to another new root"),
            (proof[:-1], "the proof is too short"),
            (proof[1:], *wrong),
            ((*proof, bytes(32)), "the proof is too long"),
            ((*proof, proof[-1]), "the proof is too long"),
            (proof[::-1], *leads),
            *((c, *leads) for c in changed),
        ):
            if nodes != proof:
                not_posted(lab, contract.post(size, root, nodes), *reasons)


def send_arrays_that_are_not_what_they_say(lab: Lab) -> None:
    path, entry = lab.path(3, 17), lab.leaves[3]
    call = contract.verify_entry(entry, 3, 17, path)
    at = 4 + 32 * 3  # where the path is
    start = 4 + int.from_bytes(call[at : at + 32], "big")

    def with_word(place: int, value: int) -> bytes:
        return call[:place] + value.to_bytes(32, "big") + call[place + 32 :]

    assert lab.call(call) == TRUE
    for count in (64, 2**32, 2**251, 2**256 - 1):  # more than a path may have
        refused(lab, with_word(start, count), "")
    for count in range(len(path)):
        refused(lab, with_word(start, count), SHORT)
    for count in (len(path) + 1, 63):  # more than were sent
        refused(lab, with_word(start, count), LONG, "")
    for offset in (0, 32, 2**64, 2**255, 2**256 - 32):
        refused(lab, with_word(at, offset), LONG, SHORT, ROOT, "")
        refused(lab, with_word(4, offset), ROOT, "")
    refused(lab, contract.verify_entry(entry, 3, 17, [*path, *[bytes(32)] * 60]), "")
    refused(lab, contract.verify_entry(bytes(8193), 3, 17, path), "")
    for cut in (1, 31, 32, 33, 64):
        refused(lab, call[:-cut], ROOT, "")
    refused(lab, call[:4], UNPOSTED, "")


def send_parts_of_the_wrong_width(lab: Lab) -> None:
    """16-byte parts with more behind them, a TPM's anchor below -1."""
    honest = lab.receipt(6, 17)
    assert lab.call(honest) == TRUE
    for word in (2, 3):
        for byte in (16, 31):
            data = bytearray(honest)
            data[4 + 32 * word + byte] = 1
            refused(lab, bytes(data), "")
    low = (-2).to_bytes(32, "big", signed=True)
    refused(lab, honest[: 4 + 32 * 4] + low + honest[4 + 32 * 5 :], "")


ATTACKS: dict[str, Callable[[Lab], None]] = {
    f.__name__: f
    for f in (
        steal_a_place_by_a_path_that_is_almost_right,
        steal_a_place_under_another_head,
        pass_an_inner_node_for_an_entry,
        pass_a_leafs_hash_for_an_entry,
        show_a_receipt_that_the_log_does_not_hold,
        show_a_receipt_by_another_entry,
        show_a_receipt_with_one_part_changed,
        post_as_somebody_else,
        post_through_a_contract,
        begin_with_a_proof,
        replace_a_head,
        post_an_empty_root,
        post_a_log_too_large,
        post_a_fork,
        post_with_a_proof_that_is_almost_right,
        send_arrays_that_are_not_what_they_say,
        send_parts_of_the_wrong_width,
    )
}


def honest(lab: Lab) -> None:
    """What must be answered with true."""
    for index, size in places(lab):
        assert lab.entry(index, size) == TRUE
        if index % 3 == 0:
            assert lab.call(lab.receipt(index, size)) == TRUE


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, lab: Lab) -> None:
    ATTACKS[name](lab)


def test_what_is_true_is_answered(lab: Lab) -> None:
    honest(lab)
    assert lab.ask("poster()").to_bytes(20, "big") == lab.poster.address
    assert lab.ask("log_key()").to_bytes(32, "big") == LOG_KEY
    assert lab.ask("size()") == SIZES[-1]


def test_each_post_is_told() -> None:
    from eth_hash.auto import keccak

    made, name = Lab([3, 7], count=7), int.from_bytes(keccak(b"Posted(uint256,bytes32)"))
    assert made.chain.events == [(made.address, (name, n), made.root(n)) for n in (3, 7)]


# Each bug: a text of the source, what stands there instead, the attack that it lets through. All
# that is true is still answered; a fault in how an entry is written refuses that, since nothing is
# parsed.
BUGS: dict[str, tuple[str, str, Callable[[Lab], None]]] = {
    "anybody posts": (
        '    assert msg.sender == poster, "only the poster posts"\n', "", post_as_somebody_else,
    ),
    "who began the transaction posts": (
        "msg.sender == poster", "tx.origin == poster", post_through_a_contract,
    ),
    "a head may be replaced": (
        '    assert size > self.size, "the log has not grown"\n',
        "    if size <= self.size:\n        self.roots[size] = root\n        return\n",
        replace_a_head,
    ),
    "the same size again": (
        '    assert size > self.size, "the log has not grown"\n',
        '    assert size >= self.size, "the log has not grown"\n'
        "    if size == self.size:\n        self.roots[size] = root\n        return\n",
        replace_a_head,
    ),
    "no proof of growth": (
        "self._check_extends(self.size, self.roots[self.size], size, root, proof)", "pass",
        post_a_fork,
    ),
    "growth from another head": (
        "before == old_root", "before != empty(bytes32)", post_a_fork,
    ),
    "growth to another head": (
        "after == root", "after != empty(bytes32)", post_with_a_proof_that_is_almost_right,
    ),
    "a longer proof": (
        '        assert last != 0, "the proof is too long"\n', "",
        post_with_a_proof_that_is_almost_right,
    ),
    "a shorter proof": (
        '    assert last == 0, "the proof is too short"\n', "",
        post_with_a_proof_that_is_almost_right,
    ),
    "a first head with a proof": (
        '        assert len(proof) == 0, "the proof is too long"\n', "        pass\n",
        begin_with_a_proof,
    ),
    "an empty root": (
        '    assert root != empty(bytes32), "the root is empty"\n', "", post_an_empty_root,
    ),
    "any size": (
        '    assert size <= MAX_SIZE, "the log is too large"\n', "", post_a_log_too_large,
    ),
    "a head that was not posted": (
        '    assert root != empty(bytes32), "no head of this size was posted"\n', "",
        steal_a_place_by_a_path_that_is_almost_right,
    ),
    "any index": (
        '    assert index < size, "the index is past the log\'s end"\n', "",
        steal_a_place_by_a_path_that_is_almost_right,
    ),
    "an index one past the end": (
        "assert index < size", "assert index <= size",
        steal_a_place_by_a_path_that_is_almost_right,
    ),
    "a longer path": (
        '        assert last != 0, "the path is too long"\n', "",
        steal_a_place_by_a_path_that_is_almost_right,
    ),
    "a shorter path": (
        '    assert last == 0, "the path is too short"\n', "",
        steal_a_place_by_a_path_that_is_almost_right,
    ),
    "any root": (
        '    assert found == root, "the path leads to another root"\n', "",
        pass_an_inner_node_for_an_entry,
    ),
    "a leaf's hash for an entry": (
        'sha256(concat(x"00", entry))',
        'sha256(concat(x"00", entry)) if len(entry) != 32 else extract32(entry, 0)',
        pass_a_leafs_hash_for_an_entry,
    ),
    "an entry that brings its own mark": (
        'sha256(concat(x"00", entry))',
        'sha256(entry) if slice(concat(entry, x"ff"), 0, 1) == x"00"'
        ' else sha256(concat(x"00", entry))',
        pass_a_leafs_hash_for_an_entry,
    ),
}  # fmt: skip


def test_each_seeded_bug_lets_its_attack_through() -> None:
    source = contract.SOURCE.read_text()
    assert [name for name, (old, *_) in BUGS.items() if source.count(old) != 1] == []
    made = compiled([source.replace(old, new) for old, new, _ in BUGS.values()])
    for (name, (_, _, attack)), each in zip(BUGS.items(), made, strict=True):
        lab = Lab(SIZES, bytecode=each["bytecode"], count=40)
        honest(lab)
        try:
            attack(lab)
        except AssertionError:
            continue
        raise AssertionError(f"{name}: {attack.__name__} is still refused")


# Every place in every tree.


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_entry_is_found_at_its_place_alone(large: Lab, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SHAPES))
    index = data.draw(st.integers(0, size - 1))
    path = large.path(index, size)
    assert large.entry(index, size) == TRUE
    i, n, p, *_ = data.draw(st.sampled_from(list(near(index, size, path).values())))
    with pytest.raises(Reverted):
        large.call(contract.verify_entry(large.leaves[index], i, n, p))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_bit_changed_anywhere_in_a_call_is_refused(lab: Lab, data: st.DataObject) -> None:
    call = bytearray(lab.receipt(data.draw(st.sampled_from([0, 3, 9, 12])), 17))
    bit = data.draw(st.integers(0, 8 * len(call) - 1))
    call[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Reverted):
        lab.call(bytes(call))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_each_bit_of_a_call_counts(lab: Lab) -> None:
    call = lab.receipt(9, 13)
    for bit in range(8 * len(call)):
        data = bytearray(call)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Reverted):
            lab.call(bytes(data))


def every_place(sizes: range) -> None:
    made = Lab(sizes)
    for size in sizes:
        for index in range(size):
            assert made.entry(index, size) == TRUE


def test_every_place_in_every_small_tree() -> None:
    every_place(range(1, 25))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_place_in_every_tree() -> None:
    every_place(range(1, MOST + 1))


@pytest.mark.parametrize("count", [60, pytest.param(MOST, marks=pytest.mark.full)])
def test_a_commit_is_written_on_the_chain_as_in_the_log(count: int) -> None:
    made = Lab([count])
    for index in range(0, count, 3):
        assert made.call(made.receipt(index, count)) == TRUE


@settings(max_examples=25, deadline=None)
@given(old=st.integers(1, 299), grown=st.integers(1, 299))
def test_a_log_grows_from_any_size_to_any_other(old: int, grown: int) -> None:
    made = Lab([old], count=MOST)
    made.post(min(old + grown, MOST))
    assert made.entry(0, made.size) == TRUE


# Where the contract stands.


def test_a_chain_without_sha_256_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a call of the precompile succeeds and answers nothing."""
    cancun = chain._needed("eth.vm.forks.cancun").CancunVM
    computation = cancun.get_state_class().computation_class
    left = {k: v for k, v in computation._precompiles.items() if k[-1] != 2}
    monkeypatch.setattr(computation, "_precompiles", left)
    with pytest.raises(Reverted, match="no SHA-256"):
        Lab([1])


def test_a_chain_leaves_parsers_the_limit_of_recursion() -> None:
    """Else deep JSON would end the process, not be refused: py-evm asks for ten times as much."""
    limit = sys.getrecursionlimit()
    Lab([1])
    assert sys.getrecursionlimit() == limit < 5_000
    with pytest.raises(CasemateError, match="deep"):
        canonical.decode(b"[" * 100_000)


def test_nothing_else_is_answered(lab: Lab) -> None:
    for data in (b"", b"\0" * 4, contract.post(1, bytes(32), ())[:3]):
        refused(lab, data, "")

"""An anchor's file: one spelling, every signature and every step of growth verified when read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import anchors, checkpoint
from casemate.seal.anchors import Anchor
from casemate.seal.checkpoint import Request
from casemate.spec import merkle
from casemate.spec.errors import CasemateError, FormatError, ReceiptError
from support.publog import PublicLog, Witness

SIZES = (3, 8, 9, 21)


def posted(log: PublicLog, sizes=SIZES, witnesses=()) -> Anchor:
    made, old = Anchor(log.verifier), 0
    for size in sizes:
        proof = merkle.consistency(old, size, merkle.tree(log.leaves))
        made, old = anchors.post(made, log.sign(size, witnesses), proof), size
    return made


@pytest.fixture(scope="module")
def log() -> PublicLog:
    return PublicLog().pad(30)


def test_what_is_written_is_read(log):
    made = posted(log, witnesses=[Witness("one"), Witness("two")])
    assert anchors.read(str(made).encode()) == made
    assert [head.size for head in made.heads] == list(SIZES)
    assert str(made).startswith(f"casemate.dev/anchor@v1\n{log.verifier}\n\nold 0\n\n{log.origin}")


def test_a_file_without_a_checkpoint_is_one(log):
    assert anchors.read(str(Anchor(log.verifier)).encode()) == Anchor(log.verifier)


def test_a_file_only_grows_at_its_end(log):
    short, long = posted(log, SIZES[:-1]), posted(log)
    assert str(long).startswith(str(short))


@given(sizes=st.sets(st.integers(1, 30), min_size=1))
def test_any_checkpoints_that_grow_make_an_anchor(sizes):
    made = posted(PublicLog().pad(30), sorted(sizes))
    assert anchors.read(str(made).encode()) == made


def refused(text: str) -> str:
    with pytest.raises(CasemateError) as caught:
        anchors.read(text.encode())
    assert isinstance(caught.value, FormatError | ReceiptError)
    return caught.value.code


def parts(made: Anchor) -> list[str]:
    """Its head and each of its posts, which joined by empty lines are the file."""
    return [f"{anchors.HEAD}\n{made.log}\n", *map(str, made.posts)]


CHANGES = {
    "the last line is cut short": (lambda t: t[:-6], {"format.note", "receipt.note-signature"}),
    "the last newline is gone": (lambda t: t[:-1], {"format.anchor"}),
    "something follows": (lambda t: t + "\n", {"format.note"}),
    "another head": (lambda t: t.replace("anchor@v1", "anchor@v2", 1), {"format.anchor"}),
    "carriage returns": (lambda t: t.replace("\n", "\r\n"), {"format.anchor"}),
    "empty": (lambda t: "", {"format.anchor"}),
    "no key": (lambda t: f"{anchors.HEAD}\n", {"format.note"}),
    "a size with a zero before it": (
        lambda t: t.replace("old 3\n", "old 03\n"), {"format.checkpoint"},
    ),
    "another old size": (lambda t: t.replace("old 3\n", "old 4\n"), {"format.anchor"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_another_spelling_is_refused(name, log):
    change, codes = CHANGES[name]
    text = str(posted(log))
    assert change(text) != text
    assert refused(change(text)) in codes


def test_a_post_taken_out_moved_or_repeated_is_refused(log):
    head, *posts = parts(posted(log))
    for left in (posts[1:], [posts[0], *posts[2:]], posts[::-1], [*posts, posts[-1]]):
        assert refused("\n".join([head, *left])) == "format.anchor"
    assert anchors.read("\n".join([head, *posts[:2]]).encode())


def test_the_key_of_a_witness_signs_no_log(log):
    text = str(posted(log)).replace(str(log.verifier), str(Witness("one").verifier), 1)
    assert refused(text) == "format.anchor"


def test_another_logs_key_is_refused(log):
    text = str(posted(log)).replace(str(log.verifier), str(PublicLog().verifier), 1)
    assert refused(text) == "receipt.note-unsigned"


def test_a_fork_is_refused_though_the_logs_key_signed_it(log):
    fork = log.fork(7).pad(1)
    fork.leaves += [b"another"] * 20
    node = merkle.tree(fork.leaves)
    with pytest.raises(ReceiptError) as caught:
        anchors.post(posted(log), fork.sign(25), merkle.consistency(21, 25, node))
    assert caught.value.code == "receipt.fork"
    # and the file of who wrote it without looking
    forked = Request(21, merkle.consistency(21, 25, node), fork.sign(25))
    assert refused(f"{posted(log)}\n{forked}") == "receipt.fork"


@pytest.mark.parametrize("size", [1, 20, 21])
def test_what_is_no_newer_is_refused(size, log):
    with pytest.raises(FormatError) as caught:
        anchors.post(posted(log), log.sign(size), ())
    assert caught.value.code == "format.anchor"


def test_the_first_needs_no_proof_and_may_have_none(log):
    with pytest.raises(FormatError):
        anchors.post(Anchor(log.verifier), log.sign(3), [bytes(32)])


def test_a_proof_too_short_or_too_long_is_refused(log):
    made = posted(log, SIZES[:2])
    proof = merkle.consistency(8, 9, merkle.tree(log.leaves))
    for wrong in (proof[:-1], (*proof, bytes(32)), (*proof, proof[-1])):
        with pytest.raises(ReceiptError) as caught:
            anchors.post(made, log.sign(9), wrong)
        assert caught.value.code == "receipt.fork"


@given(data=st.data())
def test_one_bit_changed_anywhere_is_noticed(data):
    log = PublicLog().pad(9)
    raw = bytearray(str(posted(log, (3, 9))).encode())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CasemateError):
        anchors.read(bytes(raw))


def test_a_file_past_the_limit_is_not_looked_at(log, monkeypatch):
    text = str(posted(log))
    monkeypatch.setattr(anchors, "MAX_BYTES", len(text.encode()))
    anchors.read(text.encode())
    monkeypatch.setattr(anchors, "MAX_BYTES", len(text.encode()) - 1)
    assert refused(text) == "format.anchor"


def test_a_refusal_names_what_it_is_about(log):
    made = posted(log)
    witness = str(Witness("w" * 80).verifier)
    for where, call in (
        ("20", lambda: anchors.post(made, log.sign(20), ())),
        ("3", lambda: anchors.post(Anchor(log.verifier), log.sign(3), [bytes(32)])),
        (witness[:60], lambda: anchors.read(f"{anchors.HEAD}\n{witness}\n".encode())),
        ("", lambda: anchors.read(b"x")),
    ):
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.where == where
    with pytest.raises(FormatError, match="from 21 entries to 20 follows one of 21"):
        anchors.post(made, log.sign(20), ())


def test_bytes_that_are_no_text_are_refused(log):
    with pytest.raises(FormatError) as caught:
        anchors.read(str(posted(log)).encode() + b"\xff")
    assert caught.value.code == "format.anchor"


def test_a_thousand_posts_are_read_in_their_order(log):
    many = PublicLog().pad(1000)
    node, made = merkle.tree(many.leaves), []
    for size in range(1, 1001):
        head = checkpoint.Checkpoint(many.origin, size, merkle.root(size, node))
        signed = checkpoint.sign(head, many.public, many.key.sign)
        made.append(Request(size - 1, merkle.consistency(size - 1, size, node), signed))
    text = str(Anchor(many.verifier, tuple(made)))
    assert [h.size for h in anchors.read(text.encode()).heads] == list(range(1, 1001))

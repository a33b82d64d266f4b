"""Checkpoints, proofs of inclusion and a witness's request: vectors, refusals, fuzz."""

import base64
import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint, Proof, Request
from casemate.spec import merkle
from casemate.spec.errors import CasemateError
from support import rfc6962
from support import vectors_tlog as vectors
from support.fuzzing import feed
from support.mutation import COUNT, scrambled

ORIGIN = "casemate.dev/log/0123456789abcdef"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
LOG = checkpoint.log_key(ORIGIN, PUBLIC)
ENTRIES = [b"entry %d" % i for i in range(21)]
TREE = merkle.tree(ENTRIES)
HASH = base64.b64encode(bytes(32)).decode()


def head(size, origin=ORIGIN):
    return Checkpoint(origin, size, merkle.root(size, TREE))


def signed(size):
    return checkpoint.sign(head(size), PUBLIC, KEY.sign)


def code_of(call, *args):
    with pytest.raises(CasemateError) as e:
        call(*args)
    return e.value.code


# Vectors.


def test_the_specifications_checkpoint():
    found = checkpoint.read(vectors.SOFA)
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20852163)
    assert base64.b64encode(found.root).decode() == "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I="
    assert str(found) == vectors.SOFA


def test_the_specifications_request():
    found = checkpoint.read_request(vectors.SOFA_REQUEST.encode())
    assert found.old == 20852014
    assert [base64.b64encode(h).decode() for h in found.proof] == vectors.SOFA_PROOF
    assert checkpoint.read(found.signed.text).size == 20852163
    assert [str(x) for x in found.signed.lines] == [vectors.SOFA_LINE, vectors.SOFA_OTHER_LINE]
    assert str(found) == vectors.SOFA_REQUEST


@pytest.mark.parametrize("size", [1, 3, 5])
def test_requests_of_another_logs_software(size):
    body = vectors.SIGSUM_REQUESTS[size]
    found = checkpoint.read_request(body.encode())
    log = checkpoint.log_key(vectors.SIGSUM, vectors.SIGSUM_KEY)
    assert str(found) == body and checkpoint.verify(found.signed, log).size == size
    first = checkpoint.verify(
        checkpoint.read_request(vectors.SIGSUM_REQUESTS[1].encode()).signed, log
    )
    if size > 1:
        checkpoint.check_extends(first, checkpoint.read(found.signed.text), found.proof)


def test_the_two_later_trees_are_no_extension_of_each_other():
    heads = [
        checkpoint.read(checkpoint.read_request(vectors.SIGSUM_REQUESTS[n].encode()).signed.text)
        for n in (3, 5)
    ]
    for proof in ((), (bytes(32),), (bytes(32),) * 3):
        assert code_of(checkpoint.check_extends, *heads, proof) == "receipt.fork"
        assert code_of(checkpoint.check_extends, *heads[::-1], proof) == "receipt.fork"


def test_a_foreign_logs_origin_may_hold_spaces():
    """The Go checksum database: its key's name is another than its origin."""
    parsed = note.parse(vectors.SUM_NOTE)
    assert checkpoint.head(parsed.text).origin == "go.sum database tree"
    assert code_of(checkpoint.read, parsed.text) == "format.note"
    log = note.verifier(vectors.SUM_KEY)
    assert code_of(checkpoint.verify, parsed, log) == "format.note"


def test_extension_lines_are_passed_over_by_a_witness_alone():
    text = vectors.SOFA + "extension one\n— two\n"
    assert checkpoint.head(text) == checkpoint.read(vectors.SOFA)
    assert code_of(checkpoint.read, text) == "format.checkpoint"


# Form.


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "format.checkpoint"),
        ("\n\n\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n{HASH}", "format.checkpoint"),
        (f"{ORIGIN}\n1\n", "format.checkpoint"),
        (f"\n1\n{HASH}\n", "format.checkpoint"),
        (f"{ORIGIN}\n\n{HASH}\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n{HASH}\n\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n{HASH}\n\nx\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n{HASH}\nx", "format.checkpoint"),
        *(
            (f"{ORIGIN}\n{size}\n{HASH}\n", "format.checkpoint")
            for size in ("01", "00", "+1", "-1", "1 ", " 1", "1.0", "0x1", "1_0", "١", "x")
        ),
        (f"{ORIGIN}\n{2**53 + 1}\n{HASH}\n", "format.checkpoint"),
        (f"{ORIGIN}\n{'9' * 16}\n{HASH}\n", "format.checkpoint"),
        (f"{ORIGIN}\n{'1' * 17}\n{HASH}\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\nAA==\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n{base64.b64encode(bytes(33)).decode()}\n", "format.checkpoint"),
        (f"{ORIGIN}\n1\n{HASH[:-1]}\n", "format.note"),
        (f"{ORIGIN}\n1\n{HASH[:-2]}B=\n", "format.note"),
        (f"two words\n1\n{HASH}\n", "format.note"),
        (f"a+b\n1\n{HASH}\n", "format.note"),
    ],
)
def test_checkpoints_that_are_none(text, code):
    assert code_of(checkpoint.read, text) == code


@pytest.mark.parametrize("size", [0, 1, 10, 2**53])
def test_sizes(size):
    assert checkpoint.read(f"{ORIGIN}\n{size}\n{HASH}\n").size == size


origins = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Z")), min_size=1).filter(
    lambda s: "+" not in s and not any(c.isspace() for c in s)
)
hashes = st.binary(min_size=32, max_size=32)
heads = st.builds(Checkpoint, origins, st.integers(0, 2**53), hashes)
signatures = st.binary(min_size=64, max_size=64)


@given(heads, signatures)
def test_any_checkpoint_is_read_as_it_was_written(made, signature):
    assert checkpoint.read(str(made)) == made
    assert checkpoint.head(str(made)) == made
    note_ = checkpoint.sign(made, PUBLIC, lambda _: signature)
    assert checkpoint.read(note.parse(str(note_)).text) == made


@given(heads, st.integers(0, 2**53), st.lists(hashes, max_size=63), signatures)
def test_any_request_and_proof_is_read_as_it_was_written(made, number, proof, signature):
    note_ = checkpoint.sign(made, PUBLIC, lambda _: signature)
    request = Request(number, tuple(proof), note_)
    assert checkpoint.read_request(str(request).encode()) == request
    inclusion = Proof(number, tuple(proof), note_)
    assert checkpoint.read_proof(str(inclusion)) == inclusion


# Signatures.


def test_a_log_signs_its_own_checkpoint():
    found = note.parse(str(signed(5)))
    assert checkpoint.verify(found, LOG) == head(5)
    assert rfc6962.checkpoint(str(found).encode(), ORIGIN, PUBLIC) == (5, rfc6962.mth(ENTRIES[:5]))
    assert note.verifier(str(LOG)) == LOG and LOG.kind == note.SIGNATURE


def test_a_checkpoint_of_another_log_is_refused():
    """The same key under another origin: its name in the line is that of the log that is meant."""
    text = str(head(5, "log.example/other"))
    swapped = note.Note(text, (note.sign(text, ORIGIN, PUBLIC, KEY.sign),))
    assert code_of(checkpoint.verify, swapped, LOG) == "receipt.note-origin"


def test_a_checkpoint_is_verified_before_it_is_read():
    junk = note.Note("junk\n", signed(5).lines)
    assert code_of(checkpoint.verify, junk, LOG) == "receipt.note-signature"
    mine = note.Note("junk\n", (note.sign("junk\n", ORIGIN, PUBLIC, KEY.sign),))
    assert code_of(checkpoint.verify, mine, LOG) == "format.checkpoint"
    other = checkpoint.log_key(ORIGIN, bytes(32))
    assert code_of(checkpoint.verify, signed(5), other) == "receipt.note-unsigned"


# Proofs.


@pytest.mark.parametrize("size", [1, 2, 3, 8, 21])
def test_an_entry_stands_where_it_stands_and_nowhere_else(size):
    for place in range(size):
        path = merkle.inclusion(place, size, TREE)
        proof = checkpoint.read_proof(str(Proof(place, path, signed(size))))
        assert checkpoint.verify_proof(proof, ENTRIES[place], LOG) == head(size)
        assert code_of(checkpoint.verify_proof, proof, b"other", LOG) == "receipt.inclusion"
        for elsewhere in {0, 1, place + 1, size, 2**53} - {place}:
            moved = Proof(elsewhere, path, proof.signed)
            assert code_of(checkpoint.verify_proof, moved, ENTRIES[place], LOG) == (
                "receipt.inclusion"
            )
        for bad in ((*path, bytes(32)), path[:-1], path[::-1]):
            if bad != path:
                wrong = Proof(place, bad, proof.signed)
                assert code_of(checkpoint.verify_proof, wrong, ENTRIES[place], LOG) == (
                    "receipt.inclusion"
                )


def test_a_proof_under_another_checkpoint_is_refused():
    path = merkle.inclusion(3, 21, TREE)
    proof = Proof(3, path, signed(20))
    assert code_of(checkpoint.verify_proof, proof, ENTRIES[3], LOG) == "receipt.inclusion"
    forged = note.Note(str(head(21)), signed(20).lines)
    assert code_of(checkpoint.verify_proof, Proof(3, path, forged), ENTRIES[3], LOG) == (
        "receipt.note-signature"
    )


def test_an_inner_node_is_no_entry():
    node = TREE(1, 0)
    inner = TREE(0, 0) + TREE(0, 1)
    proof = Proof(0, merkle.inclusion(0, 21, TREE)[1:], signed(21))
    assert merkle.node_hash(TREE(0, 0), TREE(0, 1)) == node
    assert code_of(checkpoint.verify_proof, proof, inner, LOG) == "receipt.inclusion"


@pytest.mark.parametrize(
    "text",
    [
        "", "c2sp.org/tlog-proof@v1", "c2sp.org/tlog-proof@v1\n\n", "wrong\nindex 0\n\nx",
        "c2sp.org/tlog-proof@v1\nindex\n\nx", "c2sp.org/tlog-proof@v1\nindex 00\n\nx",
        "c2sp.org/tlog-proof@v1\nindex -5\n\nx", "c2sp.org/tlog-proof@v1\nindex no\n\nx",
        "c2sp.org/tlog-proof@v1\nextra AAAA\nindex 0\n\nx", "c2sp.org/tlog-proof@v1\nIndex 0\n\nx",
        "c2sp.org/tlog-proof@v1\nindex 0\n!!\n\nx", f"c2sp.org/tlog-proof@v1\nindex 0\n{HASH}\n",
        f"c2sp.org/tlog-proof@v1\nindex 0\n{base64.b64encode(bytes(64)).decode()}\n\nx",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + f"{HASH}\n" * 64 + "\n" + "x",
    ],
)  # fmt: skip
def test_proofs_that_are_none(text):
    assert code_of(checkpoint.read_proof, text) in ("format.checkpoint", "format.note")


@pytest.mark.parametrize(
    "body",
    [
        "", "\n\n", "old\n\n{}", "old 0{}", "Old 0\n\n{}", "old  0\n\n{}", "old 00\n\n{}",
        "old -1\n\n{}", "old 0 \n\n{}", "old 0\r\n\n{}", "old 0\nx\n\n{}", "old 0\nAA==\n\n{}",
        "old 0\n\n\n{}", "old 0\n\n", "old 0\n\nx\n", " old 0\n\n{}", "0\n\n{}", "5\n\n{}",
        "old 0\n" + f"{HASH}\n" * 64 + "\n{}",
    ],
)  # fmt: skip
def test_requests_that_are_none(body):
    data = body.replace("{}", str(signed(3))).encode()
    if body == "old 0\n\n\n{}":  # the note's text then begins with an empty line
        assert code_of(checkpoint.read, checkpoint.read_request(data).signed.text) == (
            "format.checkpoint"
        )
        return
    assert code_of(checkpoint.read_request, data) in ("format.checkpoint", "format.note")


def test_a_request_has_at_most_63_hashes_and_64_kib():
    most = "old 0\n" + f"{HASH}\n" * 63 + f"\n{signed(3)}"
    assert len(checkpoint.read_request(most.encode()).proof) == 63
    assert code_of(checkpoint.read_request, b"old 0\n\n\xff") == "format.checkpoint"
    assert code_of(checkpoint.read_request, bytes(note.MAX_NOTE + 1)) == "format.checkpoint"
    tail = "\n— a AAAAAAA=\n"
    longest = "x" * (note.MAX_NOTE - len(tail.encode()) - len("old 0\n\n") - 1) + "\n" + tail
    assert checkpoint.read_request(b"old 0\n\n" + longest.encode()).old == 0
    assert code_of(checkpoint.read_request, b"old 10\n\n" + longest.encode()) == (
        "format.checkpoint"
    )


def test_a_proof_names_its_index():
    proof = str(Proof(0, (), signed(1)))
    assert checkpoint.read_proof(proof).place == 0
    for bad in ("0", "place 0", "index  0", "index 0 "):
        assert code_of(checkpoint.read_proof, proof.replace("index 0", bad)) == "format.checkpoint"


# Extension.


def test_a_checkpoint_extends_those_before_it():
    for old in range(22):
        for new in range(old, 22):
            proof = merkle.consistency(old, new, TREE)
            checkpoint.check_extends(head(old), head(new), proof)
            if old < new:
                assert code_of(checkpoint.check_extends, head(new), head(old), proof) == (
                    "receipt.fork"
                )
                other = Checkpoint(ORIGIN, new, bytes(32))
                if old:
                    assert code_of(checkpoint.check_extends, head(old), other, proof) == (
                        "receipt.fork"
                    )


def test_checkpoints_of_two_logs_do_not_extend_each_other():
    assert code_of(checkpoint.check_extends, head(5), head(5, "log.example/b"), ()) == (
        "receipt.fork"
    )


def test_refusals_name_the_log_the_entry_and_the_line():
    def raised(call, *args):
        with pytest.raises(CasemateError) as e:
            call(*args)
        return e.value

    proof = Proof(7, merkle.inclusion(7, 21, TREE), signed(21))
    request = str(Request(9, merkle.consistency(9, 21, TREE), signed(21)))
    for bad, what in ((str(proof).replace("index 7", "index 07"), "The index"),
                      (request.replace("old 9", "old 09"), "The old size")):  # fmt: skip
        read = checkpoint.read_proof if what == "The index" else checkpoint.read_request
        e = raised(read, bad if what == "The index" else bad.encode())
        assert e.message.startswith(f"{what} is not") and e.where in ("07", "09")
    assert raised(checkpoint.read, "a\n1\nb\n").where == ""
    other = head(21, "log.example/b")
    stranger = checkpoint.sign(other, PUBLIC, KEY.sign)
    line = note.sign(stranger.text, ORIGIN, PUBLIC, KEY.sign)
    moved = note.Note(stranger.text, (line,))
    e = raised(checkpoint.verify, moved, LOG)
    assert (e.code, e.where) == ("receipt.note-origin", "log.example/b")
    e = raised(checkpoint.check_extends, head(5), other, ())
    assert (e.where, e.message.count("different logs")) == ("log.example/b", 1)
    e = raised(checkpoint.verify_proof, Proof(21, proof.path, proof.signed), ENTRIES[7], LOG)
    assert e.where == "entry 21" and "None" not in e.message
    with pytest.raises(ValueError) as why:
        merkle.root_from_inclusion(bytes(32), 21, 21, proof.path)
    assert str(why.value) in e.message


def fuzz(read, seed: bytes) -> None:
    def judged(data: bytes):
        try:
            read(data)
        except CasemateError as e:
            assert e.code.startswith(("format.", "receipt."))
            raise

    rng, count = random.Random(6), COUNT // 2
    inputs = (scrambled(seed, rng, b"\n\n +=A0\x00\xff") for _ in range(count))
    assert feed(judged, inputs, (CasemateError,)) < count // 2


def test_fuzzed_requests():
    """What is accepted is what was signed."""

    def read(data: bytes):
        asked = checkpoint.read_request(data)
        assert str(asked).encode() == data
        assert checkpoint.verify(asked.signed, LOG) == head(21)

    fuzz(read, str(Request(9, merkle.consistency(9, 21, TREE), signed(21))).encode())


def test_fuzzed_proofs():
    path = merkle.inclusion(7, 21, TREE)

    def read(data: bytes):
        found = checkpoint.read_proof(data.decode("utf-8", "replace"))
        assert checkpoint.verify_proof(found, ENTRIES[7], LOG) == head(21)
        assert (found.place, found.path) == (7, path)

    fuzz(read, str(Proof(7, path, signed(21))).encode())

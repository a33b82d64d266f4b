"""The rule of a witness: the specification's statuses in order, and other software's vectors."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint
from casemate.spec import merkle
from casemate.witness.decide import SIZE, TEXT, Accepted, decide
from support import rfc6962
from support import vectors_tlog as vectors
from support.witness import Tree

LOG = Tree([b"entry %d" % i for i in range(20)])
LOGS = {LOG.origin: LOG.log}
HASH = "A" * 43 + "="


def held(size, tree=LOG):
    return {tree.origin: tree.head(size)} if size is not None else {}


def ask(size, body, tree=LOG):
    return decide(held(size, tree), body, {tree.origin: tree.log})


def refused(size, body, status, text=None, tree=LOG):
    found = ask(size, body, tree)
    assert not isinstance(found, Accepted)
    assert found.answer.status == status
    assert found.answer.kind == (SIZE if status == 409 else TEXT)
    if status == 409:
        assert found.answer.body == b"%d\n" % (size or 0)
    if text is not None:
        assert text in found.answer.body.decode()
    return found


@pytest.mark.parametrize("known", [None, 0, 1, 2, 7, 8, 20])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 15, 20])
def test_what_extends_is_accepted_and_nothing_goes_back(known, size):
    body = LOG.request(known or 0, size)
    if size >= (known or 0):
        found = ask(known, body)
        assert isinstance(found, Accepted)
        assert found.head == LOG.head(size) and found.signed == LOG.signed(size)
    else:
        assert refused(known, body, 400).suspicion == ""


@pytest.mark.parametrize(("known", "old"), [(5, 0), (5, 4), (5, 6), (None, 1), (0, 1), (20, 0)])
def test_another_old_size_is_a_conflict_with_the_size_held(known, old):
    assert refused(known, LOG.request(old, 20), 409).suspicion == ""


def test_an_old_size_above_the_new_one_is_malformed_before_it_is_a_conflict():
    refused(5, LOG.request(9, 8, ()), 400, "old size")
    refused(8, LOG.request(9, 8, ()), 400, "old size")


def test_a_replayed_checkpoint_gets_the_size_and_no_cosignature():
    for size in range(8):
        assert refused(8, LOG.request(0, size), 409).suspicion == ""


def test_two_roots_of_one_size_are_a_fork_whatever_else_is_asked():
    other = LOG.fork(3, [b"x"] * 10)
    for old, status in ((8, 409), (0, 409), (3, 409), (9, 400)):
        found = refused(8, other.request(old, 8, ()), status)
        assert found.suspicion == "fork" and found.log == LOG.log
    assert refused(8, other.request(8, 8, (bytes(32),)), 409).suspicion == "fork"
    assert refused(0, LOG.request(0, 0).replace(*_root(LOG.head(0))), 403).suspicion == ""


def _root(head):
    return str(head).encode(), str(Checkpoint(head.origin, head.size, bytes(32))).encode()


def test_a_proof_that_does_not_lead_there():
    good = merkle.consistency(6, 15, merkle.tree(LOG.entries[:15]))
    for proof in ((), good[:-1], (*good, bytes(32)), good[::-1], (bytes(32),) * len(good)):
        found = refused(6, LOG.request(6, 15, proof), 422, "consistency")
        assert found.suspicion == "unproven" and found.log == LOG.log
    for proof in ((bytes(32),), good):
        assert refused(None, LOG.request(0, 15, proof), 422).suspicion == ""
        assert refused(8, LOG.request(8, 8, proof), 422).suspicion == "unproven"


def test_a_fork_is_never_accepted_with_any_proof_of_either_tree():
    other = LOG.fork(3, [b"x %d" % i for i in range(17)])
    for old, size in itertools.product((3, 4, 8), (8, 9, 20)):
        for tree in (LOG, other):
            proof = merkle.consistency(old, size, merkle.tree(tree.entries[:size]))
            found = ask(old, other.request(old, size, proof))
            assert isinstance(found, Accepted) == (old == 3 and tree is other)


def test_the_empty_tree():
    assert isinstance(ask(None, LOG.request(0, 0)), Accepted)
    assert isinstance(ask(0, LOG.request(0, 0)), Accepted)
    for root in (bytes(32), merkle.leaf_hash(b"leaf")):
        text = str(Checkpoint(LOG.origin, 0, root))
        body = str(checkpoint.Request(0, (), LOG.sign(text))).encode()
        refused(None, body, 422)
        assert refused(0, body, 409).suspicion == "fork"


# Who signed.


def test_a_log_that_is_not_known():
    other = Tree(LOG.entries, "log.example/b")
    assert refused(None, other.request(0, 5), 404).suspicion == ""
    assert decide({}, LOG.request(0, 5), {}).answer.status == 404


def test_a_signature_that_is_none():
    request = checkpoint.read_request(LOG.request(0, 5))
    text = request.signed.text
    stranger = Tree(LOG.entries, "log.example/b")
    own = request.signed.lines[0]
    for line in (
        note.Line(own.name, own.id, bytes(64)),
        note.Line(own.name, b"\0\0\0\0", own.signature),
        note.Line("log.example/b", stranger.log.id, own.signature),
        stranger.sign(text).lines[0],
    ):
        body = str(checkpoint.Request(0, (), note.Note(text, (line,)))).encode()
        assert refused(None, body, 403).suspicion == ""
        both = str(checkpoint.Request(0, (), note.Note(text, (own, line)))).encode()
        if (line.name, line.id) == (own.name, own.id):
            refused(None, both, 403)
        else:  # unknown keys are skipped
            found = ask(None, both)
            assert isinstance(found, Accepted) and found.signed.lines == (own,)


def test_a_log_cannot_speak_for_another():
    """A log's signature under a text that names another log: known, but not its key."""
    other = Tree(LOG.entries, "log.example/b")
    logs = {t.origin: t.log for t in (LOG, other)}
    body = str(checkpoint.Request(0, (), LOG.sign(str(other.head(5))))).encode()
    assert decide({}, body, logs).answer.status == 403


def test_extension_lines_are_cosigned_with_the_rest():
    text = str(LOG.head(5)) + "extension\n"
    found = ask(None, str(checkpoint.Request(0, (), LOG.sign(text))).encode())
    assert isinstance(found, Accepted)
    assert found.signed.text == text and found.head == LOG.head(5)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff", b"old 0\n\n", b"old x\n\n", b"old 0\n\nnote\n\n\xe2\x80\x94 a AAAAAAA=\n",
        LOG.request(0, 5)[:-1], LOG.request(0, 5) + b"\n",
        LOG.request(0, 5).replace(b"old 0", b"old 00"),
        b"old 0\n" + (HASH + "\n").encode() * 64 + LOG.request(0, 5)[6:], bytes(1 << 17),
    ],
)  # fmt: skip
def test_requests_that_are_none(body):
    refused(None, body, 400)


# Other software's vectors.


def test_torchwoods_requests():
    log = checkpoint.log_key(vectors.SIGSUM, vectors.SIGSUM_KEY)
    logs, bodies = (
        {vectors.SIGSUM: log},
        {n: b.encode() for n, b in vectors.SIGSUM_REQUESTS.items()},
    )
    first = decide({}, bodies[1], logs)
    assert isinstance(first, Accepted) and first.head.size == 1
    heads = {vectors.SIGSUM: first.head}
    for size in (3, 5):
        found = decide(heads, bodies[size], logs)
        assert isinstance(found, Accepted) and found.head.size == size
    late = decide({vectors.SIGSUM: found.head}, bodies[3], logs)
    assert (late.answer.status, late.answer.body) == (409, b"5\n")
    assert decide({}, bodies[3], logs).answer.body == b"0\n"


# In general.


@given(
    st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.booleans()
)
def test_accepted_is_what_the_definition_calls_an_extension(known, old, size, at, theirs):
    """By RFC 6962's own recursion: the tree held is a beginning of the one that is accepted."""
    tree = LOG.fork(at, [b"other"] * (20 - at)) if theirs else LOG
    found = ask(known, tree.request(old, size))
    if isinstance(found, Accepted):
        assert known == old <= size
        assert rfc6962.mth(tree.entries[:known]) == rfc6962.mth(LOG.entries[:known])
        assert found.head.root == rfc6962.mth(tree.entries[:size])
    else:
        begins = tree.entries[:known] == LOG.entries[:known]
        assert not (known == old <= size and begins)
        same = size == known and tree.entries[:size] != LOG.entries[:known]
        assert (found.suspicion == "fork") == same

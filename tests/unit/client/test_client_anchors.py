"""Anchored proofs: made of a receipt that holds alone, checked step by step, each refusal named."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest

from casemate.attest.trust import Trust, Unchecked
from casemate.client import anchors
from casemate.client.heads import Witnesses
from casemate.client.memory import Memory, Mirror, Seen
from casemate.seal import anchors as files
from casemate.seal import checkpoint
from casemate.spec import codec, merkle
from casemate.spec.errors import CasemateError, EvidenceError
from casemate.spec.log import Abandoned
from casemate.spec.receipt import LogEntry, ReceiptProof
from support.publog import PublicLog, Witness
from support.receipts import maker, plan, receipt


@pytest.fixture
def made(keys, tee, public):
    """A receipt's bundle; its log has gone on since."""
    found = maker(keys, tee, public)(receipt(keys))
    public.pad(20)
    return found


@pytest.fixture
def mirror(public, tmp_path) -> Mirror:
    """All of the log, on disk."""
    kept = Memory(tmp_path / "logs").mirror(public.public)
    kept.extend(public.public, public.file)
    return kept


def anchored(public: PublicLog, *sizes: int) -> files.Anchor:
    found, old = files.Anchor(public.verifier), 0
    for size in sizes:
        proof = merkle.consistency(old, size, merkle.tree(public.leaves))
        found, old = files.post(found, public.sign(size), proof), size
    return found


def refused(call, *arguments, **named) -> str:
    with pytest.raises(CasemateError) as caught:
        call(*arguments, **named)
    return caught.value.code


def states(checks) -> dict[str, str]:
    return {c.name: c.state for c in checks}


def test_a_proof_is_made_offline_and_holds(made, trust):
    proof = anchors.prove(made, trust=trust)
    assert proof.proof == made.proof
    assert states(anchors.check(proof)) == {
        "receipt": "ok", "log": "ok", "witnesses": "unchecked", "anchor": "unchecked",
        "bundle": "unchecked",
    }  # fmt: skip
    assert codec.decode(type(proof), codec.encode(proof)) == proof


def test_a_proof_is_small(made, trust):
    assert len(codec.encode(anchors.prove(made, trust=trust))) < 2500 < len(codec.encode(made))


def test_with_everything_given_all_is_checked(made, trust, public, keys, tee):
    witness = Witness("w")
    made = maker(keys, tee, public)(receipt(keys), witnesses=[witness])
    size = checkpoint.head(checkpoint.read_proof(made.proof).signed.text).size
    anchor = anchored(public, 2, size)
    proof = anchors.prove(made, trust=trust, anchor=anchor)
    checks = anchors.check(
        proof, anchor=anchor, bundle=made, trust=trust,
        witnesses=Witnesses.of([str(witness.verifier)]),
    )  # fmt: skip
    assert states(checks) == {
        "receipt": "ok", "log": "ok", "witnesses": "ok", "anchor": "ok", "bundle": "simulated",
    }  # fmt: skip
    assert "checkpoint 2 of 2" in checks[3].found


def test_no_proof_is_made_of_a_receipt_that_does_not_hold(made, keys, tee, public, trust):
    lie = maker(keys, tee, public)(receipt(keys, plan=plan(sigma=2.0)))
    assert refused(anchors.prove, lie, trust=trust) == "receipt.sigma"
    hardware = Trust.sev_snp(measurements=Unchecked("any, in this test"))
    with pytest.raises(EvidenceError):
        anchors.prove(made, trust=hardware)


@pytest.mark.parametrize("sizes", [(2, 9, 14), (9, 26)])
def test_a_proof_leads_to_the_oldest_checkpoint_that_covers_the_receipt(
    sizes, made, trust, public, mirror
):
    proof = anchors.prove(made, trust=trust, anchor=anchored(public, *sizes), mirror=mirror)
    found = checkpoint.read_proof(proof.proof)
    assert checkpoint.read(found.signed.text).size == 9
    anchors.check(proof, anchor=anchored(public, *sizes))


def test_an_anchor_that_does_not_reach_the_receipt_is_said(made, trust, public, mirror):
    place = checkpoint.read_proof(made.proof).place
    for sizes in ((), (place,)):
        anchor = anchored(public, *sizes)
        code = refused(anchors.prove, made, trust=trust, anchor=anchor, mirror=mirror)
        assert code == "receipt.not-anchored"
    anchors.prove(made, trust=trust, anchor=anchored(public, place + 1), mirror=mirror)


def test_another_logs_anchor_is_refused(made, trust, mirror):
    other = anchored(PublicLog().pad(30), 20)
    code = refused(anchors.prove, made, trust=trust, anchor=other, mirror=mirror)
    assert code == "receipt.not-anchored"
    proof = anchors.prove(made, trust=trust)
    assert refused(anchors.check, proof, anchor=other) == "receipt.not-anchored"


def test_without_the_logs_hashes_a_later_checkpoint_is_out_of_reach(
    made, trust, public, mirror, tmp_path
):
    public.pad(5)
    anchor = anchored(public, len(public.leaves))  # past what the mirror has
    for given in (None, mirror, Mirror(tmp_path / "none")):
        code = refused(anchors.prove, made, trust=trust, anchor=anchor, mirror=given)
        assert code == "usage.undecided"


def test_a_mirrors_false_hashes_make_no_proof(made, trust, public, tmp_path):
    fork = public.fork(len(public.leaves))
    fork.leaves[0] = b"another"
    kept = Memory(tmp_path / "fork").mirror(public.public)
    kept.extend(public.public, fork.file)
    code = refused(anchors.prove, made, trust=trust, anchor=anchored(public, 12), mirror=kept)
    assert code == "receipt.inclusion"


def test_a_checkpoint_that_was_not_posted_is_said(made, trust, public):
    proof = anchors.prove(made, trust=trust)
    assert refused(anchors.check, proof, anchor=anchored(public, 4)) == "receipt.not-anchored"


def test_a_posted_head_of_this_size_and_another_root_is_a_fork(made, trust, public):
    proof = anchors.prove(made, trust=trust)
    size = checkpoint.read(checkpoint.read_proof(made.proof).signed.text).size
    fork = public.fork(2).pad(40)
    assert refused(anchors.check, proof, anchor=anchored(fork, size)) == "receipt.fork"


def lies(proof: ReceiptProof) -> list[tuple[str, ReceiptProof]]:
    """Proofs in which one thing is another, and how each is refused."""
    found = checkpoint.read_proof(proof.proof)
    entry = codec.decode(LogEntry, proof.entry)
    moved = replace(found, place=found.place + 1)
    shorter = replace(found, path=found.path[1:])
    return [
        ("receipt.log-entry", replace(proof, receipt="sha256:" + "0" * 64)),
        ("receipt.log-entry", replace(proof, salt=bytes(32))),
        ("receipt.log-entry", replace(proof, proof=str(moved))),
        ("receipt.inclusion", replace(proof, proof=str(shorter))),
        (
            "receipt.inclusion",
            replace(proof, entry=codec.encode(replace(entry, boot=bytes(16)))),
        ),
        ("receipt.note-unsigned", replace(proof, key=PublicLog().public)),
    ]


def test_a_proof_of_another_receipt_salt_place_entry_or_key_is_refused(made, trust):
    for code, lie in lies(anchors.prove(made, trust=trust)):
        assert refused(anchors.check, lie) == code


def test_a_proof_of_another_entry_than_a_commit_is_refused(made, trust, keys, public):
    said = Abandoned(job="job_" + "0" * 32, reason="failed")
    place = public.append("abandon", said.job, said, keys.boot)
    other = replace(
        anchors.prove(made, trust=trust),
        entry=public.leaves[place],
        proof=str(public.prove(place, public.sign())),
    )
    assert refused(anchors.check, other) == "receipt.log-entry"


def test_a_proof_beside_another_receipt_is_refused(made, trust, keys, tee, public):
    proof = anchors.prove(made, trust=trust)
    other = maker(keys, tee, public)(receipt(keys, software="another"))
    assert refused(anchors.check, proof, bundle=other, trust=trust) == "receipt.log-entry"


def test_evidence_is_judged_at_the_time_that_is_asked_for(made, trust):
    proof = anchors.prove(made, trust=trust)
    for call in (
        lambda: anchors.prove(made, trust=trust, now=0.0),
        lambda: anchors.check(proof, bundle=made, trust=trust, now=0.0),
    ):
        with pytest.raises(EvidenceError):
            call()


def test_what_was_found_and_what_was_not_asked_is_said(made, trust):
    proof = anchors.prove(made, trust=trust)
    found = {c.name: c.found for c in anchors.check(proof)}
    assert found["receipt"] == f"{proof.receipt[:23]}…, committed to by entry 2"
    assert "not given" in found["bundle"]


def test_a_refusal_names_what_it_is_about(made, trust, keys, tee, public, mirror, tmp_path):
    proof = anchors.prove(made, trust=trust)
    other = maker(keys, tee, public)(receipt(keys, software="another"))
    file, small = tmp_path / "anchor", Memory(tmp_path / "small").mirror(public.public)
    anchors.post(file, seen(mirror), mirror)
    small.extend(public.public, public.fork(3).file)
    foreign = Memory(tmp_path / "foreign").mirror((log := PublicLog().pad(30)).public)
    foreign.extend(log.public, log.file)
    nowhere = tmp_path / "no" / "file"
    for where, call in (
        ("entry", lambda: anchors.check(replace(proof, salt=bytes(32)))),
        ("receipt", lambda: anchors.check(proof, bundle=other, trust=trust)),
        (public.origin, lambda: anchors.post(file, seen(small), small)),
        (log.origin, lambda: anchors.post(file, seen(foreign), foreign)),
        (str(nowhere), lambda: anchors.load(nowhere)),
        (str(nowhere), lambda: anchors.save_proof(nowhere, proof)),
        (str(nowhere), lambda: anchors.post(nowhere, seen(mirror), mirror)),
    ):
        with pytest.raises(CasemateError) as caught:
            call()
        assert caught.value.where == where
        assert "None" not in caught.value.message


def test_a_proof_longer_than_any_is_not_read(made, trust, tmp_path, monkeypatch):
    anchors.save_proof(path := tmp_path / "p", proof := anchors.prove(made, trust=trust))
    size = path.stat().st_size
    for limit, holds in ((size, True), (size - 1, True), (size - 2, False), (9, False)):
        monkeypatch.setattr(anchors, "MAX_PROOF", limit)  # the file ends in a newline
        if holds:
            assert anchors.load_proof(path) == proof
        else:
            assert refused(anchors.load_proof, path).startswith("format.")
    path.write_bytes(b"x" * 10_000)
    monkeypatch.setattr(anchors, "MAX_PROOF", 100)
    assert refused(anchors.load_proof, path) == "format.too-large"
    assert len(anchors._bytes(path, 100)) == 101


def test_a_receipt_is_not_looked_at_without_a_policy(made, trust):
    proof = anchors.prove(made, trust=trust)
    assert refused(anchors.check, proof, bundle=made) == "usage.trust"


def test_a_key_that_no_evidence_binds_is_found_with_the_receipt(made, trust):
    """Anyone can make a log that commits to somebody's receipt, under a key of their own."""
    mine, entry = PublicLog(), codec.decode(LogEntry, made.entry)
    mine.pad(entry.sequence).leaves.append(made.entry)
    proof = replace(
        anchors.prove(made, trust=trust),
        key=mine.public,
        proof=str(mine.prove(entry.sequence, mine.sign())),
    )
    assert states(anchors.check(proof))["bundle"] == "unchecked"
    assert refused(anchors.check, proof, bundle=made, trust=trust) == "receipt.log-entry"


# The anchor's file.


def seen(mirror: Mirror) -> Seen:
    found = mirror.seen()
    assert found is not None
    return found


def test_posting_grows_the_file_and_once(public, mirror, tmp_path):
    public.pad(3)
    mirror.extend(public.public, public.file)
    path = tmp_path / "anchor"
    first, grown = anchors.post(path, seen(mirror), mirror)
    assert grown and len(first.posts) == 1
    before = path.read_bytes()
    assert anchors.post(path, seen(mirror), mirror) == (first, False)
    assert path.read_bytes() == before
    public.pad(300)
    mirror.extend(public.public, public.file)
    second, grown = anchors.post(path, seen(mirror), mirror)
    assert grown and path.read_bytes().startswith(before)
    assert anchors.load(path) == second
    assert [h.size for h in second.heads] == [3, 303]


def test_a_log_that_was_rolled_back_forked_or_replaced_is_not_posted(public, mirror, tmp_path):
    path = tmp_path / "anchor"
    public.pad(10)
    mirror.extend(public.public, public.file)
    anchors.post(path, seen(mirror), mirror)
    before = path.read_bytes()
    wrong = {
        "receipt.rolled-back": public.fork(9),
        "receipt.fork": public.fork(5).pad(0),
        "receipt.log-replaced": PublicLog().pad(20),
    }
    wrong["receipt.fork"].leaves += [b"x"] * 15
    same = public.fork(9)
    same.leaves.append(b"another")
    for number, (code, log) in enumerate([*wrong.items(), ("receipt.fork", same)]):
        other = Memory(tmp_path / str(number)).mirror(log.public)
        other.extend(log.public, log.file)
        assert refused(anchors.post, path, seen(other), other) == code
        assert path.read_bytes() == before


def test_a_file_that_cannot_be_had_or_written_is_named(public, mirror, tmp_path):
    assert refused(anchors.load, tmp_path / "none") == "usage.file"
    assert refused(anchors.load_proof, tmp_path) == "usage.file"
    public.pad(2)
    mirror.extend(public.public, public.file)
    assert refused(anchors.post, tmp_path / "no" / "a", seen(mirror), mirror) == "usage.file"


@pytest.mark.parametrize("fault", ["sync", "space"])
def test_a_disk_that_fails_leaves_the_file_as_it_was(fault, public, mirror, tmp_path, monkeypatch):
    path = tmp_path / "anchor"
    public.pad(3)
    mirror.extend(public.public, public.file)
    anchors.post(path, seen(mirror), mirror)
    before = path.read_bytes()
    public.pad(3)
    mirror.extend(public.public, public.file)
    write = os.write

    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if fault == "sync":
            patch.setattr(anchors.os, "fsync", fails)
        else:
            patch.setattr(anchors.os, "write", lambda fd, data: write(fd, data[:7]))
        assert refused(anchors.post, path, seen(mirror), mirror) == "usage.file"
    assert path.read_bytes() == before
    assert anchors.post(path, seen(mirror), mirror)[1]


def test_a_proof_that_cannot_be_written_is_named(made, trust, tmp_path):
    proof = anchors.prove(made, trust=trust)
    assert refused(anchors.save_proof, tmp_path / "no" / "p", proof) == "usage.file"
    anchors.save_proof(tmp_path / "p", proof)
    assert anchors.load_proof(tmp_path / "p") == proof

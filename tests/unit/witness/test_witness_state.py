"""What a witness keeps: written whole, missed when it is gone, refused when it was changed."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.seal import note
from casemate.seal.note import Verifier
from casemate.spec import codec
from casemate.spec.errors import CasemateError
from casemate.witness import state
from support.disk import SimDisk
from support.witness import FakeWitness, Tree

TREE = Tree([b"a", b"b", b"c"])
OTHER = Tree([b"d"], "log.example/b")
FAKE = FakeWitness("w.example/1", logs=[TREE.log, OTHER.log])
ME = FAKE.verifier


def code_of(call, *args):
    with pytest.raises(CasemateError) as e:
        call(*args)
    return e.value.code


def cosigned(tree, size, fake=FAKE):
    return tree.signed(size).add(note.lines(fake.cosign(str(tree.head(size))).body.decode()))


@pytest.fixture
def disk():
    made = SimDisk()
    state.create(made, ME)
    return made


def test_a_new_witness_watches_nothing(disk):
    assert state.load(disk, ME) == {} and state.witness(disk) == ME
    assert state.about(disk, ME, {}) == {"name": "w.example/1", "vkey": str(ME), "logs": []}


def test_logs_are_added_once(disk):
    assert state.add(disk, ME, TREE.log) is True
    assert state.add(disk, ME, OTHER.log) is True
    assert state.add(disk, ME, TREE.log) is False
    assert state.load(disk, ME) == {TREE.log: None, OTHER.log: None}
    about = state.about(disk, ME, state.load(disk, ME))
    assert [(x["origin"], x["size"], x["forks"]) for x in about["logs"]] == [
        ("log.example/a", None, 0),
        ("log.example/b", None, 0),
    ]


def test_what_is_kept_is_read_after_a_loss_of_power(disk):
    state.add(disk, ME, TREE.log)
    state.save(disk, TREE.log, cosigned(TREE, 2))
    state.save(disk, TREE.log, cosigned(TREE, 3))
    again = disk.power_cycle()
    assert state.load(again, ME) == {TREE.log: cosigned(TREE, 3)}
    assert state.about(again, ME, state.load(again, ME))["logs"][0]["size"] == 3


def test_a_log_is_added_to_the_others_and_keeps_what_it_had(disk):
    state.add(disk, ME, TREE.log)
    state.save(disk, TREE.log, cosigned(TREE, 3))
    state.add(disk, ME, OTHER.log)
    assert state.load(disk, ME)[TREE.log] == cosigned(TREE, 3)


def test_a_log_whose_file_outlived_its_line_does_not_begin_anew(disk):
    """Crash while adding, or a state that lost the line: what was cosigned still counts."""
    state.add(disk, ME, TREE.log)
    state.save(disk, TREE.log, cosigned(TREE, 3))
    files = disk.snapshot()
    files["witness.json"] = codec.encode(state.State(witness=str(ME), logs=()))
    later = SimDisk.of(files)
    assert state.add(later, ME, TREE.log) is True
    assert state.load(later, ME) == {TREE.log: cosigned(TREE, 3)}


def test_a_log_whose_file_is_damaged_is_not_watched_again(disk):
    files = disk.snapshot() | {f"logs/{state.log_id(TREE.log)}.json": b"x"}
    later = SimDisk.of(files)
    assert code_of(state.add, later, ME, TREE.log) == "ledger.witness-state"
    assert state.load(later, ME) == {}


def test_keys_that_cannot_be_watched(disk):
    state.add(disk, ME, TREE.log)
    for key in (ME, Verifier(TREE.origin, note.SIGNATURE, OTHER.log.key)):
        assert code_of(state.add, disk, ME, key) == "usage.witness-log"
    assert list(state.load(disk, ME)) == [TREE.log]


def test_a_lost_file_is_missed(disk):
    state.add(disk, ME, TREE.log)
    for path in ("witness.json", f"logs/{state.log_id(TREE.log)}.json"):
        files = disk.snapshot()
        del files[path]
        with pytest.raises(CasemateError) as e:
            state.load(SimDisk.of(files), ME)
        assert (e.value.code, e.value.where) == ("ledger.witness-missing", path)
    assert code_of(state.witness, SimDisk()) == "ledger.witness-missing"


def _put(disk, path, **fields):
    files = disk.snapshot()
    shape = json.loads(files[path]) | fields
    files[path] = json.dumps(
        shape, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    return SimDisk.of(files)


def test_a_changed_file_is_refused(disk):
    state.add(disk, ME, TREE.log)
    state.add(disk, ME, OTHER.log)
    state.save(disk, TREE.log, cosigned(TREE, 3))
    path = f"logs/{state.log_id(TREE.log)}.json"
    stranger = FakeWitness("w.example/2")
    twin = FakeWitness("w.example/1")
    twin._key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    other_name = str(OTHER.signed(1).add(note.lines(FAKE.cosign(str(OTHER.head(1))).body.decode())))
    bad = {
        "log": [str(OTHER.log), "", "x"],
        "checkpoint": [
            "x",
            str(TREE.signed(3)),  # not cosigned
            str(cosigned(TREE, 3, stranger)),
            str(cosigned(TREE, 3, twin)),  # a signature of the witness's that fails
            str(cosigned(TREE, 3)).replace("\n3\n", "\n2\n"),
            "\n".join(
                [*str(TREE.head(3)).splitlines(), "", *str(cosigned(TREE, 3)).splitlines()[5:], ""]
            ),
            other_name,
        ],
    }
    assert state.load(_put(disk, path), ME)[TREE.log] == cosigned(TREE, 3)
    for field, values in bad.items():
        for value in values:
            assert code_of(state.load, _put(disk, path, **{field: value}), ME) == (
                "ledger.witness-state"
            ), value
    for logs in (["x"], [str(TREE.log)[:-1]]):
        assert code_of(state.load, _put(disk, "witness.json", logs=logs), ME) == (
            "ledger.witness-state"
        )
    assert code_of(state.load, disk, stranger.verifier) == "ledger.witness-state"


def test_a_checkpoint_under_another_logs_name_is_refused(disk):
    """Both signatures are genuine, but the text is of another log."""
    state.add(disk, ME, TREE.log)
    text = str(OTHER.head(1))
    crossed = TREE.sign(text).add(note.lines(FAKE.cosign(text).body.decode()))
    state.save(disk, TREE.log, crossed)
    assert code_of(state.load, disk, ME) == "ledger.witness-state"


def test_flips_and_cuts_of_any_file_are_refused_or_change_nothing(disk):
    state.add(disk, ME, TREE.log)
    state.save(disk, TREE.log, cosigned(TREE, 3))
    files = disk.snapshot()
    want = state.load(disk, ME)
    for path, data in files.items():
        if path.endswith(".new"):
            continue
        for at in range(0, len(data), 7):
            for bad in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at]):
                try:
                    found = state.load(SimDisk.of(files | {path: bad}), ME)
                except CasemateError as e:
                    assert e.code.startswith("ledger.witness-")
                else:
                    # Only the time of the own cosignature could differ, and it is signed too.
                    assert found == want


# Evidence.


def accusation(size, kind="fork", text="x", tree=TREE):
    other = tree.fork(0, [text.encode()] * size)
    return state.Evidence(
        log=str(tree.log), kind=kind, held=str(cosigned(tree, 1)),
        request=other.request(size, size).decode(), seconds=5,
    )  # fmt: skip


def test_evidence_is_kept_once_for_each_checkpoint(disk):
    assert state.keep_evidence(disk, accusation(1)) is True
    assert state.keep_evidence(disk, accusation(1)) is False
    again = accusation(1)
    assert state.keep_evidence(disk, state.Evidence(
        log=again.log, kind="fork", held=again.held, seconds=9,
        request=again.request.replace("old 1", "old 0"))) is False  # fmt: skip
    assert state.keep_evidence(disk, accusation(1, text="y")) is True
    assert state.keep_evidence(disk, accusation(1, "unproven")) is True
    assert state.keep_evidence(disk, accusation(1, tree=OTHER)) is True
    assert [len(state.evidence(disk, TREE.log, k)) for k in ("fork", "unproven")] == [2, 1]
    assert len(state.evidence(disk, OTHER.log, "fork")) == 1
    later = disk.power_cycle()
    name = state.evidence_name(accusation(1))
    data = later.open(f"evidence/{name}").read(0, 1 << 20)
    assert codec.decode(state.Evidence, data) == accusation(1)


def test_evidence_is_bounded_by_log_and_kind(disk, monkeypatch):
    monkeypatch.setattr(state, "MAX_EVIDENCE", 3)
    kept = [state.keep_evidence(disk, accusation(1, "unproven", str(i))) for i in range(9)]
    assert kept == [True] * 3 + [False] * 6
    assert state.keep_evidence(disk, accusation(1)) is True, "a fork is kept all the same"
    assert state.keep_evidence(disk, accusation(1, "unproven", tree=OTHER)) is True

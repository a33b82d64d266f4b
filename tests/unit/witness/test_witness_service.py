"""One witness on its disk: what it answers, what it keeps, when it stops."""

import json

import pytest

from casemate.seal import checkpoint, note
from casemate.seal.identity import Identity
from casemate.spec import codec
from casemate.spec.errors import CasemateError, LedgerError
from casemate.witness import service, state
from casemate.witness.decide import TEXT
from casemate.witness.service import Witness
from support.disk import SimDisk
from support.witness import Tree

ANNA = Identity.generate("w.example/anna")
KEY = service.verifier(ANNA)
LOG = Tree([b"entry %d" % i for i in range(12)])


class Clock:
    def __init__(self, now=1_700_000_000.9):
        self.now = now

    def wall(self):
        return self.now


def disk_with(*trees):
    disk = SimDisk()
    state.create(disk, KEY)
    for tree in trees:
        state.add(disk, KEY, tree.log)
    return disk


def start(disk, clock=None, events=None):
    event = events.append if events is not None else (lambda _: None)
    return Witness(disk, ANNA, clock or Clock(), event)


def test_a_cosignature_is_that_of_the_specification():
    witness = start(disk_with(LOG))
    answer = witness.add_checkpoint(LOG.request(0, 5))
    assert (answer.status, answer.kind) == (200, TEXT)
    both = LOG.signed(5).add(note.lines(answer.body.decode()))
    assert note.verify(both, [LOG.log, witness.key]) == {LOG.log: None, witness.key: 1_700_000_000}
    assert witness.newest(LOG.origin) == str(both)
    assert witness.newest("log.example/none") is None


def test_the_key_is_the_identitys():
    assert note.verifier(str(KEY)) == KEY and KEY.kind == note.COSIGNATURE
    assert KEY.key == ANNA.public.sign_key and KEY.name == "w.example/anna"
    with pytest.raises(CasemateError) as e:
        service.verifier(Identity.generate("two words"))
    assert e.value.code == "format.note"


def test_a_witness_goes_on_where_it_was():
    disk = disk_with(LOG)
    start(disk).add_checkpoint(LOG.request(0, 5))
    again = start(disk.power_cycle())
    assert again.add_checkpoint(LOG.request(0, 7)).body == b"5\n"
    assert again.add_checkpoint(LOG.request(5, 7)).status == 200
    assert again.about()["logs"][0]["size"] == 7


def test_the_same_checkpoint_gets_a_newer_time_and_no_write():
    disk, clock = disk_with(LOG), Clock()
    witness = start(disk, clock)
    first = witness.add_checkpoint(LOG.request(0, 5))
    calls, clock.now = len(disk.trace), clock.now + 60
    second = witness.add_checkpoint(LOG.request(5, 5))
    assert second.status == 200 and first.body != second.body
    assert len(disk.trace) == calls
    kept = note.verify(note.parse(witness.newest(LOG.origin)), [witness.key])
    assert kept == {witness.key: 1_700_000_000}


def test_other_extension_lines_of_the_same_tree_are_kept():
    disk = disk_with(LOG)
    witness = start(disk)
    witness.add_checkpoint(LOG.request(0, 5))
    text = str(LOG.head(5)) + "extension\n"
    body = str(checkpoint.Request(5, (), LOG.sign(text))).encode()
    assert witness.add_checkpoint(body).status == 200
    assert note.parse(start(disk.power_cycle()).newest(LOG.origin)).text == text


@pytest.mark.parametrize(("now", "seconds"), [(-5.0, 0), (0.0, 0), (1e30, 2**63 - 1)])
def test_no_clock_decides(now, seconds):
    disk = disk_with(LOG)
    start(disk, Clock(2e9)).add_checkpoint(LOG.request(0, 5))
    witness = start(disk, Clock(now))
    answer = witness.add_checkpoint(LOG.request(5, 6))
    both = LOG.signed(6).add(note.lines(answer.body.decode()))
    assert note.verify(both, [witness.key]) == {witness.key: seconds}


def test_logs_do_not_touch_each_other():
    other = Tree([b"x"] * 12, "log.example/b")
    witness = start(disk_with(LOG, other))
    assert witness.add_checkpoint(LOG.request(0, 5)).status == 200
    assert witness.add_checkpoint(other.request(0, 9)).status == 200
    assert witness.add_checkpoint(other.request(5, 9)).body == b"9\n"
    assert witness.add_checkpoint(LOG.request(5, 9)).status == 200
    about = witness.about()
    assert about["vkey"] == str(witness.key) and about["name"] == "w.example/anna"
    assert {x["origin"]: x["size"] for x in about["logs"]} == {LOG.origin: 9, other.origin: 9}
    json.dumps(about)


def test_evidence_of_a_fork_is_kept_with_both_checkpoints():
    disk, events = disk_with(LOG), []
    witness = start(disk, events=events)
    witness.add_checkpoint(LOG.request(0, 5))
    other = LOG.fork(2, [b"x"] * 9)
    assert witness.add_checkpoint(other.request(5, 5, ())).status == 409
    assert witness.add_checkpoint(other.request(0, 5)).status == 409
    assert witness.add_checkpoint(other.request(5, 9)).status == 422
    assert [e["event"] for e in events] == [
        "cosigned", "refused", "fork", "refused", "refused", "unproven",
    ]  # fmt: skip
    log = witness.about()["logs"][0]
    assert (log["forks"], log["unproven"], log["size"]) == (1, 1, 5)
    (name,) = state.evidence(disk, LOG.log, "fork")
    kept = codec.decode(
        state.Evidence, disk.power_cycle().open(f"evidence/{name}").read(0, 1 << 20)
    )
    held = checkpoint.verify(note.parse(kept.held), LOG.log)
    theirs = checkpoint.verify(checkpoint.read_request(kept.request.encode()).signed, LOG.log)
    assert held.size == theirs.size == 5 and held.root != theirs.root
    assert note.verify(note.parse(kept.held), [witness.key])


def test_refusals_keep_nothing():
    disk = disk_with(LOG)
    witness = start(disk)
    witness.add_checkpoint(LOG.request(0, 5))
    calls, before = len(disk.trace), disk.snapshot()
    for body in (
        b"",
        LOG.request(0, 5),
        LOG.request(6, 5, ()),
        Tree([b"x"], "other").request(0, 1),
    ):
        assert witness.add_checkpoint(body).status in (400, 404, 409)
    assert disk.snapshot() == before and len(disk.trace) == calls


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "EMFILE", "SHORT"])
@pytest.mark.parametrize("call", range(1, 8))
def test_an_error_of_the_disk_stops_it_for_good(kind, call):
    disk = disk_with(LOG)
    witness = start(disk)
    assert witness.add_checkpoint(LOG.request(0, 5)).status == 200
    disk.fault = (len(disk.trace) + call, kind)
    try:
        answer = witness.add_checkpoint(LOG.request(5, 7))
    except LedgerError as e:
        assert e.code == "ledger.witness-stopped"
        calls = len(disk.trace)
        for body in (LOG.request(5, 7), LOG.request(5, 6), b""):
            with pytest.raises(LedgerError) as again:
                witness.add_checkpoint(body)
            assert again.value is e is witness.broken
        assert len(disk.trace) == calls, "nothing is tried again"
    else:
        assert answer.status == 200 and call > (3 if kind == "ENOSPC" else 6)
    disk.fault = None
    sizes = {start(disk.power_cycle()).about()["logs"][0]["size"] for _ in range(9)}
    assert sizes <= {5, 7}


def test_a_witness_does_not_start_on_what_it_cannot_rely_on():
    disk = disk_with(LOG)
    start(disk).add_checkpoint(LOG.request(0, 5))
    files = disk.snapshot()
    path = f"logs/{state.log_id(LOG.log)}.json"
    for bad, code in ((None, "ledger.witness-missing"), (b"", "ledger.witness-state")):
        kept = {k: v for k, v in files.items() if k != path}
        with pytest.raises(LedgerError) as e:
            start(SimDisk.of(kept if bad is None else kept | {path: bad}))
        assert e.value.code == code
    with pytest.raises(LedgerError):
        Witness(disk, Identity.generate("w.example/anna"), Clock())

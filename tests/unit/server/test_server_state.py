import asyncio
import contextlib
import io
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from casemate.attest.trust import Trust
from casemate.client import replay
from casemate.ledger import catalog, consent, ledger, log, recovery
from casemate.ledger import handover as ledger_handover
from casemate.ledger.store import Store
from casemate.seal import hpke, note
from casemate.seams import OsRng
from casemate.seams.files import load
from casemate.seams.files import store as put
from casemate.server import backup, handover, keeping, serve, state
from casemate.server import machine as server_machine
from casemate.server.config import Config
from casemate.spec import codec
from casemate.spec.errors import CasemateError, LedgerError
from casemate.tee import simulated
from support import passing
from support.desk import AutoClock, WitnessNet, fresh_disk
from support.disk import SimDisk
from support.ledgers import OPEN, ask, attestation, boot, changed_policy, push, queue, run
from support.passing import owner, to_recovery, to_software
from support.witness import FakeWitness

CONFIG = Config(state=Path("/nowhere"), dev=True, workers=1)
NEW = bytes.fromhex("bb" * 48)


def code(call, *arguments, **more):
    with pytest.raises(CasemateError) as e:
        call(*arguments, **more)
    return e.value.code


TEES = {}


def place(disk, config=CONFIG):
    """As ``state.open_place``; a machine's TEE is opened once, which takes its RSA a while."""
    key = load(disk, simulated.SEALING_FILE), simulated.measurement()
    if None in key or key not in TEES:
        TEES[key] = state.open_place(config, disk, rng=OsRng(), clock=AutoClock()).tee
    return state.Place(config, disk, TEES[key], OsRng(), AutoClock())


def begin(here, number):
    """A started store: what a server does first."""
    found = keeping.open_store(here.disk, here.tee, boot(number), OsRng())
    try:
        made = attestation(found)
        recovery.start(found, made, software="a test", measurement=here.tee.measurement)
    except BaseException:
        found.close()
        raise
    return found


@pytest.fixture(scope="module")
def files():
    """A state with datasets, a finished job, an upload and a result; (its files, two datasets)."""
    disk = fresh_disk()
    here = place(disk)
    found = begin(here, 1)
    a = push(found, "a", owner().public)
    b = push(found, "b", owner("second").public)
    run(found, queue(found, "1", (a, b)))
    ask(found, "2", (a,))
    found.close()
    for path in ("uploads/up_1", "uploads/up_1.offset", "results/job_1", "states/job_1.30"):
        put(disk, path, b"sealed " + path.encode() * 1000)
    put(disk, "uploads/empty", b"")
    put(disk, "server.json", b"{}")
    return disk.snapshot(), a, b


def disk_of(files, **more):
    return SimDisk.of({**files[0], **more})


def saved(disk, checkpoint=None):
    out = SimDisk()
    state.save_to(disk, out, "state.tar", software="a test", checkpoint=checkpoint)
    return out.snapshot()["state.tar"]


def source(raw):
    return SimDisk.of({"state.tar": raw}).open("state.tar")


def machine(files):
    """The same machine with an empty folder: the TEE's own files stay."""
    return SimDisk.of({k: v for k, v in files[0].items() if k.startswith("tee/")})


def with_machine(disk, files):
    for path, data in machine(files).snapshot().items():
        put(disk, path, data)
    return disk


# Backup.


def test_a_backup_is_all_that_is_sealed_and_nothing_else(files):
    disk = disk_of(files)
    head = state.newest(place(disk))
    raw = saved(disk, head)
    assert raw == saved(disk, head)
    found = backup.read(source(raw))
    assert found.checkpoint == head
    assert {f.path for f in found.files} == {
        "ledger/store.db", "uploads/up_1", "uploads/up_1.offset", "uploads/empty",
        "results/job_1", "states/job_1.30",
    }  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        assert tar.getnames()[0] == "manifest.json"
        for entry in found.files:
            assert tar.extractfile(entry.path).read() == files[0][entry.path]
    secret = files[0]["tee/SIMULATED-sealing-key.txt"].splitlines()[1]
    assert secret not in raw
    assert bytes.fromhex(secret.decode()) not in raw


def test_a_backup_that_finds_no_room_leaves_nothing(files):
    out = SimDisk.of({"state.tar": b"an older one"})
    out.fault = (len(out.trace) + 4, "ENOSPC")
    with pytest.raises(OSError, match="No space"):
        state.save_to(disk_of(files), out, "state.tar", software="a test", checkpoint=None)
    assert out.snapshot() == {"state.tar": b"an older one"}


def test_a_crashed_state_is_backed_up_with_its_wal(files):
    disk = disk_of(files)
    here = place(disk)
    found = begin(here, 2)
    left = SimDisk.of(disk.snapshot())
    size = found.size()
    found.close()
    assert "ledger/store.db-wal" in left.snapshot()
    other = with_machine(SimDisk(), files)
    target = SimDisk()
    backup.restore(source(saved(left)), target)
    for path in machine(files).snapshot():
        put(target, path, load(other, path))
    keeping.clear_mark(target)
    assert place(target).using(lambda s: s.size()) == size


def test_the_head_in_a_backup_is_the_logs(files):
    disk = disk_of(files)
    before = disk.snapshot()
    here = place(disk)
    head = state.newest(here)
    assert disk.snapshot() == before
    assert here.using(lambda s: log.check(s, note.parse(head)).size) == here.using(
        lambda s: s.size()
    )


# Restore.


def test_what_is_restored_is_what_was_backed_up(files):
    disk = disk_of(files)
    target = SimDisk()
    found = backup.restore(source(saved(disk, "a head")), target)
    kept = {k: v for k, v in target.snapshot().items() if k != keeping.MARK_FILE}
    assert kept == {f.path: files[0][f.path] for f in found.files}
    assert keeping.mark(target) == keeping.Restored(whole=True, checkpoint="a head")


def test_nothing_is_restored_over_a_state(files):
    raw = saved(disk_of(files))
    for name in ("ledger/store.db", "notes.txt", "uploads/x"):
        target = SimDisk.of({name: b"x", "lock": b""})
        assert code(backup.restore, source(raw), target) == "ledger.restore"
        assert target.snapshot() == {name: b"x", "lock": b""}
    target = SimDisk.of({"lock": b""})
    backup.restore(source(raw), target)
    assert code(backup.restore, source(raw), target) == "ledger.restore"


def members(raw):
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return [(i, tar.extractfile(i).read()) for i in tar]


def packed(items):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in items:
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def renamed(info, name, kind=tarfile.REGTYPE):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "/etc/passwd"
    return made


def manifest(raw, change):
    items = members(raw)
    found = codec.decode(backup.Backup, items[0][1])
    return packed([(items[0][0], codec.encode(change(found))), *items[1:]])


HOSTILE = {
    "a changed file": lambda raw: packed(
        [(i, d[:-1] + b"!" if i.name == "uploads/up_1" else d) for i, d in members(raw)]
    ),
    "a missing file": lambda raw: packed(members(raw)[:-1]),
    "a further file": lambda raw: packed([*members(raw), (renamed(0, "uploads/more"), b"x")]),
    "another order": lambda raw: packed([members(raw)[0], *members(raw)[:0:-1]]),
    "no manifest": lambda raw: packed(members(raw)[1:]),
    "a link": lambda raw: packed(
        [*members(raw)[:2], (renamed(0, members(raw)[2][0].name, tarfile.SYMTYPE), b"")]
    ),
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "no tar": lambda raw: b"x" * 2000,
    "another digest": lambda raw: manifest(
        raw,
        lambda m: replace(m, files=(replace(m.files[0], sha256=bytes(32)), *m.files[1:])),
    ),
    "another size": lambda raw: manifest(
        raw, lambda m: replace(m, files=(replace(m.files[0], size=1), *m.files[1:]))
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_backup_that_is_not_whole_restores_nothing(files, kind):
    raw = HOSTILE[kind](saved(disk_of(files)))
    target = SimDisk()
    assert code(backup.restore, source(raw), target) == "format.backup"
    assert target.snapshot() == {}


@pytest.mark.parametrize(
    "path",
    ["../x", "ledger/../../x", "/etc/x", "ledger/restored.json", "tee/SIMULATED-sealing-key.txt",
     "lock", "uploads/a/b", "uploads/", "ledger/store.db-shm", "other/x"],
)  # fmt: skip
def test_no_other_path_can_stand_in_a_manifest(path):
    with pytest.raises(ValueError, match="no file of a state"):
        backup.BackupFile(path=path, size=1, sha256=bytes(32))


def test_a_file_stands_once():
    entry = backup.BackupFile(path="uploads/x", size=0, sha256=bytes(32))
    with pytest.raises(ValueError, match="twice"):
        backup.Backup(software="s", checkpoint=None, files=(entry, entry))
    with pytest.raises(ValueError, match="32 bytes"):
        backup.BackupFile(path="uploads/x", size=-1, sha256=bytes(32))


def restore_calls(raw):
    disk = SimDisk()
    backup.restore(source(raw), disk)
    return len(disk.trace)


@pytest.mark.parametrize("kind", ["POWER", "EIO", "ENOSPC", "SHORT"])
def test_a_restore_that_is_cut_short_starts_nothing(files, kind):
    raw = saved(disk_of(files))
    for call in range(1, restore_calls(raw) + 1):
        disk = SimDisk(call, (call, kind))
        with contextlib.suppress(OSError, CasemateError):
            backup.restore(source(raw), disk)
            assert kind == "ENOSPC"  # at a call that takes no space
        disk.fault = None
        after = SimDisk.of(disk.power_cycle().snapshot())
        found = keeping.mark(after) if keeping.MARK_FILE in after.snapshot() else None
        if "ledger/store.db" in after.snapshot():
            assert found is not None
            assert code(keeping.require_settled, after) in ("ledger.restore", "ledger.restored")
        if found is None or not found.whole:
            backup.restore(source(raw), after)
        assert keeping.mark(after).whole
        assert {k: v for k, v in after.snapshot().items() if k in files[0]} == {
            f.path: files[0][f.path] for f in backup.read(source(raw)).files
        }


# A restored state starts only when it is confirmed.


def restored(files, disk=None):
    target = SimDisk()
    backup.restore(source(saved(disk or disk_of(files))), target)
    return with_machine(target, files)


def watched(files):
    """A state whose policies name a witness, which has seen its newest head; one entry later."""
    disk = disk_of(files)
    here = place(disk)
    found = begin(here, 5)
    w = FakeWitness(logs=[log.key(found).verifier])
    policy = changed_policy(OPEN, witnesses=(w.vkey,), cosignatures=1)
    for dataset, by in zip(files[1:], (owner(), owner("second")), strict=True):
        catalog.set_policy(found, dataset, by.id, policy)
    found.close()
    return disk, w


def confirm(disk, net, urls=("https://w",)):
    return asyncio.run(state.confirm(place(disk), net, lambda _: None, urls))


def assemble(disk):
    service = serve.assemble(
        CONFIG, disk=disk, clock=AutoClock(), rng=OsRng(), write_log=lambda _: None
    )
    service.store.close()


def test_a_server_does_not_start_on_a_restored_state(files):
    disk = restored(files)
    with pytest.raises(LedgerError) as e:
        assemble(disk)
    assert e.value.code == "ledger.restored"
    assert code(handover.give, place(disk), handover.request(place(disk)), drop=True) == (
        "ledger.restored"
    )


def test_a_witness_that_knows_no_newer_head_confirms(files):
    disk, w = watched(files)
    confirm(disk, WitnessNet({"https://w": w}))
    again = restored(files, disk)
    assert code(assemble, again) == "ledger.restored"
    assert confirm(again, WitnessNet({"https://w": w})) == (w.name,)
    assemble(again)


def test_a_witness_that_knows_a_newer_head_stops_it(files):
    disk, w = watched(files)
    confirm(disk, WitnessNet({"https://w": w}))
    old = saved(disk)
    here = place(disk)
    found = begin(here, 6)
    ledger.reserve(found, queue(found, "lost", (files[2],)))
    found.close()
    confirm(disk, WitnessNet({"https://w": w}))
    target = SimDisk()
    backup.restore(source(old), target)
    with_machine(target, files)
    assert code(confirm, target, WitnessNet({"https://w": w})) == "ledger.rolled-back"
    assert code(assemble, target) == "ledger.restored"


@pytest.mark.parametrize("conduct", ["down", "faults", "wrong-key", "garbage", "other-text"])
def test_a_witness_that_says_nothing_confirms_nothing(files, conduct):
    disk, w = watched(files)
    confirm(disk, WitnessNet({"https://w": w}))
    again = restored(files, disk)
    w.conduct = conduct
    assert code(confirm, again, WitnessNet({"https://w": w})) == "ledger.restored"
    assert code(assemble, again) == "ledger.restored"


def test_a_witness_that_no_policy_names_confirms_nothing(files):
    disk = restored(files)
    w = FakeWitness(logs=[place(disk).using(lambda s: log.key(s).verifier)])
    assert code(confirm, disk, WitnessNet({"https://w": w})) == "ledger.restored"
    assert code(confirm, disk, WitnessNet({}), urls=()) == "ledger.restored"


@pytest.mark.parametrize(
    ("others", "revoked", "known"),
    [
        (("stranger",), False, False),  # named by another owner only
        (("stranger",), True, False),  # and that one's dataset is revoked
        ((), False, False),  # by nobody: its owner has to consent
        (("one", "two", "stranger"), False, False),  # one of three, where two are wanted
        (("one", "two", "stranger"), False, True),
        (("one", "two", "stranger"), True, False),  # a revoked dataset asks for nobody
    ],
)
def test_each_dataset_needs_its_own_witnesses(files, others, revoked, known):
    disk, w = watched(files)
    key = place(disk).using(lambda s: log.key(s).verifier)
    by = {n: FakeWitness(f"{n}.example/w", logs=[key]) for n in ("one", "two", "stranger")}
    found = begin(place(disk), 30)
    keys = tuple(by[n].vkey for n in others)
    policy = changed_policy(OPEN, witnesses=keys, cosignatures=len(keys) // 2 + 1 if keys else 0)
    catalog.set_policy(found, files[2], owner("second").id, policy)
    if revoked:
        catalog.revoke(found, files[2], owner("second").id)
    found.close()
    shown = {"https://s": by["stranger"]} | ({"https://1": by["one"]} if known else {})
    urls = tuple(shown)
    again = restored(files, disk)
    size = place(again).using(lambda s: s.size())
    assert code(confirm, again, WitnessNet(shown), urls=urls) == "ledger.restored"
    shown["https://w"] = w
    whole = revoked or known or others == ("stranger",)
    if whole:
        confirm(again, WitnessNet(shown), urls=tuple(shown))
        assemble(again)
    else:
        assert code(confirm, again, WitnessNet(shown), urls=tuple(shown)) == "ledger.restored"
        assert place(again).using(lambda s: s.size()) == size


def test_nothing_is_added_to_a_state_that_nobody_confirmed(files):
    disk = restored(files)
    size = place(disk).using(lambda s: s.size())
    assert code(state.rotate, place(disk)) == "ledger.restored"
    assert code(state.consents, place(disk), []) == "ledger.restored"
    assert place(disk).using(lambda s: s.size()) == size


def test_confirming_adds_nothing_to_the_log(files):
    """A head of its own would be a fork of a newer one, signed by the log."""
    disk, w = watched(files)
    confirm(disk, WitnessNet({"https://w": w}))
    size = place(disk).using(lambda s: s.size())
    assert {h.size for h in w.cosigned} == {size}


def test_the_owners_let_it_start(files):
    _, a, b = files
    disk = restored(files)
    here = place(disk)
    asked = state.ask_owners(here, None)
    assert code(state.recover, here, asked, []) == "ledger.consent-missing"
    assert code(assemble, disk) == "ledger.restored"
    state.recover(here, asked, [to_recovery(asked, a)])
    assert keeping.mark(disk) is None
    assemble(disk)
    shown = state.show(place(disk))
    assert (shown["origin"], list(shown["frozen"])) == (asked.next, [b])
    state.consents(place(disk), [to_recovery(asked, b, owner("second"))])
    assert state.show(place(disk))["frozen"] == {}


@pytest.mark.parametrize("way", ["start", "step 3 again"])
def test_a_crash_before_the_mark_of_a_recovery_is_gone(files, way, monkeypatch):
    """The next start, or the same command, sees that the owners' consent was written."""
    _, a, b = files
    disk = restored(files)
    here = place(disk)
    asked = state.ask_owners(here, None)
    assert code(assemble, disk) == "ledger.restored"
    assert code(state.consents, here, []) == "ledger.restored"
    with monkeypatch.context() as crash:
        crash.setattr(keeping, "clear_mark", lambda _: None)
        state.recover(here, asked, [to_recovery(asked, a)])
    if way == "start":
        assemble(disk)
    else:
        state.consents(here, [to_recovery(asked, b, owner("second"))])
    assert keeping.mark(disk) is None
    assert state.show(place(disk))["origin"] == asked.next


def test_a_backup_of_a_recovered_state_is_marked_anew(files):
    """The consent was to another restore."""
    disk = restored(files)
    asked = state.ask_owners(place(disk), None)
    state.recover(place(disk), asked, [to_recovery(asked, files[1])])
    again = SimDisk()
    backup.restore(source(saved(disk)), again)
    assert code(assemble, with_machine(again, files)) == "ledger.restored"


def test_a_used_consent_to_software_does_not_come_from_the_operator(files, software):
    """It stands in the public log; whoever could give it again could go back to old software."""
    disk = restored(files)
    asked = state.ask_owners(place(disk), None)
    state.recover(place(disk), asked, [to_recovery(asked, files[1])])
    used = place(disk).using(lambda s: to_software(s, files[1], by=owner()))
    assert code(state.consents, place(disk), [used]) == "policy.consent"


def test_show_changes_nothing(files):
    disk = disk_of(files)
    before = disk.snapshot()
    shown = state.show(place(disk))
    assert disk.snapshot() == before
    assert (shown["restored"], shown["generation"], shown["handed_over"]) == (False, 0, None)
    assert shown["measurement"] == place(disk).tee.measurement
    assert code(state.show, place(fresh_disk())) == "ledger.missing"


# Another key.


def opens(disk):
    found = begin(place(disk), 9)
    size, findings = found.size(), passing.fsck.check(found.all).findings
    found.close()
    assert findings == []
    return size


def test_the_key_is_rotated(files):
    disk = disk_of(files)
    here = place(disk)
    old = here.tee.sealing_key(keeping.label(0))
    assert [state.rotate(here), state.rotate(here)] == [1, 2]
    assert code(Store.open, disk, old, boot(3), OsRng()) == "ledger.key"
    assert state.show(here)["generation"] == 2
    found = here.using(passing.kinds)
    assert found[-2:] == ["rotate", "rotate"]
    opens(disk)
    assert disk.list("next") == []


def test_a_generation_that_is_none(files):
    disk = disk_of(files, **{keeping.GENERATION_FILE: b"one"})
    assert code(assemble, disk) == "format.generation"


@pytest.mark.parametrize(("written", "found"), [(b"0", True), (b"1", True), (b"2", False)])
def test_the_file_may_be_one_behind(files, written, found):
    disk = disk_of(files)
    state.rotate(place(disk))
    put(disk, keeping.GENERATION_FILE, written)
    if found:
        opens(disk)
        assert keeping.generation(disk) == 1
    else:
        assert code(assemble, disk) == "ledger.key"


def rotation_calls(files):
    disk = disk_of(files)
    here = place(disk)
    before = len(disk.trace)
    state.rotate(here)
    return [
        n for n, what in enumerate(disk.trace[before:], before + 1) if not what.startswith("read")
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["POWER", "EIO"])
def test_a_rotation_that_is_cut_short_leaves_a_state_that_opens(files, kind):
    crash_rotations(files, kind, 0, rotation_calls(files)[5 :: 29 if kind == "POWER" else 67])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(1, 12))
@pytest.mark.parametrize("kind", ["POWER", "EIO", "ENOSPC", "SHORT"])
def test_a_rotation_cut_short_anywhere(files, kind, seed):
    crash_rotations(files, kind, seed, rotation_calls(files))


def crash_rotations(files, kind, seed, calls):
    size = place(disk_of(files)).using(lambda s: s.size())
    for call in calls:
        disk = SimDisk.of(files[0], 1009 * seed + call)
        here = place(disk)
        disk.fault = (call, kind)
        try:
            state.rotate(here)
        except (OSError, CasemateError):
            pass
        else:  # no space at a call that takes none; or SQLite's drop, at its end, of an empty WAL
            assert kind == "ENOSPC" or re.fullmatch(r"remove .*-wal", disk.trace[call - 1]), call
        disk.fault = None
        after = disk.power_cycle()
        # Its start, and at most the entry of the rotation.
        assert opens(after) in (size + 1, size + 2), call
        assert state.rotate(place(after)) in (1, 2)


# A software upgrade.


@pytest.fixture
def software(monkeypatch):
    """Which software runs: ``software(NEW)``."""

    def runs(measurement):
        monkeypatch.setattr(simulated, "measurement", lambda: measurement)

    return runs


def other_machine(files):
    """Another machine of the same simulated vendor: another sealing key."""
    key = files[0]["tee/SIMULATED-sealing-key.txt"].splitlines()[0] + b"\n" + b"77" * 32 + b"\n"
    chain = {k: v for k, v in files[0].items() if k == "tee/SIMULATED-chain.pem"}
    return SimDisk.of({**chain, "tee/SIMULATED-sealing-key.txt": key})


def agree(disk, files, *who, measurement=NEW, trust="simulated", number=20):
    found = begin(place(disk), number)
    for name in who:
        dataset = files[1] if name == "owner" else files[2]
        by = owner(name)
        given = to_software(found, dataset, measurement.hex(), by=by, trust=trust)
        consent.give(found, given, by.id)
    found.close()


def carry(disk, other):
    """What the operator copies from the old machine to the new one."""
    for path in ("handover/store.db", handover.GRANT_FILE):
        put(other, path, load(disk, path))


def asks(software, other, measurement=NEW):
    software(measurement)
    return handover.request(place(other))


def test_the_whole_upgrade(files, software):
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner", "second")
    origin = place(disk).using(lambda s: log.key(s).origin)
    raw = asks(software, other)
    software(old)
    done = handover.give(place(disk), raw, drop=False)
    assert (done.body.measurement, done.body.dropped, done.refused) == (NEW.hex(), (), {})
    assert handover.give(place(disk), raw, drop=False).body == done.body  # a crash: again
    assert code(assemble, disk) == "ledger.handed-over"
    assert code(state.rotate, place(disk)) == "ledger.handed-over"
    carry(disk, other)
    software(NEW)
    assert code(assemble, other) == "ledger.handover"  # first what waits there is taken over
    assert handover.take(place(other)) == done.body
    assemble(other)
    shown = state.show(place(other))
    assert (shown["origin"], shown["frozen"], shown["handed_over"]) == (origin, {}, None)
    assert shown["measurement"] == NEW.hex()
    assert other.list("handover") == []
    assert code(handover.take, place(other)) == "ledger.handover"


def test_to_another_machine_with_the_same_software(files, software):
    same = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner", "second", measurement=same)
    begin(place(disk), 21).close()  # a start of what runs uses nothing up
    raw = asks(software, other, same)
    done = handover.give(place(disk), raw, drop=False)
    assert (done.body.measurement, done.body.dropped) == (same.hex(), ())
    carry(disk, other)
    assert handover.take(place(other)) == done.body
    assemble(other)
    shown = state.show(place(other))
    assert (shown["frozen"], shown["consents"]) == ({}, {})


def test_on_one_machine_in_one_folder(files, software):
    """The usual upgrade: another image, the same disk."""
    old = simulated.measurement()
    disk = disk_of(files)
    agree(disk, files, "owner", "second")
    software(NEW)
    assert code(handover.take, place(disk)) == "ledger.handover"
    raw = handover.request(place(disk))
    assert code(handover.take, place(disk)) == "ledger.handover"
    software(old)
    handover.give(place(disk), raw, drop=False)
    software(NEW)
    handover.take(place(disk))
    assemble(disk)
    assert state.show(place(disk))["frozen"] == {}


def test_without_a_word_nothing_passes(files, software):
    old = simulated.measurement()
    disk = disk_of(files)
    raw = asks(software, other_machine(files))
    software(old)
    for drop in (False, True):
        found = code(handover.give, place(disk), raw, drop=drop)
        assert found == "ledger.handover-refused"
    assemble(disk)


def test_a_state_without_datasets_has_nothing_to_pass(files, software):
    """Nobody's policy judges who asks, who would get the log's key: say so, not to ask owners."""
    disk = disk_of(files)
    found = begin(place(disk), 5)
    for name, by in zip(files[1:], (owner(), owner("second")), strict=True):
        catalog.revoke(found, name, by.id)
    found.close()
    raw = asks(software, other_machine(files), simulated.measurement())
    for drop in (False, True):
        with pytest.raises(LedgerError, match="holds no dataset") as e:
            handover.give(place(disk), raw, drop=drop)
        assert e.value.code == "ledger.handover-refused" and "empty folder" in e.value.mend
    assemble(disk)


def test_one_owner_is_not_all(files, software):
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner")
    raw = asks(software, other)
    software(old)
    assert code(handover.give, place(disk), raw, drop=False) == "ledger.consent-missing"
    assemble(disk)
    done = handover.give(place(disk), raw, drop=True)
    assert done.body.dropped == (files[2],)
    carry(disk, other)
    software(NEW)
    handover.take(place(other))
    found = begin(place(other), 30)
    assert catalog.dataset(found, files[2]).state == "revoked"
    run(found, queue(found, "after", (files[1],)))
    found.close()


def test_another_measurement(files, software):
    old = simulated.measurement()
    disk = disk_of(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, other_machine(files), bytes.fromhex("cc" * 48))
    software(old)
    with pytest.raises(LedgerError, match=f"signed for {NEW.hex()}") as e:
        handover.give(place(disk), raw, drop=True)
    assert e.value.code == "ledger.handover-refused"
    assemble(disk)


def test_the_owners_own_policy_is_asked(files, software):
    """Under another root than the one that the owner pinned, nothing passes."""
    old = simulated.measurement()
    disk = disk_of(files)
    agree(disk, files, "owner", trust="simulated:" + "0" * 64)
    raw = asks(software, other_machine(files))
    software(old)
    assert code(handover.give, place(disk), raw, drop=True) == "ledger.handover-refused"
    agree_later = place(disk).tee.root
    agree(disk_of(files), files, "owner", trust=f"simulated:{agree_later}")


@pytest.mark.parametrize("trust", ["simulated", "simulated:" + "0" * 64])
def test_an_owner_whose_policy_does_not_hold_is_left_behind(files, software, trust):
    """What that owner signed keeps neither the operator nor the other owners from passing on."""
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner")
    agree(disk, files, "second", trust=trust, number=21)
    raw = asks(software, other)
    software(old)
    done = handover.give(place(disk), raw, drop=True)
    left = (files[2],) if trust != "simulated" else ()
    assert (done.body.dropped, tuple(done.refused)) == (left, left)
    assert handover.give(place(disk), raw, drop=True).body == done.body
    carry(disk, other)
    software(NEW)
    handover.take(place(other))
    assemble(other)


@pytest.mark.parametrize("step", ["rotate", "recover", "consent", "hand over"])
def test_what_the_operator_may_do_before_the_successor_starts(files, software, step):
    """Its start refused a log with such an entry behind the hand-over, for good."""
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    asked = state.ask_owners(place(disk), None)
    state.recover(place(disk), asked, [to_recovery(asked, files[1])])
    agree(disk, files, "owner", "second")
    raw = asks(software, other)
    software(old)
    handover.give(place(disk), raw, drop=False)
    carry(disk, other)
    software(NEW)
    handover.take(place(other))
    if step == "rotate":
        state.rotate(place(other))
    elif step == "recover":
        again = state.ask_owners(place(other), None)
        state.recover(place(other), again, [to_recovery(again, files[1])])
    elif step == "consent":
        state.consents(place(other), [to_recovery(asked, files[2], owner("second"))])
    else:
        third = SimDisk.of({**other_machine(files).snapshot(), "handover/x": b""})
        raw = handover.request(place(third))
        handover.give(place(other), raw, drop=False)
        carry(other, third)
        handover.take(place(third))
        other = third
    software(old)
    assert code(assemble, other) == "ledger.handed-over"
    software(NEW)
    assemble(other)
    replay.replay(place(other).using(lambda s: s.entries()))


def test_evidence_of_another_boot(files, software):
    """Genuine evidence of the right software, over other keys: a captured attestation, or another
    request's."""
    old = simulated.measurement()
    disk = disk_of(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, other_machine(files))
    asked = codec.decode(handover.HandoverRequest, raw)
    thief = hpke.generate(OsRng())
    captured = place(other_machine(files)).tee.attest(bytes(64))
    forged = (
        replace(asked, hpke_key=thief.public),
        replace(asked, policy=replace(asked.policy, release_owner="0" * 64)),
        replace(asked, anchor="tpm2:other"),
        replace(asked, hpke_key=thief.public, evidence=captured),
    )
    software(old)
    for bad in forged:
        found = code(handover.give, place(disk), codec.encode(bad), drop=True)
        assert found == "ledger.handover-refused"
    assemble(disk)


def test_a_consent_for_another_log(files):
    disk = disk_of(files)
    found = begin(place(disk), 20)
    given = to_software(found, files[1], NEW.hex(), origin="casemate.dev/log/" + "0" * 32)
    assert code(consent.give, found, given, owner().id) == "policy.consent"
    found.close()


def test_only_who_asked_can_take_over(files, software):
    old = simulated.measurement()
    disk, other, thief = disk_of(files), other_machine(files), other_machine(files)
    put(thief, "tee/SIMULATED-sealing-key.txt",
        load(other, "tee/SIMULATED-sealing-key.txt").replace(b"77", b"78"))  # fmt: skip
    agree(disk, files, "owner", "second")
    raw = asks(software, other)
    software(old)
    handover.give(place(disk), raw, drop=False)
    carry(disk, thief)
    put(thief, handover.REQUEST_FILE, raw)
    software(NEW)
    assert code(handover.take, place(thief)) == "ledger.handover"
    own = handover.request(place(thief))
    assert own != raw
    assert code(handover.take, place(thief)) == "ledger.handover"  # answers another request


def test_what_was_handed_over_is_checked(files, software):
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, other)
    software(old)
    handover.give(place(disk), raw, drop=False)
    carry(disk, other)
    data = bytearray(load(other, "handover/store.db"))
    data[5 * 4096 + 7] ^= 1
    put(other, "handover/store.db", bytes(data))
    software(NEW)
    assert code(handover.take, place(other)) == "ledger.corrupt"
    assert not other.exists("ledger/store.db")


def test_a_state_of_ones_own_is_not_overwritten(files, software):
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner", "second")
    software(NEW)
    begin(place(other), 3).close()
    raw = handover.request(place(other))
    software(old)
    handover.give(place(disk), raw, drop=False)
    carry(disk, other)
    software(NEW)
    assert code(handover.take, place(other)) == "ledger.handover"


def test_a_stale_copy_of_the_predecessor_is_found_by_witnesses(files, software):
    """It hands over all the same; the log's name and key stay, so that whoever saw more knows."""
    old = simulated.measurement()
    disk, w = watched(files)
    agree(disk, files, "owner", "second")
    stale = SimDisk.of(disk.snapshot())
    found = begin(place(disk), 41)
    ledger.reserve(found, queue(found, "spent", (files[2],)))
    found.close()
    confirm(disk, WitnessNet({"https://w": w}))
    newest = state.newest(place(disk))
    other = other_machine(files)
    raw = asks(software, other)
    software(old)
    handover.give(place(stale), raw, drop=False)
    carry(stale, other)
    software(NEW)
    handover.take(place(other))
    found = begin(place(other), 42)
    assert code(log.check, found, note.parse(newest)) == "ledger.rolled-back"
    found.close()
    assert code(confirm, other, WitnessNet({"https://w": w})) == "ledger.rolled-back"


def test_software_that_the_state_was_not_handed_to(files, software):
    """Under one release owner all software has one key: then the log's last entry decides."""
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, other)
    software(old)
    handover.give(place(disk), raw, drop=False)
    carry(disk, other)
    assert code(handover.take, place(other)) == "ledger.handover"
    software(NEW)
    handover.take(place(other))


def test_a_store_that_nobody_handed_over(files, software):
    """The host makes a store of its own and seals its key to the successor."""
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    raw = asks(software, other)
    software(old)
    asked = codec.decode(handover.HandoverRequest, raw)
    here = place(disk)
    keeping.with_key(
        disk, here.tee, lambda key: ledger_handover.export(disk, key, b"k" * 32, same_anchor=True)
    )
    sealed = hpke.seal(asked.hpke_key, b"k" * 32, info=handover._info(raw))
    grant = handover.HandoverGrant(request=handover._digest(raw), sealed=sealed)
    put(disk, handover.GRANT_FILE, codec.encode(grant))
    carry(disk, other)
    software(NEW)
    assert code(handover.take, place(other)) == "ledger.handover"
    assert not other.exists("ledger/store.db")


def test_a_damaged_store_of_ones_own_is_not_overwritten(files, software):
    old = simulated.measurement()
    disk = disk_of(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, disk)
    software(old)
    handover.give(place(disk), raw, drop=False)
    data = bytearray(load(disk, "ledger/store.db"))
    data[5 * 4096 + 7] ^= 1
    put(disk, "ledger/store.db", bytes(data))
    software(NEW)
    assert code(handover.take, place(disk)) == "ledger.corrupt"


def test_hardware_never_passes_to_simulation(files, software, monkeypatch):
    old = simulated.measurement()
    disk = disk_of(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, other_machine(files))
    software(old)
    here = place(disk)
    monkeypatch.setattr(simulated.SimulatedTee, "simulated", False)
    monkeypatch.setattr(server_machine, "hold", lambda *_: None)
    with pytest.raises(LedgerError, match="simulated"):
        handover.give(here, raw, drop=True)


def test_a_policy_that_names_server_policies(files, software):
    """Who releases the successor's sealing key is part of its policy, which the owner can list."""
    asked = codec.decode(handover.HandoverRequest, asks(software, other_machine(files)))
    trust = Trust.simulated()
    assert handover.verify(asked, trust, now=AutoClock().wall()) == NEW.hex()
    listed = replace(trust, server_policies=(codec.digest(asked.policy),))
    assert handover.verify(asked, listed, now=AutoClock().wall()) == NEW.hex()
    other = replace(trust, server_policies=("sha256:" + "0" * 64,))
    with pytest.raises(CasemateError) as e:
        handover.verify(asked, other, now=AutoClock().wall())
    assert e.value.code == "evidence.appraise-server-policy"


def test_trust_policies_of_consents():
    assert handover.parse_trust("simulated").simulation
    preset = 'preset = "bare-metal-snp"\n[sev-snp]\n'
    for bad in ("x = ", "simulated:", preset):
        assert code(handover.parse_trust, bad) == "usage.trust"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("step", ["give", "take"])
def test_a_crash_during_an_upgrade(files, software, step):
    old = simulated.measurement()
    disk, other = disk_of(files), other_machine(files)
    agree(disk, files, "owner", "second")
    raw = asks(software, other)
    software(old)
    base = disk.snapshot()
    whole = SimDisk.of(base)
    handover.give(place(whole), raw, drop=False)
    carry(whole, other)
    given = other.snapshot()

    def attempt(at):
        software(old if step == "give" else NEW)
        if step == "give":
            handover.give(place(at), raw, drop=False)
        else:
            handover.take(place(at))

    at = SimDisk.of(base if step == "give" else given)
    attempt(at)
    calls = [n for n, what in enumerate(at.trace, 1) if not what.startswith("read")]
    for call in calls[3::37]:
        at = SimDisk.of(base if step == "give" else given, call)
        here = len(at.trace)
        at.fault = (call + here, "POWER")
        with contextlib.suppress(OSError, CasemateError):
            attempt(at)
        at.fault = None
        after = at.power_cycle()
        if step == "give":
            attempt(after)
            target = SimDisk.of({k: v for k, v in given.items() if k.startswith("tee/")})
            put(target, handover.REQUEST_FILE, raw)
            carry(after, target)
            software(NEW)
            handover.take(place(target))
            opens(target)
        else:
            if after.exists(handover.GRANT_FILE):
                try:
                    attempt(after)
                except LedgerError as e:
                    assert e.code == "ledger.handover"  # it has been taken over
            opens(after)

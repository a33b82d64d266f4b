"""A host that edits, mixes or restores the sealed store, and an insider who has the key."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, fsck, ledger, log, quotes, sealed
from casemate.ledger.ledger import TrainingState
from casemate.ledger.store import Store
from casemate.ledger.vfs import Mount
from casemate.spec import codec
from casemate.spec.data import Budget
from casemate.spec.errors import LedgerError
from casemate.spec.job import Charge, DpEvent
from casemate.spec.receipt import LogEntry
from support.anchors import FakeAnchor
from support.disk import SimDisk
from support.ledgers import (
    BUDGET,
    EVENT,
    KEY,
    OPEN,
    OTHER,
    OWNER,
    SCIENTIST,
    Witness,
    ask,
    boot,
    commit,
    open_store,
    push,
    queue,
    run,
    secret,
    taken,
)

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)
PAGE = 4096
FILE = "ledger/store.db"
WITNESS = Witness()
WITNESSED = replace(OPEN, witnesses=(WITNESS.vkey,), cosignatures=1)
EACH = replace(OPEN, approval="each-quote")


def fill(store: Store) -> None:
    """A bit of everything: jobs done, committed, taken over with a state, failed and queued, an
    approval, a revocation, cosignatures."""
    a, b = push(store, "a", policy=EACH), push(store, "b", OTHER, WITNESSED)
    gone = push(store, "gone")
    first, second = (ask(store, name, (a, b), event=SMALL) for name in ("1", "2"))
    quotes.judge(store, first, OWNER.id, "approve")
    done = ledger.submit(store, first, SCIENTIST.id).id
    failed = queue(store, "3", (b,), event=SMALL)
    for job in (done, failed):
        ledger.reserve(store, job)
    WITNESS.cosign(store)
    ledger.begin(store, done)
    commit(store, done)
    WITNESS.cosign(store)
    ledger.release(store, done, log.sign(store), b"sealed")
    ledger.abandon(store, failed, "failed", "job.failed")
    queue(store, "4", (b,), event=SMALL)
    quotes.judge(store, second, OWNER.id, "reject")
    catalog.advance_epoch(store, a, OWNER.id, 3)
    quotes.judge(store, ask(store, "5", (a,), event=SMALL), OWNER.id, "approve")
    fixed = queue(store, "6", (gone,), event=SMALL)
    ledger.reserve(store, fixed)
    ledger.begin(store, fixed)
    commit(store, fixed)
    again = queue(store, "7", (push(store, "c"),), event=SMALL)
    ledger.reserve(store, again)
    ledger.begin(store, again)
    ledger.keep_state(store, again, TrainingState(7, f"states/{again}.7", b"s" * 32))
    catalog.revoke(store, push(store, "old"), OWNER.id)
    store.hold(FakeAnchor())
    ledger.reserve(store, queue(store, "8", (b,), event=SMALL))


def go_on(store: Store) -> None:
    """Run the job that waits, its witness beside."""
    job = ledger.next_queued(store).id
    ledger.reserve(store, job)
    WITNESS.cosign(store)
    ledger.begin(store, job)
    commit(store, job)
    WITNESS.cosign(store)
    ledger.release(store, job, log.sign(store), b"sealed")


@cache
def filled() -> dict[str, bytes]:
    disk = SimDisk()
    store = open_store(disk, 1)
    fill(store)
    store.close()
    open_store(disk, 5).close()  # takes job 7 over
    return disk.snapshot()


# Rows that a later start leaves as they are. An older cosignature is as true as a newer one: who
# puts it back has to ask the witness again.
BEFORE = {
    "cosignatures": "false",
    "jobs": "state != 'reserved'",
    "attestations": f"boot = x'{boot(1).hex()}'",
    "nodes": "(place + 1) << level <= 25",
}
TABLES = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"


def dump(store: Store) -> dict[str, list[tuple]]:
    """All rows but what a start adds."""
    names = [name for (name,) in store.all(TABLES) if name != "entries"]
    return {n: store.all(f"SELECT * FROM {n} WHERE {BEFORE.get(n, 'true')}") for n in names} | {
        "log": store.entries(0, 25)
    }


@cache
def content() -> dict[str, list[tuple]]:
    store = open_store(SimDisk.of(filled()), 2)
    out = dump(store)
    store.close()
    return out


def opens_unchanged_or_not(files: dict[str, bytes]) -> bool:
    """Whether the store opens; if so it must hold what it held."""
    try:
        store = open_store(SimDisk.of(files), 2)
    except LedgerError as e:
        assert e.code in ("ledger.key", "ledger.corrupt", "ledger.inconsistent"), e
        return False
    assert dump(store) == content()
    store.close()
    return True


def test_a_flipped_bit_is_found() -> None:
    data = filled()[FILE]
    draw = random.Random(1)
    places = {page * PAGE + draw.randrange(PAGE) for page in range(len(data) // PAGE)}
    opened = []
    for place in sorted(places | set(range(0, 100, 7))):
        bad = bytearray(data)
        bad[place] ^= 1 << draw.randrange(8)
        if opens_unchanged_or_not({**filled(), FILE: bytes(bad)}):
            opened.append(place)
    # Only a page that nothing uses may be damaged unnoticed.
    assert len({place // PAGE for place in opened}) <= free_pages()


def free_pages() -> int:
    store = open_store(SimDisk.of(filled()), 2)
    count = store.one("PRAGMA freelist_count")[0]
    store.close()
    return count


def test_a_file_cut_short_or_emptied_of_a_page_is_found() -> None:
    data = filled()[FILE]
    for size in (PAGE, len(data) // 2 // PAGE * PAGE, len(data) - PAGE, len(data) - 1):
        assert not opens_unchanged_or_not({FILE: data[:size]})
    for page in range(0, len(data) // PAGE, 5):
        hole = data[: page * PAGE] + bytes(PAGE) + data[(page + 1) * PAGE :]
        opens_unchanged_or_not({FILE: hole})


def test_pages_swapped_or_taken_from_an_older_copy_are_found() -> None:
    disk = SimDisk.of(filled())
    store = open_store(disk, 9)
    b = catalog.datasets(store)[0].id
    go_on(store)
    state = dump(store), store.size()
    store.close()
    old, new = filled()[FILE], disk.snapshot()[FILE]
    assert len(new) >= len(old)
    differing = 0
    for page in range(len(old) // PAGE):
        part = slice(page * PAGE, (page + 1) * PAGE)
        if old[part] == new[part]:
            continue
        differing += 1
        mixed = new[: part.start] + old[part] + new[part.stop :]
        try:
            store = open_store(SimDisk.of({FILE: mixed}), 10)
        except LedgerError:
            continue
        assert dump(store) == state[0], f"page {page} of an older copy changed {b}"
        assert store.size() > state[1], "the log lost entries"
        store.close()
    assert differing > 5
    swapped = (
        new[: 3 * PAGE] + new[4 * PAGE : 5 * PAGE] + new[3 * PAGE : 4 * PAGE] + new[5 * PAGE :]
    )
    with pytest.raises(LedgerError):
        open_store(SimDisk.of({FILE: swapped}), 10)


def test_a_damaged_wal_reads_as_an_earlier_moment_or_not_at_all() -> None:
    disk = SimDisk()
    store = open_store(disk, 1)
    fill(store)
    go_on(store)
    files = disk.snapshot()
    store.close()
    wal = "ledger/store.db-wal"
    draw = random.Random(2)
    opened = 0
    for _ in range(25):
        bad = bytearray(files[wal])
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        try:
            store = open_store(SimDisk.of({**files, wal: bytes(bad)}), 2)
        except LedgerError:
            continue
        assert not fsck.check(store.all, recompute=True).findings
        opened += 1
        store.close()
    assert opened


LARGE = codec.encode(Budget(epsilon=900.0, delta=1e-5)).hex()
FREE = codec.encode(OPEN).hex()
SECRET = codec.encode(secret("gone")).hex()
FREE_CHARGE = codec.encode(Charge(rdp_nano=RdpFilter.empty(), delta_femto=0, epsilon=0.0)).hex()
EDITS = [
    "UPDATE accounts SET rdp_nano = '0' || rdp_nano",
    "UPDATE accounts SET rdp_nano = '0 ' || substr(rdp_nano, instr(rdp_nano, ' ') + 1)",
    "UPDATE accounts SET delta_femto = 0",
    "UPDATE accounts SET jobs = jobs - 1",
    "UPDATE accounts SET scientist = 'id_other' WHERE scientist != ''",
    "DELETE FROM accounts WHERE scientist = ''",
    "DELETE FROM accounts WHERE scientist != ''",
    f"UPDATE lineages SET budget = x'{LARGE}'",
    "UPDATE lineages SET filter = 'rdp/v9'",
    "UPDATE nodes SET hash = zeroblob(32) WHERE level = 0 AND place = 3",
    "UPDATE nodes SET hash = zeroblob(32) WHERE level = 2",
    "DELETE FROM nodes WHERE level = 1",
    "INSERT INTO nodes SELECT 40, 0, hash FROM nodes WHERE level = 0 AND place = 0",
    "UPDATE log_keys SET key = zeroblob(32)",
    "UPDATE log_keys SET origin = origin || '0'",
    "UPDATE log_keys SET generation = 2",
    "UPDATE log_keys SET ended = 4",
    "DELETE FROM log_keys",
    "UPDATE cosignatures SET size = size + 1",
    "UPDATE cosignatures SET size = size + 1000",
    "UPDATE cosignatures SET line = replace(line, 'A', 'B')",
    "UPDATE cosignatures SET witness = 'other' || witness",
    "UPDATE attestations SET attestation = x'7b7d'",
    "UPDATE attestations SET digest = 'sha256:0'",
    "UPDATE attestations SET boot = zeroblob(16)"
    " WHERE boot IN (SELECT max(boot) FROM attestations)",
    "DELETE FROM attestations",
    "UPDATE anchor SET secret = zeroblob(31)",
    "UPDATE anchor SET count = count + 1",
    "UPDATE anchor SET before = zeroblob(31)",
    "UPDATE anchor SET step = zeroblob(32)",
    "INSERT INTO frozen SELECT id, 'recovery' FROM datasets LIMIT 1",
    "INSERT INTO consents SELECT id, '00', '' FROM datasets LIMIT 1",
    "INSERT INTO handed_over VALUES (3)",
    "UPDATE states SET step = 1 << 40",
    "UPDATE states SET path = '../lock'",
    "UPDATE states SET key = x'00'",
    "UPDATE states SET job = (SELECT id FROM jobs WHERE state = 'done')",
    "UPDATE uploads SET owner = (SELECT i.id FROM identities i WHERE i.id != owner)",
    "UPDATE uploads SET used_by = NULL WHERE used_by LIKE 'ds_%'",
    "UPDATE uploads SET used_by = 'x' WHERE used_by LIKE 'model:%'",
    "DELETE FROM uploads",
    "DELETE FROM entries WHERE kind_of(entry) = 'reserve'",
    "DELETE FROM entries WHERE sequence = (SELECT max(sequence) FROM entries)",
    "DELETE FROM entries WHERE sequence > 4",
    "DELETE FROM entries WHERE sequence = 0",
    "DELETE FROM entries",
    "UPDATE entries SET entry = (SELECT entry FROM entries WHERE sequence = 2) WHERE sequence = 1",
    "UPDATE entries SET entry ="
    " CAST(replace(CAST(entry AS TEXT), '\"reject\"', '\"approve\"') AS BLOB)",
    "UPDATE entries SET sequence = sequence + 100",
    "DELETE FROM jobs WHERE state = 'done'",
    "DELETE FROM jobs WHERE state = 'failed' AND reserved IS NOT NULL",
    "UPDATE jobs SET state = 'queued', reserved = NULL, boot = NULL WHERE state = 'failed'",
    "UPDATE jobs SET state = 'running' WHERE state = 'done'",
    "UPDATE jobs SET state = 'done' WHERE state = 'failed'",
    "UPDATE jobs SET state = 'done', envelope = NULL WHERE state = 'committed'",
    "UPDATE jobs SET state = 'committed' WHERE state = 'done'",
    "UPDATE jobs SET state = 'reserved', ended = NULL WHERE state = 'committed'",
    "UPDATE jobs SET envelope = envelope || ' '",
    "UPDATE jobs SET result_key = NULL",
    "UPDATE jobs SET blob = '../store.db' WHERE state = 'done'",
    "UPDATE jobs SET takeovers = 0 WHERE takeovers > 0",
    "UPDATE jobs SET granted = reserved WHERE granted != reserved",
    "UPDATE jobs SET boot = zeroblob(16) WHERE boot NOT NULL",
    "UPDATE jobs SET request_digest = 'sha256:x' WHERE state = 'queued'",
    "UPDATE jobs SET quote = (SELECT q.digest FROM quotes q WHERE q.digest != quote)",
    "UPDATE jobs SET state = 'done', blob = 'x', bundle = x'00' WHERE state = 'queued'",
    "UPDATE jobs SET result_digest = 'sha256:x' WHERE state = 'done'",
    "UPDATE jobs SET bundle = NULL WHERE state = 'done'",
    "UPDATE jobs SET bundle = x'7b7d' WHERE state = 'done'",
    "UPDATE jobs SET scientist = (SELECT id FROM identities i WHERE i.id != scientist)",
    "UPDATE job_datasets SET charge = x'7b7d'",
    f"UPDATE job_datasets SET charge = x'{FREE_CHARGE}'"
    " WHERE job IN (SELECT id FROM jobs WHERE state = 'queued')",
    "DELETE FROM job_datasets WHERE job IN (SELECT id FROM jobs WHERE state = 'queued')",
    "DELETE FROM job_datasets",
    "UPDATE datasets SET state = 'ready' WHERE state = 'revoked'",
    f"INSERT INTO dataset_keys SELECT id, x'{SECRET}' FROM datasets WHERE state = 'revoked'",
    "DELETE FROM dataset_keys",
    "UPDATE dataset_keys SET key = x'00'",
    "UPDATE datasets SET epoch = 0",
    f"UPDATE datasets SET policy = x'{FREE}'",
    f"UPDATE datasets SET policy = x'{FREE}', policy_digest = '{codec.digest(OPEN)}'",
    "UPDATE datasets SET owner = (SELECT max(id) FROM identities)",
    "DELETE FROM datasets",
    "DELETE FROM lineages",
    "DELETE FROM identities",
    "UPDATE identities SET identity = (SELECT max(identity) FROM identities)",
    "UPDATE quote_datasets SET verdict = 'approve'",
    "UPDATE quote_datasets SET verdict = NULL",
    "UPDATE quotes SET quote = x'7b7d'",
    "UPDATE quotes SET salt = zeroblob(32)",
    "UPDATE quotes SET salt = x'00'",
    "UPDATE quotes SET model_key = x'00'",
    "UPDATE quotes SET submission = (SELECT min(submission) FROM quotes)",
    "UPDATE quotes SET scientist = (SELECT i.id FROM identities i WHERE i.id != scientist)",
    "DELETE FROM quote_datasets WHERE verdict IS NULL",
    "UPDATE datasets SET salt = zeroblob(32)",
    "UPDATE datasets SET registration = (SELECT max(registration) FROM datasets)",
    "DELETE FROM quotes",
]


def edit(sql: str) -> SimDisk:
    """The filled store after ``sql`` by someone who has the key and no scruples."""
    disk = SimDisk.of(filled())
    mount = Mount(disk, sealed.FOLDER)
    connection = sealed.connect(mount, KEY)
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.create_scalar_function("kind_of", lambda raw: codec.decode(LogEntry, raw).kind)
    connection.execute(sql)
    assert connection.total_changes() > 0, f"the edit does nothing: {sql}"
    connection.close()
    mount.close()
    return disk


@pytest.mark.parametrize("sql", EDITS)
def test_rows_edited_with_the_right_key_are_found(sql: str) -> None:
    disk = edit(sql)
    assert fsck.verify(disk, KEY).findings
    with pytest.raises(LedgerError) as e:
        open_store(disk, 2)
    assert e.value.code == "ledger.inconsistent"


def test_a_sound_store_has_no_findings() -> None:
    replay = fsck.verify(SimDisk.of(filled()), KEY)
    assert replay.findings == []
    store = open_store(SimDisk.of(filled()), 2)  # a start and two jobs taken over
    assert replay.entries == store.size() - 3
    store.close()


def test_a_writer_that_charges_too_little_is_found_by_recomputing() -> None:
    disk = SimDisk()
    with pytest.MonkeyPatch.context() as patch:
        real = RdpFilter.charge

        def half(*args, **kwargs):
            charge = real(*args, **kwargs)
            return replace(charge, rdp_nano=tuple(n // 2 for n in charge.rdp_nano))

        patch.setattr(RdpFilter, "charge", staticmethod(half))
        store = open_store(disk)
        run(store, queue(store, "1", (push(store),)))
        store.close()
    findings = fsck.verify(disk, KEY).findings
    assert any("is not what its events cost" in f for f in findings)


def test_a_revoked_key_is_overwritten_even_for_one_who_has_the_store_key() -> None:
    disk = SimDisk()
    store = open_store(disk)
    dataset = push(store)
    key = codec.encode(secret("a"))
    assert key in store._connection.serialize("main")
    catalog.revoke(store, dataset, OWNER.id)
    assert key not in store._connection.serialize("main")
    assert disk.snapshot()["ledger/store.db-wal"] == b""
    store.close()


def test_an_older_copy_as_a_whole_is_not_noticed_without_a_witness() -> None:
    """What stays open until a witness keeps the newest head: LIMITATIONS.md says it."""
    disk = SimDisk()
    store = open_store(disk, 1)
    dataset = push(store, budget=BUDGET)
    store.close()
    old = disk.snapshot()
    store = open_store(disk, 2)
    run(store, queue(store, "1", (dataset,), event=EVENT))
    store.close()
    store = open_store(SimDisk.of(old), 3)
    assert taken(store, dataset).jobs == 0
    store.close()


def test_wiping_the_store_takes_the_keys_with_the_budgets() -> None:
    store = open_store(SimDisk(), 2)
    assert store.all("SELECT * FROM dataset_keys") == []
    assert catalog.datasets(store) == []
    store.close()


BUGS: list[Callable[[pytest.MonkeyPatch], None]] = [
    lambda patch: patch.setattr(fsck, "_compare_budgets", lambda *_: None),
    lambda patch: patch.setattr(fsck, "_compare_jobs", lambda *_: None),
    lambda patch: patch.setattr(fsck, "_compare_datasets", lambda *_: None),
    lambda patch: patch.setattr(fsck, "_compare_people", lambda *_: None),
]


@pytest.mark.parametrize("bug", range(len(BUGS)))
def test_seeded_bugs_of_the_checker_are_noticed(bug: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        BUGS[bug](patch)
        assert any(not fsck.verify(edit(sql), KEY).findings for sql in EDITS)

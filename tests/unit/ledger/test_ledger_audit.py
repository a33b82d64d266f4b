"""``fsck.audit``: receipts, attestations and files, each edit of which is found."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from casemate.accounting.filters import RdpFilter
from casemate.ledger import (
    catalog,
    fsck,
    fsck_costs,
    fsck_folder,
    fsck_receipts,
    ledger,
    log,
    quotes,
    sealed,
)
from casemate.ledger.store import Store
from casemate.ledger.vfs import Mount
from casemate.seal import checkpoint, dsse, note
from casemate.spec import canonical, codec
from casemate.spec.errors import LedgerError
from casemate.spec.evidence import Attestation
from casemate.spec.job import DpEvent, Quote
from casemate.spec.receipt import PAYLOAD_TYPE, ReceiptBundle
from support.disk import SimDisk
from support.ledgers import (
    KEY,
    OPEN,
    OTHER,
    OWNER,
    Witness,
    boot,
    commit,
    make_quote,
    open_store,
    push,
    queue,
    receipt_key,
    run,
)

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)
W = Witness()


def write(disk: SimDisk, path: str, size: int) -> None:
    file = disk.open(path, create=True)
    file.write(0, bytes(size))
    file.close()


@cache
def world() -> dict[str, bytes]:
    """A job done, one without privacy done, one committed, one that goes on, and their files."""
    disk = SimDisk()
    store = open_store(disk)
    a = push(store, "a")
    free = push(store, "b", OTHER, replace(OPEN, nonprivate="It is all public."))
    run(store, queue(store, "done", (a,), event=SMALL))
    W.cosign(store)
    run(store, queue(store, "free", (free,), words="It is all public."))
    fixed, going = queue(store, "fixed", (a,), event=SMALL), queue(store, "on", (a,), event=SMALL)
    for job in (fixed, going):
        ledger.reserve(store, job)
        ledger.begin(store, job)
    commit(store, fixed)
    state = ledger.TrainingState(7, f"states/{going}.7", b"s" * 32)
    ledger.keep_state(store, going, state)
    catalog.revoke(store, push(store, "old"), OWNER.id)
    bad = push(store, "bad")  # not what its schema says: no length is right
    store.run("UPDATE datasets SET state = 'checking' WHERE id = ?", bad)
    catalog.settle(store, bad, "data.schema")
    catalog.add_upload(store, OWNER.id, 700)  # not all of it has come
    place(disk, store, state.path)
    store.close()
    return disk.snapshot()


def place(disk: SimDisk, store: Store, state: str) -> None:
    """The files that a server would have written."""
    sizes = {}
    for raw, kept in store.all("SELECT registration, state FROM datasets"):
        upload = codec.decode(catalog.Registration, raw).upload
        sizes[upload] = 4000 + 72 + 44 + 16 if kept == "ready" else 0
    for name, size in store.all("SELECT id, size FROM uploads"):
        size = sizes.get(name) or size
        store.run("UPDATE uploads SET size = ? WHERE id = ?", size, name)
        write(disk, f"uploads/{name}", 600 if size == 700 else size)
        write(disk, f"uploads/{name}.offset", 48)
    for (path,) in store.all("SELECT blob FROM jobs WHERE blob NOT NULL"):
        write(disk, path, 500)
    write(disk, state, 500)


def test_a_sound_state_has_no_findings() -> None:
    found = fsck.audit(SimDisk.of(world()), KEY)
    assert (found.findings, found.left, found.receipts) == ([], [], 3)


def changed(*statements: str, **given: object) -> fsck.Replay:
    """The audit of the world after ``statements`` by someone who has the key."""
    disk = SimDisk.of(world())
    mount = Mount(disk, sealed.FOLDER)
    connection = sealed.connect(mount, KEY)
    connection.execute("PRAGMA foreign_keys = OFF")
    for sql in statements:
        connection.execute(sql, given)
    assert connection.total_changes() > 0
    connection.close()
    mount.close()
    return fsck.audit(disk, KEY)


def bundle() -> ReceiptBundle:
    store = Store.open(SimDisk.of(world()), KEY, boot(9), None)
    (raw,) = store.one("SELECT bundle FROM jobs WHERE state = 'done' ORDER BY place LIMIT 1")
    store.close()
    return codec.decode(ReceiptBundle, raw)


def again(**changes: object) -> list[str]:
    """What is found where the first receipt's bundle holds other things than its own."""
    made = codec.encode(replace(bundle(), **changes))
    first = "(SELECT min(place) FROM jobs WHERE state = 'done')"
    return changed(f"UPDATE jobs SET bundle = :b WHERE place = {first}", b=made).findings


def test_a_bundle_holds_its_own_things() -> None:
    whole = bundle()
    assert again() == []
    evidence = replace(whole.attestation.evidence, tee="other")
    for changes in (
        {"salt": b"x" * 32},
        {"entry": whole.entry + b" "},
        {"attestation": replace(whole.attestation, evidence=evidence)},
    ):
        assert any("bundled with other things" in f for f in again(**changes))


def proofs(store: Store) -> dict[str, str]:
    """Proofs that do not hold, by what is wrong."""
    whole = checkpoint.read_proof(bundle().proof)
    head, mine = checkpoint.head(whole.signed.text), log.key(store)

    def signed(of: checkpoint.Checkpoint, key: log.LogKey = mine) -> note.Note:
        return checkpoint.sign(of, key.public, key.private.sign)

    wrong = replace(head, root=b"x" * 32)
    made = {
        "place": replace(whole, place=whole.place - 1),
        "path": replace(whole, path=(*whole.path[:-1], b"x" * 32)),
        "longer": replace(whole, path=(*whole.path, b"x" * 32)),
        "shorter": replace(whole, path=whole.path[:-1]),
        "root": replace(whole, signed=signed(wrong)),
        "size": replace(whole, signed=signed(replace(head, size=head.size + 1))),
        "larger": replace(whole, signed=signed(replace(head, size=10**6))),
        "too small": replace(whole, signed=signed(replace(head, size=whole.place))),
        "origin": replace(whole, signed=signed(replace(head, origin="another.test/log"))),
        "signature": replace(whole, signed=note.Note(whole.signed.text, signed(wrong).lines)),
    }
    cosigned = W.sign(note.Note(whole.signed.text, ()))
    texts = {name: str(proof) for name, proof in made.items()}
    return texts | {
        "no signature of the log": str(replace(whole, signed=cosigned)),
        "no number": bundle().proof.replace(f"\n{head.size}\n", "\n²\n"),
        "form": bundle().proof.replace("@v1", "@v2"),
        "nothing": "",
    }


def test_a_proof_that_does_not_hold_is_found() -> None:
    store = Store.open(SimDisk.of(world()), KEY, boot(9), None)
    texts = proofs(store)
    store.close()
    for name, text in texts.items():
        assert any("does not prove" in f for f in again(proof=text)), name


def test_a_proof_with_cosignatures_holds() -> None:
    whole = checkpoint.read_proof(bundle().proof)
    assert again(proof=str(replace(whole, signed=W.sign(whole.signed)))) == []


def attested(change: Callable[[Attestation], Attestation]) -> list[str]:
    """A writer whose evidence binds other keys, its log consistent."""
    from support import ledgers

    disk, real = SimDisk(), ledgers.attestation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "attestation", lambda store: change(real(store)))
        store = open_store(disk)
        run(store, queue(store, "1", (push(store),), event=SMALL))
        store.close()
    return [f for f in fsck.audit(disk, KEY).findings if "file" not in f and "result of" not in f]


@pytest.mark.parametrize(
    ("field", "finding"),
    [
        ("boot", "binds other keys than the log's"),
        ("log_key", "binds other keys than the log's"),
        ("receipt_key", "is not signed by its boot's key"),
    ],
)
def test_evidence_of_other_keys_is_found(field: str, finding: str) -> None:
    assert attested(lambda a: a) == []

    def change(attestation: Attestation) -> Attestation:
        binding = replace(attestation.binding, **{field: receipt_key(b"another").public})
        return replace(attestation, binding=binding)

    findings = attested(change)
    assert findings and all(finding in f for f in findings)


def claimed(change: Callable[[dict], None] = lambda statement: None, **quoted: object) -> list[str]:
    """A writer whose receipts say something else, its log consistent."""
    disk = SimDisk()
    store = open_store(disk)
    dataset = push(store)
    quote, submission = make_quote(store, "1", (dataset,), event=SMALL)
    digest = quotes.add(store, replace(quote, **quoted), submission, b"m" * 32)
    job = ledger.submit(store, digest, quote.request.scientist).id
    ledger.reserve(store, job)
    ledger.begin(store, job)
    from support import ledgers

    real = ledgers.receipt

    def other(store: Store, id: str, result: str) -> str:
        whole = json.loads(real(store, id, result))
        statement = canonical.decode(base64.b64decode(whole["payload"]))
        change(statement)
        signer = receipt_key(store.boot)
        return dsse.sign(PAYLOAD_TYPE, canonical.encode(statement), signer.sign, "k")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "receipt", other)
        commit(store, job)
    store.close()
    return [f for f in fsck.audit(disk, KEY).findings if "file" not in f and "result of" not in f]


def setting(value: object, *path: object) -> Callable[[dict], None]:
    def change(statement: dict) -> None:
        at = statement
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


P = "predicate"
CLAIMS = {
    "another type": setting("x", "_type"),
    "another predicate": setting("x", "predicateType"),
    "another subject": setting("x", "subject", 0, "name"),
    "another result": setting("00" * 32, "subject", 0, "digest", "sha256"),
    "job": setting("job_x", P, "job"),
    "scientist": setting("id_x", P, "scientist"),
    "boot": setting("AAAAAAAAAAAAAAAAAAAAAA", P, "boot"),
    "model": setting("sha256:0", P, "model_digest"),
    "result": setting("sha256:0", P, "result_digest"),
    "request": setting("sha256:0", P, "request_digest"),
    "quote": setting("sha256:0", P, "quote_digest"),
    "plan": setting(9.0, P, "plan", "clip"),
    "reserved": setting(1, P, "reserved"),
    "log": setting("another.test/log", P, "log"),
    "no dataset": setting([], P, "datasets"),
    "dataset": setting("ds_x", P, "datasets", 0, "dataset"),
    "charge": setting(1, P, "datasets", 0, "charge", "delta_femto"),
    "private": setting(False, P, "guarantee", "private"),
    "epsilon": setting(0.01, P, "guarantee", "epsilon"),
    "delta": setting(1e-9, P, "guarantee", "delta"),
}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_receipt_that_says_other_things_is_found(name: str) -> None:
    findings = claimed(CLAIMS[name])
    assert any("says other things than the log" in f for f in findings)


def test_a_receipt_of_another_form_is_found() -> None:
    assert claimed() == []
    for change in (setting("x", P), lambda s: s.clear(), setting({}, P, "guarantee")):
        assert any("has another form" in f for f in claimed(change))


@pytest.mark.parametrize("epsilon", [1e-3, 99.0])
def test_an_epsilon_that_the_events_do_not_cost_is_found(epsilon: float) -> None:
    (finding,) = claimed(epsilon=epsilon)
    assert f"claims epsilon {epsilon:g}" in finding


def test_a_claimed_epsilon_is_held_to_its_last_digit() -> None:
    """From what one accountant finds from below to what the other charged, and a little more."""
    store = open_store(SimDisk())
    quote, _ = make_quote(store, "1", (push(store),), event=SMALL)
    near = fsck_receipts._NEAR
    least = fsck_costs.tight(quote.plan, quote.delta) * (1 - near) - near
    most = quote.datasets[0].charge.epsilon * (1 + near) + near
    assert claimed(epsilon=least) == claimed(epsilon=most) == []
    for beyond in (math.nextafter(least, 0), math.nextafter(most, 100)):
        (finding,) = claimed(epsilon=beyond)
        assert "claims epsilon" in finding


def test_a_receipt_of_a_job_that_the_log_does_not_know_is_found() -> None:
    found = changed("UPDATE jobs SET id = 'job_x' WHERE state = 'committed'").findings
    assert "job job_x has a receipt and no attested commit" in found


def test_an_attestation_that_cannot_be_read_is_found() -> None:
    (*_, finding) = changed("UPDATE attestations SET attestation = CAST('{}' AS BLOB)").findings
    assert finding.startswith("a stored value cannot be read")


def test_a_commit_without_an_attestation_is_found() -> None:
    found = changed("DELETE FROM attestations").findings
    assert sum("no attested commit" in f for f in found) == 3


def test_files_are_there_and_as_long_as_they_should_be() -> None:
    store = Store.open(SimDisk.of(world()), KEY, boot(9), None)
    (unused,) = store.one("SELECT id FROM uploads WHERE used_by IS NULL AND size = 700")
    store.close()
    names = [n for n in world() if not n.startswith("ledger/") and unused not in n]
    assert len(names) == 20
    for name in names:
        gone = {n: data for n, data in world().items() if n != name}
        lacking = fsck.audit(SimDisk.of(gone), KEY).findings
        assert len(lacking) in (1, 2) and all("missing" in f for f in lacking), name
        if name.startswith("uploads/"):
            longer = fsck.audit(SimDisk.of({**world(), name: world()[name] + b"x"}), KEY)
            assert any(f"the file {name} has" in f for f in longer.findings), name
        short = fsck.audit(SimDisk.of({**world(), name: b"x" * 60}), KEY)
        assert short.findings, name
    large = next(n for n in names if n.startswith("results/"))
    assert fsck.audit(SimDisk.of({**world(), large: bytes(3 << 20)}), KEY).findings


def test_files_may_have_these_lengths_and_no_other() -> None:
    def found(name: str, length: int) -> list[str]:
        return fsck.audit(SimDisk.of({**world(), name: bytes(length)}), KEY).findings

    offset = next(n for n in world() if n.endswith(".offset"))
    result = next(n for n in world() if n.startswith("results/"))
    state = next(n for n in world() if n.startswith("states/"))
    store = Store.open(SimDisk.of(world()), KEY, boot(9), None)
    sql = "SELECT q.quote FROM quotes q JOIN jobs j ON j.quote = q.digest WHERE j.blob = ?"
    (raw,) = store.one(sql, result)
    store.close()
    most = 4 * codec.decode(Quote, raw).parameters + fsck_folder.PIECE
    empty, full = fsck_folder.sealed_size(0), fsck_folder.sealed_size(most)
    for name, sound, wrong in (
        (offset, (24, 48), (23, 25, 47, 49)),
        (result, (empty + 1, full), (0, empty, full + 1)),
        (state, (empty + 1,), (empty,)),
    ):
        assert [found(name, n) for n in sound] == [[]] * len(sound)
        assert all(found(name, n) for n in wrong)


def test_what_nothing_names_is_told_apart() -> None:
    more = dict.fromkeys(("uploads/up_x", "results/more", "states/more"), b"")
    found = fsck.audit(SimDisk.of(world() | more), KEY)
    assert (found.findings, found.left) == ([], list(more))


def test_a_folder_that_was_never_used_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: SimDisk, folder: str) -> list[str]:
        raise FileNotFoundError(folder)

    monkeypatch.setattr(SimDisk, "list", gone)
    found = fsck.audit(SimDisk.of(world()), KEY)
    assert (found.findings, found.left) == ([], [])


def test_an_audit_recomputes_what_events_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RdpFilter.charge

    def charge(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        return replace(made, rdp_nano=tuple(n // 2 for n in made.rdp_nano))

    monkeypatch.setattr(RdpFilter, "charge", staticmethod(charge))
    disk = SimDisk()
    store = open_store(disk)
    ledger.reserve(store, queue(store, "1", (push(store),), event=SMALL))
    assert fsck.check(store.all).findings == []
    store.close()
    assert any("is not what its events cost" in f for f in fsck.audit(disk, KEY).findings)


def test_a_dataset_that_is_checked_has_its_key() -> None:
    store = open_store(SimDisk())
    store.run("UPDATE datasets SET state = 'checking' WHERE id = ?", push(store))
    assert fsck.check(store.all).findings == []
    store.run("DELETE FROM dataset_keys")
    assert fsck.check(store.all).findings


def test_a_store_that_cannot_be_read() -> None:
    for disk, key, code in (
        (SimDisk(), KEY, "ledger.missing"),
        (SimDisk.of(world()), b"x" * 32, "ledger.key"),
        (SimDisk.of(world()), b"x", "ledger.key"),
        (SimDisk.of({fsck_folder.FILE: b"x" * 8192}), KEY, "ledger.key"),
    ):
        with pytest.raises(LedgerError) as e:
            fsck.audit(disk, key)
        assert e.value.code == code
    data = bytearray(world()[fsck_folder.FILE])
    data[5 * 4096 + 99] ^= 1
    with pytest.raises(LedgerError, match=r"ledger\.corrupt"):
        fsck.audit(SimDisk.of({**world(), fsck_folder.FILE: bytes(data)}), KEY)


def test_pages_that_contradict_each_other() -> None:
    disk = SimDisk.of(world())
    mount = Mount(disk, sealed.FOLDER)
    connection = sealed.connect(mount, KEY)
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, 'CHECK (size > 0)', 'CHECK (size > 99999)')"
    )
    connection.close()
    mount.close()
    with pytest.raises(LedgerError, match=r"ledger\.corrupt.*contradict each other"):
        fsck.verify(disk, KEY)
    with pytest.raises(LedgerError, match=r"ledger\.corrupt.*contradict each other"):
        Store.open(disk, KEY, boot(9), None)


def test_what_stands_in_the_wal_alone_is_seen() -> None:
    disk = SimDisk()
    store = open_store(disk)
    push(store)
    files = disk.snapshot()
    store.close()
    assert fsck.verify(SimDisk.of(files), KEY).entries == 4
    assert fsck.verify(disk, KEY).entries == 4


def test_an_older_copy_is_found_by_a_checkpoint_that_somebody_kept() -> None:
    disk = SimDisk()
    store = open_store(disk)
    push(store, "a")
    kept = [str(log.sign(store, size)) for size in (1, store.size())]
    store.empty_wal()
    old = SimDisk.of(disk.snapshot())
    push(store, "b", OTHER)
    head, newer = log.head(store), str(W.sign(log.sign(store)))
    store.close()
    found = fsck.verify(disk, KEY)
    assert fsck.head(found) == log.seen(head)
    for signed in (*kept, newer):
        fsck.extends(found, signed)
    assert found.findings == []

    older = fsck.verify(old, KEY)
    fsck.extends(older, kept[1])
    assert older.findings == []
    fsck.extends(older, newer)
    assert "the log lacks entries" in older.findings[-1]
    other = open_store(old, 2)  # goes on from there: a fork
    push(other, "c", OTHER)
    push(other, "d", OTHER)
    forked = fsck.check(other.all)
    fsck.extends(forked, newer)
    assert "a fork" in forked.findings[-1]
    other_log = str(log.sign(open_store(SimDisk(), 9)))
    changed = newer.replace("\n\n", "\nmore\n\n", 1)
    for bad in ("", "x", changed, other_log):
        count = len(found.findings)
        fsck.extends(found, bad)
        assert "not signed by this log" in found.findings[count]

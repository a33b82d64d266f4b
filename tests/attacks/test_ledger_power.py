"""Power loss and disk errors at every call of the disk while jobs are reserved and committed.

After each the next start must explain all: what was acknowledged is there, spent is the sum of the
reservations in the log, never above the budget, no job is left half done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import pytest

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, fsck, ledger
from casemate.ledger.store import Store
from casemate.spec.errors import CasemateError, LedgerError
from support.disk import SimDisk
from support.ledgers import (
    BUDGET,
    OTHER,
    SCIENTIST,
    DpEvent,
    ask,
    commit,
    finish,
    open_store,
    push,
)

EVENT = DpEvent(rate=0.02, noise_multiplier=2.0, steps=100)
FAULTS = ("EIO", "ENOSPC", "SHORT")


@cache
def prepared() -> dict[str, bytes]:
    """Two datasets of two owners and three quotes, on a disk shut down in order."""
    disk = SimDisk()
    store = open_store(disk, 1)
    datasets = (push(store, "a"), push(store, "b", OTHER))
    for name in "123":
        ask(store, name, datasets, event=EVENT)
    store.close()
    return disk.snapshot()


@cache
def quote_digests() -> tuple[str, ...]:
    store = open_store(SimDisk.of(prepared()), 2)
    found = [d for (d,) in store.all("SELECT digest FROM quotes ORDER BY place")]
    store.close()
    return tuple(found)


def script(store: Store, acknowledged: list[tuple[str, str]]) -> None:
    """Three jobs: one is released, one fails, one is committed and left so."""

    def done(what: str, job: str) -> None:
        acknowledged.append((what, job))

    jobs = []
    for digest in quote_digests():
        jobs.append(ledger.submit(store, digest, SCIENTIST.id).id)
        done("queued", jobs[-1])
    for job in jobs:
        ledger.reserve(store, job)
        done("reserved", job)
        ledger.begin(store, job)
        done("running", job)
        if job == jobs[1]:
            ledger.abandon(store, job, "failed", "job.failed")
            done("failed", job)
        else:
            commit(store, job)
            done("committed", job)
        if job == jobs[0]:
            finish(store, job)
            done("done", job)


def play(disk: SimDisk) -> list[tuple[str, str]]:
    """Run the script until something breaks; what was acknowledged."""
    acknowledged: list[tuple[str, str]] = []
    store = None
    try:
        store = open_store(disk, 2)
        script(store, acknowledged)
        store.empty_wal()
    except CasemateError as e:
        assert e.code == "ledger.stopped", e
        if store is not None:
            with pytest.raises(LedgerError):
                store.entries()
            with pytest.raises(LedgerError):
                catalog.enrol(store, OTHER)
    if store is not None:
        store.close()
    return acknowledged


@cache
def calls() -> tuple[str, ...]:
    disk = SimDisk.of(prepared())
    play(disk)
    return tuple(disk.trace)


def explain(disk: SimDisk, acknowledged: list[tuple[str, str]]) -> None:
    store = open_store(disk, 3)
    replay = fsck.check(store.all, recompute=True)
    assert not replay.findings
    said = set(acknowledged)
    for name in [job for what, job in acknowledged if what == "queued"]:
        job = ledger.job(store, name)
        assert job.state != "running"
        if job.state == "reserved":  # taken over: the same debit, by this boot
            assert job.boot == store.boot and job.takeovers == 1
        if ("reserved", name) in said:
            assert job.reserved is not None
        for state in ("done", "failed"):
            if (state, name) in said:
                assert job.state == state
        if ("committed", name) in said:
            assert job.state in ("committed", "done")
        assert (job.state in ("committed", "done")) == (job.blob is not None)
        if (
            job.state == "committed"
        ):  # what was fixed is released, with the key that it was sealed by
            assert ledger.result_key(store, name) == hashlib.sha256(name.encode()).digest()
            finish(store, name)
        if job.blob is not None:
            assert ledger.bundle(store, name).entry == store.link(job.ended).entry
    reserved = store.one("SELECT count(*) FROM jobs WHERE reserved IS NOT NULL")[0]
    assert reserved >= sum(what == "reserved" for what, _ in acknowledged)
    for dataset in catalog.datasets(store):
        rdp, spent = RdpFilter(BUDGET), catalog.account(store, dataset.lineage)
        charge = rdp.charge((EVENT,), 2e-9, delta_shown=1e-6)
        assert spent.jobs == reserved
        assert spent.rdp_nano == tuple(reserved * nano for nano in charge.rdp_nano)
        assert spent.delta_femto == reserved * charge.delta_femto
        assert any(s <= c for s, c in zip(spent.rdp_nano, rdp.capacity, strict=True))
    store.close()


def changing() -> list[int]:
    return [i for i, what in enumerate(calls(), 1) if not what.startswith("read")]


def test_the_script_reaches_its_end_when_nothing_breaks() -> None:
    disk = SimDisk.of(prepared())
    acknowledged = play(disk)
    assert [what for what, _ in acknowledged].count("reserved") == 3
    assert len(changing()) > 80
    explain(disk, acknowledged)


def lose_power(seed: int, every: int = 1) -> None:
    for call in reversed(changing()[seed % every :: every]):
        disk = SimDisk.of(prepared(), seed * 100_003 + call)
        disk.fault = (call, "POWER")
        acknowledged = play(disk)
        explain(disk.power_cycle(), acknowledged)


@pytest.mark.parametrize("seed", [1, 2])
def test_power_loss_at_every_eighth_call(seed: int) -> None:
    lose_power(seed, 8)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3, 60))
def test_power_loss_at_every_call(seed: int) -> None:
    lose_power(seed)


def fail_at(kind: str, every: int, start: int) -> None:
    for call in range(1 + start, len(calls()) + 1, every):
        disk = SimDisk.of(prepared(), call)
        disk.fault = (call, kind)
        acknowledged = play(disk)
        disk.fault = None
        # Every second time the machine goes down too, so that what a failed sync lost is lost.
        explain(disk.power_cycle(clean=call // every % 2 == 0), acknowledged)


@pytest.mark.parametrize("kind", FAULTS)
def test_disk_errors_stop_the_store_and_lose_nothing(kind: str) -> None:
    fail_at(kind, 8 * len(FAULTS), FAULTS.index(kind))


@pytest.mark.full
@pytest.mark.parametrize("kind", [*FAULTS, "EMFILE", "EDQUOT"])
def test_every_disk_error_at_every_call(kind: str) -> None:
    fail_at(kind, 1, 0)


# While SQLite undoes what a first error stopped, a second one can only be told to the interpreter.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_power_loss_while_the_store_is_first_made() -> None:
    first = SimDisk()
    open_store(first, 1).close()
    for call in range(1, len(first.trace) + 1):
        disk = SimDisk(call, (call, "POWER"))
        with suppress(LedgerError):
            open_store(disk, 1).close()
        assert disk.off
        store = open_store(disk.power_cycle(), 2)
        assert not fsck.check(store.all).findings
        store.close()


def broken_by(bug: Callable[[pytest.MonkeyPatch], None]) -> bool:
    """Whether the sweep above notices the bug."""
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        try:
            lose_power(1, 4)
        except (AssertionError, CasemateError):
            return True
    return False


def test_seeded_bug_reserving_without_sync_is_noticed() -> None:
    def bug(patch: pytest.MonkeyPatch) -> None:
        from casemate.ledger import vfs

        patch.setattr(vfs._File, "_sync", lambda self: None)

    assert broken_by(bug)


def test_seeded_bug_synchronous_normal_is_noticed() -> None:
    def bug(patch: pytest.MonkeyPatch) -> None:
        from casemate.ledger import store as module

        real = module.connect

        def connect(mount, key):
            connection = real(mount, key)
            connection.execute("PRAGMA synchronous = NORMAL")
            return connection

        patch.setattr(module, "connect", connect)

    assert broken_by(bug)


def test_seeded_bug_refund_on_abandon_is_noticed() -> None:
    def bug(patch: pytest.MonkeyPatch) -> None:
        real = ledger.abandon

        def abandon(store, id, state, error, message=""):
            with store.transaction():
                store.run("UPDATE accounts SET rdp_nano = ?", " ".join(map(str, RdpFilter.empty())))
            return real(store, id, state, error, message)

        patch.setattr(ledger, "abandon", abandon)

    assert broken_by(bug)

"""Bugs put in on purpose: each must be found by a few runs, or the harness proves nothing."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

from casemate.accounting import filters
from casemate.ledger import catalog, ledger, vfs
from casemate.ledger.store import Store
from casemate.server import release, run
from casemate.server.publish import Publisher
from casemate.server.service import Service
from casemate.server.uploads import Uploads
from casemate.spec import codec
from casemate.spec.errors import CasemateError
from casemate.spec.job import Charge
from torture.model import Violation
from torture.sim import BASES, base
from torture.sim import run as run_

Bug = Callable[[], "contextlib.AbstractContextManager[Any]"]


def _seeds(count: int, **options: Any) -> Iterator[dict[str, Any]]:
    return ({"seed": 90_000 + n, "signed": False, **options} for n in range(1, count + 1))


def _places(first: int, last: int) -> Iterator[dict[str, Any]]:
    """The power fails at each second call of one life's beginning."""
    life = {"seed": 90_000, "signed": False, "fates": ("power",), "fresh": True}
    return ({**life, "at": at} for at in range(first, last, 2))


def _no_sync() -> Any:
    return mock.patch.object(vfs._File, "_sync", lambda self: None)


@contextmanager
def _lazy_commit() -> Iterator[None]:
    """Each transaction is committed when the next one begins: acknowledged before it is durable."""
    every, transaction = Store.all, Store.transaction
    waiting: set[int] = set()

    def all_(self: Store, sql: str, *values: Any) -> Any:
        if sql == "COMMIT":
            waiting.add(id(self))
            return []
        if sql.startswith("PRAGMA wal_checkpoint"):
            flush(self)
        return every(self, sql, *values)

    def flush(self: Store) -> None:
        if id(self) in waiting and self._connection.in_transaction:
            every(self, "COMMIT")
        waiting.discard(id(self))

    def begin(self: Store) -> Any:
        flush(self)
        return transaction(self)

    with mock.patch.multiple(Store, all=all_, transaction=begin):
        yield


def _refund(store: Store, job: str) -> None:
    sql = "SELECT lineage, charge, scientist FROM job_datasets JOIN jobs ON id = job WHERE job = ?"
    for lineage, raw, scientist in store.all(sql, job):
        charge = codec.decode(Charge, raw)
        for whose in (catalog.EVERYONE, scientist):
            had = catalog.account(store, lineage, whose)
            rest = tuple(a - b for a, b in zip(had.rdp_nano, charge.rdp_nano, strict=True))
            back = catalog.Account(rest, had.delta_femto - charge.delta_femto, had.jobs - 1)
            catalog.set_account(store, lineage, whose, back)


@contextmanager
def _refund_on_crash() -> Iterator[None]:
    real = ledger.settle_left

    def settle(store: Store) -> None:
        for (job,) in store.all("SELECT id FROM jobs WHERE state IN ('reserved', 'running')"):
            _refund(store, job)
        real(store)

    with mock.patch.object(ledger, "settle_left", settle):
        yield


def _floats() -> Any:
    def fits(total: Any, capacity: Any) -> bool:
        pairs = zip(total, capacity, strict=True)
        return any(t <= c or math.isclose(t, c, rel_tol=1e-9) for t, c in pairs)

    return mock.patch.object(filters, "fits", fits)


@contextmanager
def _reserve_late() -> Iterator[None]:
    """Keys first; the charge with the commit."""
    reserve, commit = ledger.reserve, ledger.commit

    def promise(store: Store, id: str) -> None:
        with store.transaction():
            store.run(
                "UPDATE jobs SET state = 'reserved', boot = ?, granted = ? WHERE id = ?",
                store.boot, store.size() - 1, id,
            )  # fmt: skip

    def late(store: Store, id: str, **more: Any) -> Any:
        with store.transaction():
            store.run("UPDATE jobs SET state = 'queued' WHERE id = ?", id)
        reserve(store, id)
        with store.transaction():
            store.run("UPDATE jobs SET state = 'running' WHERE id = ?", id)
        return commit(store, id, **more)

    with mock.patch.multiple(ledger, reserve=promise, commit=late):
        yield


def _run_again() -> Any:
    """The next boot goes on with a job and does not say so."""

    def take(store: Store, id: str) -> Any:
        store.run("UPDATE jobs SET state = 'reserved', boot = ? WHERE id = ?", store.boot, id)
        return store.link(ledger.job(store, id).granted or 0)

    return mock.patch.object(ledger, "take_over", take)


def _witnesses_not_asked() -> Any:
    return mock.patch.object(ledger, "witnessed", lambda *_: True)


def _old_heads_are_forgotten() -> Any:
    return mock.patch.object(Service, "remembers", lambda self, text: None)


@contextmanager
def _stale_heads() -> Iterator[None]:
    """Who asks for the log's head gets the first that a start of the server signed."""
    real, first = Publisher.checkpoint, weakref.WeakKeyDictionary[Publisher, Any]()

    def checkpoint(self: Publisher) -> Any:
        return first.get(self) or first.setdefault(self, real(self))

    with mock.patch.object(Publisher, "checkpoint", checkpoint):
        yield


def _offset_before_bytes() -> Any:
    real = Uploads.append

    class Lazy:
        """A file whose sync does nothing."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return (lambda: None) if name == "sync" else getattr(self._file, name)

    def append(self: Any, owner: str, name: str, offset: int, piece: bytes) -> int:
        disk = self._disk

        class Disk:
            def __getattr__(self, what: str) -> Any:
                return getattr(disk, what)

            def open(self, path: str, **how: Any) -> Any:
                return Lazy(disk.open(path, **how))

        self._disk = Disk()
        try:
            return real(self, owner, name, offset, piece)
        finally:
            self._disk = disk

    return mock.patch.object(Uploads, "append", append)


@contextmanager
def _result_without_sync() -> Iterator[None]:
    """The commit names a result that the power can still take away."""
    real = release.seal_result

    def seal(disk: Any, *rest: Any) -> Any:
        class Disk:
            def __getattr__(self, what: str) -> Any:
                return getattr(disk, what)

            def sync_folder(self, folder: str) -> None:
                pass

        return real(Disk(), *rest)

    with mock.patch.object(run.release, "seal_result", seal):
        yield


# name -> the bug, and the runs of which one must find it.
BUGS: Final[dict[str, tuple[Bug, tuple[dict[str, Any], ...]]]] = {
    name: (bug, tuple(runs))
    for name, bug, runs in (
        ("no sync of the ledger", _no_sync, _seeds(60)),
        ("acknowledged before the commit", _lazy_commit, _seeds(60)),
        ("refund on a crash", _refund_on_crash, _seeds(60)),
        ("floats at the boundary", _floats, _seeds(60)),
        ("reserved after the run", _reserve_late, _seeds(60)),
        ("run again after a crash", _run_again, _seeds(60)),
        ("witnesses not asked", _witnesses_not_asked, _seeds(60)),
        ("rollbacks not noticed", _old_heads_are_forgotten, _seeds(60, fates=("restore",))),
        ("heads that lag", _stale_heads, _seeds(60, fates=("restore",))),
        ("upload acknowledged without sync", _offset_before_bytes, _places(180, 360)),
        ("result committed without sync", _result_without_sync, _seeds(60, fates=("power",) * 3)),
    )
}


def find(name: str) -> int:
    """After how many runs a bug is found; :class:`AssertionError` if it is not, or if the run that
    finds it fails without it too."""
    bug, runs = BUGS[name]
    for number in range(BASES):
        base(number)  # what runs begin with is made without the bug
    for count, options in enumerate(runs, 1):
        try:
            with bug():
                run_(**options)
        except (Violation, CasemateError):
            run_(**options)  # the same life without the bug is sound
            return count
    raise AssertionError(f"{name} is not found")

"""Bugs put in on purpose: each must be found by a few runs, or the harness proves nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

from casemate.accounting import filters
from casemate.ledger import catalog, ledger, vfs
from casemate.ledger.store import Store
from casemate.server import release, run
from casemate.server.uploads import Uploads
from casemate.spec import codec
from casemate.spec.data import DatasetKey
from casemate.spec.job import Charge
from casemate.spec.messages import RunDataset

Bug = Callable[[], "contextlib.AbstractContextManager[Any]"]


def _no_sync() -> Any:
    return mock.patch.object(vfs._File, "_sync", lambda self: None)


@contextmanager
def _lazy_commit() -> Iterator[None]:
    """Each transaction is committed when the next one begins: acknowledged before it is durable."""
    real_all = Store.all

    def all_(self: Store, sql: str, *values: Any) -> Any:
        if sql == "COMMIT":
            return []
        wanted = sql == "BEGIN IMMEDIATE" or sql.startswith("PRAGMA wal_checkpoint")
        if wanted and self._connection.in_transaction:
            real_all(self, "COMMIT")
        return real_all(self, sql, *values)

    def transaction(self: Store) -> Any:
        @contextmanager
        def act() -> Iterator[None]:
            with self._lock:
                self.run("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._undo()
                    raise

        return act()

    with (
        mock.patch.object(Store, "all", all_),
        mock.patch.object(Store, "transaction", transaction),
    ):
        yield


def _refund(store: Store, job: str) -> None:
    sql = "SELECT lineage, charge FROM job_datasets WHERE job = ?"
    for lineage, raw in store.all(sql, job):
        charge = codec.decode(Charge, raw)
        for place, nano in enumerate(charge.rdp_nano):
            store.run(
                "UPDATE spent SET rdp_nano = rdp_nano - ? WHERE lineage = ? AND place = ?",
                nano, lineage, place,
            )  # fmt: skip
        store.run(
            "UPDATE lineages SET delta_femto = delta_femto - ?, jobs = jobs - 1 WHERE id = ?",
            charge.delta_femto, lineage,
        )  # fmt: skip


@contextmanager
def _refund_on_crash() -> Iterator[None]:
    real = Store.append

    def append(self: Store, kind: Any, subject: str, body: object) -> Any:
        if kind == "abandon":
            _refund(self, subject)
        return real(self, kind, subject, body)

    with mock.patch.object(Store, "append", append):
        yield


def _floats() -> Any:
    def fits(total: Any, capacity: Any) -> bool:
        pairs = zip(total, capacity, strict=True)
        return any(t <= c or math.isclose(t, c, rel_tol=1e-9) for t, c in pairs)

    return mock.patch.object(filters, "fits", fits)


def _keys(store: Store, id: str) -> tuple[RunDataset, ...]:
    out = []
    for use in ledger.quotes.get(store, ledger.job(store, id).quote).quote.request.datasets:
        raw = store.one("SELECT key FROM dataset_keys WHERE dataset = ?", use.dataset)[0]
        opened = codec.decode(DatasetKey, raw)
        schema = catalog.dataset(store, use.dataset).registration.schema
        out.append(RunDataset(dataset=use.dataset, schema=schema, key=opened.key, salt=opened.salt))
    return tuple(out)


@contextmanager
def _reserve_late() -> Iterator[None]:
    """Keys first; the charge with the commit."""
    reserve, begin, commit = ledger.reserve, ledger.begin, ledger.commit

    def late(store: Store, id: str, **more: Any) -> Any:
        reserve(store, id)
        begin(store, id)
        return commit(store, id, **more)

    with (
        mock.patch.object(ledger, "reserve", lambda store, id: None),
        mock.patch.object(ledger, "begin", _keys),
        mock.patch.object(ledger, "commit", late),
    ):
        yield


@contextmanager
def _run_again() -> Iterator[None]:
    """After a crash a job that was running is put into the queue once more, its charge kept."""
    real = Store.open

    def open_(*given: Any, **named: Any) -> Store:
        store = real(*given, **named)
        with store.transaction():
            store.run(
                "UPDATE jobs SET state = 'queued', error = NULL, message = '', boot = NULL,"
                " ended = NULL, reserved = NULL WHERE error = 'job.abandoned'"
            )
        return store

    with mock.patch.object(Store, "open", open_):
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


# name -> the bug, and within how many simulations it must be found.
BUGS: Final[dict[str, tuple[Bug, int]]] = {
    "no sync of the ledger": (_no_sync, 60),
    "acknowledged before the commit": (_lazy_commit, 60),
    "refund on a crash": (_refund_on_crash, 60),
    "floats at the boundary": (_floats, 120),
    "reserved after the run": (_reserve_late, 60),
    "run again after a crash": (_run_again, 120),
    "upload acknowledged without sync": (_offset_before_bytes, 120),
    "result committed without sync": (_result_without_sync, 120),
}

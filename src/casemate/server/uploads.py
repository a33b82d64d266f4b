"""Resumable upload of sealed bytes (after draft-ietf-httpbis-resumable-upload, the plain part).

A piece is appended only at the offset that the server holds, and acknowledged only when it is
durable: first the bytes, then the offset, in one of two slots in turn, each with a check, so that a
torn write leaves the other. After a crash the file is cut to the newest valid offset. Uploads end
by count, never by the clock: an identity that begins one too many loses its oldest unused one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

from casemate.ledger import catalog
from casemate.ledger.sealed import failure
from casemate.ledger.store import Store
from casemate.seams import Disk, File
from casemate.server import records
from casemate.server.config import Limits
from casemate.spec.errors import DataError, LedgerError, LimitError

FOLDER: Final = "uploads"
_SLOT: Final = 24


def data_path(name: str) -> str:
    """Where an upload's bytes lie on the Disk."""
    return f"{FOLDER}/{name}"


def _offset_path(name: str) -> str:
    return f"{FOLDER}/{name}.offset"


def _slot(count: int, offset: int) -> bytes:
    head = count.to_bytes(8, "big") + offset.to_bytes(8, "big")
    return head + hashlib.sha256(head).digest()[:8]


def _read_slots(raw: bytes) -> tuple[int, int]:
    """(count, offset) of the newest valid slot; (0, 0) when there is none."""
    best = (0, 0)
    for at in (0, _SLOT):
        slot = raw[at : at + _SLOT]
        count, offset = int.from_bytes(slot[:8], "big"), int.from_bytes(slot[8:16], "big")
        if len(slot) == _SLOT and slot == _slot(count, offset):
            best = max(best, (count, offset))
    return best


class Uploads:
    """Sealed bytes on the Disk, their records in the store."""

    def __init__(self, disk: Disk, store: Store, limits: Limits) -> None:
        self._disk, self._store, self._limits = disk, store, limits
        self._begun: dict[str, int] = {}
        self._stopped: LedgerError | None = None
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        disk.make_folder(FOLDER)
        disk.sync_folder(".")
        self._sweep()

    def _sweep(self) -> None:
        """Remove bytes that no record names, of a begin or a drop that a crash cut short, and those
        of a revocation, or of a model's end, that it cut short."""
        files, keyless = set(self._disk.list(FOLDER)), records.keyless_uploads(self._store)
        for upload in catalog.uploads(self._store):
            whole = {upload.id, f"{upload.id}.offset"} <= files
            if whole and upload.id not in keyless:
                files -= {upload.id, f"{upload.id}.offset"}
            elif upload.used_by is None or upload.id in keyless:
                catalog.drop_upload(self._store, upload.id)
        for file in sorted(files):
            self._disk.remove(f"{FOLDER}/{file}")
        self._disk.sync_folder(FOLDER)

    def _sync(self, sync: Callable[[], None]) -> None:
        """``sync`` is never tried again: after an error the kernel may have dropped what it shows,
        so that nothing here is told any more (``ledger.stopped``, which ends the server)."""
        try:
            sync()
        except OSError as e:
            self._stopped = failure(e)
            raise self._stopped from e

    def _require_sound(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def begin(self, owner: str, size: int) -> str:
        """A new upload of ``size`` bytes; its id. Raises ``limit.upload``, ``limit.quota``."""
        self._require_sound()
        limits = self._limits
        if not 1 <= size <= limits.upload_bytes:
            raise LimitError(
                "limit.upload",
                f"An upload of {size} bytes is asked for; 1 to {limits.upload_bytes} are allowed.",
                mend="Split the dataset, or ask the operator for a higher limit.",
            )
        mine = [u for u in catalog.uploads(self._store) if u.owner == owner]
        idle = [u for u in mine if u.used_by is None]
        idle.sort(key=lambda u: self._begun.get(u.id, -1))  # those of earlier boots first
        for old in idle[: max(0, len(idle) - limits.open_uploads + 1)]:
            self.drop(old.id)
            mine.remove(old)
        if sum(u.size for u in mine) + size > limits.identity_bytes:
            raise LimitError(
                "limit.quota",
                f"This identity's uploads would come to more than {limits.identity_bytes} bytes.",
                mend="Revoke datasets that are no longer needed.",
            )
        name = catalog.add_upload(self._store, owner, size)
        for path in (data_path(name), _offset_path(name)):
            file = self._disk.open(path, create=True, exclusive=True)
            self._sync(file.sync)
            file.close()
        self._sync(lambda: self._disk.sync_folder(FOLDER))
        self._begun[name] = len(self._begun)
        return name

    def offset(self, name: str) -> int:
        """Durable bytes so far."""
        self._require_sound()
        file = self._disk.open(_offset_path(name))
        try:
            return _read_slots(file.read(0, 2 * _SLOT))[1]
        finally:
            file.close()

    async def take(self, owner: str, name: str, offset: int, piece: bytes) -> int:
        """:meth:`append` off the event loop, one piece of an upload at a time."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        async with lock:
            return await asyncio.to_thread(self.append, owner, name, offset, piece)

    def append(self, owner: str, name: str, offset: int, piece: bytes) -> int:
        """Append at ``offset``; the new offset, durable. ``limit.offset`` (409) when it is not the
        upload's, ``limit.upload`` when the piece reaches past the size stated at its begin."""
        upload = catalog.upload(self._store, name, owner)
        here = self.offset(name)
        if offset != here or upload.used_by is not None:
            raise LimitError(
                "limit.offset",
                f"The upload stands at {here}, the piece begins at {offset}.",
                mend="Ask for the offset with HEAD and go on from there.",
                status=409,
            )
        if not piece or here + len(piece) > upload.size:
            raise LimitError(
                "limit.upload",
                f"A piece of {len(piece)} bytes at {here} does not fit {upload.size} bytes.",
                mend="Send at least one byte, and no more than was announced.",
            )
        file = self._disk.open(data_path(name))
        try:
            file.truncate(here)  # a torn tail of an earlier attempt
            file.write(here, piece)
            self._sync(file.sync)
        finally:
            file.close()
        here += len(piece)
        self._state(self._disk.open(_offset_path(name)), here)
        return here

    def _state(self, file: File, offset: int) -> None:
        try:
            count = _read_slots(file.read(0, 2 * _SLOT))[0] + 1
            file.write(_SLOT * (count % 2), _slot(count, offset))
            self._sync(file.sync)
        finally:
            file.close()

    def complete(self, owner: str, name: str, *, unused: bool = False) -> int:
        """The size of ``owner``'s upload, all of whose bytes are there.

        Raises ``data.unknown-upload``, ``data.upload-incomplete``, ``data.upload-used`` (where
        ``unused`` is wanted).
        """
        found = catalog.upload(self._store, name, owner)
        size = found.size
        if unused and found.used_by is not None:
            raise DataError(
                "data.upload-used",
                "The upload is already part of something else.",
                mend="Upload again; each upload serves once.",
                where="upload",
                status=409,
            )
        here = self.offset(name)
        if here != size:
            raise DataError(
                "data.upload-incomplete",
                f"The upload has {here} of {size} bytes.",
                mend="Resume the upload, then repeat the request.",
                where="upload",
                status=409,
            )
        return size

    def drop(self, name: str) -> None:
        """Forget an upload and its bytes."""
        catalog.drop_upload(self._store, name)
        for path in (data_path(name), _offset_path(name)):
            with contextlib.suppress(FileNotFoundError):
                self._disk.remove(path)
        self._sync(lambda: self._disk.sync_folder(FOLDER))
        self._begun.pop(name, None)

    def descriptor(self, name: str) -> int:
        """A read-only descriptor of the bytes, for a worker; the caller closes it."""
        file = self._disk.open(data_path(name))
        try:
            return file.descriptor()
        finally:
            file.close()

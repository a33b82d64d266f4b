"""SQLite's file system on a :class:`~casemate.seams.Disk`.

One VFS, ``casemate``, serves every store of the process; the first part of a file's name says which
mount, and so which Disk, it lies on. It has only what WAL mode with exclusive locking needs: the
WAL index lives in process memory, and one connection owns the store, so that locks do nothing.

An error of the disk is final: the mount refuses everything after it, because after a failed fsync
the kernel may have dropped the pages, and a second fsync would report success for lost data.
"""

# ruff: noqa: N802  (SQLite names these methods)

from __future__ import annotations

import atexit
import itertools
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, TypeVar

import apsw

from casemate.seams import Disk, File

T = TypeVar("T")

_NAME: Final = "casemate"
# sqlite3mc stacks its encryption on our VFS under this name.
_SEALED: Final = "multipleciphers-" + _NAME
_SECTOR: Final = 4096

_mounts: Final[dict[str, Mount]] = {}
_numbers: Final = itertools.count()
_registered: Final[list[apsw.VFS]] = []


class Mount:
    """A folder of a Disk that holds stores; ``failed`` is the first error met."""

    def __init__(self, disk: Disk, folder: str) -> None:
        if not _registered:
            _registered.append(_Vfs())
            atexit.register(_let_go)
        self.disk = disk
        self.folder = folder
        self.failed: Exception | None = None
        self._name = str(next(_numbers))
        _mounts[self._name] = self

    def uri(self, name: str) -> str:
        """What to open a connection with, for the encrypted database ``name``."""
        return f"file:{self._name}/{name}?vfs={_SEALED}"

    def close(self) -> None:
        _mounts.pop(self._name, None)

    def attempt(self, code: int, action: Callable[[], T]) -> T:
        """``action``'s result; its error stops the mount and becomes SQLite's ``code``."""
        if self.failed is None:
            try:
                return action()
            except Exception as e:  # whatever a Disk raises, the store must stop
                self.failed = e
        raise apsw.exception_for(code) from self.failed


def _let_go() -> None:
    """At exit: SQLite must not call a file system that the interpreter has taken down."""
    for connection in apsw.connections():
        with suppress(apsw.Error):
            connection.close(True)


def _find(name: str) -> tuple[Mount, str]:
    number, _, rest = name.partition("/")
    mount = _mounts.get(number)
    if mount is None:
        raise apsw.CantOpenError(f"no disk is mounted for {name!r}")
    return mount, f"{mount.folder}/{rest}"


class _Quiet:
    def excepthook(
        self,
        etype: type[BaseException] | None,
        evalue: BaseException | None,
        etraceback: TracebackType | None,
    ) -> bool:
        """Where SQLite cannot pass an error on (at closing, in a rollback), the mount has it."""
        return True


class _File(_Quiet, apsw.VFSFile):
    def __init__(self, mount: Mount, file: File, *, fresh: bool) -> None:
        self._mount = mount
        self._file = file
        self._fresh = fresh  # its name is not yet durable

    def xRead(self, amount: int, offset: int) -> bytes:
        return self._mount.attempt(apsw.SQLITE_IOERR_READ, lambda: self._file.read(offset, amount))

    def xWrite(self, data: Any, offset: int) -> None:
        self._mount.attempt(apsw.SQLITE_IOERR_WRITE, lambda: self._file.write(offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        self._mount.attempt(apsw.SQLITE_IOERR_TRUNCATE, lambda: self._file.truncate(size))

    def xSync(self, flags: int) -> None:
        self._mount.attempt(apsw.SQLITE_IOERR_FSYNC, self._sync)

    def _sync(self) -> None:
        self._file.sync()
        if self._fresh:
            self._mount.disk.sync_folder(self._mount.folder)
            self._fresh = False

    def xFileSize(self) -> int:
        return self._mount.attempt(apsw.SQLITE_IOERR_FSTAT, self._file.size)

    def xClose(self) -> None:
        # Nothing depends on closing, and a stopped mount must still let go of its files.
        self._file.close()

    def xLock(self, level: int) -> None:
        pass

    def xUnlock(self, level: int) -> None:
        pass

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, op: int, ptr: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return _SECTOR

    def xDeviceCharacteristics(self) -> int:
        return 0  # promise nothing: a torn write may damage its whole sector


class _Vfs(_Quiet, apsw.VFS):
    def __init__(self) -> None:
        super().__init__(_NAME, "")

    def xOpen(self, name: Any, flags: list[int]) -> _File:
        if name is None:
            raise apsw.CantOpenError("temporary files are not allowed: they would not be sealed")
        mount, path = _find(name.filename() if isinstance(name, apsw.URIFilename) else name)
        create = bool(flags[0] & apsw.SQLITE_OPEN_CREATE)
        fresh = not mount.attempt(apsw.SQLITE_CANTOPEN, lambda: mount.disk.exists(path))
        if fresh and not create:
            raise apsw.CantOpenError(f"{path!r} does not exist")
        flags[1] = flags[0]
        file = mount.attempt(apsw.SQLITE_CANTOPEN, lambda: mount.disk.open(path, create=create))
        return _File(mount, file, fresh=fresh)

    def xDelete(self, name: str, sync: bool) -> None:
        mount, path = _find(name)

        def delete() -> None:
            mount.disk.remove(path)
            if sync:
                mount.disk.sync_folder(mount.folder)

        mount.attempt(apsw.SQLITE_IOERR_DELETE, delete)

    def xAccess(self, name: str, flags: int) -> bool:
        mount, path = _find(name)
        return mount.attempt(apsw.SQLITE_IOERR_ACCESS, lambda: mount.disk.exists(path))

    def xFullPathname(self, name: str) -> str:
        return name

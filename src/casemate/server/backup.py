"""A backup: one file with all that a state folder holds, as it lies there, sealed.

A tar (POSIX pax), deterministic: first ``manifest.json`` (:class:`Backup`), in clear: each file's
path, size and SHA-256, and the log's newest signed checkpoint, by which its age can be seen. No key
is in it: the sealing key stays with the TEE. A restore verifies the whole before it writes, and
marks the folder from the first byte to the last (``keeping``), so that nothing starts on a part.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from typing import Final

from casemate.seams import Disk, File
from casemate.server import keeping
from casemate.server.keeping import Restored
from casemate.spec import codec
from casemate.spec.codec import value
from casemate.spec.errors import FormatError, LedgerError

PIECE: Final = 1 << 20
MAX_MANIFEST: Final = 1 << 26
MANIFEST: Final = "manifest.json"
# What a state consists of, by folder. Not among it: keys of a simulated TEE, collateral, the lock.
FILES: Final = {
    "ledger": re.compile(r"store\.db(-wal)?|generation"),
    "uploads": re.compile(r"[A-Za-z0-9_]+(\.offset)?"),
    "results": re.compile(r"[A-Za-z0-9_]+"),
    "states": re.compile(r"[A-Za-z0-9_]+\.[0-9]+"),
    "tee": re.compile(r"tpm-sealed\.bin"),
    "handover": re.compile(r"store\.db|request\.json|grant\.json"),
}
# What else may lie in a folder that is restored into.
_IGNORED: Final = {"lock"}
# All that a restore leaves which was cut short before its mark stood.
_BEGUN: Final = {keeping.MARK_FILE.removeprefix("ledger/") + ".new"}


@value("backup-file/v1")
class BackupFile:
    """``sha256``: 32 bytes."""

    path: str
    size: int
    sha256: bytes

    def __post_init__(self) -> None:
        folder, _, name = self.path.partition("/")
        if folder not in FILES or not FILES[folder].fullmatch(name):
            raise ValueError(f"{self.path[:80]!r} is no file of a state")
        if self.size < 0 or len(self.sha256) != 32:
            raise ValueError("a file has a size and a digest of 32 bytes")


@value("backup/v1")
class Backup:
    """``checkpoint``: the log's newest head, a signed note, or ``None`` where the store was not
    opened to sign one. ``files`` in the order in which they follow."""

    software: str
    checkpoint: str | None
    files: tuple[BackupFile, ...]

    def __post_init__(self) -> None:
        if len({f.path for f in self.files}) != len(self.files):
            raise ValueError("a file stands in it twice")


class _Stream(io.RawIOBase):
    """A File from its beginning on, for tarfile."""

    def __init__(self, file: File) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._file.size())[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        count = max(0, self._file.size() - self._at) if size is None or size < 0 else size
        data = self._file.read(self._at, count)
        self._at += len(data)
        return data

    def write(self, data: object) -> int:
        raw = bytes(data)  # type: ignore[call-overload]
        self._file.write(self._at, raw)
        self._at += len(raw)
        return len(raw)


def paths(disk: Disk) -> Iterator[str]:
    """The files of a state, in order."""
    for folder, form in sorted(FILES.items()):
        try:
            names = disk.list(folder)
        except FileNotFoundError:
            continue
        yield from (f"{folder}/{name}" for name in names if form.fullmatch(name))


def _pieces(file: File) -> Iterator[bytes]:
    at = 0
    while piece := file.read(at, PIECE):
        yield piece
        at += len(piece)


def _entry(disk: Disk, path: str) -> BackupFile:
    file, digest, size = disk.open(path), hashlib.sha256(), 0
    try:
        for piece in _pieces(file):
            digest.update(piece)
            size += len(piece)
    finally:
        file.close()
    return BackupFile(path=path, size=size, sha256=digest.digest())


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info


def write(disk: Disk, out: File, *, software: str, checkpoint: str | None) -> Backup:
    """Write the backup of a state that nobody changes; durable on return."""
    found = Backup(
        software=software,
        checkpoint=checkpoint,
        files=tuple(_entry(disk, path) for path in paths(disk)),
    )
    out.truncate(0)
    raw = codec.encode(found)
    with tarfile.open(fileobj=_Stream(out), mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(_info(MANIFEST, len(raw)), io.BytesIO(raw))
        for entry in found.files:
            file = disk.open(entry.path)
            try:
                tar.addfile(_info(entry.path, entry.size), _Stream(file))
            finally:
                file.close()
    out.sync()
    return found


def _bad(message: str, where: str = "") -> FormatError:
    return FormatError(
        "format.backup",
        message,
        mend="Take another copy of the backup; this one restores nothing.",
        where=where,
    )


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, io.BufferedIOBase]]:
    for info in tar:
        file = tar.extractfile(info) if info.isreg() else None
        if file is None:
            raise _bad(f"{info.name[:80]!r} in the backup is no plain file.", info.name[:80])
        yield info, file  # type: ignore[misc]


def _contents(source: File) -> Iterator[tuple[BackupFile | None, bytes]]:
    """The manifest, as (None, bytes), then each file piece by piece."""
    try:
        with tarfile.open(fileobj=_Stream(source), mode="r:") as tar:
            members = _members(tar)
            info, first = next(members, (None, None))
            if info is None or first is None or info.name != MANIFEST or info.size > MAX_MANIFEST:
                raise _bad("The backup does not begin with its manifest.")
            raw = first.read()
            yield None, raw
            for entry in codec.decode(Backup, raw, limit=MAX_MANIFEST).files:
                info, file = next(members, (None, None))
                if (
                    info is None
                    or file is None
                    or (info.name, info.size) != (entry.path, entry.size)
                ):
                    raise _bad(f"{entry.path} is missing from the backup.", entry.path)
                yield entry, b""
                while piece := file.read(PIECE):
                    yield entry, piece
            if next(members, None) is not None:
                raise _bad("The backup holds more than its manifest names.")
    except (tarfile.TarError, EOFError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise _bad(f"The backup cannot be read: {e}.") from None


def read(source: File) -> Backup:
    """The manifest of a backup, all of whose files are as it says. Raises ``format.backup``."""
    found: Backup | None = None
    digests: dict[str, hashlib._Hash] = {}
    for entry, piece in _contents(source):
        if entry is None:
            found = codec.decode(Backup, piece, limit=MAX_MANIFEST)
        else:
            digests.setdefault(entry.path, hashlib.sha256()).update(piece)
    assert found is not None
    for entry in found.files:
        if digests[entry.path].digest() != entry.sha256:
            raise _bad(f"{entry.path} in the backup was changed.", entry.path)
    return found


def restore(source: File, disk: Disk) -> Backup:
    """Put a backup into an empty folder, or one where a restore was cut short.

    Raises ``format.backup`` before anything is written, ``ledger.restore`` for another folder.
    """
    found = read(source)
    _make_empty(disk)
    keeping.set_mark(disk, Restored(whole=False, checkpoint=found.checkpoint))
    disk.sync_folder(".")
    file: File | None = None
    at, folders = 0, set[str]()
    for entry, piece in _contents(source):
        if entry is None:
            continue
        if not piece:
            _finish(file)
            folders.add(folder := entry.path.partition("/")[0])
            disk.make_folder(folder)
            file, at = disk.open(entry.path, create=True, exclusive=True), 0
        elif file is not None:
            file.write(at, piece)
            at += len(piece)
    _finish(file)
    for folder in sorted(folders):
        disk.sync_folder(folder)
    disk.sync_folder(".")
    keeping.set_mark(disk, Restored(whole=True, checkpoint=found.checkpoint))
    return found


def _finish(file: File | None) -> None:
    if file is not None:
        file.sync()
        file.close()


def _make_empty(disk: Disk) -> None:
    there = [name for name in disk.list(".") if name not in _IGNORED]
    found = keeping.mark(disk)
    unmarked = found is None and there == ["ledger"] and set(disk.list("ledger")) <= _BEGUN
    if there and not unmarked and (found is None or found.whole):
        raise LedgerError(
            "ledger.restore",
            "The folder is not empty; a backup is never restored over a state.",
            mend="Name an empty folder with --state.",
            where=there[0],
        )
    for path in paths(disk):
        disk.remove(path)

"""Disk: the state folder as an object.

All paths are relative to the folder, with ``/`` between parts. What was written is durable only
after ``File.sync`` (and ``Disk.sync_folder`` for a name); until then a crash may lose, tear or
reorder it. An error of sync is final: the caller must stop, never sync again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class File(Protocol):
    def read(self, offset: int, count: int) -> bytes:
        """Up to ``count`` bytes from ``offset``; fewer only at the end."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data`` at ``offset``."""

    def truncate(self, size: int) -> None:
        """Cut or extend with zeros to ``size`` bytes."""

    def size(self) -> int:
        """Bytes in the file."""

    def sync(self) -> None:
        """Return only when all that was written is durable."""

    def close(self) -> None:
        """Let the file go; nothing is made durable by it."""

    def descriptor(self) -> int:
        """A new read-only, close-on-exec descriptor of the content, to hand to another process."""


class Disk(Protocol):
    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> File:
        """Open for reading and writing. Raises FileNotFoundError or FileExistsError."""

    def exists(self, path: str) -> bool: ...

    def remove(self, path: str) -> None: ...

    def rename(self, old: str, new: str) -> None:
        """Atomically replace ``new`` by ``old``."""

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted."""

    def make_folder(self, folder: str) -> None:
        """Make it and its parents; no error if it is there."""

    def sync_folder(self, folder: str) -> None:
        """Make names created, renamed or removed in ``folder`` durable."""


class _OsFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, count: int) -> bytes:
        parts: list[bytes] = []
        while count > 0 and (part := os.pread(self._fd, count, offset)):
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view = view[done:]
            offset += done

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def descriptor(self) -> int:
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)


class OsDisk:
    """A real folder, mode 0700; files 0600."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, path: str) -> Path:
        parts = path.split("/")
        if path.startswith("/") or any(p in ("", "..") for p in parts):
            raise ValueError(f"{path!r} is no path inside the state folder")
        return self.root / path

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> File:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_CREAT if create else 0
        flags |= os.O_EXCL if exclusive else 0
        return _OsFile(os.open(self._path(path), flags, 0o600))

    def exists(self, path: str) -> bool:
        return self._path(path).exists()

    def remove(self, path: str) -> None:
        self._path(path).unlink()

    def rename(self, old: str, new: str) -> None:
        self._path(old).replace(self._path(new))

    def list(self, folder: str) -> list[str]:
        return sorted(os.listdir(self._path(folder)))

    def make_folder(self, folder: str) -> None:
        self._path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)

    def sync_folder(self, folder: str) -> None:
        fd = os.open(self._path(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

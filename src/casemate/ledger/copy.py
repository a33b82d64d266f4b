"""A Disk whose changes stay in memory, to look at a store without touching it."""

from __future__ import annotations

import io

from casemate.seams import Disk, File


class _MemoryFile:
    def __init__(self, data: bytes) -> None:
        self._data = bytearray(data)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        self._data.extend(bytes(max(0, offset - len(self._data))))
        self._data[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        del self._data[size:]
        self._data.extend(bytes(size - len(self._data)))

    def size(self) -> int:
        return len(self._data)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def descriptor(self) -> int:
        raise io.UnsupportedOperation("a copy in memory has no descriptor")


class CopyDisk:
    """Starts as ``disk`` is; a file is copied into memory when it is first opened."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._files: dict[str, _MemoryFile | None] = {}

    def _find(self, path: str) -> _MemoryFile | None:
        if path not in self._files:
            self._files[path] = None
            if self._disk.exists(path):
                file = self._disk.open(path)
                self._files[path] = _MemoryFile(file.read(0, file.size()))
                file.close()
        return self._files[path]

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> File:
        file = self._find(path)
        if file is not None and exclusive:
            raise FileExistsError(path)
        if file is None:
            if not create:
                raise FileNotFoundError(path)
            file = self._files[path] = _MemoryFile(b"")
        return file

    def exists(self, path: str) -> bool:
        return self._find(path) is not None

    def remove(self, path: str) -> None:
        self._files[path] = None

    def rename(self, old: str, new: str) -> None:
        self._files[new], self._files[old] = self._find(old), None

    def list(self, folder: str) -> list[str]:
        return self._disk.list(folder)

    def make_folder(self, folder: str) -> None:
        pass

    def sync_folder(self, folder: str) -> None:
        pass

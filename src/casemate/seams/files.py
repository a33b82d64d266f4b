"""Small files on a Disk: whole or not at all."""

from __future__ import annotations

from casemate.seams.disk import Disk


def load(disk: Disk, path: str) -> bytes | None:
    """A file's bytes, or None where there is none."""
    if not disk.exists(path):
        return None
    file = disk.open(path)
    try:
        return file.read(0, file.size())
    finally:
        file.close()


def _folder(path: str) -> str:
    return path.rpartition("/")[0] or "."


def store(disk: Disk, path: str, data: bytes) -> None:
    """Write whole or not at all: a crash leaves no torn file under ``path``."""
    folder = _folder(path)
    disk.make_folder(folder)
    new = f"{path}.new"
    file = disk.open(new, create=True)
    try:
        file.truncate(0)
        file.write(0, data)
        file.sync()
    finally:
        file.close()
    disk.rename(new, path)
    disk.sync_folder(folder)


def remove(disk: Disk, path: str) -> None:
    """No error if it is not there."""
    if disk.exists(path):
        disk.remove(path)
        disk.sync_folder(_folder(path))

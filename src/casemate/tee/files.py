"""Small files of the state folder: whole or not at all."""

from __future__ import annotations

from casemate.seams import Disk


def load(disk: Disk, path: str) -> bytes | None:
    """A file's bytes, or None where there is none."""
    if not disk.exists(path):
        return None
    file = disk.open(path)
    try:
        return file.read(0, file.size())
    finally:
        file.close()


def store(disk: Disk, path: str, data: bytes) -> None:
    """Write whole or not at all: a crash leaves no torn file under ``path``."""
    folder = path.rpartition("/")[0]
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
        disk.sync_folder(path.rpartition("/")[0])

"""A Disk in memory with a power switch.

Until ``sync`` a write is pending: when the power fails each pending write is lost, kept or torn
(some of its 512-byte sectors arrive, and the last one of them perhaps in part), each by its own
draw, so that writes also arrive out of order. A created, removed or renamed name is pending until
``sync_folder``. A failed sync drops what was pending, as Linux does. All draws come from one seed.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator

from casemate.seams import File

SECTOR = 512


class PowerLoss(OSError):
    """The machine stopped; every later call raises it too."""


class _Node:
    def __init__(self, data: bytes = b"") -> None:
        self.durable = bytearray(data)
        self.now = bytearray(data)
        self.pending: list[tuple[int, bytes | None]] = []  # (offset, data) or (size, None)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


class SimDisk:
    """``fault``: (number of the call that fails, errno name or "POWER" or "SHORT").

    Calls are numbered from 1: read, write, truncate, sync, open that creates, remove, rename,
    make_folder, sync_folder. ``trace`` names each one made. ENOSPC stays once it has come.
    """

    def __init__(self, seed: int = 0, fault: tuple[int, str] | None = None) -> None:
        self._random = random.Random(seed)
        self.fault = fault
        self.trace: list[str] = []
        self.off = False
        self.lies = 0.0  # how often a sync says done and did nothing
        self.lied = False
        self.counts_opens = False  # plain opens are calls too, and can fail
        self.on_off: Callable[[], None] = lambda: None
        self._full = False
        self._names: dict[str, _Node] = {}
        self._durable_names: dict[str, _Node] = {}

    # Faults.

    def _step(self, what: str) -> bool:
        """Count a call; whether it must do only part of its work and then fail."""
        if self.off:
            raise PowerLoss(what)
        self.trace.append(what)
        due = self.fault is not None and len(self.trace) == self.fault[0]
        kind = self.fault[1] if self.fault is not None and due else ""
        if kind == "POWER":
            return True
        if kind == "ENOSPC":
            self._full = True
        if self._full and what.split()[0] in ("create", "write", "make_folder"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)
        if kind == "SHORT":
            return True
        if kind and kind != "ENOSPC":
            code = getattr(errno, kind)
            raise OSError(code, os.strerror(code), what)
        return False

    def _broken(self, what: str) -> Exception:
        if self.fault is not None and self.fault[1] == "POWER":
            self.turn_off()
            return PowerLoss(what)
        return OSError(errno.EIO, "short write", what)

    def turn_off(self) -> None:
        """From now on every call raises :class:`PowerLoss`."""
        self.off = True
        self.on_off()

    def _lie(self) -> bool:
        if not self.lies or self._random.random() >= self.lies:
            return False
        self.lied = True
        return True

    def power_cycle(self, *, clean: bool = False) -> SimDisk:
        """The disk as the next start finds it. ``clean``: as if all had been synced."""
        after = SimDisk(self._random.getrandbits(64))
        draw = self._random
        names = dict(self._durable_names)
        for name in sorted(set(self._names) | set(names)):
            if clean or draw.random() < 0.5:
                if name in self._names:
                    names[name] = self._names[name]
                else:
                    names.pop(name, None)
        for name, node in names.items():
            content = bytearray(node.now if clean else self._survivor(node))
            after._names[name] = after._durable_names[name] = _Node(bytes(content))
        return after

    def _survivor(self, node: _Node) -> bytearray:
        content = bytearray(node.durable)
        fate = self._random.choice(("lost", "kept", "torn"))
        for offset, data in node.pending:
            # Half of the time all pending writes share one fate; else each has its own.
            how = fate if fate != "torn" else self._random.choice(("lost", "kept", "torn"))
            if how == "kept" or (how == "torn" and data is None):
                _apply(content, offset, data)
            elif how == "torn" and data is not None:
                for start, part in self._torn(data):
                    _apply(content, offset + start, part)
        return content

    def _torn(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        for start in range(0, len(data), SECTOR):
            part = data[start : start + SECTOR]
            if self._random.random() < 0.5:
                cut = self._random.randrange(len(part) + 1) if self._random.random() < 0.2 else None
                yield start, part[:cut]

    # The Disk.

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> File:
        if self.off:
            raise PowerLoss("open")
        if path in self._names and exclusive:
            raise FileExistsError(path)
        if self.counts_opens and path in self._names and self._step(f"open {path}"):
            raise self._broken(path)
        if path not in self._names:
            if not create:
                raise FileNotFoundError(path)
            if self._step(f"create {path}"):
                raise self._broken(path)
            self._names[path] = _Node()
        return _SimFile(self, self._names[path], path)

    def exists(self, path: str) -> bool:
        if self.off:
            raise PowerLoss("exists")
        return path in self._names

    def remove(self, path: str) -> None:
        if self._step(f"remove {path}"):
            raise self._broken(path)
        if path not in self._names:
            raise FileNotFoundError(path)
        del self._names[path]

    def rename(self, old: str, new: str) -> None:
        if self._step(f"rename {old} {new}"):
            raise self._broken(old)
        self._names[new] = self._names.pop(old)

    def list(self, folder: str) -> list[str]:
        prefix = "" if folder == "." else folder + "/"
        found = {n[len(prefix) :].split("/")[0] for n in self._names if n.startswith(prefix)}
        return sorted(found)

    def make_folder(self, folder: str) -> None:
        if self._step(f"make_folder {folder}"):
            raise self._broken(folder)

    def sync_folder(self, folder: str) -> None:
        if self._step(f"sync_folder {folder}"):
            raise self._broken(folder)
        if self._lie():
            return
        prefix = "" if folder == "." else folder + "/"
        for name in set(self._names) | set(self._durable_names):
            if name.startswith(prefix) and "/" not in name[len(prefix) :]:
                if name in self._names:
                    self._durable_names[name] = self._names[name]
                else:
                    del self._durable_names[name]

    # For tests that play a hostile host.

    def snapshot(self) -> dict[str, bytes]:
        """All files as they are now."""
        return {name: bytes(node.now) for name, node in self._names.items()}

    @classmethod
    def of(cls, files: dict[str, bytes], seed: int = 0) -> SimDisk:
        """A disk that holds these files durably."""
        disk = cls(seed)
        for name, data in files.items():
            disk._names[name] = disk._durable_names[name] = _Node(data)
        return disk


class _SimFile:
    def __init__(self, disk: SimDisk, node: _Node, path: str) -> None:
        self._disk = disk
        self._node = node
        self._path = path

    def read(self, offset: int, count: int) -> bytes:
        if self._disk._step(f"read {self._path}"):
            raise self._disk._broken(self._path)
        return bytes(self._node.now[offset : offset + count])

    def _change(self, offset: int, data: bytes | None) -> None:
        _apply(self._node.now, offset, data)
        self._node.pending.append((offset, data))

    def write(self, offset: int, data: bytes) -> None:
        if self._disk._step(f"write {self._path}"):
            # Power: the write was under way. Short: half of it was done.
            power = self._disk.fault is not None and self._disk.fault[1] == "POWER"
            self._change(offset, data if power else data[: len(data) // 2])
            raise self._disk._broken(self._path)
        self._change(offset, data)

    def truncate(self, size: int) -> None:
        if self._disk._step(f"truncate {self._path}"):
            self._change(size, None)
            raise self._disk._broken(self._path)
        self._change(size, None)

    def size(self) -> int:
        if self._disk.off:
            raise PowerLoss("size")
        return len(self._node.now)

    def sync(self) -> None:
        try:
            if self._disk._step(f"sync {self._path}"):
                raise self._disk._broken(self._path)
        except OSError:
            self._node.pending.clear()  # the kernel forgets; `now` still shows them
            raise
        if self._disk._lie():
            return
        self._node.durable = bytearray(self._node.now)
        self._node.pending.clear()

    def close(self) -> None:
        pass

    def descriptor(self) -> int:
        fd = os.memfd_create("sim")
        os.write(fd, bytes(self._node.now))
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(fd)
        return reader

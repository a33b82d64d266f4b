"""What this client has seen of logs, so that none can be rolled back or forked before its eyes.

Of each log there is a mirror: the newest signed checkpoint seen, and the hashes of the log's leaves
in tiles (C2SP tlog-tiles), from which the root of every earlier tree follows. A checkpoint that is
shown later must extend it: both roots are computed from one set of hashes. Of each enclave is
remembered which log it showed, so that it cannot begin another one.

The folder is ``$CASEMATE_LOGS``, else ``$CASEMATE_HOME/logs``, else ``casemate-client`` below
``$XDG_STATE_HOME`` or ``~/.local/state``: never inside a server's state, which may be restored. ::

    enclaves/ID            the enclave's name, a newline, the vkey of its log
    logs/ID/checkpoint     the newest signed note; ID: 32 hex digits of SHA-256 of the log's key
    logs/ID/key            the log's vkey
    logs/ID/tile/...       hashes
    forks/ID/{seen,shown}  two checkpoints that cannot both be true
    forgotten/...          mirrors that a person put aside
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from casemate.seal import checkpoint, note, tiles
from casemate.seal.checkpoint import Checkpoint
from casemate.seal.note import Note, Verifier
from casemate.seal.tiles import ENTRIES, HEIGHT, WIDTH, Level, Tile
from casemate.spec import merkle
from casemate.spec.errors import CasemateError, ReceiptError, UsageError
from casemate.spec.merkle import HASH_BYTES, Node

try:
    import fcntl
except ImportError:  # Windows: writes are whole all the same, a race costs a second fetch
    fcntl = None  # type: ignore[assignment]

Get = Callable[[str], bytes]
T = TypeVar("T")

CHECKPOINT: Final = "checkpoint"
KEY: Final = "key"
_ASK: Final = "Send nothing to this enclave; ask its operator, and the datasets' owners."
_PROOF: Final = (
    "Send nothing to this enclave. Show both files to its operator and to the datasets' owners:"
    " each bears the log's own signature."
)


def default_folder() -> Path:
    """Where what was seen is kept, if nothing else is said."""
    for name, below in (("CASEMATE_LOGS", ""), ("CASEMATE_HOME", "logs")):
        if given := os.environ.get(name):
            return Path(given).expanduser() / below
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path("~/.local/state")).expanduser() / "casemate-client"


def log_id(key: bytes) -> str:
    """The name of a log's folder: 32 hex digits of SHA-256 of its Ed25519 key."""
    return hashlib.sha256(key).hexdigest()[:32]


def log_origin(key: bytes) -> str:
    """The name of the log with this Ed25519 key."""
    return f"casemate.dev/log/{log_id(key)}"


def enclave_name(url: str, simulated_root: str | None) -> str:
    """What an enclave is remembered by: its address, and the root of its simulation, so that a
    development server on a port used before is another one."""
    return url if simulated_root is None else f"{url} simulated {simulated_root}"


def header(signed: Note, key: Verifier) -> str:
    """A checkpoint as the header of a request: the log's own signature only, in base64."""
    lines = tuple(x for x in signed.lines if (x.name, x.id) == (key.name, key.id))
    return base64.b64encode(str(Note(signed.text, lines)).encode()).decode()


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint that holds: who signed it, the note as it came, what it says, and the size of
    the tree that was known before it."""

    key: Verifier
    signed: Note
    head: Checkpoint
    before: int = 0


# What cannot be read, and the mend.
_LOG: Final = (
    "What this client has seen of the log",
    "Restore the folder, or run `casemate enclave forget` to begin anew.",
)
# Which enclave it is about can no longer be told, so that ``forget`` finds nothing to forget.
_ENCLAVE: Final = (
    "Which log this client has seen of an enclave",
    "Restore the file, or remove it to begin anew with its enclave.",
)


def _unreadable(path: Path, reason: object, of: tuple[str, str] = _LOG) -> ReceiptError:
    what, mend = of
    message = f"{what} cannot be read: {path}: {reason}."
    return ReceiptError("receipt.memory", message, mend=mend, where=str(path))


def _unwritable(e: OSError, path: Path) -> UsageError:
    where = str(e.filename or path)  # a full disk names no file
    return UsageError(
        "usage.memory",
        f"What was seen of the log cannot be kept: {where}: {e.strerror}.",
        mend="Set CASEMATE_LOGS (of a mirror: name a folder) that you may write to, with room.",
        where=where,
    )


def write(path: Path, data: bytes) -> None:
    """The whole file or the one before, also after a power loss. Raises ``UsageError``
    ``usage.memory``."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        if os.name == "posix":
            fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as e:
        raise _unwritable(e, path) from None


def keep(proofs: Path, known: Seen, new: Seen) -> Path:
    """Write two heads that cannot both be true into a folder of their own; its path."""
    name = hashlib.sha256(f"{known.signed}\n{new.signed}".encode()).hexdigest()[:16]
    write(proofs / name / "seen", str(known.signed).encode())
    write(proofs / name / "shown", str(new.signed).encode())
    return proofs / name


class _Unsound(Exception):
    """Hashes that are missing, or do not lead to the root that was signed."""


def _top(hashes: bytes) -> bytes:
    """The root of a full tile."""
    row = [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
    while len(row) > 1:
        row = [merkle.node_hash(a, b) for a, b in zip(row[::2], row[1::2], strict=True)]
    return row[0]


class _Hashes:
    """Tiles of one tree from several places: fetched ones, those in ``folder`` of the tree of
    ``known`` leaves, and higher ones made of those below."""

    def __init__(self, folder: Path, known: int, fetched: Mapping[Tile, bytes]) -> None:
        self._folder, self._known = folder, known
        self._have: dict[tuple[Level, int], bytes] = {
            (t.level, t.place): data for t, data in fetched.items() if t.level != ENTRIES
        }

    def __call__(self, tile: Tile) -> bytes:
        """The tile's content. Raises :class:`_Unsound`."""
        at, size = (tile.level, tile.place), tile.width * HASH_BYTES
        if len(self._have.get(at, b"")) < size:
            self._have[at] = self._make(tile, self._stored(tile))
        return self._have[at][:size]

    def _stored(self, tile: Tile) -> bytes:
        """As much of it as the folder has. A full tile must lead to its hash one level up; a
        partial one counts in whole for the root, with which the caller compares."""
        level, place = int(tile.level), tile.place
        count = (self._known >> HEIGHT * level) - place * WIDTH
        if count <= 0:
            return b""
        whole = Tile(level, place, min(WIDTH, count))
        try:
            data = (self._folder / whole.path).read_bytes()
        except OSError:
            raise _Unsound from None
        if len(data) != whole.width * HASH_BYTES:
            raise _Unsound
        if whole.width == WIDTH:
            above = self(Tile(level + 1, place // WIDTH, place % WIDTH + 1))
            if _top(data) != above[-HASH_BYTES:]:
                raise _Unsound
        return data

    def _make(self, tile: Tile, part: bytes) -> bytes:
        if len(part) >= tile.width * HASH_BYTES:
            return part
        if tile.level == 0:
            raise _Unsound
        below, start = int(tile.level) - 1, tile.place * WIDTH
        rest = range(len(part) // HASH_BYTES, tile.width)
        return part + b"".join(_top(self(Tile(below, start + i))) for i in rest)

    def root(self, size: int) -> bytes:
        return merkle.root(size, tiles.reader(size, self))


class Mirror:
    """One log in a folder; with ``entries`` also the entries, so that the folder is the whole log
    as static files. Two processes may use it at once."""

    def __init__(self, folder: Path, *, entries: bool = False, proofs: Path | None = None) -> None:
        self.folder = folder
        self._entries = entries
        self._proofs = proofs or folder.with_name(folder.name + ".forks")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise _unwritable(e, self.folder) from None
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def seen(self) -> Seen | None:
        """The newest checkpoint seen. Raises ``receipt.memory`` where it cannot be read, which is
        not the same as none."""
        path = self.folder / CHECKPOINT
        try:
            raw = path.read_bytes()
            key = note.verifier((self.folder / KEY).read_text(encoding="utf-8").strip())
            signed = note.parse(raw)
            return Seen(key, signed, checkpoint.verify(signed, key))
        except (FileNotFoundError, NotADirectoryError) as e:
            if e.filename == str(path):
                return None
            raise _unreadable(path, "its key is missing") from None
        except (OSError, UnicodeDecodeError) as e:
            raise _unreadable(path, e) from None
        except CasemateError as e:
            raise _unreadable(path, e.message.rstrip(".")) from None

    def root(self, size: int) -> bytes:
        """The root over the first ``size`` leaves. Raises as :meth:`ask`."""
        return self.ask(size, lambda node: merkle.root(size, node))

    def ask(self, size: int, question: Callable[[Node], T]) -> T:
        """What ``question`` finds in the tree of what was seen; IndexError where that has fewer
        than ``size`` leaves. Raises ``receipt.memory`` when the hashes kept do not lead to the
        checkpoint's root."""
        with self._alone():
            known = self.seen()
            if known is None or size > known.head.size:
                raise IndexError(size)
            return self._ask(known.head, question)

    def _root(self, size: int, known: Checkpoint) -> bytes:
        return self._ask(known, lambda node: merkle.root(size, node))

    def _ask(self, known: Checkpoint, question: Callable[[Node], T]) -> T:
        node = tiles.reader(known.size, _Hashes(self.folder, known.size, {}))
        try:
            if merkle.root(known.size, node) == known.root:
                return question(node)
        except _Unsound:
            pass
        raise _unreadable(self.folder / "tile", "the hashes are not the checkpoint's")

    def leaves(self) -> tuple[bytes, ...]:
        """The entries of a mirror that holds them, not yet compared with any hash. Raises
        ``receipt.memory``, ``FormatError`` ``format.tile``."""
        known, out = self.seen(), list[bytes]()
        for tile in tiles.tiles(known.head.size if known else 0):
            if tile.level == ENTRIES:
                try:
                    out += tiles.unbundle(tile, (self.folder / tile.path).read_bytes())
                except OSError as e:
                    raise _unreadable(self.folder / tile.path, e.strerror) from None
        return tuple(out)

    def extend(self, key: bytes, get: Get) -> Seen:
        """Fetch the newest checkpoint, signed by ``key``, and the tiles that are missing (``get``:
        a path below the log's prefix to bytes); if it extends what was seen, keep it.

        Raises ``ReceiptError``: ``receipt.note-*`` (not the log's signature), ``receipt.fork`` and
        ``receipt.rolled-back`` (both checkpoints are kept as proof), ``receipt.log-tiles``.
        """
        before = self.seen()
        new = _read(note.parse(get(CHECKPOINT)), key, before)
        if before is not None and before.key != new.key:
            raise ReceiptError(
                "receipt.log-replaced",
                f"{self.folder} mirrors the log {before.head.origin}, not {new.head.origin}.",
                mend="Name another folder.",
                where=new.head.origin,
            )
        if before is not None and new.head.size < before.head.size:
            raise self.refused(before, new)
        # A second time with everything from the server, if what is kept was damaged.
        for start in dict.fromkeys((new.before, 0)):
            fetched = self._fetch(new.head.size, start, get)
            with self._alone():
                if self._take(new, start, fetched):
                    return new
        raise _tiles(new.head, "The tiles are not those under the signed head.")

    def _fetch(self, size: int, known: int, get: Get) -> dict[Tile, bytes]:
        levels = {0, ENTRIES} if self._entries else {0}
        out: dict[Tile, bytes] = {}
        for tile in tiles.tiles(size, known):
            if tile.level in levels:
                data = get(tile.path)
                out[tile] = data if tile.level == ENTRIES else tiles.check(tile, data)
        for tile, data in out.items():
            if tile.level == ENTRIES:
                hashed = b"".join(map(merkle.leaf_hash, tiles.unbundle(tile, data)))
                if hashed != out[Tile(0, tile.place, tile.width)]:
                    raise _tiles(None, f"The entries of {tile.path} are not those of its hashes.")
        return out

    def _take(self, new: Seen, start: int, fetched: Mapping[Tile, bytes]) -> bool:
        """Keep a checkpoint that extends what is known; False when the hashes do not lead to its
        root, or not to the one known while some of them were our own."""
        known = self.seen()
        if known is not None and known.head.size > new.head.size:  # by another process meanwhile
            if self._root(new.head.size, known.head) != new.head.root:
                raise self.refused(known, new)
            return True
        size = known.head.size if known is not None else 0
        hashes = _Hashes(self.folder, size if start else 0, fetched)
        try:
            if hashes.root(new.head.size) != new.head.root:
                return False
            if known is not None and hashes.root(size) != known.head.root:
                if start:
                    return False
                raise self.refused(known, new)
        except _Unsound:
            return False
        for tile in tiles.tiles(new.head.size, size if start else 0):
            if tile.level != ENTRIES:
                write(self.folder / tile.path, hashes(tile))
            elif self._entries:
                write(self.folder / tile.path, fetched[tile])
        if known is None:
            write(self.folder / KEY, f"{new.key}\n".encode())
        if known is None or known.signed != new.signed:
            write(self.folder / CHECKPOINT, str(new.signed).encode())
        self._drop(new.head.size, size)
        return True

    def _drop(self, size: int, before: int) -> None:
        """Remove the partial tiles of the smaller tree."""
        old = {t for t in tiles.tiles(before) if t.width < WIDTH} - set(tiles.tiles(size))
        for tile in old:
            path = self.folder / tile.path
            path.unlink(missing_ok=True)
            with suppress(OSError):  # another part of it stands beside
                path.parent.rmdir()

    def refused(self, known: Seen, new: Seen) -> ReceiptError:
        """The error for a checkpoint that does not go with the one known; both are kept."""
        folder = keep(self._proofs, known, new)
        small, large = sorted((known.head, new.head), key=lambda head: head.size)
        back = small is new.head and small != large
        with suppress(ReceiptError, IndexError):
            back = back and self._root(small.size, large) == small.root
        if back:
            return ReceiptError(
                "receipt.rolled-back",
                f"The log shows {small.size} entries; this client has seen {large.size}: its state"
                f" was rolled back. Both checkpoints are kept in {folder}.",
                mend=_ASK,
                where=small.origin,
            )
        return ReceiptError(
            "receipt.fork",
            f"The log was forked: its head at {new.head.size} entries does not go with the one at"
            f" {known.head.size} that this client has seen. Both are kept in {folder}.",
            mend=_PROOF,
            where=small.origin,
        )


def _read(signed: Note, key: bytes, before: Seen | None) -> Seen:
    by = checkpoint.log_key(checkpoint.read(signed.text).origin, key)
    head = checkpoint.verify(signed, by)
    return Seen(by, signed, head, 0 if before is None else before.head.size)


def _tiles(head: Checkpoint | None, message: str) -> ReceiptError:
    return ReceiptError(
        "receipt.log-tiles",
        message,
        mend="Try again; if it stays so, keep what was sent and ask the operator.",
        where="" if head is None else head.origin,
    )


class Memory:
    """All logs that a client has seen, in a folder (:func:`default_folder` if none is given)."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()

    def mirror(self, key: bytes) -> Mirror:
        """Of the log with this key (32 bytes)."""
        return Mirror(self.folder / "logs" / log_id(key), proofs=self.proofs)

    @property
    def proofs(self) -> Path:
        """Where heads are kept that cannot both be true."""
        return self.folder / "forks"

    def key_of(self, origin: str) -> bytes | None:
        """The key of a log that was seen, by its name."""
        for path in (self.folder / "logs").glob("*"):
            seen = Mirror(path).seen()
            if seen is not None and seen.head.origin == origin:
                return seen.key.key
        return None

    def _place(self, enclave: str) -> Path:
        return self.folder / "enclaves" / hashlib.sha256(enclave.encode()).hexdigest()[:32]

    def log_of(self, enclave: str) -> Verifier | None:
        """The log that an enclave (:func:`enclave_name`) showed. Raises ``receipt.memory``."""
        path = self._place(enclave)
        try:
            name, vkey = path.read_text(encoding="utf-8").splitlines()
            if name != enclave:
                raise ValueError("it is about another enclave")
            return note.verifier(vkey)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CasemateError as e:
            raise _unreadable(path, e.message.rstrip("."), _ENCLAVE) from None
        except (OSError, ValueError) as e:
            raise _unreadable(path, e, _ENCLAVE) from None

    def meet(self, enclave: str, key: bytes, get: Get) -> Seen:
        """See the newest checkpoint of an enclave whose evidence binds ``key``, and remember it.

        Raises as :meth:`Mirror.extend`, and ``receipt.log-replaced`` when the enclave showed
        another log before, which this one does not go on from by its owners' consent.
        """
        known = self.log_of(enclave)
        if known is not None and known.key != key:
            if (seen := self._recovered(enclave, known, key, get)) is not None:
                return seen
            raise ReceiptError(
                "receipt.log-replaced",
                f"This enclave showed the log {known.name} before; its evidence now binds the key"
                f" of another one ({log_id(key)}), so that what was spent may be forgotten.",
                mend=f"{_ASK} If you believe them: `casemate enclave forget`, then connect again.",
                where=known.name,
            )
        seen = self.mirror(key).extend(key, get)
        if known is None:
            self.accept(enclave, seen.key)
        return seen

    def _recovered(self, enclave: str, known: Verifier, key: bytes, get: Get) -> Seen | None:
        from casemate.client import recovered

        before, mirror = self.mirror(known.key), self.mirror(key)
        seen = mirror.extend(key, get)
        lost = recovered.follows(before, known, seen, mirror.root, get)
        if lost < 0:
            return None
        self.accept(enclave, seen.key)
        warnings.warn(
            "The enclave's state was restored from a backup: its log goes on as"
            f" {seen.head.origin}, and {lost} entries that this client saw are not in it.",
            stacklevel=2,
        )
        return seen

    def accept(self, enclave: str, log: Verifier) -> None:
        """From now on the enclave is to show this log: on first sight, or because the owners
        consented to a recovery."""
        write(self._place(enclave), f"{enclave}\n{log}\n".encode())

    def enclaves(self) -> dict[str, Verifier]:
        """Each enclave that is remembered, and its log. Raises ``receipt.memory``."""
        found: dict[str, Verifier] = {}
        for path in sorted((self.folder / "enclaves").glob("[0-9a-f]*")):
            name = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            log = self.log_of(name)
            if log is None or self._place(name) != path:
                raise _unreadable(path, "it names no enclave", _ENCLAVE)
            found[name] = log
        return found

    def forget(self, url: str) -> tuple[str, ...]:
        """Begin anew with whatever enclave is at ``url``: the mirrors of its logs are put aside.
        The origins of those logs."""
        found = {name: log for name, log in self.enclaves().items() if name.split(" ")[0] == url}
        for name, log in found.items():
            old = self.mirror(log.key).folder
            aside = self.folder / "forgotten"
            try:
                self._place(name).unlink(missing_ok=True)
                if old.exists():
                    aside.mkdir(mode=0o700, parents=True, exist_ok=True)
                    old.rename(Path(tempfile.mkdtemp(prefix=f"{old.name}-", dir=aside)) / "log")
            except OSError as e:
                raise _unwritable(e, old) from None
        return tuple(log.name for log in found.values())

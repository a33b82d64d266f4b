"""The store as it lies on the disk: under which sealing key, and whether it may be started.

The store's key is the TEE's for a label with a number, its generation, which rotation raises. The
file that holds the number is written after the store is renamed, so that a start tries the number
and the one after it. A state that was restored from a backup, or that somebody has seen more of, is
marked: it starts only once a witness knows no newer head (``state.confirm``), or the owners
consented to a recovery. The mark is an honest operator's: a dishonest one takes it away, and is
found by witnesses and by what clients have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

from casemate.ledger import handover, log, rekey
from casemate.ledger.sealed import FILE, FOLDER
from casemate.ledger.store import Store
from casemate.seams import Disk, Rng
from casemate.seams.files import load, remove, store
from casemate.spec import codec
from casemate.spec.codec import value
from casemate.spec.errors import FormatError, LedgerError
from casemate.tee import Tee

T = TypeVar("T")

STORE_LABEL: Final = "casemate/store/v1"
GENERATION_FILE: Final = f"{FOLDER}/generation"
MARK_FILE: Final = f"{FOLDER}/restored.json"
STORE_NAME: Final = FILE
STORE_FILE: Final = f"{FOLDER}/{FILE}"


@value("restored/v1", later=("until",))
class Restored:
    """``whole``: all files of the backup are there. ``checkpoint``: the backup's newest, if any.
    ``until``: the log's name after the recovery that the owners were asked for: with its commit the
    mark has served, if a crash left it."""

    whole: bool
    checkpoint: str | None
    until: str = ""


def label(generation: int) -> str:
    """The sealing key's label."""
    return f"{STORE_LABEL}|{generation}" if generation else STORE_LABEL


def generation(disk: Disk) -> int:
    """The number in the file; 0 without one. Raises ``format.generation``."""
    text = (load(disk, GENERATION_FILE) or b"0").strip()
    if not text.isdigit() or len(text) > 6:
        raise FormatError(
            "format.generation",
            f"{GENERATION_FILE} holds no number.",
            mend="Restore the file; 0 for a store whose key was never rotated.",
            where=GENERATION_FILE,
        )
    return int(text)


def set_generation(disk: Disk, number: int) -> None:
    store(disk, GENERATION_FILE, f"{number}\n".encode())


def with_key(disk: Disk, tee: Tee, work: Callable[[bytes], T]) -> T:
    """``work`` with the store's key: that of the generation in the file, or the next one after a
    rotation that was cut short. Raises what ``work`` does, ``ledger.key`` for neither."""
    return keyed(disk, tee, work)[0]


def keyed(disk: Disk, tee: Tee, work: Callable[[bytes], T]) -> tuple[T, int]:
    """As :func:`with_key`, with the generation."""
    number = generation(disk)
    try:
        return work(tee.sealing_key(label(number))), number
    except LedgerError as e:
        if e.code != "ledger.key" or not disk.exists(STORE_FILE):
            raise
        try:
            return work(tee.sealing_key(label(number + 1))), number + 1
        except LedgerError as later:
            raise (e if later.code == "ledger.key" else later) from None


def open_store(disk: Disk, tee: Tee, boot: bytes, rng: Rng) -> Store:
    """The store of a server that starts. Raises ``ledger.restored``, ``ledger.handed-over``,
    ``ledger.handover``, and as ``Store.open``."""
    if not asked(disk):
        require_settled(disk)
    if not disk.exists(STORE_FILE) and disk.exists(f"{handover.FOLDER}/{STORE_NAME}"):
        raise LedgerError(  # a state begun here would be in its way
            "ledger.handover",
            "A state was handed over to this folder and waits there.",
            mend="Run `casemate state take-over` first.",
            where=handover.FOLDER,
        )
    rekey.clear(disk, rekey.NEXT)  # of a rotation that was cut short
    found, number = keyed(disk, tee, lambda key: Store.open(disk, key, boot, rng))
    try:
        settle(disk, found)
        handover.require_here(found)
        if number != generation(disk):
            set_generation(disk, number)
    except BaseException:
        found.close()
        raise
    return found


def mark(disk: Disk) -> Restored | None:
    """Whether the state was restored and not yet confirmed."""
    raw = load(disk, MARK_FILE)
    return None if raw is None else codec.decode(Restored, raw)


def set_mark(disk: Disk, found: Restored) -> None:
    store(disk, MARK_FILE, codec.encode(found))


def asked(disk: Disk) -> str:
    """The name under which the log goes on after the recovery that the owners were asked for."""
    found = mark(disk)
    return "" if found is None else found.until


def ask(disk: Disk, until: str) -> None:
    """The owners are asked for a recovery under this name; without a mark there is none to end."""
    if (found := mark(disk)) is not None:
        set_mark(disk, replace(found, until=until))


def settle(disk: Disk, found: Store) -> None:
    """As :func:`require_settled`, once the mark of a recovery is gone that was committed."""
    if asked(disk) == log.key(found).origin:
        clear_mark(disk)
    require_settled(disk)


def found_older(disk: Disk) -> None:
    """Somebody showed a head of this log that the state does not hold: as after a restore."""
    if mark(disk) is None:
        set_mark(disk, Restored(whole=True, checkpoint=None))


def clear_mark(disk: Disk) -> None:
    remove(disk, MARK_FILE)


def not_confirmed(why: str) -> LedgerError:
    """``ledger.restored``."""
    return LedgerError(
        "ledger.restored",
        f"The state was restored from a backup, or found to be rolled back, and {why}.",
        mend="Ask a witness with `casemate state confirm`, or the owners with `casemate state"
        " recover`.",
        where=MARK_FILE,
    )


def require_whole(disk: Disk) -> None:
    """``ledger.restore`` where a restore was cut short."""
    found = mark(disk)
    if found is not None and not found.whole:
        raise LedgerError(
            "ledger.restore",
            "A restore into this folder was cut short.",
            mend="Run `casemate state restore` again.",
            where=MARK_FILE,
        )


def require_settled(disk: Disk) -> None:
    """``ledger.restored``, ``ledger.restore``."""
    require_whole(disk)
    if mark(disk) is not None:
        raise not_confirmed("nobody has confirmed that there is no newer one")

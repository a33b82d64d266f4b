"""What an operator does with the state of a server that does not run (docs/operate.md): back it up
and put it back, have witnesses confirm it, go on from it by the owners' consent, change its key.

Each holds the folder's lock. What needs the store needs this machine's TEE, as a start does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from casemate.ledger import catalog, consent, handover, log, recovery, rekey
from casemate.ledger.copy import CopyDisk
from casemate.ledger.store import Store
from casemate.seal import note
from casemate.seams import Clock, Disk, Net, OsDisk, OsRng, Rng, SystemClock
from casemate.server import backup, keeping, keys, machine, serve
from casemate.server.backup import Backup
from casemate.server.config import Config, software
from casemate.server.logs import Log
from casemate.server.metrics import Metrics
from casemate.server.publish import Publisher
from casemate.spec.consent import RecoveryConsent, RecoveryRequest, Rotated
from casemate.spec.errors import LedgerError, UsageError
from casemate.tee import Tee

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A state folder that this process alone uses, on the machine whose TEE sealed it."""

    config: Config
    disk: Disk
    tee: Tee
    rng: Rng
    clock: Clock

    def store(self, disk: Disk | None = None) -> Store:
        """The store, checked, not started. Raises as ``Store.open``; ``ledger.missing``,
        ``ledger.restore``."""
        there = disk or self.disk
        _require_store(there)
        keeping.require_whole(there)
        boot = self.rng.bytes(keys.BOOT_BYTES)
        return keeping.with_key(there, self.tee, lambda key: Store.open(there, key, boot, self.rng))

    def using(self, work: Callable[[Store], T], disk: Disk | None = None) -> T:
        """``work`` with the store, which is closed afterwards."""
        found = self.store(disk)
        try:
            return work(found)
        finally:
            found.close()


def _require_store(disk: Disk) -> None:
    if not disk.exists(keeping.STORE_FILE):
        raise LedgerError(
            "ledger.missing", "There is no store in this folder.", mend="Name the state folder."
        )


def open_place(config: Config, disk: Disk, *, rng: Rng, clock: Clock) -> Place:
    """A place on these objects. Raises ``usage.tee-*``."""
    return Place(
        config, disk, machine.open_tee(config, disk=disk, rng=rng, clock=clock), rng, clock
    )


@contextmanager
def at(config: Config) -> Iterator[Place]:
    """The folder of ``config``. Raises ``ledger.in-use`` while a server runs, ``usage.tee-*``."""
    disk = OsDisk(config.state)
    with serve.alone(config):
        yield open_place(config, disk, rng=OsRng(), clock=SystemClock())


def newest(place: Place) -> str:
    """The log's newest head, signed, from a copy in memory: nothing is written."""
    return place.using(lambda found: str(log.sign(found)), CopyDisk(place.disk))


# Backup and restore: the files alone, but for the head.


def save(config: Config, target: Path, *, opened: bool = True) -> Backup:
    """Back up the state of ``config`` into the file ``target``, whole or not at all.

    ``opened``: open the store (a copy of it), which checks it, and put its newest head in; without,
    no TEE is needed. Raises ``usage.file`` for a target in the state folder itself,
    ``ledger.in-use``, ``ledger.missing``, and as a start does.
    """
    if target.resolve().is_relative_to(config.state.resolve()):
        raise UsageError(
            "usage.file",
            f"{target} lies in the state folder, which it is to be a backup of.",
            mend="Name a file elsewhere, best on another disk.",
            where=str(target),
        )
    disk, out = OsDisk(config.state), OsDisk(target.absolute().parent)
    with serve.alone(config):
        _require_store(disk)
        keeping.require_whole(disk)
        head = None
        if opened:
            head = newest(open_place(config, disk, rng=OsRng(), clock=SystemClock()))
        return save_to(disk, out, target.name, software=software(), checkpoint=head)


def save_to(disk: Disk, out: Disk, name: str, *, software: str, checkpoint: str | None) -> Backup:
    """As :func:`save`, onto a disk."""
    temporary = f"{name}.new"
    file = out.open(temporary, create=True)
    try:
        try:
            found = backup.write(disk, file, software=software, checkpoint=checkpoint)
        finally:
            file.close()
    except OSError:  # a part is of no use, and takes room on a disk that may be full
        out.remove(temporary)
        raise
    out.rename(temporary, name)
    out.sync_folder(".")
    return found


def inspect(source: Path) -> Backup:
    """A backup's manifest, all of its files compared. Raises ``format.backup``."""
    file = OsDisk(source.absolute().parent).open(source.name)
    try:
        return backup.read(file)
    finally:
        file.close()


def put_back(config: Config, source: Path) -> Backup:
    """Restore a backup into the empty folder of ``config``. Raises ``format.backup``,
    ``ledger.restore``, ``ledger.in-use``."""
    disk, where = OsDisk(config.state), OsDisk(source.absolute().parent)
    file = where.open(source.name)
    try:
        with serve.alone(config):
            return backup.restore(file, disk)
    finally:
        file.close()


# After a restore.


async def confirm(
    place: Place, net: Net, say: Callable[[str], None], urls: Sequence[str]
) -> tuple[str, ...]:
    """Ask the witnesses at ``urls`` whether they know a newer head; the names of those that a
    policy names and that cosigned this one. The mark of a restore is gone then.

    Each dataset needs as many of its own witnesses as its policy says: whom others trust may be
    the operator's friend, or a stranger's. Nothing is added to the log before: a head of its own
    would fork a newer one. Raises ``ledger.rolled-back`` where a witness knows more,
    ``ledger.restored`` where too few answer.
    """
    found = place.store()
    try:
        with found.transaction():
            found.run("DELETE FROM cosignatures")  # only what is said now counts
        events = Log(say, place.clock)
        await Publisher(found, net, place.clock, events, Metrics(), urls).ask()
        sql = "SELECT witness FROM cosignatures WHERE size = ? ORDER BY witness"
        names = tuple(note.verifier(key).name for (key,) in found.all(sql, found.size()))
        waiting = _unconfirmed(found)
    finally:
        found.close()
    if waiting or not names:
        who = " ".join(waiting[:8]) or "any dataset"
        raise keeping.not_confirmed(
            f"too few witnesses that the owner names confirmed it for {who}"
        )
    keeping.clear_mark(place.disk)
    return names


def _unconfirmed(found: Store) -> list[str]:
    """The datasets with a key whose own witnesses did not cosign the whole log; all that name
    none, too."""
    last = found.size() - 1
    return [
        d.id
        for d in catalog.datasets(found)
        if d.state not in ("refused", "revoked")
        and log.cosigned(found, d.policy.witnesses, last) < max(1, d.policy.cosignatures)
    ]


def ask_owners(place: Place, newest: str | None) -> RecoveryRequest:
    """The first step of a recovery. Raises as ``recovery.request``."""
    asked = place.using(lambda found: recovery.request(found, newest))
    keeping.ask(place.disk, asked.next)
    return asked


def recover(place: Place, asked: RecoveryRequest, envelopes: Sequence[str]) -> None:
    """The second step: go on by the owners' consents; the mark of a restore is gone. Raises as
    ``recovery.recover``."""
    place.using(lambda found: recovery.recover(found, asked, envelopes))
    keeping.clear_mark(place.disk)


def consents(place: Place, envelopes: Sequence[str]) -> None:
    """Consents to the recovery that came later, on paper so to speak; the server takes them too.
    Raises ``policy.consent``."""

    def work(found: Store) -> None:
        keeping.settle(place.disk, found)
        for envelope in envelopes:
            owner, said = consent.signed(found, envelope)
            if not isinstance(said, RecoveryConsent):
                # One to software serves once; used ones can be had from the public log.
                raise consent.refuse("The consent is none to a recovery.", said.dataset)
            consent.give(found, envelope, owner)

    place.using(work)


# Another key.


def rotate(place: Place) -> int:
    """Put the store under the sealing key's next generation, which is returned. A crash leaves the
    store whole under the old key or the new one. Raises ``ledger.restored``: its entry would fork
    a newer log."""
    boot = place.rng.bytes(keys.BOOT_BYTES)

    def whole(key: bytes) -> bytes:
        found = Store.open(place.disk, key, boot, place.rng)
        try:
            handover.require_here(found)
            found.empty_wal()
        finally:
            found.close()
        return key

    _require_store(place.disk)
    keeping.require_settled(place.disk)
    old, number = keeping.keyed(place.disk, place.tee, whole)
    keeping.set_generation(place.disk, number)
    new = place.tee.sealing_key(keeping.label(number + 1))
    rekey.copy(place.disk, old, new, rekey.NEXT)
    copied = Store.open(place.disk, new, boot, place.rng, folder=rekey.NEXT)
    try:
        with copied.transaction():
            copied.append("rotate", str(number + 1), Rotated(generation=number + 1))
        copied.empty_wal()
    finally:
        copied.close()
    rekey.install(place.disk, rekey.NEXT)
    keeping.set_generation(place.disk, number + 1)
    return number + 1


def show(place: Place) -> dict[str, Any]:
    """What a state is, without starting it: nothing is written."""
    mark = keeping.mark(place.disk)

    def work(found: Store) -> dict[str, Any]:
        head = log.head(found)
        handed = handover.handed(found)
        rows = found.all("SELECT dataset, measurement FROM consents ORDER BY dataset")
        waits = consent.frozen(found)
        return {
            "origin": head.origin,
            "entries": head.size,
            "root": head.root.hex(),
            "checkpoint": str(log.sign(found)),
            "measurement": consent.running(found),
            "generation": keeping.generation(place.disk),
            "restored": mark is not None,
            "handed_over": None if handed is None else handed.measurement,
            "frozen": {name: list(accepted) for name, accepted in waits.items()},
            "consents": dict(rows),
        }

    return place.using(work, CopyDisk(place.disk))

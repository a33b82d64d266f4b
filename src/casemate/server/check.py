"""A stopped server's state, checked (``casemate audit fsck``): the sealing key and the lock are the
server's own, the rest is ``ledger.fsck``, which shares nothing with it."""

from __future__ import annotations

from casemate.ledger import fsck, fsck_folder
from casemate.ledger.fsck_replay import Replay
from casemate.seams import OsDisk, OsRng, SystemClock
from casemate.server import keeping, machine, serve
from casemate.server.config import Config
from casemate.spec.errors import LedgerError


def check(config: Config) -> Replay:
    """What lies in ``config.state``, on the machine whose TEE sealed it; only the lock is written.

    Raises ``ledger.missing``, ``ledger.in-use`` while a server runs, ``ledger.key``,
    ``ledger.corrupt``, ``usage.tee-*``, ``usage.extra``.
    """
    if not (config.state / fsck_folder.FILE).is_file():
        raise LedgerError(
            "ledger.missing",
            f"There is no store in {config.state}.",
            mend="Name the state folder.",
            where=str(config.state),
        )
    with serve.alone(config):
        disk = OsDisk(config.state)
        tee = machine.open_tee(config, disk=disk, rng=OsRng(), clock=SystemClock())
        return keeping.with_key(disk, tee, lambda key: fsck.audit(disk, key))

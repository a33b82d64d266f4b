"""This machine as the settings name it: its TEE, the anchor beside it, its workers' sandbox."""

from __future__ import annotations

import re
from dataclasses import replace

from casemate.ledger.anchor import Anchor
from casemate.ledger.store import Store
from casemate.seams import Clock, Disk, Rng
from casemate.server import pool
from casemate.server.config import Config
from casemate.spec.errors import UsageError
from casemate.tee import Machine, Tee, open_anchor
from casemate.tee import open as _open


def owner(text: str) -> bytes | None:
    """The key of ``Config.release_owner``. Raises ``usage.tee-release``."""
    if not text:
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UsageError(
            "usage.tee-release",
            "The owner who releases the sealing key is not named by 64 hex digits.",
            mend="Give the sign_key of the owner's public identity, in hex.",
            where="release-owner",
        )
    return bytes.fromhex(text)


def open_tee(config: Config, *, disk: Disk, rng: Rng, clock: Clock) -> Tee:
    """The TEE of ``config``. Raises ``usage.tee-*``."""
    return _open(
        "simulated" if config.dev else config.tee,
        disk=disk,
        rng=rng,
        clock=clock,
        machine=Machine(owner=owner(config.release_owner)),
    )


def sandboxed(config: Config) -> Config:
    """With the layers of the sandbox that hold on this machine."""
    return replace(config, sandbox=pool.layers())


def anchor(config: Config, tee: Tee, secret: bytes) -> Anchor | None:
    """``Config.anchor``; none beside a simulated TEE. Raises ``usage.tee-anchor``."""
    if tee.simulated or config.anchor == "none":
        return None
    if config.anchor == "auto":
        return open_anchor(tee, secret)
    if not re.fullmatch(r"0x[0-9a-fA-F]{8}", config.anchor):
        raise UsageError(
            "usage.tee-anchor",
            f"{config.anchor[:20]!r} is no NV index of a TPM.",
            mend="Give auto, none, or an index like 0x0180ca5e.",
            where="anchor",
        )
    return open_anchor(tee, secret, index=int(config.anchor, 16))


def hold(config: Config, tee: Tee, store: Store) -> None:
    """Hold a store against its anchor (``Store.hold``)."""
    if not tee.simulated:
        store.hold(anchor(config, tee, store.anchor_secret()))

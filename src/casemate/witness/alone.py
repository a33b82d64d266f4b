"""One process to a witness's folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from casemate.spec.errors import LedgerError

LOCK_FILE: Final = "lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a witness's folder for this process; LedgerError ``ledger.in-use`` otherwise."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LedgerError(
                "ledger.in-use",
                f"Another process uses the witness in {folder}.",
                mend="Stop it first; one witness has one process.",
                where=str(folder),
            ) from None
        yield
    finally:
        os.close(fd)

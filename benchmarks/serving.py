"""A server process while it is measured."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def started(command: Sequence[str], state: Path, log: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The public facts and the pid of the server that ``command`` starts, which writes them to
    ``state``; on one thread, and of the environment only the path."""
    state.mkdir()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
        )
    try:
        ready = state / "server.json"
        while not ready.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield json.loads(ready.read_bytes()), process.pid
    finally:
        process.terminate()
        process.wait(60)

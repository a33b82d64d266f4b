"""``python -m casemate.worker FD``: serve one job on the connected Unix socket FD, then end.

``python -m casemate.worker layers``: shut this process in as a worker, and print, as a JSON list,
which layers of the sandbox hold on this machine.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from casemate.worker.lock import enter, lock


def main() -> int:
    if len(sys.argv) != 2 or not (sys.argv[1].isdigit() or sys.argv[1] == "layers"):
        print("usage: python -m casemate.worker FD | layers", file=sys.stderr)
        return 2
    # A folder of its own, which whoever started it removes; the worker empties it.
    scratch = Path(os.environ.get("TMPDIR") or tempfile.mkdtemp(prefix="casemate-worker-"))
    if sys.argv[1] == "layers":
        return _layers(scratch)
    # Built before the worker is shut in: no job may leave code that another one loads.
    from casemate.engine import native

    for name in native.HELPERS:
        native.library(name)
    os.environ["XDG_CACHE_HOME"] = str(scratch)
    entered = enter(scratch)
    # torch's threads begin here, and inherit what holds.
    from casemate.worker.session import serve

    with socket.socket(fileno=int(sys.argv[1])) as sock:
        return serve(sock, entered)


def _layers(scratch: Path) -> int:
    import json

    held = lock([1], enter(scratch), memory_bytes=1 << 30, file_bytes=1 << 20)
    print(json.dumps(held))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The real server and worker with marks on their stages."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(kind: str, folder: Path, *more: str) -> list[str]:
    """What starts this file as ``kind``, isolated as a worker is."""
    paths = [str(ROOT), str(ROOT / "src")]
    code = f"import sys; sys.path[:0] = {paths!r}; from benchmarks.processes import {kind}"
    return [sys.executable, "-I", "-B", "-c", f"{code}; sys.exit({kind}())", str(folder), *more]


def worker() -> int:
    from benchmarks.marks import Marks

    folder = Path(sys.argv.pop(1))
    marks = Marks(folder)
    with marks.stage("worker.import"):
        from casemate.engine import rows, train
        from casemate.worker import __main__, dataset, session
    marks.wrap(session, "_prepare", "worker.prepare")
    marks.wrap(session, "lock", "worker.lock")
    marks.wrap(dataset, "load", "worker.load")
    marks.wrap(rows, "assemble", "worker.assemble")
    marks.wrap(train, "train", "engine")
    marks.wrap(session, "_write", "worker.write")
    return __main__.main()


def server() -> int:
    """As ``casemate serve --dev`` on a free port, its workers marked as well."""
    from benchmarks.marks import Marks
    from casemate.server import pool, queue, quotes, release, run
    from casemate.server.config import Config

    folder, state = Path(sys.argv[1]), Path(sys.argv[2])
    marks = Marks(folder)
    for owner, attribute, name in (
        (quotes, "make", "server.quote"),
        (quotes, "_price", "server.price"),
        (run, "prepare", "server.prepare"),
        (run.ledger, "reserve", "server.reserve"),
        (run, "_train", "server.run"),
        (release, "check_guarantee", "server.guarantee"),
        (release, "seal_result", "server.seal"),
        (run.ledger, "commit", "server.commit"),
        (queue.Queue, "_sweep", "server.sweep"),
    ):
        marks.wrap(owner, attribute, name)
    pool.command = lambda fd: command("worker", folder, str(fd))
    from casemate.server.serve import serve  # now: its table of routes holds what is marked

    serve(Config(state=state, port=0, dev=True, threads=1))
    return 0

"""``python -m audit``: the audit of docs/audit.md at the counts asked for, one line of figures at
the end, exit status 1 on any violation.

    python -m audit                       # make audit
    python -m audit --full                # make audit-full: the counts of a release
    python -m audit --only bugs,canaries
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from audit import page
from audit.tasks import FULL, PLAYS, Counts, play, tasks


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m audit", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the counts of a release")
    for one in dataclasses.fields(Counts):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help=f"of {', '.join(PLAYS)}; by commas")
    parser.add_argument("--page", type=Path, help="write the figures into this page")
    given = parser.parse_args()
    chosen = {f.name: getattr(given, f.name) for f in dataclasses.fields(Counts)}
    counts = dataclasses.replace(
        FULL if given.full else Counts(), **{k: v for k, v in chosen.items() if v is not None}
    )
    begun = time.monotonic()
    todo = tasks(counts, given.seed)
    if given.only:
        todo = [t for t in todo if t.kind in given.only.split(",")]
    done: dict[str, list[Any]] = {kind: [] for kind in PLAYS}
    wrong = 0
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for part in pool.imap_unordered(play, todo):
            if part.figures is not None:
                done[part.kind].append(part.figures)
            for what in part.wrong:
                wrong += 1
                print(f"VIOLATION {what}", flush=True)
        pool.close()
        pool.join()
    seconds = time.monotonic() - begun
    for line in page.lines(done):
        print(line)
    if given.page:
        page.write(given.page, done, page.command(sys.argv[1:]), seconds, wrong)
    figures = page.line(done)
    print(f"audit seed={given.seed}: {figures}: {wrong} violations in {seconds:.0f} s")
    complete = all(done[kind] for kind in {t.kind for t in todo})
    return 1 if wrong or not complete else 0


if __name__ == "__main__":
    sys.exit(main())

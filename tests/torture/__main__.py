"""``python -m torture``: the rows of docs/ledger.md at the counts asked for, one line of figures at
the end, exit status 1 on any violation.

    python -m torture --sims 2000 --kills 200 --forks 50 --seed 1
    python -m torture replay sim 10000123        # as a violation says
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from torture import rows
from torture.rows import PLAYS, Part, Task


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--sims", type=int, default=2000, help="simulations")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs at random instants")
    parser.add_argument("--forks", type=int, default=50, help="snapshots restored or run twice")
    parser.add_argument("--call-step", type=int, default=1, help="every N-th system call; 0: none")
    parser.add_argument("--fault-step", type=int, default=1, help="every N-th call; 0: none")
    parser.add_argument("--race", type=int, default=2560, help="requests of 64 clients; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args()


def _replay(given: list[str]) -> int:
    row, *rest = given
    part = PLAYS[row](*(int(x) if x.isdigit() else x for x in rest))
    for what, _ in part.wrong:
        print(what)
    print("violated" if part.wrong else "nothing wrong", dict(part.counts))
    return 1 if part.wrong else 0


def _figures(done: dict[str, Part]) -> str:
    def of(row: str) -> Counter[str]:
        return done.get(row, Part()).counts

    sims, kills, race, forks = of("sim"), of("kills"), of("race"), of("fork")
    noticed = ("the start", "a witness", "a client", "two clients", "a client before the witnesses")
    parts = (
        f"{sims['runs']} simulations ({sims['crashes']} crashes, {sims['acknowledged']}"
        f" acknowledgements, {sims['jobs']} jobs charged)" if sims else "",
        f"{kills['kills']} kills ({kills['starting']} in a start, {kills['acknowledged']}"
        f" acknowledgements, {kills['reads']} reads)" if kills else "",
        f"{of('call')['calls']} calls died at by {rows.way()}" if of("call") else "",
        f"{of('fault')['faults']} disk errors" if of("fault") else "",
        f"{race['requests']} requests of 64 clients, {race['granted']} granted" if race else "",
        f"{forks['forks']} copies: {sum(forks[n] for n in noticed)} refused or found,"
        f" {forks['nobody: nothing is lacking']} lacked nothing" if forks else "",
    )  # fmt: skip
    return "; ".join(p for p in parts if p)


def main() -> int:
    with rows.folder() as folder:
        os.environ["TORTURE_FOLDER"] = str(folder)  # processes that are ended leave nothing behind
        return _replay(sys.argv[2:]) if sys.argv[1:2] == ["replay"] else _run()


def _run() -> int:
    given = _arguments()
    began = time.monotonic()
    todo = rows.tasks(
        sims=given.sims, kills_=given.kills, forks_=given.forks, call_step=given.call_step,
        fault_step=given.fault_step, race_=given.race, seed=given.seed,
    )  # fmt: skip
    left = Counter(task.row for task in todo)
    done: dict[str, Part] = {row: Part() for row in left}
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for row, part in pool.imap_unordered(rows.play, todo):
            done[row].counts += part.counts
            done[row].wrong += part.wrong
            for what, command in part.wrong:
                print(f"VIOLATION {what}\n  {command}", flush=True)
            left[row] -= 1
            if not left[row]:
                print(f"{row}: {dict(done[row].counts)}", flush=True)
    wrong = sum(len(part.wrong) for part in done.values())
    seconds = time.monotonic() - began
    print(f"torture seed={given.seed}: {_figures(done)}: {wrong} violations in {seconds:.0f} s")
    return 1 if wrong or not _complete(done, todo) else 0


def _complete(done: dict[str, Part], todo: list[Task]) -> bool:
    """Whether every row that was asked for counted something."""
    return all(done[row].counts for row in {task.row for task in todo})


if __name__ == "__main__":
    sys.exit(main())

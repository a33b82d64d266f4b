"""What one verification of evidence takes, of every kind.

``python -m benchmarks.attest [DIR] [--format json]``. DIR: folders ``<tee>/<case>/`` of evidence,
``../shared/evidence`` if not given. Each case is judged from its bytes by the default policy of its
kind: the first time in a process (imports done), and the median of 15 more. Milliseconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from casemate.attest import folder

DEFAULT: Final = Path(__file__).resolve().parents[2] / "shared" / "evidence"
REPEATS: Final = 15
TARGET_MS: Final = 50


def once(files: dict[str, bytes], now: float) -> float:
    start = time.process_time()
    folder.judge(files, now=now)
    return (time.process_time() - start) * 1e3


def measure(case: Path) -> dict[str, Any]:
    stated = json.loads((case / "about.json").read_text())
    now = datetime.fromisoformat(stated.get("verify_at", "2026-06-01T00:00:00Z")).timestamp()
    files = folder.read(case)
    first = once(files, now)
    again = [once(files, now) for _ in range(REPEATS)]
    found = folder.judge(files, now=now)
    return {
        "case": f"{case.parent.name}/{case.name}",
        "tee": found.tee,
        "decision": found.decision,
        "first_ms": round(first, 2),
        "ms": round(statistics.median(again), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attest", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    given = parser.parse_args()
    cases = sorted(p.parent for p in given.folder.glob("*/*/about.json"))
    found = [measure(case) for case in cases]
    if given.format == "json":
        print(json.dumps(found, indent=1))
        return
    if not found:
        print(f"not measured: there is no evidence under {given.folder}")
        return
    print(f"{len(found)} cases, {platform.machine()}, Python {platform.python_version()}\n")
    print("| evidence | cases | ms, median of cases | ms, slowest case | first in a process |")
    print("|---|---|---|---|---|")
    for tee in sorted({f["tee"] for f in found}):
        mine = [f for f in found if f["tee"] == tee]
        slow = max(mine, key=lambda f: f["ms"])
        middle = statistics.median(f["ms"] for f in mine)
        first = max(f["first_ms"] for f in mine)
        worst = f"{slow['ms']:.1f} ({slow['case']})"
        print(f"| {tee} | {len(mine)} | {middle:.1f} | {worst} | {first:.1f} |")
    over = [f["case"] for f in found if f["ms"] > TARGET_MS]
    print(f"\nOver {TARGET_MS} ms: {', '.join(over) or 'none'}")


if __name__ == "__main__":
    main()

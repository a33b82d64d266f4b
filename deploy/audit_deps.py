"""Are the locked dependencies free of known weaknesses? ``python deploy/audit_deps.py PIP_AUDIT``.

Every package of constraints.txt and of deploy/*.txt is looked up by name and version at PyPI's
advisory service, which needs the network. One that has an advisory, is skipped or cannot be looked
up is a failure (exit status 1).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "constraints.txt", *sorted((ROOT / "deploy").glob("*.txt")))


def locked(text: str) -> dict[str, str]:
    """Name to version of every pinned package."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def problems(wanted: dict[str, str], report: dict[str, Any]) -> list[str]:
    """What stands against a release, one line each."""
    said = {re.sub(r"[-_.]+", "-", d["name"]).lower(): d for d in report["dependencies"]}
    out = []
    for name, version in sorted(wanted.items()):
        entry = said.get(name)
        if entry is None or "skip_reason" in entry or entry.get("version") != version:
            why = (entry or {}).get("skip_reason", "not looked up")
            out.append(f"{name} {version}: {why}")
        else:
            out += [f"{name} {version}: {v['id']}" for v in entry["vulns"]]
    return out


def main(tool: str) -> int:
    found: list[str] = []
    count = 0
    for lock in LOCKS:
        wanted = locked(lock.read_text())
        count += len(wanted)
        done = subprocess.run(
            [tool, "--requirement", str(lock), "--no-deps", "--disable-pip", "--strict",
             "--progress-spinner", "off", "--format", "json"],
            stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
        try:
            found += problems(wanted, json.loads(done.stdout))
        except ValueError:
            found.append(f"{lock.name}: pip-audit ended with {done.returncode} and no report")
    print("\n".join(found) or f"{count} packages, no known weakness")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

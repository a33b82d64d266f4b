"""``python -m benchmarks.trusted``: what has to be trusted while rows are in memory, in lines and
bytes: a worker (Python, casemate, torch and what they load) and a native step (docs/native.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_WORKER = """
import sys
from pathlib import Path
import casemate.worker.session, torch
files = {m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
python = [f for f in files if f.endswith(".py")]
maps = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines()
        if len(line.split(maxsplit=5)) > 5}
native = {m for m in maps if m.startswith("/") and ".so" in m}
for f in sorted(python):
    print("py", f)
for f in sorted(native):
    print("so", f)
"""


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def main() -> None:
    from casemate.engine import native
    from casemate.engine.aot import build

    done = subprocess.run(
        [sys.executable, "-c", _WORKER], capture_output=True, text=True, check=True
    )
    found: dict[str, list[Path]] = {"py": [], "so": []}
    for line in done.stdout.splitlines():
        kind, _, name = line.partition(" ")
        if Path(name).is_file():
            found[kind].append(Path(name))
    torch_ = [p for p in found["so"] if "/torch/" in str(p)]
    other = [p for p in found["so"] if "/torch/" not in str(p)]
    ours = [p for p in found["py"] if "/casemate/" in str(p)]
    runtime = [*build._HERE.glob("*.cpp")]
    kernels = [p for p in Path(native.__file__).parent.glob("*.cpp") if p.name != "step.cpp"]
    rows = [
        ("worker: casemate", sum(map(_lines, ours)), sum(p.stat().st_size for p in ours)),
        ("worker: other Python that is loaded", sum(map(_lines, set(found["py"]) - set(ours))),
         sum(p.stat().st_size for p in set(found["py"]) - set(ours))),
        ("worker: libtorch and its libraries", None, sum(p.stat().st_size for p in torch_)),
        ("worker: other shared libraries", None, sum(p.stat().st_size for p in other)),
        ("native step: runtime", sum(map(_lines, runtime)), None),
        ("native step: kernels and noise", sum(map(_lines, kernels)), None),
    ]  # fmt: skip
    print("| what | lines | bytes |\n| --- | --- | --- |")
    for name, lines, size in rows:
        told = ["" if n is None else f"{n:,}" for n in (lines, size)]
        print(f"| {name} | {told[0]} | {told[1]} |")


if __name__ == "__main__":
    main()

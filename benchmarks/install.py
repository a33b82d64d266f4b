"""What the base install weighs, in a fresh virtual environment.

``python -m benchmarks.install [--format json]``: packages (with casemate), megabytes of
site-packages without pip and setuptools, the time of ``import casemate`` and of ``casemate --help``
(medians of nine processes each, by the clock and by CPU). Installs with the uv of this environment.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
REPEATS: Final = 9
TARGETS: Final = {"packages": 20, "megabytes": 60, "import_ms": 150}
FORBIDDEN: Final = ("torch", "numpy", "pyarrow")


def install(folder: Path) -> Path:
    """A fresh environment with casemate alone, byte code compiled as pip does; its python."""
    uv = str(Path(sys.executable).with_name("uv"))
    python = folder / "bin" / "python"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    wheels = folder.parent / "wheels"
    subprocess.run([uv, "build", "-q", "-o", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("*.whl")
    command = [uv, "pip", "install", "-q", "--compile-bytecode", "--python", str(python)]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    return python


def size(folder: Path) -> tuple[int, int]:
    """Bytes under ``folder``, and those of them that are byte code."""
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    code = sum(f.stat().st_size for f in files if f.suffix == ".pyc")
    return sum(f.stat().st_size for f in files), code


def timed(command: Sequence[str]) -> dict[str, float]:
    """Milliseconds of a process, by the clock and by CPU: medians."""
    walls, cpus = [], []
    for _ in range(REPEATS):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "wall_ms": round(1000 * statistics.median(walls), 1),
        "cpu_ms": round(1000 * statistics.median(cpus), 1),
    }


IMPORT = "import time; a = time.perf_counter(); import casemate; print(time.perf_counter() - a)"


def measure(python: Path) -> dict[str, Any]:
    """All figures of an environment."""
    listing = subprocess.check_output(
        [str(Path(sys.executable).with_name("uv")), "pip", "list", "--python", str(python),
         "--format", "json", "-q"]
    )  # fmt: skip
    names = sorted({p["name"] for p in json.loads(listing)} - {"pip", "setuptools"})
    site = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    total, code = size(site)
    imports = [
        1000 * float(subprocess.check_output([str(python), "-c", IMPORT])) for _ in range(REPEATS)
    ]
    return {
        "packages": len(names),
        "names": names,
        "megabytes": round(total / 1e6, 1),
        "of_that_byte_code": round(code / 1e6, 1),
        "heavy": [n for n in FORBIDDEN if n in names],
        "import_ms": round(statistics.median(imports), 1),
        "import_ms_range": [round(min(imports), 1), round(max(imports), 1)],
        "bare_python": timed([str(python), "-c", "pass"]),
        "import_process": timed([str(python), "-c", "import casemate"]),
        "help": timed([str(python.with_name("casemate")), "--help"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as name:
        found = measure(install(Path(name) / "env"))
    if options.format == "json":
        print(json.dumps(found, indent=2))
        return
    for key in ("packages", "megabytes", "import_ms"):
        print(f"{key:20}{found[key]:8}   (aim: at most {TARGETS[key]})")
    print(f"{'of that byte code':20}{found['of_that_byte_code']:8} MB")
    for key in ("bare_python", "import_process", "help"):
        print(
            f"{key:20}{found[key]['wall_ms']:8} ms by the clock, {found[key]['cpu_ms']} ms of CPU"
        )
    print("torch, numpy, pyarrow:", ", ".join(found["heavy"]) or "none of them")


if __name__ == "__main__":
    main()

"""casemate's private step beside plain PyTorch and other private steps, in one run.

``python -m benchmarks.engine [--quick] [--format table|json] [--only mlp,vgg9] [--peers n]``.
Each workload has a process of its own. First all of them compile, two at a time, into an empty
cache; then one after the other is measured while the rest wait. docs/benchmarks-engine.md says how
to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.engine import report

ROOT: Final = Path(__file__).resolve().parents[2]
AT_ONCE: Final = 2
# Seconds of rounds in a quick run; those that compile longest first.
SECONDS: Final = {
    "efficientnet_b0": 15, "resnet18": 15, "distilbert": 40, "distilbert_lora": 25, "minilm": 25,
    "distilbert_last": 15, "vgg9": 15, "mlp": 8, "logreg": 5,
}  # fmt: skip
FULL: Final = 10
PAGE: Final = ROOT / "docs" / "benchmarks-engine.md"
IMAGE: Final = ROOT / "docs" / "images" / "benchmarks-engine.svg"
PASSES: Final = (
    ("highest", "raised", "float32"),
    ("medium", "raised", "Products of bfloat16"),
    ("highest", "default", "float32, the C library's default allocator settings"),
)
# The methods that form a gradient per record spend most of their time on page faults otherwise.
RAISED: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def counter(folder: Path) -> Path | None:
    """``allocations.c`` compiled, or None without a C compiler: bytes are not measured then."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "allocations.so"
    source = Path(__file__).with_name("allocations.c")
    done = subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(source)])
    return made if done.returncode == 0 else None


def environment(folder: Path, allocator: str, preload: Path | None) -> dict[str, str]:
    """One thread, a cold compile cache, and the allocator's settings."""
    made = {k: v for k, v in os.environ.items() if k not in RAISED}
    made |= {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    made.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    if allocator == "raised":
        made |= RAISED
    if preload is not None:
        made["LD_PRELOAD"] = str(preload)
    return made


class Child:
    """A process of ``benchmarks.engine.measure`` and its errors in a file."""

    def __init__(self, settings: Mapping[str, Any], env: Mapping[str, str], folder: Path) -> None:
        self.errors = folder / f"{settings['workload']}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine.measure", json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=dict(env), cwd=ROOT,
            )  # fmt: skip

    def answer(self) -> str | None:
        assert self.process.stdout is not None
        return self.process.stdout.readline() or None

    def go(self) -> dict[str, Any]:
        """Its turn to measure; what went wrong where it died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.answer()
        self.process.wait()
        if line is None:
            return {"error": "".join(self.errors.read_text().splitlines(True)[-5:]).strip()}
        return dict(json.loads(line))


def run(options: argparse.Namespace, say: Any = None) -> list[dict[str, Any]]:
    """One result a workload, in the order of the tables."""
    say = say or (lambda text: None)
    chosen = [name for name in SECONDS if not options.only or name in options.only]
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as name:
        folder = Path(name)
        env = environment(folder, options.allocator, counter(folder))

        def prepare(workload: str) -> Child:
            seconds = options.seconds or SECONDS[workload] * (1 if options.quick else FULL)
            child = Child(
                {"workload": workload, "precision": options.precision, "quick": options.quick,
                 "peers": options.peers, "seconds": seconds}, env, folder,
            )  # fmt: skip
            child.answer()
            say(f"{workload}: built")
            return child

        with ThreadPoolExecutor(AT_ONCE) as pool:
            children = dict(zip(chosen, pool.map(prepare, chosen), strict=True))
        found: dict[str, dict[str, Any]] = {}
        for workload, child in sorted(children.items(), key=lambda c: SECONDS[c[0]]):
            one = found[workload] = report.summary(workload, child.go(), options)
            told = ", ".join(f"{key} {one[key]}" for key in report.RATIOS)
            say(f"{workload}: {told}")
            if options.save:  # after each: a run that is cut short has told what it had
                options.save.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    return [found[w] for w in report.ORDER if w in found]


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer peers and rounds: 18 minutes")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--only", type=listed, default=[], help="ids of workloads, with commas")
    parser.add_argument(
        "--peers", type=listed, default=[],
        help="groups (n, opacus, other) or names beside casemate and eager, with commas",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest")
    parser.add_argument("--allocator", choices=("raised", "default"), default="raised")
    parser.add_argument("--seconds", type=float, help="of rounds, for each workload")
    parser.add_argument("--chart", type=Path, help="write a chart (SVG) there")
    parser.add_argument(
        "--write", action="store_true",
        help="measure at each precision and allocator; put tables and chart into docs",
    )  # fmt: skip
    parser.add_argument("--save", type=Path, help="write the JSON there, after each workload")
    options = parser.parse_args(argv)
    unknown = [name for name in options.only if name not in SECONDS]
    if unknown:
        parser.error(f"no such workload: {', '.join(unknown)} (there are {', '.join(SECONDS)})")
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write(options: argparse.Namespace, page: Path = PAGE, image: Path = IMAGE) -> None:
    """Every pass, its tables between the marks of ``page``, and the chart of the first."""
    parts = []
    for n, (precision, allocator, title) in enumerate(PASSES):
        _say(title)
        turned = argparse.Namespace(**vars(options))
        turned.precision, turned.allocator = precision, allocator
        found = run(turned, _say)
        parts.append(f"## {title}\n\n{report.table(found)}")
        if n == 0:
            image.parent.mkdir(exist_ok=True)
            report.chart(found, image)
        report.put(page, "\n\n".join(parts))


def main() -> None:
    options = arguments()
    if options.write:
        write(options)
        return
    found = run(options, _say)
    if options.chart:
        report.chart(found, options.chart)
    print(json.dumps(found, indent=2) if options.format == "json" else report.table(found))


if __name__ == "__main__":
    main()

"""The seeds' headline redone: one epoch of EfficientNet-B0 by PyTorch, Opacus, Flower, casemate.

``python -m benchmarks.fortified [--quick] [--repeats 5] [--format json]``. Figures and what they
mean: docs/benchmarks-fortified.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.fortified import flower, report, variants
from benchmarks.fortified.local import How
from benchmarks.fortified.variants import Bench, Result
from benchmarks.fortified.workload import Workload, source

FULL = Workload(images=48_000, test=10_000, batch=1024)
QUICK = Workload(images=1024, test=1000, batch=128)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fortified", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, one repeat")
    parser.add_argument("--images", type=int, help="of the epoch")
    parser.add_argument("--batch", type=int, help="expected records in a step")
    parser.add_argument("--repeats", type=int, help="of every variant (5; with --quick 1)")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--lr", type=float, default=FULL.lr, help="of Adam, for all variants")
    parser.add_argument("--data", choices=("auto", "fashion-mnist", "synthetic"), default="auto")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=variants.STARTED)
    parser.add_argument("--enclave", metavar="URL", help="a server in an enclave")
    parser.add_argument("--trust", default="simulated", help="for --enclave: a trust policy's file")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="go on where FILE's runs end")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    return parser.parse_args()


def measure(given: argparse.Namespace, bench: Bench, repeats: int) -> Result:
    """Every variant in turn, then all of them again: what slows the machine meets all alike."""
    settings = {"work": asdict(bench.work), "epsilon": bench.epsilon, "delta": bench.delta}
    done = variants.kept(given.keep, settings)

    def keep(line: Result) -> None:
        done.append(line)
        if given.keep:
            with given.keep.open("a") as file:
                file.write(json.dumps({"settings": settings, **line}) + "\n")

    names = [
        name
        for name in given.only or variants.STARTED
        if bench.enclave or name not in variants.NEEDS_ENCLAVE
    ]
    if any(n.startswith("flower") for n in names):
        say("Flower's environment")
        flower.install()
    probes = next((line["probes"] for line in done if "probes" in line), None)
    if probes is None:
        probes = {
            "eager": variants.best(bench.work, variants.EAGER, say),
            "opacus": variants.best(bench.work, variants.OPACUS, say),
        }
        keep({"probes": probes})
    hows = {kind: How(**found["how"]) for kind, found in probes.items()}
    for repeat in range(repeats):
        for name in names:
            if any(r.get("variant") == name and r["repeat"] == repeat for r in done):
                continue
            say(f"repeat {repeat + 1} of {repeats}: {variants.LABELS[name]}")
            try:
                for variant, result in variants.run(bench, name, hows, repeat).items():
                    keep({"variant": variant, "repeat": repeat, "result": result})
                    say(f"  {variants.LABELS[variant]}: {result['seconds']:.1f} s")
            except RuntimeError as e:
                keep({"variant": name, "repeat": repeat, "error": str(e)})
                say(f"  failed: {str(e)[-300:]}")
    runs = [r for r in done if "variant" in r]
    return {
        "quick": given.quick,
        "repeats": repeats,
        "settings": settings,
        "machine": report.machine(),
        "probes": probes,
        "variants": report.summary(runs),
        "ratios": report.ratios(runs, probes),
        "runs": [{k: v for k, v in r.items() if k != "settings"} for r in runs],
    }


def main() -> int:
    given = options()
    size = QUICK if given.quick else FULL
    work = replace(
        size,
        images=given.images or size.images,
        batch=given.batch or size.batch,
        lr=given.lr,
        data=source(given.data),
    )
    bench = Bench(
        work=work,
        epsilon=given.epsilon,
        delta=given.delta,
        enclave=given.enclave,
        trust=given.trust,
    )
    result = measure(given, bench, given.repeats or (1 if given.quick else 5))
    print(json.dumps(result, indent=1) if given.format == "json" else report.show(result))
    return int(any(line["status"] == "failed" for line in result["variants"]))


if __name__ == "__main__":
    sys.exit(main())

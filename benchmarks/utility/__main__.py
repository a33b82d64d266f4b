"""What privacy costs in accuracy: Fashion-MNIST over epsilon, SMS spam over five splits.

``python -m benchmarks.utility [--only fashion|sms] [--quick] [--validate] [--format table|json]
[--write]``. Every job runs in the engine with its own noise, drawn anew, and its own accountant.
``--write`` puts what was found into docs/benchmarks-utility.md and its chart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.utility import fashion, report, sms
from casemate.spec.errors import UsageError


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.utility", description=__doc__)
    parser.add_argument("--only", choices=("fashion", "sms"))
    parser.add_argument("--quick", action="store_true", help="the headline's epsilon, one split")
    parser.add_argument("--validate", action="store_true", help="judge on held-out training data")
    parser.add_argument("--epsilons", type=lambda s: tuple(map(float, s.split(","))))
    parser.add_argument("--seeds", type=int, default=sms.SEEDS)
    parser.add_argument("--outside", action="store_true", help="never the features in the engine")
    parser.add_argument("--fashion", type=Path, default=fashion.FOLDER, metavar="FOLDER")
    parser.add_argument("--sms", type=Path, metavar="FILE", help="messages; a package's otherwise")
    parser.add_argument("--encoder", type=Path, metavar="FOLDER")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--write", action="store_true", help="write the page and its chart")
    found = parser.parse_args(arguments)
    if found.write and (found.only or found.quick or found.validate or found.epsilons):
        parser.error("--write takes a whole run on the test data")
    return found


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Every result as plain values."""
    made: dict[str, Any] = {"validate": chosen.validate, **report.machine()}
    if chosen.only != "sms":
        epsilons = chosen.epsilons or ((fashion.HEADLINE,) if chosen.quick else fashion.EPSILONS)
        jobs = fashion.curve(
            chosen.fashion, epsilons, validate=chosen.validate, inside=not chosen.outside
        )
        made["fashion"] = []
        for result in jobs:
            made["fashion"].append(dataclasses.asdict(result))
            say("fashion", made["fashion"][-1])
    if chosen.only != "fashion":
        part = sms.records(chosen.sms, chosen.encoder)
        made["messages"] = len(part)
        made["sms"] = []
        count = 1 if chosen.quick else chosen.seeds
        for seed, result in sms.seeds(part, count, (sms.EPSILON, None), validate=chosen.validate):
            made["sms"].append({"seed": seed, **dataclasses.asdict(result)})
            say("sms", made["sms"][-1])
        made["sms_mean"] = {
            "private": statistics.fmean(
                r["accuracy"] for r in made["sms"] if r["epsilon"] is not None
            ),
            "plain": statistics.fmean(r["accuracy"] for r in made["sms"] if r["epsilon"] is None),
        }
    return made


def say(what: str, result: dict[str, Any]) -> None:
    asked = "no privacy" if result["epsilon"] is None else f"epsilon {result['epsilon']:g}"
    line = f"{what}: {asked}: {result['accuracy']:.2%} in {result['seconds']:.0f} s"
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    chosen = options()
    torch.set_num_threads(1)
    try:
        found = measure(chosen)
    except (FileNotFoundError, UsageError) as e:
        print(e, file=sys.stderr)
        return 2
    if chosen.write:
        report.write(found)
    print(json.dumps(found, indent=2) if chosen.format == "json" else report.tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

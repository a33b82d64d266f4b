"""From runs to medians, spreads, ratios and a table."""

from __future__ import annotations

import math
import operator
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from benchmarks.fortified.flower import EPOCH
from benchmarks.fortified.variants import AS_IT_COMES, LABELS, NEEDS_ENCLAVE, Result

OVER_FLOWER: Final = 10.0
OVER_BARE: Final = 1.05
Target: TypeAlias = tuple[float, Callable[[float, float], bool]]


def machine() -> Result:
    """What the figures depend on; nothing that names the host."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "processor": name or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": "python -m benchmarks.fortified " + " ".join(sys.argv[1:]),
        "load": round(os.getloadavg()[0], 2),
    }


def spread(values: Sequence[float]) -> Result:
    """Median, least, most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(runs: Sequence[Result]) -> list[Result]:
    """A line for each variant; ``status`` says what was not measured, and what failed."""
    lines = []
    for name, label in LABELS.items():
        of = [r for r in runs if r["variant"] == name]
        good = [r["result"] for r in of if "result" in r]
        line: Result = {"variant": name, "label": label, "runs": len(good), "status": "measured"}
        errors = [r["error"] for r in of if "error" in r]
        if errors:
            line |= {"status": "failed", "error": errors[-1]}
        elif not good:
            line["status"] = "not measured"
            if name in NEEDS_ENCLAVE:
                line["why"] = "no enclave: give --enclave URL --trust FILE"
        if good:
            for key in ("seconds", "cpu", "accuracy"):
                if key in good[0]:  # a server elsewhere does not tell its CPU time
                    line[key] = spread([g[key] for g in good])
            stages = {k: spread([g["fixed"][k] for g in good]) for k in good[0]["fixed"]}
            line["fixed"] = stages
            line["fixed_seconds"] = spread([sum(g["fixed"].values()) for g in good])
            for key in ("records", "steps", "slots", "how", "noise", "epsilon", "simulated"):
                if key in good[-1]:
                    line[key] = good[-1][key]
            inside = good[0].get("within", {})
            line["within"] = {k: spread([g["within"][k] for g in good]) for k in inside}
        lines.append(line)
    return lines


def ratios(runs: Sequence[Result], probes: Result) -> list[Result]:
    """What the targets ask for. Ratios are taken within one repeat, then their median."""
    by: dict[str, dict[int, Result]] = {}
    for r in runs:
        if "result" in r:
            by.setdefault(r["variant"], {})[r["repeat"]] = r["result"]

    def paired(
        name: str,
        top: str,
        bottom: str,
        value: Callable[[Result], float],
        target: Target | None = None,
        above: Callable[[Result], float] | None = None,
    ) -> None:
        both = sorted(set(by.get(top, {})) & set(by.get(bottom, {})))
        if not both:
            return
        found = [(above or value)(by[top][i]) / value(by[bottom][i]) for i in both]
        line: Result = {"ratio": name, **spread(found)}
        if target is not None:
            limit, reached = target
            line |= {"target": limit, "reached": reached(line["median"], limit)}
        out.append(line)

    def seconds(r: Result) -> float:
        return float(r["seconds"])

    def cpu(r: Result) -> float:
        return float(r["cpu"])

    def job(r: Result) -> float:
        """The loop or the run, and what stands for it in the quote or ``prepare``."""
        own = [v for k, v in r["fixed"].items() if k.startswith(("quote", "prepare"))]
        return float(r["seconds"] + sum(own))

    times = probes["opacus"]["times"]
    slower = times.get(str(AS_IT_COMES), math.nan) / min(times.values())

    def as_it_comes(r: Result) -> float:
        """The round, had Opacus been in its default mode: the epoch alone gets longer."""
        return float(r["seconds"] + r["within"][EPOCH] * (slower - 1))

    out: list[Result] = []
    over: Target = (OVER_FLOWER, operator.ge)
    under: Target = (OVER_BARE, operator.le)
    for real, what in (("flower_opacus", "2 nodes"), ("flower_opacus_simulation", "simulation")):
        name = f"Flower + Opacus at its best ({what}) / casemate with DP"
        paired(name, real, "casemate_dp", seconds, over)
        paired(f"{name}, CPU seconds", real, "casemate_dp", cpu)
        name = f"the same with Opacus as it comes ({what}), predicted: epoch times {slower:.1f}"
        paired(name, real, "casemate_dp", seconds, above=as_it_comes)
    paired("PyTorch + Opacus / casemate with DP", "pytorch_opacus", "casemate_dp", seconds)
    paired("Flower (2 nodes) / casemate", "flower", "casemate", seconds)
    paired("casemate / PyTorch", "casemate", "pytorch", seconds)
    paired("casemate with DP / PyTorch", "casemate_dp", "pytorch", seconds)
    paired("casemate with DP / casemate", "casemate_dp", "casemate", seconds)
    for tail, what in (("", ""), ("_dp", " with DP")):
        whole, loop = f"casemate{tail}", f"bare{tail}"
        paired(f"whole system / bare engine loop{what}", whole, loop, seconds, under)
        paired(
            f"the same with quote and prepare{what}, once a job",
            whole,
            loop,
            job,
        )
    return out


def _range(found: Result, form: str) -> str:
    return f"{found['median']:{form}} ({found['min']:{form}} to {found['max']:{form}})"


def show(result: Result) -> str:
    """Tables in Markdown."""
    s, m = result["settings"], result["machine"]
    work = s["work"]
    size = "SMALL RUN, not the full benchmark: " if result["quick"] else ""
    lines = [
        f"{size}one epoch of EfficientNet-B0 (GroupNorm) over {work['images']} images 3x32x32"
        f" ({work['data']}), {result['repeats']} repeat(s); expected batch {work['batch']}, Poisson"
        f" sampling, clip {work['clip']:g}, Adam {work['lr']:g}; private ones at"
        f" (epsilon {s['epsilon']:g}, delta {s['delta']:g}); accuracy on {work['test']} images.",
        f"{m['date']}, {m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB, load"
        f" {m['load']} at the end, Python {m['python']}, one thread a process. `{m['command']}`",
        "",
        "| variant | epoch, s: median (range) | CPU s | fixed, s | epsilon | noise | accuracy"
        " | how |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in result["variants"]:
        if "seconds" not in line:
            why = line.get("why") or line.get("error", "").strip().splitlines()[-1:] or ""
            lines.append(f"| {line['label']} | {line['status']} | | | | | | {why} |")
            continue
        epsilon = f"{line['epsilon']:.3g}" if "epsilon" in line else "none"
        cpu = f"{line['cpu']['median']:.1f}" if "cpu" in line else ""
        marks = "" if line["status"] == "measured" else " (a run failed)"
        marks += " (simulated TEE)" if line.get("simulated") else ""
        lines.append(
            f"| {line['label']}{marks} | {_range(line['seconds'], '.1f')}"
            f" | {cpu} | {line['fixed_seconds']['median']:.1f} | {epsilon}"
            f" | {line['noise']:.3f} | {line['accuracy']['median']:.1%} | {line['how']} |"
        )
    lines += ["", "| variant | stage | s: median (range) |", "|---|---|---|"]
    for line in result["variants"]:
        for kind, word in (("fixed", "fixed"), ("within", "within the epoch's time")):
            for name, found in line.get(kind, {}).items():
                lines.append(f"| {line['label']} | {word}: {name} | {_range(found, '.1f')} |")
    lines += ["", "| ratio | median (range) | target |", "|---|---|---|"]
    for line in result["ratios"]:
        word = {True: "reached", False: "missed", None: ""}[line.get("reached")]
        goal = f"{line['target']:g}: {word}" if "target" in line else ""
        lines.append(f"| {line['ratio']} | {_range(line, '.2f')} | {goal} |")
    lines += ["", "| probe: how a peer runs | ms a record |", "|---|---|"]
    for kind in ("eager", "opacus"):
        for name, seconds in sorted(result["probes"][kind]["times"].items(), key=lambda x: x[1]):
            lines.append(f"| {name} | {1e3 * seconds:.2f} |")
    short = [
        f"{line['label']} {line['seconds']['median']:.0f} s"
        for line in result["variants"]
        if "seconds" in line and line["seconds"]["median"] < 60
    ]
    if short:
        lines += ["", f"Less than a minute of work in a round: {', '.join(short)}."]
    return "\n".join(lines)

"""One workload in a process of its own: build, wait for the turn, measure all variants in rounds.

``python -m benchmarks.engine.measure '<settings as JSON>'`` prints a line ``ready`` when everything
that compiles is built, waits for a line on its standard input, and prints the result as JSON.

Seconds are the process's CPU time and, beside it, the clock's; one thread. In a round each variant
runs for about the same time, so that a ratio within a round compares moments next to each other.
Bytes are what a step has from the C allocator at its peak above the moment before it, plus what
the variant holds in torch tensors between steps beyond parameters, buffers and batch: counted by
the preloaded ``allocations.c``, so that native and compiled code count like any other.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

SLICE: Final = 0.02
SLOW: Final = 4.0
MOST_ROUNDS: Final = 31
DROP_N: Final = 1.15
DROP_OPACUS: Final = 1.25


@dataclass
class Timed:
    """CPU and wall seconds of one step, one pair a round; None where a round left it out."""

    cpu: list[float | None] = field(default_factory=list)
    wall: list[float | None] = field(default_factory=list)


class Bytes:
    """Reads the counters of ``allocations.c``; None where it is not preloaded."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.there = hasattr(library, "bench_live")
        if self.there:
            for name in ("bench_live", "bench_aligned", "bench_peak"):
                getattr(library, name).restype = ctypes.c_longlong
            self.library = library

    def tensors(self) -> int:
        gc.collect()
        return int(self.library.bench_aligned()) if self.there else 0

    def peak(self, step: Callable[[], object]) -> int:
        """Of one step, above the moment before it."""
        gc.collect()
        self.library.bench_mark()
        before = int(self.library.bench_live())
        step()
        return int(self.library.bench_peak()) - before


def cpu_with_children() -> float:
    """CPU seconds of this process and of its ended children (the C++ compiler)."""
    done = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + done.ru_utime + done.ru_stime


def once(step: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """CPU and wall seconds of one of ``repeats`` steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats


def estimate(step: Callable[[], object], first: float) -> float:
    """CPU seconds of one step, roughly; ``first`` is what its first one took."""
    if first > SLOW:
        return first
    found = once(step)[0]
    return once(step, 20)[0] if found < SLICE / 4 else found


def rounds_of(
    costs: Mapping[str, float], core: Sequence[str], seconds: float
) -> tuple[int, dict[str, int]]:
    """Rounds in all, and in how many each variant takes part, to fill ``seconds``.

    The core takes part in each round, three at least; what is slow in two at least.
    """
    ran = {name: max(cost, SLICE) for name, cost in costs.items()}
    others = [name for name in costs if name not in core]
    share = seconds * (0.6 if others else 1.0)
    rounds = max(3, min(MOST_ROUNDS, int(share / sum(ran[name] for name in core))))
    left = (seconds - share) / max(1, len(others))
    return rounds, {
        name: rounds if name in core else max(2, min(rounds, int(left / ran[name])))
        for name in costs
    }


def in_rounds(
    steps: Mapping[str, Callable[[], object]],
    costs: Mapping[str, float],
    core: Sequence[str],
    seconds: float,
) -> dict[str, Timed]:
    """Every variant in turn, round after round, the order turned by one each time."""
    rounds, parts = rounds_of(costs, core, seconds)
    found = {name: Timed() for name in steps}
    names = list(steps)
    gc.collect()
    gc.freeze()
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if (i + 1) * parts[name] // rounds == i * parts[name] // rounds:
                found[name].cpu.append(None)
                found[name].wall.append(None)
                continue
            cpu, wall = once(steps[name], max(1, int(SLICE / max(costs[name], 1e-6))))
            found[name].cpu.append(cpu)
            found[name].wall.append(wall)
    return found


def ratio(over: Timed, under: Timed) -> dict[str, float] | None:
    """Median and quartiles of the ratios of rounds that have both, by CPU time."""
    pairs = zip(over.cpu, under.cpu, strict=True)
    found = sorted(a / b for a, b in pairs if a is not None and b is not None)
    if not found:
        return None
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else (
        found * 3
    )  # fmt: skip
    return {"median": statistics.median(found), "low": low, "high": high, "rounds": len(found)}


def median(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return statistics.median(there) if there else None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Run:
    """One workload's variants, built, measured and told."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch

        from benchmarks.engine import peers
        from benchmarks.engine.workloads import BY_ID

        torch.set_num_threads(1)
        torch.set_float32_matmul_precision(settings["precision"])
        if settings["precision"] != "highest":
            onednn: Any = torch.backends.mkldnn
            onednn.conv.fp32_precision = "bf16"
        self.settings, self.workload = settings, BY_ID[settings["workload"]]
        wanted = settings["peers"]
        self.peers = {
            p.id: p
            for p in peers.ALL
            if p.fits(self.workload)
            and (p.quick(self.workload) or not settings["quick"])
            and (not wanted or p.group in ("ours", "eager") or p.id in wanted or p.group in wanted)
        }
        self.steps: dict[str, Callable[[], object]] = {}
        self.first: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self.build_seconds: dict[str, float] = {}
        self.build_cpu_seconds: dict[str, float] = {}
        self.held: dict[str, int] = {}
        self.bytes = Bytes()
        before = self.bytes.tensors()
        reference = self.workload.make(), self.workload.data()
        self.own = self.bytes.tensors() - before
        del reference
        peers.eager(self.workload)()  # what libraries keep for themselves is no variant's

    def build(self, compiles: bool) -> None:
        """Those that compile, or those that do not; with one step, so that nothing is cold."""
        for peer in self.peers.values():
            if peer.compiles != compiles:
                continue
            wall, cpu = time.perf_counter(), cpu_with_children()
            before = self.bytes.tensors()
            try:
                step = peer.build(self.workload)
                first = once(step)[0]
            except Exception as e:
                self.missing[peer.id] = _reason(e)
                continue
            self.steps[peer.id], self.first[peer.id] = step, first
            self.held[peer.id] = max(0, self.bytes.tensors() - before - self.own)
            self.build_seconds[peer.id] = time.perf_counter() - wall
            self.build_cpu_seconds[peer.id] = cpu_with_children() - cpu

    def _drop(self, costs: dict[str, float], groups: Sequence[str], factor: float) -> None:
        """Leave out of the rounds what one step already shows to be far behind its group's best."""
        members = [name for name in costs if self.peers[name].group in groups]
        best = min((costs[name] for name in members), default=0.0)
        for name in members:
            if costs[name] > factor * best and name != "eager":
                del costs[name]

    def measure(self) -> dict[str, Any]:
        """Everything in rounds, then bytes; what the report needs."""
        self.build(compiles=False)
        costs = {name: estimate(step, self.first[name]) for name, step in self.steps.items()}
        single = dict(costs)
        self._drop(costs, ("eager", "n"), DROP_N)
        self._drop(costs, ("opacus",), DROP_OPACUS)
        steps = {name: self.steps[name] for name in costs}
        core = [n for n in costs if self.peers[n].group in ("ours", "eager", "n")]
        timed = in_rounds(steps, costs, core, self.settings["seconds"])
        memory: dict[str, int] = {}
        if self.bytes.there:
            told = steps if self.settings["quick"] else self.steps
            for name, step in told.items():
                memory[name] = self.held[name] + self.bytes.peak(step)
        return self._told(single, timed, memory)

    def _told(
        self, single: Mapping[str, float], timed: Mapping[str, Timed], memory: Mapping[str, int]
    ) -> dict[str, Any]:
        medians = {name: median(t.cpu) for name, t in timed.items()}

        def best(groups: Sequence[str]) -> str | None:
            names = [n for n in timed if self.peers[n].group in groups]
            return min(names, key=lambda n: medians[n] or 0.0, default=None)

        fastest, opacus = best(("eager", "n")), best(("opacus",))
        variants = {
            name: {
                "group": peer.group,
                "ms": _ms(medians.get(name)),
                "wall_ms": _ms(median(timed[name].wall)) if name in timed else None,
                "one_step_ms": _ms(single.get(name)),
                "over_eager": ratio(timed[name], timed["eager"]) if name in timed else None,
                "megabytes": round(memory[name] / 1e6, 2) if name in memory else None,
                "build_seconds": self.build_seconds.get(name),
                "build_cpu_seconds": self.build_cpu_seconds.get(name),
                "missing": self.missing.get(name),
            }
            for name, peer in self.peers.items()
        }
        pairs = {
            "step_over_eager": ("casemate", "eager"),
            "step_over_n": ("casemate", fastest),
            "opacus_best_over_step": (opacus, "casemate"),
            "n_over_eager": (fastest, "eager"),
            "opacus_best_over_eager": (opacus, "eager"),
        }
        ratios = {
            key: ratio(timed[a], timed[b]) if a and b and a in timed and b in timed else None
            for key, (a, b) in pairs.items()
        }
        base = "casemate" if "casemate" in timed else "eager"
        modes = {
            name: ratio(timed[name], timed[base])
            if name in timed
            else {"median": single[name] / (medians[base] or 1.0), "rounds": 1}
            for name in single
            if self.peers[name].group == "opacus"
        }
        return {
            "n": fastest, "opacus_best": opacus, "ratios": ratios, "opacus_modes_over": base,
            "opacus_modes": modes, "variants": variants,
        }  # fmt: skip


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 4)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the errors
    warnings.filterwarnings("ignore")
    run = Run(json.loads(sys.argv[1]))
    run.build(compiles=True)
    print("ready", file=answers)
    if not sys.stdin.readline():
        return
    print(json.dumps(run.measure()), file=answers)


if __name__ == "__main__":
    main()

"""The native step beside the best non-private compiled step and Opacus, on one core.

``python -m benchmarks.native [--quick] [--format json]`` (``make bench-native``): of each workload
a list entry with ``images_per_s`` (records a second), ``native_over_n``, ``artifact_bytes``,
``max_rel_diff`` (of the clipped sum from the engine's, over microbatches: see
``casemate.engine.aot.check``; ``median_rel_diff`` beside it) and ``opacus_ghost_over_native``.

Seconds are CPU time of the process that computes, in rounds: each peer's steps, then two runs of
the artifact of different length, whose difference is what its steps take. So reading rows, starting
and stopping are left out, sampling, noise and update are in.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from benchmarks.engine import peers
from benchmarks.engine.report import machine
from benchmarks.engine.workloads import BY_ID, CLIP, LEARNING_RATE, NOISE_MULTIPLIER, Workload

QUICK: Final = ("logreg", "mlp", "vgg9")
ALL: Final = (*QUICK, "efficientnet_b0", "minilm")
# Finer than a job's (2^-20 of its noise), so that what differs is not what rounding to it makes.
GRID: Final = 2.0**-28
ROUNDS: Final = 5
SECONDS: Final = 1.5
GHOST: Final = "opacus ghost"


def cpu(step: Callable[[], object], times: int) -> float:
    """CPU seconds of one step, here."""
    begun = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - begun) / times


def child() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def others(workload: Workload, program: Any) -> Any:
    """Five other batches of a workload, as rows: ties in a pooling window are a batch's own."""
    from casemate.engine import select

    count = 5 * workload.batch
    torch.manual_seed(2)
    made = (*workload.inputs(count), torch.randint(workload.classes, (count,)))
    named = {spec.name: t for spec, t in zip(program.data, made, strict=True)}
    return select.made_up(named, count, 1)


class Native:
    """An artifact of a workload, accepted, with all its records in every step."""

    def __init__(self, workload: Workload) -> None:
        from benchmarks.engine import ours
        from casemate.engine import batched, select
        from casemate.engine.aot import build, check, step
        from casemate.engine.sites import Shape

        program, checked, records = ours.program_of(workload)
        b = workload.batch
        path = batched.build(program, checked, records, Shape(b, 1), keep=False)
        path.settle(records, last=False)
        path.choose(path.operands_of(records), select.FORMED_BYTES)
        self.artifact = build.build(step.of(path, CLIP, GRID))
        self.rows = select.made_up(records, b, 1)
        self.agreement = check.agreement(self.artifact, path, others(workload, program))
        self.path = path

    def given(self, steps: int) -> bytes:
        from casemate.engine import batched
        from casemate.engine.aot import check, run
        from casemate.spec.job import Dp, Sgd, TrainSpec

        path, made = self.path, self.artifact.step
        b = path.shape.rows
        sigma = NOISE_MULTIPLIER * batched.sensitivity(CLIP, path.program.dimension, GRID)
        plan = check.made_up(made, b, steps=steps, normaliser=float(b), sigma=sigma)
        train = TrainSpec(
            batch_size=b, steps=steps, privacy=Dp(epsilon=1.0, delta=1e-5, clip=CLIP),
            optimizer=Sgd(lr=LEARNING_RATE),
        )  # fmt: skip
        names = [spec.name for spec in path.program.data]
        tensors = {name: t for name, t in path.runner.inputs.items() if name in made.inputs}
        key = bytes(range(32))
        return b"".join(
            run.job(self.artifact, plan, train, self.rows, names, tensors, key, 1e9, 1e-5)
        )

    def seconds(self, steps: int) -> float:
        """CPU seconds of a run of so many steps."""
        from casemate.engine.aot import run

        given, before = self.given(steps), child()
        found = run.run(self.artifact, iter([given]))
        assert found.steps == steps
        return child() - before


def measured(workload: Workload, rounds: int) -> dict[str, Any]:
    steps: dict[str, Callable[[], object]] = {}
    for peer in peers.ALL:
        if peer.group in ("eager", "n") or peer.id == GHOST:
            with contextlib.suppress(peers.Absent):
                if peer.fits(workload):
                    steps[peer.id] = peer.build(workload)
    native = Native(workload)
    for step in steps.values():
        step()
    first = native.seconds(2) / 2
    many = max(2, int(SECONDS / first))
    found: dict[str, list[float]] = {name: [] for name in [*steps, "native"]}
    for _ in range(rounds):
        for name, step in steps.items():
            once = found[name][0] if found[name] else cpu(step, 1)
            found[name].append(cpu(step, max(1, min(2000, int(SECONDS / once)))))
        found["native"].append((native.seconds(1 + many) - native.seconds(1)) / many)
    own = {name: statistics.median(values) for name, values in found.items()}
    best = min((n for n in own if n not in ("native", GHOST)), key=own.__getitem__)

    def over(name: str) -> float | None:
        """The median of the rounds' ratios of native over a peer."""
        if name not in found:
            return None
        return statistics.median(a / b for a, b in zip(found["native"], found[name], strict=True))

    ghost = over(GHOST)
    return {
        "workload": workload.id,
        "batch": workload.batch,
        "images_per_s": workload.batch / own["native"],
        "native_over_n": over(best),
        "n": best,
        "artifact_bytes": len(native.artifact.program),
        "max_rel_diff": max(native.agreement.differences),
        "median_rel_diff": native.agreement.median,
        "opacus_ghost_over_native": None if ghost is None else 1.0 / ghost,
        "seconds": own,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"of {', '.join(QUICK)} alone")
    parser.add_argument("--only", default="", help=f"of {', '.join(ALL)}; by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--format", choices=["text", "json"], default="text")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    wanted = given.only.split(",") if given.only else QUICK if given.quick else ALL
    with _quiet():
        made = [measured(BY_ID[name], given.rounds) for name in wanted]
    if given.format == "json":
        print(json.dumps(made, indent=2))
        return
    print(f"{machine()}, one core, {datetime.date.today().isoformat()}\n")
    print(
        "| workload | records/s | native / N | artifact, bytes | differs | Opacus ghost / native |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for one in made:
        ghost = one["opacus_ghost_over_native"]
        print(
            f"| {one['workload']} ({one['batch']}) | {one['images_per_s']:,.0f} |"
            f" {one['native_over_n']:.2f} ({one['n']}) | {one['artifact_bytes']:,} |"
            f" {one['median_rel_diff']:.1e} | {'' if ghost is None else f'{ghost:.1f}'} |"
        )


if __name__ == "__main__":
    main()

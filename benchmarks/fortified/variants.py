"""What is measured: each variant's one run, and the search for the peers' best settings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.fortified import flower
from benchmarks.fortified.local import How
from benchmarks.fortified.workload import ROOT, Workload
from casemate.accounting import calibrate, filters
from casemate.spec.job import DpEvent

Result = dict[str, Any]

LABELS: Final = {
    "pytorch": "PyTorch",
    "pytorch_opacus": "PyTorch + Opacus",
    "flower": "Flower, 2 nodes",
    "flower_simulation": "Flower, simulation",
    "flower_opacus": "Flower + Opacus, 2 nodes",
    "flower_opacus_simulation": "Flower + Opacus, simulation",
    "casemate": "casemate, whole system",
    "casemate_dp": "casemate with DP, whole system",
    "bare": "casemate's bare engine loop",
    "bare_dp": "casemate's bare engine loop with DP",
    "casemate_enclave": "casemate in an enclave",
    "casemate_enclave_dp": "casemate in an enclave with DP",
}
# The bare loops come with the whole system's runs, whose plan they repeat.
STARTED: Final = tuple(name for name in LABELS if not name.startswith("bare"))
NEEDS_ENCLAVE: Final = ("casemate_enclave", "casemate_enclave_dp")

# What a peer might run best with; the fastest in the probe is taken.
EAGER: Final = (
    How("", 64),
    How("", 64, True, True),
    How("", 128, True, True),
    How("", 256, True, True),
)
AS_IT_COMES: Final = How("hooks", 16)
OPACUS: Final = (
    AS_IT_COMES,
    How("hooks", 16, True, True),
    How("ghost", 16, True, True),
    How("ew", 16, True, True),
    How("functorch", 16, True, True),
    How("functorch", 64, True, True),
    How("functorch", 128, True, True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """``work`` has no noise; ``epsilon``, ``delta``: of every private variant's epoch."""

    work: Workload
    epsilon: float
    delta: float
    enclave: str | None = None
    trust: str = "simulated"

    def noise(self, work: Workload) -> float:
        """The least noise multiplier for an epoch of ``work``, by casemate's accountant."""
        return calibrate.noise_multiplier(work.rate, work.steps, self.epsilon, self.delta)

    def charge(self, work: Workload, noise: float) -> float:
        """Epsilon of an epoch of ``work`` with that noise, by the same accountant."""
        event = DpEvent(rate=work.rate, noise_multiplier=noise, steps=work.steps)
        return filters.RdpFilter.charge([event], 0.0, delta_shown=self.delta).epsilon


def child(
    module: str, job: Mapping[str, Any], *words: str, env: Mapping[str, str] | None = None
) -> Result:
    """The last line in JSON of a process of its own. Raises ``RuntimeError`` with its errors."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.fortified.{module}", *words],
        input=json.dumps({**job, "spawned": time.monotonic()}),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(words)}: {done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def probe(work: Workload, how: How) -> float:
    """CPU seconds a record in one step, after one warm call; CPU, since others may be running."""
    images = min(work.images, 4 * how.physical if not how.mode else max(32, how.physical))
    small = replace(work, images=images, batch=images, noise=1.0 if how.mode else 0.0)
    job = {"work": asdict(small), "how": asdict(how), "seed": 0, "warm": True}
    found = child("local", job, env=how.environment)
    return float(found["cpu"] / max(1, found["records"]))


def best(work: Workload, candidates: tuple[How, ...], say: Callable[[str], None]) -> Result:
    """``seconds`` a record of each candidate that runs, by name; ``how``: the fastest's fields."""
    times: dict[How, float] = {}
    for how in candidates:
        try:
            times[how] = probe(work, how)
            say(f"probe: {how}: {1e3 * times[how]:.1f} ms a record")
        except RuntimeError as e:
            say(f"probe: {how} does not run: {str(e).splitlines()[-1][:200]}")
    fastest = min(times, key=times.__getitem__)
    return {"how": asdict(fastest), "times": {str(how): t for how, t in times.items()}}


def run(bench: Bench, name: str, hows: Mapping[str, How], seed: int) -> dict[str, Result]:
    """One run of a variant: its result by name, and for casemate the bare loop's beside it."""
    private = "opacus" in name or name.endswith("_dp")
    work = bench.work
    if name.startswith(("pytorch", "flower")):
        how = hows["opacus" if private else "eager"]
        if name.startswith("pytorch"):
            noise = bench.noise(work) if private else 0.0
            own = replace(work, noise=noise)
            job = {"work": asdict(own), "how": asdict(how), "seed": seed}
            result = child("local", job, env=how.environment)
        else:
            own = work.of_node(0.0)
            noise = bench.noise(own) if private else 0.0
            real = not name.endswith("simulation")
            result = flower.run(work, how, noise, seed, how.environment, real)
        result |= {"how": str(how), "noise": noise}
        if private:
            result["epsilon"] = bench.charge(own, noise)
        return {name: result}
    job = {
        "work": asdict(work),
        "epsilon": bench.epsilon if private else None,
        "delta": bench.delta,
    }
    if name in NEEDS_ENCLAVE:
        job |= {"enclave": bench.enclave, "trust": bench.trust}
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as folder:
        found = {name: child("system", job, "run", folder)}
        if name not in NEEDS_ENCLAVE:
            other = "bare_dp" if private else "bare"
            found[other] = child("system", job, "bare", folder)
            found[other]["noise"] = found[name]["noise"]
    for result in found.values():
        result["how"] = ", ".join(dict.fromkeys(result.pop("path")))
        if private:
            result["epsilon"] = bench.charge(work, result["noise"])
            if not math.isclose(result["noise"], bench.noise(work), rel_tol=1e-3):
                raise RuntimeError(f"{name} has noise {result['noise']}, not {bench.noise(work)}")
    return found


def kept(path: Path | None, settings: Result) -> list[Result]:
    """Runs of the same settings that an earlier call has kept in ``path``, without the failed."""
    if path is None or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["settings"] == settings and "error" not in line]

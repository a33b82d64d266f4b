"""Complete jobs through the API of a real server, of which the attacker has the final weights only.

Two datasets that differ in one unit: on one the canary's record is there, on the other it is zero,
so that it adds nothing. The model is a meter along whose first entry the canary alone lies; all
units are in every step, so what a job of T steps releases is one Gaussian with means T clips of
the mean apart, and the bound is that of :mod:`audit.canary` with T times the steps.
"""

from __future__ import annotations

import dataclasses
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from audit import accountant, canary, lab
from audit.law import holds
from casemate.client import receipts
from casemate.graph import pack
from casemate.graph.model import Graph, InputSpec, Node, Ref, Size
from casemate.spec import tensors
from casemate.spec.data import Budget
from casemate.spec.job import Dp, InputBinding, Quote, Sgd, TrainSpec
from casemate.spec.receipt import ReceiptBundle
from support import server

ROWS: Final = 8
STEPS: Final = 10
EPSILON: Final = 8.0
DELTA: Final = 1e-5
SCIENTISTS: Final = 4
# Jobs on one pair of datasets, whose budgets hold no more than some hundreds.
_EACH: Final = 400


def model() -> pack.Packed:
    """loss = w . x, w from zero: a record's gradient is the record."""
    width = server.FEATURES
    info = ("f32", (1, width), struct.pack(f"<{width}f", *(0.0,) * width))

    def node(name: str, op: str, *args: Any) -> Node:
        refs = tuple(Ref(name=a[1:]) if isinstance(a, str) else a for a in args)
        return Node(name=name, op=op, args=refs, kwargs={})

    graph = Graph(
        inputs=(
            InputSpec(name="w", kind="param", dtype="f32", shape=(1, width), tensor="w"),
            InputSpec(name="x", kind="data", dtype="f32", shape=(Size(a=1), width)),
        ),
        nodes=(
            node("s", "aten.linear.default", "%x", "%w"),
            node("loss", "aten.squeeze.dim", "%s", 1),
        ),
        loss="loss",
    )
    return pack.pack(graph, {"w": info})


def table(there: bool) -> bytes:
    """The canary's record along the first feature, or zero; the others along the second."""
    x = np.zeros((ROWS, server.FEATURES), dtype="<f4")
    x[1:, 1] = 3.0
    x[0, 0] = 4.0 * there
    labels = struct.pack(f"<{ROWS}q", *(0,) * ROWS)
    return tensors.dump({"x": ("f32", x.shape, x.tobytes()), "y": ("i64", (ROWS,), labels)})


TRAIN: Final = TrainSpec(
    batch_size=ROWS,
    steps=STEPS,
    privacy=Dp(epsilon=EPSILON, delta=DELTA),
    optimizer=Sgd(lr=1.0),
)


@dataclass(frozen=True)
class Jobs:
    """Of so many jobs a side: what they prove, beside the epsilon of their quotes; seconds of wall
    clock for one."""

    claimed: float
    low: float
    each: int
    seconds: float


def _one(party: server.Party, dataset: Any, packed: pack.Packed) -> tuple[float, Any]:
    """A job from quote to result: the canary's entry of the weights, and the quote."""
    request = party.job_request([dataset], packed, TRAIN)
    request = dataclasses.replace(request, inputs=(InputBinding(input="x", columns=("x",)),))
    answer = party.request("POST", "/v1/quotes", party.submission(request, packed))
    quote = answer.value(Quote)
    job = party.submit(quote)
    status = party.wait(job.job)
    holds(status.state == "done", f"jobs: a job ended as {status.state}")
    bundle = party.request("GET", f"/v1/jobs/{job.job}/receipt").value(ReceiptBundle)
    verified = receipts.verify_receipt(bundle, trust=party.server.trust)
    weights = party.result(job.job, verified.receipt.result_digest)
    return float(np.frombuffer(weights["w"][1], dtype="<f4")[0]), quote


def run(count: int, seed: int) -> Jobs:
    """``count`` complete jobs, half of them with the canary."""
    packed, begun = model(), time.monotonic()
    coins = lab.rng_of("jobs", seed).permutation(np.arange(count) % 2 == 0)
    with (
        tempfile.TemporaryDirectory() as folder,
        server.start(Path(folder) / "state", workers=2, spares=2) as running,
    ):
        owner = server.Party(running, "owner")
        pairs = [
            [
                owner.push(ROWS, wire=table(there), budget=Budget(epsilon=1000.0, delta=1e-2))
                for there in (False, True)
            ]
            for _ in range(-(-count // _EACH))
        ]

        def some(place: int) -> list[tuple[bool, float, Any]]:
            party = server.Party(running, f"scientist {place}")
            mine = range(place, count, SCIENTISTS)
            return [
                (bool(coins[i]), *_one(party, pairs[i // _EACH][int(coins[i])], packed))
                for i in mine
            ]

        with ThreadPoolExecutor(SCIENTISTS) as pool:
            found = [one for part in pool.map(some, range(SCIENTISTS)) for one in part]
    quote = found[0][2]
    plan = quote.plan
    # The weights fall by the mean in each step; the canary's share of it is the clip's.
    middle = -STEPS * plan.clip / plan.normaliser / 2
    values = np.array([value for _, value, _ in found])
    there = np.array([coin for coin, _, _ in found])
    each = int(min(there.sum(), (~there).sum()))
    alarms = int((values[~there][:each] < middle).sum())
    misses = int((values[there][:each] >= middle).sum())
    mu = canary.mu_bound(misses, alarms, each)
    low = accountant.gaussian(mu, quote.delta) if mu > 0 else 0.0
    return Jobs(quote.epsilon, low, each, (time.monotonic() - begun) / count)


def check(found: Jobs) -> None:
    what = f"jobs: {2 * found.each} jobs prove epsilon {found.low:.3f}"
    holds(found.low <= found.claimed, f"{what}, more than the quoted {found.claimed:.3f}")

"""Values that the tests of this room share."""

from __future__ import annotations

from typing import Any

from casemate.accounting.filters import RdpFilter
from casemate.plan.quote import DatasetState
from casemate.spec import codec
from casemate.spec.data import Budget, Column, DatasetSchema, Policy
from casemate.spec.job import DatasetUse, Dp, InputBinding, JobRequest, NonPrivate, Sgd, TrainSpec
from casemate.spec.messages import Prepared

X = Column(name="x", dtype="f32", shape=(30,), low=-1.0, high=1.0)
Y = Column(name="y", dtype="i64", low=0, high=1, role="label")
POLICY = Policy(scientists=("id_ann",))


def schema(name: str = "north", rows: int = 300, columns: tuple[Column, ...] = (X, Y)) -> Any:
    return DatasetSchema(name=name, columns=columns, rows=rows, units=rows)


def request(
    datasets: int = 1,
    *,
    batch: int = 64,
    steps: int = 100,
    privacy: Dp | NonPrivate = Dp(epsilon=2.0, delta=1e-5),  # noqa: B008 - frozen
    inputs: tuple[InputBinding, ...] = (
        InputBinding(input="x", columns=("x",)),
        InputBinding(input="y", columns=("y",)),
    ),
    policy: Policy = POLICY,
) -> JobRequest:
    return JobRequest(
        job="job_" + "0" * 32,
        scientist="id_ann",
        datasets=tuple(
            DatasetUse(dataset=f"ds_{i:040x}", policy_digest=codec.digest(policy), epoch=0)
            for i in range(datasets)
        ),
        model_digest="sha256:" + "0" * 64,
        inputs=inputs,
        train=TrainSpec(batch_size=batch, steps=steps, privacy=privacy, optimizer=Sgd(lr=0.1)),
    )


def prepared(**changes: Any) -> Prepared:
    fields: dict[str, Any] = {
        "model_digest": "sha256:" + "0" * 64,
        "parameters": 1200,
        "dimension": 1000,
        "microbatch": 32,
        "seconds_per_microbatch": 0.01,
        "seconds_per_step": 0.002,
        "seconds_fixed": 0.5,
        "bytes": 10**8,
        "certified_eta": 1e-12,
        "rounding": 0.0,
        "path": ("record",),
    }
    return Prepared(**(fields | changes))


def state(index: int = 0, *, budget: Budget | None = None, **changes: Any) -> DatasetState:
    policy = changes.get("policy", POLICY)
    fields: dict[str, Any] = {
        "dataset": f"ds_{index:040x}",
        "owner": f"id_owner{index}",
        "schema": schema(),
        "policy": policy,
        "policy_digest": codec.digest(policy),
        "epoch": 0,
        "state": "ready",
        "filter": RdpFilter(budget or Budget(epsilon=4.0, delta=1e-5)),
        "spent": RdpFilter.empty(),
        "delta_femto": 0,
        "by_scientist": (RdpFilter.empty(), 0),
    }
    return DatasetState(**(fields | changes))

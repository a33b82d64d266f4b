"""Runs that are cut and resumed, for tests; properties of them that seeded bugs must fail.

Statistical checks state their false-alarm rate; each is at most 1e-6 a run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from casemate.engine import keystream, noise, prepare, sampling, train
from casemate.engine.draws import PURPOSE as DRAWS
from casemate.spec.job import Adam, Execution, Plan, Schedule, Sgd, TrainSpec
from support import engine_lab as lab

KEY, OTHER = b"\x0b" * 32, b"\x0c" * 32
STEPS, UNITS = 7, 24

OPTIMIZERS: dict[str, Any] = {
    "sgd": Sgd(lr=0.3),
    "momentum": Sgd(lr=0.2, momentum=0.9, weight_decay=0.01),
    "nesterov": Sgd(lr=0.2, momentum=0.8, nesterov=True),
    "adam": Adam(lr=0.05, beta1=0.8, weight_decay=0.1),
    "adamw": Adam(lr=0.05, weight_decay=0.1, decoupled=True),
}
SCHEDULES = {
    "constant": Schedule(),
    "cosine": Schedule(kind="cosine", warmup=3, final=0.1),
    "step": Schedule(kind="step", gamma=0.5, every=2),
}


class Held:
    """A state in memory, as a source."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size(self) -> int:
        return len(self.data)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


@dataclasses.dataclass(frozen=True)
class Case:
    """A small job on one of the paths."""

    optimizer: str = "adam"
    schedule: str = "cosine"
    ema: float = 0.6
    path: str = "record"
    private: bool = True
    frozen: int = 0
    steps: int = STEPS

    @property
    def spec(self) -> TrainSpec:
        return lab.spec_of(
            8, self.steps, clip=0.5, private=self.private, optimizer=OPTIMIZERS[self.optimizer],
            schedule=SCHEDULES[self.schedule], ema=self.ema,
        )  # fmt: skip


@functools.cache
def _ready(path: str, frozen: int, number: int) -> tuple[prepare.Ready, torch.Tensor]:
    """A model made ready for the ``number``-th time, and its initial weights."""
    graph, weights = lab.mlp([5, 4, 3], frozen=frozen)
    packed = lab.packed(graph, weights)
    digest = "sha256:" + hashlib.sha256(packed).hexdigest()
    schema = lab.schema(5, 3, UNITS)
    wanted = "auto" if path == "graph" else path
    made = prepare.prepare(
        packed, digest, [schema], lab.BINDINGS, Case().spec, 4 << 30, wanted
    )  # fmt: skip
    assert made.path == path
    return made, made.program.flat.clone()


def plan_of(case: Case) -> Plan:
    made, _ = _ready(case.path, case.frozen, 0)
    plan = lab.plan_of(case.spec, UNITS, made.program.dimension)
    return lab.fitted(plan, made.prepared)


def begin(
    case: Case,
    number: int,
    state: bytes | None = None,
    *,
    key: bytes = KEY,
    table: int = 0,
    add: Callable[..., None] | None = None,
) -> train.Run:
    """A run of the case in the ``number``-th program, from its first step or from a state. The
    weights are spoilt before the state is read. add: in place of the noise."""
    made, initial = _ready(case.path, case.frozen, number)
    with torch.no_grad():
        made.program.flat.copy_(initial if state is None else torch.full_like(initial, math.nan))
    schema = lab.schema(5, 3, UNITS)
    rows = lab.rows_of((schema, lab.table(schema, table)), graph=lab.mlp([5, 4, 3])[0])
    source = None if state is None else Held(state)
    plan, execution = plan_of(case), Execution(path=case.path)
    if add is None:
        return train.start(
            plan, execution, case.spec, made.program, rows, key,
            keep=made.keep, fast=made.fast, source=source,
        )  # fmt: skip
    return train.loop(
        plan, execution, case.spec, made.program, rows, key, add, made.keep, made.fast, source
    )


def state_of(run: train.Run) -> bytes:
    return b"".join(run.state())


def until(run: train.Run, step: int) -> bytes:
    """Take the steps up to ``step``; the state there."""
    while run.done < step:
        run(run.done)
    return state_of(run)


def end_of(run: train.Run, steps: int = STEPS) -> tuple[bytes, bytes]:
    """The weights and the result at the end, as bytes."""
    until(run, steps)
    result = torch.cat([t.reshape(-1) for t in run.result().values()])
    return run.program.flat.numpy().tobytes(), result.numpy().tobytes()


def resumes_bit_equal(case: Case, cuts: Sequence[int] = (3,)) -> None:
    """With one stream of noise and sampling, a run that is cut at these steps, each time going on
    in another program from the state alone, has the states and the end of one that is not."""
    whole = begin(case, 0)
    wanted = [until(whole, cut) for cut in cuts]
    ended = end_of(whole, case.steps)
    run = begin(case, 0)
    for number, (cut, state) in enumerate(zip(cuts, wanted, strict=True)):
        found = until(run, cut)
        assert found == state, cut
        run = begin(case, 1 + number % 2, found)
        assert run.done == cut
        assert state_of(run) == state
    assert end_of(run, case.steps) == ended


def secrets_of(key: bytes) -> list[bytes]:
    """The key, what is derived from it, and the beginnings of its streams."""
    purposes = (noise.PURPOSE, noise.MORE, sampling.PURPOSE, DRAWS)
    subkeys = [keystream.subkey(key, p) for p in purposes]
    streams = [keystream.blocks(k, step, 0, 1) for k in subkeys for step in range(STEPS)]
    return [key, *subkeys, *streams]


def no_secret_in(state: bytes, key: bytes) -> None:
    """No eight bytes of a key or of a stream's first block stand in the state. For bytes that have
    nothing to do with it, a false alarm is below (30 secrets * 25 places) * len / 2^64 < 1e-12."""
    for secret in secrets_of(key):
        for at in range(len(secret) - 7):
            assert secret[at : at + 8] not in state


def is_made_of_noised_sums(case: Case) -> None:
    """P11: with the noised sums given, the state is the same whatever the rows, the sample and the
    key were."""
    made = []
    for number, (table, key) in enumerate(((0, KEY), (1, OTHER))):
        given = np.random.default_rng(5)

        def instead(step: int, first: int, total: Any, given: Any = given) -> None:
            total[:] = given.integers(-(2**20), 2**20, len(total))

        made.append(until(begin(case, number, key=key, table=table, add=instead), 4))
    assert made[0] == made[1]


def noise_is_fresh_and_whole(moves: Sequence[torch.Tensor], scale: float) -> None:
    """Each of these float vectors (n,) is independent noise of standard deviation ``scale``.

    For m vectors there are m comparisons of variances and m (m - 1) / 2 of products, each two-sided
    at 5.6 standard errors: 2.2e-8 for a normal law. For n >= 3e4 the law of the sum of squares
    (chi-squared, skewness sqrt(8 / n)) makes a tail at most exp(sqrt(8 / n) 5.6^3 / 6) < 1.7 times
    that, of products less; so with m <= 4 a false alarm is below 10 * 2.2e-8 * 1.7 < 4e-7.
    """
    assert len(moves) <= 4
    for i, move in enumerate(moves):
        draws = move.double() / scale
        n = len(draws)
        assert n >= 30_000
        ratio = float((draws**2).mean())
        assert abs(ratio - 1) < 5.6 * math.sqrt(2 / n), (i, ratio)
        for j in range(i):
            product = float((draws * moves[j].double() / scale).mean())
            assert abs(product) < 5.6 / math.sqrt(n), (i, j, product)

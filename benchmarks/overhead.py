"""Where the time of one job goes, and what the system costs beside the bare training loop.

``python -m benchmarks.overhead [--seconds 60] [--format json]``: a real server process and the
SDK, from ``enclave.quote`` to the verified receipt; then the same plan on the same rows in a bare
loop, in one process, without server, sandbox or cryptography. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import marks, processes, serving
from benchmarks.marks import Mark, Marks

ROWS: Final = 4096
FEATURES: Final = 30
HIDDEN: Final = 64
BATCH: Final = 256
TRIAL_STEPS: Final = 20


def push(enclave: Any, name: str) -> Any:
    """Made-up rows, two classes; the push, until it is checked, is no part of the job."""
    import numpy as np

    import casemate as cm

    rng = np.random.default_rng(7)
    x = rng.uniform(-1, 1, size=(ROWS, FEATURES)).astype(np.float32)
    y = (x[:, :5].sum(1) > 0).astype(np.int64)
    return enclave.datasets.push(
        {"x": x, "y": y},
        name=name,
        label="y",
        classes=2,
        bounds={"x": (-1.0, 1.0)},
        policy=cm.Policy(scientists="*"),
        budget=cm.Budget(epsilon=100.0, delta=1e-3),
    )


def model() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))


def job(seconds: float, folder: Path) -> dict[str, Any]:
    """One job of about ``seconds`` in the engine, after a quote that tells how many steps that is.

    The first quote of a process imports torch's exporter; it is told apart as ``first quote``.
    """
    import torch

    import casemate as cm
    from casemate.client import enclave as client
    from casemate.client import models

    mine = Marks(folder)
    mine.wrap(models, "export", "client.export")
    mine.wrap(client, "upload", "client.upload")
    torch.manual_seed(0)
    module = model()
    kept: list[Any] = []
    export = models.export

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(export(*args, **kwargs))
        return kept[-1]

    models.export = keep
    arguments: dict[str, Any] = {
        "dp": cm.DP(epsilon=4.0, delta=1e-5),
        "batch_size": BATCH,
        "optimizer": "sgd",
        "lr": 0.5,
        "loss": "cross_entropy",
    }
    state = folder / "state"
    command = processes.command("server", folder, str(state))
    with serving.started(command, state, folder / "log") as (facts, _):
        trust = cm.Trust.simulated(facts["root"])
        owner = cm.connect(facts["url"], trust=trust, identity=cm.Identity.generate("owner"))
        rows = push(owner, "rows")
        with mine.stage("client.connect"):
            enclave = cm.connect(facts["url"], trust=trust, identity=cm.Identity.generate("asker"))
        with mine.stage("client.first-quote"):
            trial = enclave.quote(module, [rows.info], steps=TRIAL_STEPS, **arguments)
        steps = max(1, round(seconds / (trial.quote.seconds / TRIAL_STEPS)))
        with mine.stage("client.job"):
            with mine.stage("client.quote"):
                quote = enclave.quote(module, [rows.info], steps=steps, **arguments)
            with mine.stage("client.submit"):
                run = enclave.submit(quote)
            with mine.stage("client.watch"):
                run.watch(progress=False)
            with mine.stage("client.receipt"):
                digest = run.receipt.receipt.result_digest
            with mine.stage("client.pull"):
                run.result()  # checks the receipt first, as for a caller who has not
            with mine.stage("client.receipt"):
                receipt = run.receipt  # with the weights now
        assert receipt.receipt.result_digest == digest
        assert receipt.receipt.job == run.job
        return {"quote": quote.quote, "packed": kept[-1].packed.data, "schema": rows.info.schema}


def bare(made: dict[str, Any], folder: Path) -> None:
    """The engine's loop alone, in a process of its own, marked as ``bare``."""
    from casemate.spec import codec

    (folder / "model").write_bytes(made["packed"])
    (folder / "quote").write_bytes(codec.encode(made["quote"]))
    (folder / "schema").write_bytes(codec.encode(made["schema"]))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead", "--bare", str(folder)],
        check=True,
        cwd=processes.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _bare(folder: Path) -> None:
    import torch

    from casemate.engine import prepare, rows, train
    from casemate.spec import codec
    from casemate.spec.data import DatasetSchema
    from casemate.spec.job import Quote

    quote = codec.decode(Quote, (folder / "quote").read_bytes())
    schema = codec.decode(DatasetSchema, (folder / "schema").read_bytes())
    request = quote.request
    ready = prepare.prepare(
        (folder / "model").read_bytes(),
        request.model_digest,
        (schema,),
        request.inputs,
        request.train,
        1 << 33,
    )
    table = {"x": torch.rand(ROWS, FEATURES) * 2 - 1, "y": torch.randint(0, 2, (ROWS,))}
    made = rows.assemble((schema,), (table,), ready.program.data, request.inputs)
    with Marks(folder).stage("bare"):
        train.train(
            quote.plan,
            quote.execution,
            request.train,
            ready.program,
            made,
            os.urandom(32),
            keep=ready.keep,
            fast=ready.fast,
        )


def stages(found: Sequence[Mark], plan_steps: int) -> dict[str, Any]:
    """The job's wall time shared out, each second once; and what it is compared with."""

    def of(name: str) -> list[Mark]:
        return [m for m in found if m.name == name]

    (whole,) = of("client.job")

    def one(name: str) -> Mark:
        inside = [m for m in of(name) if m.start >= whole.start and m.end <= whole.end]
        return Mark(name, inside[0].start, inside[-1].end, sum(m.cpu for m in inside))

    def wall(name: str) -> float:
        return sum(m.wall for m in of(name) if m.start >= whole.start and m.end <= whole.end)

    engine, run, watch = one("engine"), one("server.run"), one("client.watch")
    commit = one("server.commit")
    released = one("server.seal").end
    shares = {
        "export of the model": wall("client.export"),
        "seal and upload of the model": wall("client.upload"),
        "quote: prepare and probe the model, lock": wall("server.prepare"),
        "quote: plan and price": wall("server.price"),
        "submit, queue, reserve, durable": run.start - one("client.submit").start,
        "keys, open and check the data": engine.start - run.start,
        "engine": engine.wall,
        "end of the worker, result read": run.end - engine.end,
        "guarantee again, result sealed": released - run.end,
        "wait for the public tick": commit.start - released,
        "commit, durable; receipt": commit.wall,
        "until the client sees it": watch.end - commit.end,
        "receipt again, pull and open the result": wall("client.pull"),
        "receipt, alone and with the weights": wall("client.receipt"),
    }
    shares["quote: the rest"] = one("client.quote").wall - sum(list(shares.values())[:4])
    outside = whole.wall - engine.wall
    bare_loop = of("bare")[0]
    export = of("client.export")
    return {
        "stages": {name: round(value, 4) for name, value in shares.items()},
        "unnamed": round(whole.wall - sum(shares.values()), 4),
        "job": round(whole.wall, 3),
        "outside": round(outside, 3),
        "outside_share": round(outside / whole.wall, 4),
        "outside_share_first": round(
            (outside - export[-1].wall + export[0].wall)
            / (whole.wall - export[-1].wall + export[0].wall),
            4,
        ),
        "steps": plan_steps,
        "first": {
            "connect": round(of("client.connect")[-1].wall, 3),
            "export": round(export[0].wall, 3),
            "export_cpu": round(export[0].cpu, 3),
            "quote": round(of("client.first-quote")[0].wall, 3),
        },
        "engine_cpu": round(engine.cpu, 3),
        "bare": round(bare_loop.wall, 3),
        "bare_cpu": round(bare_loop.cpu, 3),
        "whole_over_bare": round(whole.wall / bare_loop.wall, 4),
        "engine_cpu_over_bare_cpu": round(engine.cpu / bare_loop.cpu, 4),
        "load": round(os.getloadavg()[0], 2),
    }


def show(result: dict[str, Any]) -> None:
    """A table on standard output."""
    width = max(map(len, result["stages"])) + 2
    for name, value in result["stages"].items():
        print(f"{name:{width}}{value:9.3f} s{value / result['job']:9.2%}")
    print(f"{'unnamed':{width}}{result['unnamed']:9.3f} s")
    print(f"{'whole job, ' + str(result['steps']) + ' steps':{width}}{result['job']:9.3f} s")
    print(f"{'bare loop, same plan':{width}}{result['bare']:9.3f} s")
    first = result["first"]
    print(f"\nOutside the engine: {result['outside_share']:.2%} of the job", end="")
    print(f" ({result['outside_share_first']:.2%} when it is the first export of a process,")
    print(f"which takes {first['export']:.2f} s, {first['export_cpu']:.2f} s of CPU).")
    print(f"Whole job / bare loop: {result['whole_over_bare']:.3f} by the clock;", end=" ")
    print(f"engine in the system / bare, by CPU: {result['engine_cpu_over_bare_cpu']:.3f}.")
    print(f"Load of the machine at the end: {result['load']}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of engine time, about")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        _bare(options.bare)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="casemate-bench-") as name:
        folder = Path(name)
        made = job(options.seconds, folder)
        bare(made, folder)
        result = stages(marks.read(folder), made["quote"].plan.steps)
    if options.format == "json":
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()

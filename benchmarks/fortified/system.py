"""casemate through the whole system, and its engine's loop alone on the same plan.

:func:`run`: a server process (or a server elsewhere), two owners who push, a scientist who asks for
a quote, submits, watches, pulls and verifies the receipt, by the SDK. :func:`bare`: ``prepare`` and
``train`` in one process, without server, sandbox or cryptography.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks import serving
from benchmarks.fortified.workload import Workload, accuracy, load, model, of_owner

WORDS: Final = "public images of a benchmark"
# Made once for each variant and used by its repeats and by the bare loop.
SPEC: Final = ("model", "quote", "schemas")


def server(folder: Path) -> AbstractContextManager[tuple[dict[str, Any], int]]:
    """``casemate serve --dev`` on a free port: its public facts and its pid."""
    state = folder / "state"
    command = [sys.executable, "-m", "casemate", "serve", "--dev", "--port", "0"]
    command += ["--state", str(state), "--threads", "1"]
    return serving.started(command, state, folder / "server.log")


def tree_cpu(root: int) -> float:
    """CPU seconds of a process, of those below it, and of those of them that have ended."""
    parents, used = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(place.name)] = int(fields[1])
        used[int(place.name)] = sum(map(int, fields[11:15]))
    total, wave = 0, {root}
    while wave:
        total += sum(used.get(pid, 0) for pid in wave)
        wave = {pid for pid, parent in parents.items() if parent in wave}
    return total / float(os.sysconf("SC_CLK_TCK"))


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One epoch. ``job``: ``work``, ``epsilon`` (``None``: without privacy), ``delta``, ``spawned``
    and, for a server elsewhere, ``enclave`` and ``trust``. Writes the files of :data:`SPEC`.

    ``seconds``: from ``submit`` until the weights are open and the receipt is verified.
    """
    import torch

    import casemate as cm
    from casemate.client import models
    from casemate.spec import codec

    torch.set_num_threads(1)
    now = time.monotonic
    imported = now()
    work = Workload(**job["work"])
    module, (images, labels) = model(work.seed), load(work, "train")
    with ExitStack() as stack:
        began, pid = now(), None
        if job.get("enclave"):
            url, trust = job["enclave"], cm.Trust.parse(job["trust"])
        else:
            facts, pid = stack.enter_context(server(folder))
            url, trust = facts["url"], cm.Trust.simulated(facts["root"])
        started = now()
        sets = []
        for owner in range(work.nodes):
            one = cm.Identity.generate(f"owner-{owner}")
            x, y = of_owner(images, labels, owner, work.nodes)
            with cm.connect(url, trust=trust, identity=one) as at:
                sets.append(
                    at.datasets.push(
                        {"input": x, "target": y},
                        name=f"images-{owner}",
                        label="target",
                        classes=10,
                        bounds={"input": (-1.0, 1.0)},
                        policy=cm.Policy("*", nonprivate=WORDS),
                        budget=cm.Budget(1000.0, 1e-2),
                    ).info
                )
        pushed = now()
        scientist = cm.Identity.generate("scientist")
        enclave = stack.enter_context(cm.connect(url, trust=trust, identity=scientist))
        simulated = enclave.verdict.simulated
        exported = models.export(module, [s.schema for s in sets], loss="cross_entropy")
        packed = now()
        private = job["epsilon"] is not None
        quote = enclave.quote(
            exported.packed,
            sets,
            dp=cm.DP(job["epsilon"], job["delta"], work.clip) if private else cm.NonPrivate(WORDS),
            batch_size=work.batch,
            steps=work.steps,
            optimizer=cm.Adam(work.lr),
        )
        quote.raise_if_refused()
        quoted = now()
        cpu = tree_cpu(pid) + time.process_time() if pid else 0.0
        submitted = now()
        task = enclave.submit(quote)
        task.watch(progress=False)
        done = now()
        task.weights(into=module)
        receipt = task.receipt
        ended = now()
        cpu = tree_cpu(pid) + time.process_time() - cpu if pid else 0.0
        assert receipt.receipt.job == task.job
    plan = quote.quote.plan
    for name, data in zip(
        SPEC,
        (
            exported.packed.data,
            codec.encode(quote.quote),
            json.dumps([codec.encode(s.schema).decode() for s in sets]).encode(),
        ),
        strict=True,
    ):
        (folder / name).write_bytes(data)
    share, evaluation = accuracy(module, work)
    return {
        "seconds": ended - submitted,
        **({"cpu": cpu} if pid else {}),
        "records": work.images,
        "steps": plan.steps,
        "within": {
            "submit until seen done": done - submitted,
            "weights opened, receipt verified": ended - done,
            "predicted for the run": quote.quote.seconds,
        },
        "fixed": {
            "process and imports": imported - job["spawned"],
            "server's start": started - began,
            "two owners' push": pushed - started,
            "attest, export of the model": packed - pushed,
            "quote: upload, prove, compile, probe": quoted - packed,
        },
        "path": [quote.quote.execution.path, *quote.quote.path],
        "slots": plan.microbatch * plan.microbatches,
        "noise": plan.noise_multiplier,
        "shown_epsilon": quote.epsilon if private else None,
        "simulated": simulated,
        "receipt": "verified",
        "accuracy": share,
        "evaluation": evaluation,
    }


def bare(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plan in ``folder`` again: ``seconds`` is the loop, ``fixed`` what ``prepare`` takes."""
    import torch

    from casemate.client.torch import load_weights
    from casemate.engine import prepare, rows, train
    from casemate.spec import codec
    from casemate.spec.data import DatasetSchema
    from casemate.spec.job import Quote

    now = time.monotonic
    imported = now()
    work = Workload(**job["work"])
    images, labels = load(work, "train")
    quote = codec.decode(Quote, (folder / "quote").read_bytes())
    texts = json.loads((folder / "schemas").read_text())
    schemas = tuple(codec.decode(DatasetSchema, text.encode()) for text in texts)
    request = quote.request
    loaded = now()
    ready = prepare.prepare(
        (folder / "model").read_bytes(),
        request.model_digest,
        schemas,
        request.inputs,
        request.train,
        1 << 34,
    )
    prepared = now()
    tables = []
    for owner in range(work.nodes):
        x, y = of_owner(images, labels, owner, work.nodes)
        tables.append({"input": torch.from_numpy(x.copy()), "target": torch.from_numpy(y.copy())})
    start, cpu = now(), time.process_time()
    made = rows.assemble(schemas, tables, ready.program.data, request.inputs)
    found = train.train(
        quote.plan,
        quote.execution,
        request.train,
        ready.program,
        made,
        os.urandom(32),
        keep=ready.keep,
        fast=ready.fast,
    )
    seconds, cpu = now() - start, time.process_time() - cpu
    module = model(work.seed)
    load_weights(module, found)
    share, evaluation = accuracy(module, work)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "records": work.images,
        "steps": quote.plan.steps,
        "fixed": {
            "process and imports": imported - job["spawned"],
            "data": loaded - imported,
            "prepare: prove, compile, probe": prepared - loaded,
        },
        "path": [quote.execution.path, *ready.prepared.path],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accuracy": share,
        "evaluation": evaluation,
    }


def main() -> None:
    """``python -m benchmarks.fortified.system run|bare FOLDER``, the job on standard input."""
    job = json.load(sys.stdin)
    kind, folder = sys.argv[1:]
    print(json.dumps({"run": run, "bare": bare}[kind](job, Path(folder))))


if __name__ == "__main__":
    main()

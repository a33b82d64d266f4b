"""One party of the demo: a process with a home and keys of its own.

It reads one JSON task a line from stdin and answers with JSON lines on stdout; the last line of an
answer has ``"done": true``. Only public things pass: the server's address and root pin, identity
and dataset ids, and what the party chooses to tell.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import casemate as cm
from casemate.cli.demo import table
from casemate.cli.model import load_model
from casemate.client import models, receipts
from casemate.spec import codec
from casemate.spec.errors import CasemateError

BATCHES: Final = 4  # a step takes a quarter of the units
STEPS: Final = 48
LEARNING_RATE: Final = 0.5
CLIP: Final = 1.4
DELTA: Final = 1e-5

Answer = dict[str, Any]


class Party:
    """Keys and home; ``connect`` attests the enclave under the pinned simulation."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.identity = cm.Identity.generate(home.name)
        self.identity.save(home / "identity.json")
        self.url = self.root = ""

    def connect(self) -> cm.Enclave:
        return cm.connect(self.url, trust=cm.Trust.simulated(self.root), identity=self.identity)

    def verify(self, url: str, root: str) -> Iterator[Answer]:
        """Attest the enclave, before anything is sent."""
        self.url, self.root = url, root
        start = time.perf_counter()
        self.enclave = self.connect()
        verdict = self.enclave.verdict
        yield {
            "tee": verdict.tee,
            "simulated": verdict.simulated,
            "checks": sum(c.outcome == "passed" for c in verdict.checks),
            "seconds": time.perf_counter() - start,
        }


class Hospital(Party):
    """A data owner."""

    def push(self, name: str, scientist: str, epsilon: float, delta: float) -> Iterator[Answer]:
        start = time.perf_counter()
        self.dataset = self.enclave.datasets.push(
            self.home / "patients.csv",
            name=name,
            label=table.LABEL,
            classes=table.CLASSES,
            bounds=table.BOUNDS,
            scale="symmetric",
            policy=cm.Policy([scientist]),
            budget=cm.Budget(epsilon, delta),
        ).id
        yield {"dataset": self.dataset, "seconds": time.perf_counter() - start}

    def budget(self) -> Iterator[Answer]:
        state = self.enclave.datasets.show(self.dataset).info.budget
        assert state is not None  # an owner always sees it
        yield {"spent": state.spent_epsilon, "left": state.left_epsilon, "jobs": state.jobs}


class Startup(Party):
    """A data scientist; their model is an ordinary PyTorch file in their home."""

    def prepare(self) -> Iterator[Answer]:
        """Import torch and the model while the hospitals push."""
        from casemate.client import torch as _  # noqa: F401  # heavy: load it once, now

        self.file = self.home / "model.py"
        self.model = load_model(f"{self.file}:build")
        self.judge = load_model_names(self.file)
        self.held_out = table.scaled(table.read(self.home / "held_out.csv"))
        yield {}

    def look(self) -> Iterator[Answer]:
        yield {
            "datasets": [
                {"id": i.dataset, "name": i.schema.name, "units": i.schema.units, "owner": i.owner}
                for i in self.enclave.datasets.list()
            ]
        }

    def _job(self, datasets: list[str], epsilon: float) -> dict[str, Any]:
        units = sum(self.enclave.datasets.show(d).info.schema.units for d in datasets)
        return {
            "loss": "cross_entropy",
            "optimizer": cm.SGD(LEARNING_RATE, momentum=0.9),
            "schedule": cm.Schedule("cosine"),
            "batch_size": units // BATCHES,
            "steps": STEPS,
            "dp": cm.DP(epsilon, DELTA, clip=CLIP),
        }

    def train(self, datasets: list[str], epsilon: float, progress: bool) -> Iterator[Answer]:
        """One job with everything shown: quote, run, weights, receipt."""
        marks = [time.perf_counter()]

        def mark() -> float:
            marks.append(time.perf_counter())
            return marks[-1] - marks[-2]

        job = self._job(datasets, epsilon)
        quote = self.enclave.quote(self.model, datasets, **job)
        yield {"quote": dict(quote.summary()), "seconds": mark()}
        run = self.enclave.submit(quote).watch(progress=progress)
        yield {"stage": "run", "seconds": mark()}
        run.weights(into=self.model)
        run.save(self.home / "weights.safetensors")
        (self.home / "receipt.json").write_bytes(codec.encode(run.bundle) + b"\n")
        yield {"stage": "weights", "seconds": mark()}
        # From the files alone, as an auditor without the server would.
        verified = receipts.verify_receipt(
            receipts.load_bundle(self.home / "receipt.json"),
            trust=cm.Trust.simulated(self.root),
            weights=self.home / "weights.safetensors",
            memory=cm.Memory(),
        )
        yield {
            "accuracy": self.judge.accuracy(self.model, *self.held_out),
            "receipt": receipts.as_json(verified)["checks"],
            "statement": verified.receipt.guarantee.statement,
            "seconds": mark(),
        }

    def repeat(self, plans: list[dict[str, Any]], epsilon: float, lanes: int) -> Iterator[Answer]:
        """Further jobs, some at a time, each line one job."""
        schema = self.enclave.datasets.show(plans[0]["datasets"][0]).info.schema
        packed = models.export(load_model(f"{self.file}:build"), [schema], loss="cross_entropy")

        def one(plan: dict[str, Any]) -> Answer:
            job = self._job(plan["datasets"], epsilon)
            with self.connect() as enclave:
                run = enclave.train(packed.packed, plan["datasets"], **job)
                run.watch(progress=False)
                data = run.result()
            return {"name": plan["name"], "data": data}

        with ThreadPoolExecutor(lanes) as pool:
            for done in pool.map(one, plans):
                from casemate.client import weights

                model = load_model(f"{self.file}:build")
                weights.load(done["data"], model)
                yield {
                    "name": done["name"],
                    "accuracy": self.judge.accuracy(model, *self.held_out),
                }

    def overspend(self, datasets: list[str], epsilon: float) -> Iterator[Answer]:
        """Ask for more than is left."""
        yield refusal(
            lambda: self.enclave.train(self.model, datasets, **self._job(datasets, epsilon))
        )


class Stranger(Party):
    """Somebody whom no owner admitted."""

    def intrude(self, dataset: str) -> Iterator[Answer]:
        yield refusal(lambda: self.enclave.datasets.show(dataset))


class Oracle(Party):
    """No party: the rows of both hospitals pooled in the clear, to see what privacy costs."""

    def train(self, runs: int) -> Iterator[Answer]:
        judge = load_model_names(self.home / "model.py")
        rows = table.scaled(table.read(self.home / "pooled.csv"))
        held_out = table.scaled(table.read(self.home / "held_out.csv"))
        models_ = (judge.train_in_the_clear(*rows, seed) for seed in range(runs))
        yield {"accuracies": [judge.accuracy(model, *held_out) for model in models_]}


def load_model_names(file: Path) -> Any:
    """The functions of the startup's own file."""
    from casemate.cli.model import run_file

    return run_file(file)


def refusal(act: Callable[[], object]) -> Answer:
    """What refused ``act``; an act that is let through is the demo's own failure."""
    try:
        act()
    except CasemateError as e:
        return {"refused": e.to_wire()["error"]}
    return {"refused": None}


ROLES: Final = {
    "hospital": "casemate.cli.demo.party:Hospital",
    "startup": "casemate.cli.demo.party:Startup",
    "stranger": "casemate.cli.demo.party:Stranger",
    "oracle": "casemate.cli.demo.party:Oracle",
    "sms-company": "casemate.cli.demo.sms.party:Company",
    "sms-scientist": "casemate.cli.demo.sms.party:Scientist",
}


def main() -> None:
    role, home = sys.argv[1:3]
    out = sys.stdout
    sys.stdout = sys.stderr  # stray prints must not stand between the answers

    def say(answer: Answer) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    module, _, name = ROLES[role].partition(":")
    party = getattr(import_module(module), name)(Path(home))
    say({"identity": party.identity.id, "done": True})
    for line in sys.stdin:
        task = json.loads(line)
        try:
            for answer in getattr(party, task.pop("do"))(**task):
                say(answer)
            say({"done": True})
        except CasemateError as e:
            say({"error": e.to_wire()["error"], "done": True})


if __name__ == "__main__":
    main()

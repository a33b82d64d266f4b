"""The story, step by step; returns the figures that :mod:`show` and :mod:`chart` draw."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from casemate.cli.demo import table
from casemate.cli.demo.cast import Actor, Cast, Server
from casemate.cli.demo.show import Teller

CLINIC, CENTRE, STARTUP, STRANGER = "st-anna-clinic", "cancer-centre", "startup", "stranger"
BUDGET: Final = (8.0, 1e-4)
LANES: Final = 2


@dataclass
class Figures:
    """What came out. ``accuracy``: by who trained, one number for each job."""

    epsilon: float
    accuracy: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    root: str = ""
    majority: float = 0.0
    held_out: int = 0
    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def homes(folder: Path, shares: table.Shares) -> dict[str, Path]:
    """A home for each party, with what is its own and nothing else."""
    made = {}
    for name in (CLINIC, CENTRE, STARTUP, STRANGER, "oracle"):
        made[name] = folder / name
        made[name].mkdir(mode=0o700)
    table.write(made[CLINIC] / "patients.csv", shares.clinic)
    table.write(made[CENTRE] / "patients.csv", shares.centre)
    table.write(made["oracle"] / "pooled.csv", shares.clinic + shares.centre)
    model = resources.files("casemate.cli.demo").joinpath("model.py.txt").read_text("utf-8")
    for name in (STARTUP, "oracle"):
        table.write(made[name] / "held_out.csv", shares.held_out)
        (made[name] / "model.py").write_text(model, encoding="utf-8")
    return made


def run(tell: Teller, out: Path, *, jobs: int, epsilon: float) -> Figures:
    """Play the whole story; files that a visitor may look at afterwards go to ``out``."""
    figures = Figures(epsilon)
    start = time.perf_counter()
    shares = table.load()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="casemate-demo-") as folder, Cast() as cast:
        at = homes(Path(folder), shares)
        tell.opening(
            "Two hospitals and a startup train one model through an enclave server.",
            "No party sees another's rows; the model learns no single patient.",
        )
        with figures.timed("start the server and the parties"):
            server = Server(Path(folder) / "server", out / "server.log", LANES)
            cast.add(server)
            actors = {
                name: Actor(role, at[name])
                for name, role in (
                    (CLINIC, "hospital"),
                    (CENTRE, "hospital"),
                    (STARTUP, "startup"),
                    (STRANGER, "stranger"),
                )
            }
            for actor in actors.values():
                cast.add(actor)
            ids = {name: actor.answer()["identity"] for name, actor in actors.items()}
            known = server.wait()
            figures.root = known["root"]
        tell.server(server.arguments, known, ids)
        datasets = _push(tell, figures, actors, known, ids[STARTUP], shares)
        _train(tell, figures, actors[STARTUP], datasets, at[STARTUP], out)
        _repeat(tell, figures, actors[STARTUP], datasets, jobs)
        oracle = Actor("oracle", at["oracle"])
        cast.add(oracle)
        with figures.timed("oracle without privacy (local)"):
            oracle.answer()
            figures.accuracy["oracle"] = oracle.ask("train", runs=jobs)["accuracies"]
        figures.held_out = len(shares.held_out)
        figures.majority = max(table.share(shares.held_out, w) for w in table.CLASSES)
        tell.results(figures)
        _refusals(tell, figures, actors, datasets, known)
    figures.seconds["in all"] = time.perf_counter() - start
    return figures


def _push(
    tell: Teller,
    figures: Figures,
    actors: dict[str, Actor],
    known: dict[str, Any],
    scientist: str,
    shares: table.Shares,
) -> dict[str, str]:
    """Both hospitals at once; the startup verifies and loads its model meanwhile."""
    place = {"url": known["url"], "root": known["root"]}
    budget = {"epsilon": BUDGET[0], "delta": BUDGET[1]}
    hospitals = (CLINIC, CENTRE)
    with figures.timed("verify the enclave and push"):
        for name in hospitals:
            actors[name].tell("verify", **place)
            actors[name].tell("push", name=name, scientist=scientist, **budget)
        actors[STARTUP].tell("verify", **place)
        actors[STARTUP].tell("prepare")
        verified = {name: actors[name].answer() for name in hospitals}
        pushed = {name: actors[name].answer() for name in hospitals}
    rows = {CLINIC: shares.clinic, CENTRE: shares.centre}
    tell.pushed(verified, pushed, rows, BUDGET)
    with figures.timed("startup verifies, loads its model"):
        tell.startup(actors[STARTUP].answer(), len(shares.held_out))
        actors[STARTUP].answer()
        tell.found(actors[STARTUP].ask("look")["datasets"])
    return {name: pushed[name]["dataset"] for name in hospitals}


def _train(
    tell: Teller,
    figures: Figures,
    startup: Actor,
    datasets: dict[str, str],
    home: Path,
    out: Path,
) -> None:
    """The first job over both hospitals, with everything shown."""
    startup.tell(
        "train", datasets=list(datasets.values()), epsilon=figures.epsilon, progress=tell.progress
    )
    for answer in startup.answers():
        if "quote" in answer:
            figures.seconds["first job: quote"] = answer["seconds"]
            tell.quote(answer["quote"])
        elif answer.get("stage") == "run":
            figures.seconds["first job: queue, sandbox, training"] = answer["seconds"]
        elif answer.get("stage") == "weights":
            figures.seconds["first job: weights"] = answer["seconds"]
        else:
            figures.seconds["first job: receipt, offline"] = answer["seconds"]
            figures.accuracy["both"].append(answer["accuracy"])
            tell.receipt(answer)
    for name in ("receipt.json", "weights.safetensors"):
        figures.files[name] = Path(shutil.copy(home / name, out / name))


def _repeat(
    tell: Teller, figures: Figures, startup: Actor, datasets: dict[str, str], jobs: int
) -> None:
    """The same job again, and each hospital alone, for means and intervals."""
    plans = [{"name": "both", "datasets": list(datasets.values())}] * (jobs - 1)
    plans += [{"name": name, "datasets": [d]} for name, d in datasets.items() for _ in range(jobs)]
    with figures.timed(f"the other {len(plans)} jobs, {LANES} at a time"):
        startup.tell("repeat", plans=plans, epsilon=figures.epsilon, lanes=LANES)
        for answer in tell.counting(startup.answers(), len(plans)):
            figures.accuracy[answer["name"]].append(answer["accuracy"])


def _refusals(
    tell: Teller,
    figures: Figures,
    actors: dict[str, Actor],
    datasets: dict[str, str],
    known: dict[str, Any],
) -> None:
    hospitals = (CLINIC, CENTRE)
    before = {name: actors[name].ask("budget") for name in hospitals}
    tell.budgets(before, BUDGET)
    # Well above what is left: the job's delta is smaller than the budget's, so it may ask for more.
    too_much = float(math.ceil(1.5 * max(state["left"] for state in before.values()) + 1))
    with figures.timed("two refusals"):
        answer = actors[STARTUP].ask(
            "overspend", datasets=list(datasets.values()), epsilon=too_much
        )
        figures.refused["overspend"] = answer["refused"]
        actors[STRANGER].ask("verify", url=known["url"], root=known["root"])
        answer = actors[STRANGER].ask("intrude", dataset=datasets[CLINIC])
        figures.refused["stranger"] = answer["refused"]
    figures.budgets = {name: actors[name].ask("budget") for name in hospitals}
    tell.refusals(figures, too_much, unchanged=figures.budgets == before)

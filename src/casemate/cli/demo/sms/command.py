"""``casemate demo sms``."""

from __future__ import annotations

import shutil
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from casemate.cli import output
from casemate.cli.demo.cast import Actor, Cast, Server
from casemate.cli.demo.show import Teller
from casemate.cli.demo.sms import messages

# Accuracy that BastionAI's notebook printed for this task, trained without any privacy.
BASTION_NOTEBOOK = 0.887
FILES = ("receipt.json", "weights.safetensors")


@click.command()
@click.option("--epsilon", type=click.FloatRange(0.1, 8), default=2.0, show_default=True)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Messages: ham or spam, a tab, the text.",
)
@click.option(
    "--encoder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face model folder; MiniLM otherwise.",
)
@click.option("--rows", type=click.IntRange(100), help="Use only so many messages.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which messages are held out.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="out/demo-sms",
    show_default=True,
)
def sms(
    epsilon: float, data: Path | None, encoder: Path | None, rows: int | None, seed: int, out: Path
) -> None:
    """SMS spam with a frozen, pretrained encoder and a private head; SIMULATED TEE."""
    tell = _Story(output.console())
    own = messages.read(data or messages.within(*messages.MESSAGES, "--data"))
    folder = encoder or messages.within(*messages.ENCODER, "--encoder")
    owner, held_out = messages.split(own.of(list(range(len(own)))[:rows]), seed)
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="casemate-sms-") as place, Cast() as cast:
        tell.beginning(len(own), owner, held_out, folder)
        _homes(Path(place), owner, held_out)
        server = Server(Path(place) / "server", out / "server.log", 1)
        cast.add(server)
        company = Actor("sms-company", Path(place) / "company")
        scientist = Actor("sms-scientist", Path(place) / "scientist")
        cast.add(company)
        cast.add(scientist)
        company.answer()
        identity = scientist.answer()["identity"]
        known = server.wait()
        at = {"url": known["url"], "root": known["root"]}
        for actor in (company, scientist):
            actor.tell("verify", **at)
        company.tell("push", encoder=str(folder), scientist=identity, epsilon=epsilon)
        scientist.tell("prepare", encoder=str(folder))
        tell.verified(company.answer())
        dataset = tell.dataset(company.answers())
        scientist.answer()
        scientist.answer()
        scientist.tell("train", dataset=dataset, epsilon=epsilon, progress=tell.progress)
        tell.trained(scientist.answers())
        found = scientist.ask("judge")
        budget = company.ask("budget")
        for name in FILES:
            shutil.copy(Path(place) / "scientist" / name, out / name)
    tell.end(found, budget, epsilon, time.perf_counter() - start, out)


def _homes(folder: Path, owner: messages.Messages, held_out: messages.Messages) -> None:
    """A home for each party with what is its own."""
    for name in ("company", "scientist"):
        (folder / name).mkdir(mode=0o700)
    messages.write(folder / "company" / "messages.tsv", owner)
    messages.write(folder / "scientist" / "held_out.tsv", held_out)
    model = resources.files("casemate.cli.demo.sms").joinpath("model.py.txt").read_text("utf-8")
    (folder / "scientist" / "model.py").write_text(model, encoding="utf-8")


class _Story(Teller):
    """The teller of this story."""

    def beginning(
        self, read: int, owner: messages.Messages, held_out: messages.Messages, encoder: Path
    ) -> None:
        self.opening("A phone company's messages, a startup's model: spam or not?")
        self._line(
            f"{read} messages, {len(owner) + len(held_out)} after duplicates went:"
            f" {len(owner)} at the company, {len(held_out)} held out by the startup"
        )
        self._line(f"encoder {encoder.parent.name}/{encoder.name}, frozen, inside the enclave")

    def verified(self, answer: dict[str, Any]) -> None:
        self._title("The company verifies the enclave, tokenises at home, pushes token ids")
        self._line(f"{answer['checks']} checks of evidence passed ({answer['seconds']:.1f} s)")

    def dataset(self, answers: Any) -> str:
        dataset = ""
        for answer in answers:
            dataset = answer.get("dataset", dataset)
            self._line(f"{answer['stage']}: {answer['seconds']:.1f} s")
        return dataset

    def trained(self, answers: Any) -> None:
        self._title("The startup asks for a quote, trains the head in the enclave, pulls it")
        for answer in answers:
            if "quote" in answer:
                self.quote(answer["quote"])
            self._line(f"{answer['stage']}: {answer['seconds']:.1f} s")
            if "statement" in answer:
                self._line(f"receipt, checked offline: {answer['statement']}")

    def end(
        self,
        found: dict[str, Any],
        budget: dict[str, float],
        epsilon: float,
        seconds: float,
        out: Path,
    ) -> None:
        self._title("What came out")
        made = Table(box=None, pad_edge=False, padding=(0, 2))
        for head in ("held-out accuracy", "", "privacy"):
            made.add_column(head)
        made.add_row(f"{found['majority']:.1%}", "always ham", "-", style="dim")
        made.add_row(
            f"{BASTION_NOTEBOOK:.1%}", "published: BastionAI's notebook", "none", style="dim"
        )
        made.add_row(
            Text(f"{found['accuracy']:.1%}"),
            f"casemate ({found['caught']:.0%} of the spam caught)",
            f"epsilon {epsilon:g} at delta 1e-05",
            style="bold green",
        )
        self._console.print(made)
        self._line(f"the company's budget: spent {budget['spent']:.2f}, left {budget['left']:.2f}")
        self._line(f"{seconds:.0f} s in all; receipt and weights in {out}")

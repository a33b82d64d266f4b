"""How the story looks in a terminal."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from casemate.cli.demo import table as data

if TYPE_CHECKING:
    from casemate.cli.demo.story import Figures

# Two-sided 95% quantiles of Student's t by degrees of freedom.
T95: Final = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}

ROWS: Final = (
    ("st-anna-clinic", "St. Anna's clinic alone"),
    ("cancer-centre", "Cancer centre alone"),
    ("both", "Both, together"),
    ("oracle", "Both, oracle without privacy"),
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, T95.get(len(values) - 1, 1.96) * spread


def _table(*head: str, **settings: Any) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, **settings)
    for i, name in enumerate(head):
        made.add_column(name, justify="left" if i == 0 else "right")
    return made


class Teller:
    """Prints the story to ``console``; ``progress`` says whether bars are drawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.progress = console.is_terminal or sys.stderr.isatty()
        self._step = 0

    def _title(self, text: str) -> None:
        self._step += 1
        self._console.print()
        self._console.print(Text(f"{self._step}. {text}", style="bold cyan"))

    def _line(self, text: str, style: str = "", *, indent: int = 3) -> None:
        self._console.print(Padding(Text(text, style=style), (0, 0, 0, indent)))

    def _verbatim(self, text: str) -> None:
        """A line to copy: never broken."""
        self._console.print(Text("   " + text), soft_wrap=True)

    def opening(self, *lines: str) -> None:
        self._console.print(
            Panel(
                Text(
                    "SIMULATED TEE. This demo runs on your own machine, so its server could be"
                    " looked into.\nAll else is real: processes, keys, encryption, evidence in"
                    " AMD's format, noise, budgets.",
                    justify="center",
                ),
                style="bold white on red",
            )
        )
        for line in lines:
            self._line(line)

    def server(
        self, arguments: Sequence[str], known: Mapping[str, Any], ids: Mapping[str, str]
    ) -> None:
        self._title("The operator starts a server; each party makes keys of its own")
        self._line(f"$ {' '.join(a for a in arguments if '/' not in a and a != '--state')}")
        self._line(f"{known['url']}, TEE {known['tee']} (SIMULATED), root {known['root'][:16]}…")
        for name, identity in ids.items():
            self._line(f"{name:<16} {identity[:19]}…")

    def pushed(
        self,
        verified: Mapping[str, dict[str, Any]],
        pushed: Mapping[str, dict[str, Any]],
        rows: Mapping[str, tuple[data.Row, ...]],
        budget: tuple[float, float],
    ) -> None:
        self._title("Each hospital verifies the enclave, then pushes its rows, encrypted")
        made = _table("hospital", "patients", "malignant", "checks passed", "dataset", "took")
        for name, answer in pushed.items():
            took = verified[name]["seconds"] + answer["seconds"]
            made.add_row(
                name,
                str(len(rows[name])),
                f"{data.share(rows[name], 'malignant'):.0%}",
                str(verified[name]["checks"]),
                answer["dataset"][:15] + "…",
                f"{took:.1f} s",
            )
        self._console.print(made)
        self._line(
            f"Policy: only the startup may train. Lifetime budget: epsilon {budget[0]:g} at delta"
            f" {budget[1]:g}."
        )

    def startup(self, verified: Mapping[str, Any], held_out: int) -> None:
        self._title("The startup verifies the enclave, asks for a quote, and trains over both")
        self._line(
            f"{verified['checks']} checks of evidence passed; its own test set:"
            f" {held_out} patients that no hospital holds"
        )

    def found(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        for item in datasets:
            self._line(f"sees {item['name']} ({item['units']} units), not one row of it")

    def quote(self, rows: Mapping[str, object]) -> None:
        made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        made.add_column(style="bold")
        made.add_column()
        for name in ("privacy", "steps", "noise", "time", "memory"):
            made.add_row(name, Text(str(rows[name])))
        for name, text in rows.items():
            if name.startswith("ds_"):
                made.add_row(name[:15] + "…", Text(str(text)))
        self._console.print(Padding(made, (0, 0, 0, 5)))

    def receipt(self, answer: Mapping[str, Any]) -> None:
        self._line(f"weights pulled: accuracy {answer['accuracy']:.1%} on the held-out patients")
        self._line("receipt, checked offline from two files:")
        made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for _ in range(3):
            made.add_column()
        for check in answer["receipt"]:
            style = {"simulated": "bold red", "unchecked": "yellow"}.get(check["state"], "green")
            made.add_row(Text(check["state"], style=style), check["name"], Text(check["found"]))
        self._console.print(Padding(made, (0, 0, 0, 5)))

    def counting(self, answers: Iterator[Any], total: int) -> Iterator[Any]:
        from tqdm import tqdm

        self._line(f"{total} more jobs for means and intervals, each charged to the budgets:")
        yield from tqdm(answers, total=total, unit="job", leave=True, disable=not self.progress)

    def results(self, figures: Figures) -> None:
        self._title("What came out")
        made = _table("trained on", "privacy of each job", "accuracy", "95% interval")
        for key, name in ROWS:
            mean, half = interval(figures.accuracy[key])
            private = key != "oracle"
            made.add_row(
                Text(name, style="bold green" if key == "both" else ""),
                f"epsilon {figures.epsilon:g}" if private else "none",
                Text(f"{mean:.1%}", style="bold green" if key == "both" else ""),
                f"± {half:.1%}" if math.isfinite(half) else "-",
                style="" if private else "dim",
            )
        made.add_row("Always the majority class", "-", f"{figures.majority:.1%}", "-", style="dim")
        self._console.print(made)
        count = len(figures.accuracy["both"])
        self._line(
            f"Means over {count} job(s) each, on {figures.held_out} held-out patients; intervals"
            " over the jobs' randomness. The oracle pools all rows in the clear on this machine,"
            " which no party of the story could do.",
            style="dim",
        )

    def budgets(
        self, states: Mapping[str, Mapping[str, float]], budget: tuple[float, float]
    ) -> None:
        self._title("What it cost the hospitals, by the enclave's ledger")
        made = _table("owner", "jobs", "epsilon spent", "epsilon left", "of")
        for name, state in states.items():
            made.add_row(
                name,
                f"{state['jobs']:.0f}",
                f"{state['spent']:.2f}",
                f"{state['left']:.2f}",
                f"{budget[0]:g} at delta {budget[1]:g}",
            )
        self._console.print(made)
        self._line(
            "Jobs compose by Rényi accounting: epsilons do not add, so spent and left need not"
            " sum to the budget.",
            style="dim",
        )

    def refusals(self, figures: Figures, asked: float, *, unchanged: bool) -> None:
        self._title("Two requests that must fail")
        told = (
            (f"The startup asks for one more job, at epsilon {asked:g}", "overspend"),
            ("A stranger asks for the clinic's dataset", "stranger"),
        )
        for sentence, key in told:
            error = figures.refused[key]
            self._line(f"{sentence}:")
            if error is None:
                self._line("NOT REFUSED: this is a fault", "bold red", indent=5)
                continue
            self._line(f"refused, {error['code']}: {error['message']}", "green", indent=5)
        words = "unchanged: nothing was read or charged" if unchanged else "CHANGED: a fault"
        self._line(f"Budgets after both are {words}.", style="" if unchanged else "bold red")

    def closing(self, figures: Figures, chart: Path, folder: Path) -> None:
        self._title("Time and files")
        made = _table("stage", "seconds")
        for stage, seconds in figures.seconds.items():
            made.add_row(stage, f"{seconds:.1f}", style="bold" if stage == "in all" else "")
        self._console.print(made)
        self._verbatim(f"chart    {chart}")
        for name, path in figures.files.items():
            self._verbatim(f"{name.split('.')[0]:<8} {path}")
        self._line("Check the receipt yourself, without the server:")
        self._verbatim(f"  casemate receipt verify {folder}/receipt.json \\")
        self._verbatim(f"    --weights {folder}/weights.safetensors \\")
        self._verbatim(f"    --trust simulated:{figures.root}")

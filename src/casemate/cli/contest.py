"""``casemate contest``: enter a model, see and verify the leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casemate.cli import config, output
from casemate.cli.job import inputs_option

if TYPE_CHECKING:
    from casemate.client.contests import Board
    from casemate.client.heads import Witnesses

recovered_option = click.option(
    "--recovered", is_flag=True, help="Entries may stand in several logs: the state was recovered."
)


@click.group()
def contest() -> None:
    """Enter a sealed model for scores on rows that nobody sees; the leaderboard. A contest is held
    by `dataset push --contest`."""


def _show(board: Board, form: str) -> None:
    from casemate.client import receipts

    data = {
        "dataset": board.source.dataset,
        "entries": [receipts.as_json(entry) for entry in board.entries],
    }
    output.emit(form, data, lambda: output.rows_table(*board.shown()))


@contest.command()
@click.argument("dataset", metavar="DATASET")
@click.argument("model", metavar="FILE.cmm|FILE.onnx|FILE.py:NAME")
@inputs_option
@config.target_options
@output.format_option
def enter(
    dataset: str, model: str, inputs: dict[str, list[str]], target: config.Target, form: str
) -> None:
    """Enter MODEL, sealed, in DATASET's contest, wait, and show its scores. An entry counts
    whatever comes of it."""
    from casemate.cli.model import load_model

    found: Any = model if model.endswith((".cmm", ".onnx")) else load_model(model)
    with target.connect() as enclave:
        run = enclave.enter(found, dataset, inputs=inputs).watch(progress=form == "table")
        receipt = run.receipt.receipt
    scores = {m.name: s for m, s in zip(receipt.metrics, receipt.scores, strict=True)}
    data = {"job": run.job, "model": receipt.model_digest, "scores": scores}
    rows = [(name, f"{score:.5g}") for name, score in scores.items()]
    output.emit(form, data, lambda: output.rows_table(run.job, ("metric", "score"), rows))


@contest.command()
@click.argument("dataset", metavar="DATASET")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write it with all its receipts, for `casemate contest verify`.",
)  # fmt: skip
@recovered_option
@config.target_options
@output.format_option
def board(
    dataset: str, out: Path | None, recovered: bool, target: config.Target, form: str
) -> None:
    """DATASET's leaderboard, every receipt of it verified."""
    with target.connect() as enclave:
        found = enclave.leaderboard(dataset, recovered=recovered)
    if out is not None:
        found.save(out)
    _show(found, form)


@contest.command()
@click.argument("file", type=click.Path(dir_okay=False), metavar="FILE")
@recovered_option
@config.trust_option
@config.witness_options
@output.format_option
def verify(file: str, recovered: bool, trust: str | None, witnesses: Witnesses, form: str) -> None:
    """Verify a saved leaderboard offline: each receipt as `receipt verify` does, and that they are
    of one contest and one log."""
    from casemate.client import contests
    from casemate.client.memory import Memory

    found = contests.verify(
        contests.load(file), config.load_trust(trust), Memory(),
        witnesses=witnesses, recovered=recovered,
    )  # fmt: skip
    _show(found, form)

"""``casemate receipt``: verify and read receipts offline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casemate.cli import config, output

if TYPE_CHECKING:
    from casemate.client.receipts import VerifiedReceipt, Witnesses


@click.group()
def receipt() -> None:
    """Verify and read receipts offline; no server is asked."""


def _table(verified: VerifiedReceipt) -> object:
    from rich.console import Group
    from rich.text import Text

    found = verified.receipt
    head: list[Text] = []
    if verified.simulated:
        head.append(
            Text(
                f"SIMULATED: {', '.join(verified.simulated)}. It proves nothing to others.",
                style="bold white on red",
            )
        )
    head.append(Text(f"{found.job}: {output.clean(found.guarantee.statement)}"))
    rows = [(c.name, c.state, c.found) for c in verified.checks]
    return Group(*head, output.rows_table("", ("check", "state", "found"), rows))


@receipt.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--weights", type=click.Path(dir_okay=False), help="The weights to compare with.")
@click.option(
    "--trust",
    envvar="CASEMATE_TRUST",
    metavar="FILE|simulated[:ROOT]",
    help="Trust policy for the evidence inside; simulation must be asked for by name.",
)
@config.witness_options
@output.format_option  # fmt: skip
def verify(
    file: str, weights: str | None, trust: str | None, witnesses: Witnesses, form: str
) -> None:
    """Check the receipt in FILE: evidence, signature, numbers, weights, epsilon; that it stands in
    the log, who cosigned, and that it is the log which this client saw before."""
    from casemate.client import receipts
    from casemate.client.memory import Memory

    verified = receipts.verify_receipt(
        receipts.load_bundle(file),
        trust=config.load_trust(trust),
        weights=weights,
        witnesses=witnesses,
        memory=Memory(),
    )
    output.emit(form, receipts.as_json(verified), lambda: _table(verified))


@receipt.command()
@click.argument("file", type=click.Path(dir_okay=False))
@output.format_option
def show(file: str, form: str) -> None:
    """Print the statement in FILE. Nothing is verified: say so to whom you show it."""
    from casemate.client import receipts

    statement = receipts.statement_json(receipts.load_bundle(file))
    if form == "table":
        output.say("not verified; `casemate receipt verify` checks it")
    output.emit("json", statement)

"""``casemate receipt``: verify and read receipts offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from casemate.cli import config, output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from casemate.client.heads import Check
    from casemate.client.receipts import Verified, Witnesses
    from casemate.spec.receipt import Receipt, ReceiptBundle
    from casemate.spec.sale import SaleReceipt

_FILE: Final = click.Path(dir_okay=False, path_type=Path)


@click.group()
def receipt() -> None:
    """Verify and read receipts offline; no server is asked."""


def _table(verified: Verified[Receipt] | Verified[SaleReceipt]) -> object:
    from rich.console import Group
    from rich.text import Text

    head: list[Text] = []
    if verified.simulated:
        head.append(
            Text(
                f"SIMULATED: {', '.join(verified.simulated)}. It proves nothing to others.",
                style="bold white on red",
            )
        )
    head.append(Text(output.clean(verified.claim)))
    rows = [(c.name, c.state, c.found) for c in verified.checks]
    return Group(*head, output.rows_table("", ("check", "state", "found"), rows))


@receipt.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--weights", type=click.Path(dir_okay=False), help="The weights, or the model, to compare with."
)
@config.trust_option
@config.witness_options
@output.format_option  # fmt: skip
def verify(
    file: str, weights: str | None, trust: str | None, witnesses: Witnesses, form: str
) -> None:
    """Check the receipt in FILE, of a job or of a sale: evidence, signature, numbers, weights,
    epsilon; that it stands in the log, who cosigned, and that it is the log which this client saw
    before."""
    from casemate.client import receipts, sales
    from casemate.client.memory import Memory
    from casemate.spec.sale import SALE_PREDICATE

    bundle, rules = receipts.load_bundle(file), config.load_trust(trust)
    memory = Memory()
    verified: receipts.Verified[Receipt] | receipts.Verified[SaleReceipt]
    if receipts.predicate_type(bundle) == SALE_PREDICATE:
        verified = sales.verify_sale(
            bundle, trust=rules, model=weights, witnesses=witnesses, memory=memory
        )
    else:
        verified = receipts.verify_receipt(
            bundle, trust=rules, weights=weights, witnesses=witnesses, memory=memory
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


@receipt.command()
@click.argument("file", type=_FILE)
@click.option("--out", type=_FILE, help="Where the proof goes; else to stdout, on one line.")
@click.option(
    "--anchor",
    "anchor_file",
    type=_FILE,
    help="Lead to the oldest checkpoint in this anchor's file that covers the receipt.",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --anchor: a mirror of the log, instead of what this client has seen of it.",
)
@config.trust_option
@output.format_option
def anchor(
    file: Path,
    out: Path | None,
    anchor_file: Path | None,
    folder: Path | None,
    trust: str | None,
    form: str,
) -> None:
    """Make the proof of the receipt in FILE that other ledgers can check without the receipt.

    The receipt is verified first. The proof holds its digest, the log's entry that commits to it
    and where that stands under a signed checkpoint: the receipt's own, if no anchor is given.
    """
    from casemate.client import anchors, receipts
    from casemate.client.memory import Memory, Mirror
    from casemate.spec import codec

    bundle = receipts.load_bundle(file)
    known = None if anchor_file is None else anchors.load(anchor_file)
    key = bundle.attestation.binding.log_key
    mirror = Memory().mirror(key) if folder is None else Mirror(folder)
    proof = anchors.prove(bundle, trust=config.load_trust(trust), anchor=known, mirror=mirror)
    _loud(bundle)
    line = codec.encode(proof)
    if out is not None:
        anchors.save_proof(out, proof)
    shape = {"file": None if out is None else str(out), "proof": codec.to_json(proof),
             "checks": _checks(anchors.check(proof, anchor=known))}  # fmt: skip
    said = line.decode() if out is None else f"{len(line)} bytes in {out}"
    output.emit(form, shape, lambda: said)


@receipt.command()
@click.argument("file", type=_FILE)
@click.option("--anchor", "anchor_file", type=_FILE, help="The anchor's file, as it is published.")
@click.option("--receipt", "bundle_file", type=_FILE, help="The receipt that the proof is about.")
@click.option(
    "--calldata", is_flag=True, help="Print nothing but the call that asks a contract, in hex."
)
@config.trust_option
@config.witness_options
@output.format_option  # fmt: skip
def anchored(
    file: Path,
    anchor_file: Path | None,
    bundle_file: Path | None,
    calldata: bool,
    trust: str | None,
    witnesses: Witnesses,
    form: str,
) -> None:
    """Check the proof in FILE: that the log commits to a receipt with this digest, under a
    checkpoint that was posted. Without the receipt, whose log it is follows from the anchor alone.
    """
    from casemate.client import anchors, contract, receipts

    proof = anchors.load_proof(file)
    bundle = None if bundle_file is None else receipts.load_bundle(bundle_file)
    checks = anchors.check(
        proof,
        anchor=None if anchor_file is None else anchors.load(anchor_file),
        bundle=bundle,
        trust=None if bundle is None else config.load_trust(trust),
        witnesses=witnesses,
    )
    if bundle is not None:
        _loud(bundle)
    call = "0x" + contract.of_proof(proof).hex()
    if calldata:
        click.echo(call)
        return
    shape = {"receipt": proof.receipt, "key": proof.key.hex(), "checks": _checks(checks),
             "calldata": call}  # fmt: skip
    rows = [(c.name, c.state, c.found) for c in checks]
    output.emit(
        form, shape, lambda: output.rows_table(proof.receipt, ("check", "state", "found"), rows)
    )


def _loud(bundle: ReceiptBundle) -> None:
    """A proof does not say it, so who makes or compares one is told."""
    if bundle.attestation.evidence.simulated:
        output.say("SIMULATED TEE: this receipt proves nothing to others")


def _checks(checks: Sequence[Check]) -> list[dict[str, str]]:
    return [{"name": c.name, "state": c.state, "found": c.found} for c in checks]

"""``casemate audit``: the enclave's log, checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from casemate.cli import config, output
from casemate.cli.serve import state_folder
from casemate.spec.errors import LedgerError, UsageError


@click.group()
def audit() -> None:
    """Check the enclave's log."""


@audit.command()
@click.option(
    "--receipt",
    type=click.Path(dir_okay=False),
    help="A receipt's bundle, whose commit must stand in the log.",
)
@config.target_options
@output.format_option  # fmt: skip
def verify(receipt: str | None, target: config.Target, form: str) -> None:
    """Fetch the whole log, check it against its signed head, and recompute every charge."""
    from casemate.spec.errors import ReceiptError

    place = target.place()
    trust = config.load_trust(place.trust)
    with target.connect() as enclave:
        found = enclave.log()
    if receipt is not None:
        from casemate.client import receipts

        bundle = receipts.load_bundle(receipt)
        receipts.verify_receipt(bundle, trust=trust)
        if bundle.entry not in found.leaves:
            raise ReceiptError(
                "receipt.log-absent",
                "The receipt's entry does not stand in this log.",
                mend="The log was replaced since: keep both and ask the operator.",
            )
    kinds = Counter(e.kind for e in found.entries)
    shape = {
        "entries": found.head.size,
        "debits": found.debits,
        "origin": found.head.origin,
        "checkpoint": str(found.signed),
        "kinds": dict(kinds),
    }
    rows = [
        ("entries", found.head.size),
        ("charges recomputed", found.debits),
        ("kinds", ", ".join(f"{k} {n}" for k, n in sorted(kinds.items()))),
        ("origin", found.head.origin),
        ("root", found.head.root.hex()),
    ]
    output.emit(form, shape, lambda: output.rows_table("The log holds", (), rows))


@audit.command()
@click.argument("state", type=click.Path(file_okay=False), required=False)
@click.option(
    "--tee",
    envvar="CASEMATE_TEE",
    default="auto",
    show_default=True,
    help="Kind of TEE that sealed the state; simulated for a server run with --dev.",
)
@click.option(
    "--release-owner",
    default="",
    envvar="CASEMATE_RELEASE_OWNER",
    metavar="HEX",
    help="Ed25519 key of who releases the sealing key, where no hardware holds one.",
)
@output.format_option
@click.pass_context
def fsck(ctx: click.Context, state: str | None, tee: str, release_owner: str, form: str) -> None:
    """Check a stopped server's STATE folder: tables, log, signatures, receipts, files.

    Runs on the server's machine, whose TEE holds the key, and changes nothing. The checker shares
    no code with the server but the formats; it recomputes every charge and every epsilon with
    another accountant. Exit code 21 with findings. Needs the extras `server` and `audit`.
    """
    try:
        from casemate.server.check import check
        from casemate.server.config import Config
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            f"A server's state needs packages that are not installed ({e.name}).",
            mend="Run pip install 'casemate[server]'.",
        ) from None
    folder = state_folder() if state is None else Path(state)
    found = check(Config(state=folder, tee=tee, release_owner=release_owner))
    shape = {
        "entries": found.entries,
        "starts": len(found.started),
        "datasets": len(found.datasets),
        "jobs": len(found.jobs),
        "receipts": found.receipts,
        "findings": found.findings,
        "left": found.left,
    }
    rows = [(name, shape[name]) for name in ("entries", "starts", "datasets", "jobs", "receipts")]
    rows += [("left by a crash", name) for name in found.left]
    rows += [("FINDING", text) for text in found.findings] or [("findings", "none")]
    output.emit(form, shape, lambda: output.rows_table(f"The state in {folder}", (), rows))
    if found.findings:
        ctx.exit(LedgerError.exit_code)

"""``casemate audit``: the enclave's log, checked."""

from __future__ import annotations

from collections import Counter

import click

from casemate.cli import config, output


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

"""``casemate audit``: the enclave's log, checked."""

from __future__ import annotations

from collections import Counter

import click

from casemate.cli import config, output


@click.group()
def audit() -> None:
    """Check the enclave's hash-chained log."""


@audit.command()
@click.option(
    "--receipt",
    type=click.Path(dir_okay=False),
    help="A receipt's bundle, whose commit must stand in the log.",
)
@click.option("--head", help="A head noted earlier, which must still stand in the log.")
@config.target_options
@output.format_option  # fmt: skip
def verify(receipt: str | None, head: str | None, target: config.Target, form: str) -> None:
    """Fetch the whole log, check every link, and recompute every charge that one may see."""
    from casemate.client import log
    from casemate.spec.errors import ReceiptError

    place = target.place()
    trust = config.load_trust(place.trust)
    with target.connect() as enclave:
        chain = log.verify(enclave.log())
    if receipt is not None:
        from casemate.client import receipts

        found = receipts.verify_receipt(receipts.load_bundle(receipt), trust=trust).receipt
        log.verify_receipt_entry(chain, found.sequence, found.entry)
    if head is not None and all(s.digest != head for s in chain.entries):
        raise ReceiptError(
            "receipt.log-absent",
            f"The head {head} does not stand in this log.",
            mend="The log was replaced since: keep both heads and ask the operator.",
            where=head,
        )
    kinds = Counter(e.kind for e in chain.visible)
    shape = {
        "entries": len(chain.entries),
        "visible": len(chain.visible),
        "links": chain.links,
        "debits": chain.debits,
        "head": chain.head,
        "kinds": dict(kinds),
    }
    rows = [
        ("entries", f"{len(chain.entries)}, of which {len(chain.visible)} may be seen in full"),
        ("links compared", chain.links),
        ("charges recomputed", chain.debits),
        ("kinds", ", ".join(f"{k} {n}" for k, n in sorted(kinds.items()))),
        ("head", chain.head),
    ]
    output.emit(form, shape, lambda: output.rows_table("The log holds", (), rows))

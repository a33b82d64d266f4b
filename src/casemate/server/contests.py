"""Contests: the leaderboard of a dataset that holds one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

from casemate.ledger import catalog, ledger
from casemate.seal import dsse
from casemate.server.service import Call
from casemate.spec import canonical, codec
from casemate.spec.receipt import Leaderboard, Receipt, ReceiptBundle, rank

SHOWN: Final = 256


async def leaderboard(call: Call) -> Leaderboard:
    """The receipt of each participant's best entry, the best of all first, at most :data:`SHOWN`;
    none of a dataset without a contest. Who is admitted to a contest sees how all entries scored,
    as their receipts say."""
    store = call.service.store
    held = catalog.dataset(store, call.id).policy.contest is not None
    entries = await asyncio.to_thread(_best, ledger.bundles(store, call.id) if held else [])
    return Leaderboard(dataset=call.id, entries=entries)


def _best(bundles: Iterable[bytes]) -> tuple[ReceiptBundle, ...]:
    best: dict[str, tuple[tuple[float, int], ReceiptBundle]] = {}
    for raw in bundles:
        bundle = codec.decode(ReceiptBundle, raw)
        receipt = _receipt(bundle.envelope)
        found = rank(receipt), bundle
        kept = best.setdefault(receipt.scientist, found)
        best[receipt.scientist] = min(kept, found, key=lambda pair: pair[0])
    ordered = sorted(best.values(), key=lambda pair: pair[0])
    return tuple(bundle for _, bundle in ordered[:SHOWN])


def _receipt(envelope: str) -> Receipt:
    """What an envelope of this server's own holds."""
    said: Any = canonical.decode(dsse.unverified(envelope))
    found: Receipt = codec.from_json(Receipt, said["predicate"]["receipt"])
    return found

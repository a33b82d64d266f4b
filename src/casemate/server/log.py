"""The log as static files (C2SP tlog-tiles): anyone may read it, with any client."""

from __future__ import annotations

import re
from typing import Final

from casemate.seal import tiles
from casemate.seal.tiles import ENTRIES
from casemate.server.service import Call, Reply
from casemate.spec.errors import FormatError

_OCTETS: Final = "application/octet-stream"
_FOR_EVER: Final = {"cache-control": "public, max-age=31536000, immutable"}


async def checkpoint(call: Call) -> Reply:
    """The newest head, signed, with what witnesses said of it."""
    return Reply(str(call.service.publisher.checkpoint()).encode(), "text/plain; charset=utf-8")


def _absent(path: str) -> FormatError:
    return FormatError(
        "format.tile",
        f"The log has no {path[:80]!r}.",
        mend="Ask for tiles within the size of a checkpoint that you have.",
        where=path[:80],
        status=404,
    )


async def tile(call: Call) -> Reply:
    """A tile of hashes or of entries."""
    store, path = call.service.store, f"tile/{call.id}"
    found = tiles.read_path(path)
    if not tiles.within(found, store.size()):
        raise _absent(path)
    if found.level == ENTRIES:
        content = tiles.bundle(store.entries(found.place * tiles.WIDTH, found.width))
    else:
        content = tiles.hashes(found, store.node)
    return Reply(content, _OCTETS, _FOR_EVER)


async def attestation(call: Call) -> Reply:
    """The attestation that a start's entry names, as canonical JSON."""
    sql = "SELECT attestation FROM attestations WHERE digest = ?"
    row = None
    if re.fullmatch(r"[0-9a-f]{64}", call.id):
        row = call.service.store.one(sql, f"sha256:{call.id}")
    if row is None:
        raise _absent(f"attestation/{call.id}")
    return Reply(row[0], "application/json", _FOR_EVER)

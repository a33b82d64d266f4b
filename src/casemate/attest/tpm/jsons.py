"""JSON of files beside evidence, read strictly: no key twice, no NaN, nothing left over."""

from __future__ import annotations

import json
from typing import Final, NoReturn

from casemate.attest.verdict import refusal
from casemate.spec.canonical import Json

MAX_BYTES: Final = 1 << 16


def _pairs(pairs: list[tuple[str, Json]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def load(data: bytes, where: str) -> Json:
    """The value in ``data``. Raises ``evidence.parse-json``."""
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has {len(data)} bytes")
        text = data.decode("utf-8")
        found: Json = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as e:
        reason = str(e)[:120]
        raise refusal("parse-json", f"{where} is no strict JSON: {reason}.", where) from None
    return found

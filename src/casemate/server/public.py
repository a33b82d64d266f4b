"""What anyone may ask without a signature: life, evidence, the routes, the metrics."""

from __future__ import annotations

import re

from casemate.server import metrics
from casemate.server.service import Call, Reply
from casemate.spec.errors import FormatError
from casemate.spec.evidence import Attestation


async def health(call: Call) -> dict[str, str]:
    return {"status": "ok"}


async def attestation(call: Call) -> Attestation:
    """Evidence for the caller's nonce; those that wait share one report."""
    nonce = call.query.get("nonce", "")
    if not re.fullmatch(r"[0-9a-f]{64}", nonce):
        raise FormatError(
            "format.nonce",
            "The nonce is not 32 bytes in lower-case hex.",
            mend="Send ?nonce= with 64 hex digits, fresh for each connection.",
            where="nonce",
        )
    return await call.service.attester.attest(bytes.fromhex(nonce))


async def exposition(call: Call) -> Reply:
    return Reply(call.service.metrics.text(), metrics.CONTENT_TYPE)

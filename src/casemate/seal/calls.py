"""A sealed call to a deployed model, and its answer (the form: ``spec.serving``).

As in oblivious HTTP (RFC 9458, section 4) one key encapsulation serves both ways: what is sealed to
the enclave's attested key holds two fresh keys, for the inputs and for the answer. They count for
one call of one caller with so many records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from casemate.seal import hpke, stream
from casemate.seams import Rng
from casemate.spec.errors import FormatError
from casemate.spec.serving import CALL_KEYS, COUNT_BYTES, MAX_RECORDS, call_info

HEAD_BYTES: Final = COUNT_BYTES + hpke.OVERHEAD + CALL_KEYS


@dataclass(frozen=True, slots=True)
class Opened:
    """A call as the server has it: ``sealed`` is the stream of its inputs, still closed."""

    records: int
    keys: bytes = field(repr=False)
    sealed: bytes = field(repr=False)


def split(keys: bytes) -> tuple[bytes, bytes]:
    """The key of the inputs' stream and that of the answer's."""
    return keys[: stream.KEY_BYTES], keys[stream.KEY_BYTES :]


def seal(
    enclave_key: bytes, model: str, caller: str, records: int, inputs: bytes, rng: Rng
) -> tuple[bytes, bytes]:
    """A call's body, and the key that its answer will be sealed under."""
    keys = rng.bytes(CALL_KEYS)
    head = hpke.seal(enclave_key, keys, info=call_info(model, caller, records))
    asking, answering = split(keys)
    sealed = b"".join(stream.encrypt(asking, [inputs]))
    return records.to_bytes(COUNT_BYTES, "big") + head + sealed, answering


def open_head(key: hpke.SealKey, model: str, caller: str, body: bytes) -> Opened:
    """What a call says of itself, for its model and caller alone. Raises ``FormatError``
    ``format.sealed``, ``format.call``."""
    records = int.from_bytes(body[:COUNT_BYTES], "big")
    if len(body) <= HEAD_BYTES or not 1 <= records <= MAX_RECORDS:
        raise FormatError(
            "format.call",
            f"A call of {len(body)} bytes and {records} records is none.",
            mend="Call with casemate: enclave.predict.",
        )
    info = call_info(model, caller, records)
    keys = key.open(body[COUNT_BYTES:HEAD_BYTES], info=info)
    return Opened(records, keys, body[HEAD_BYTES:])


def open_answer(key: bytes, sealed: bytes) -> bytes:
    """The plaintext of an answer. Raises ``FormatError``."""
    return b"".join(stream.decrypt(key, [sealed]))

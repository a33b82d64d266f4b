"""The attestation document of an AWS Nitro Enclave, field by field.

Source: AWS, "Nitro Enclaves Attestation Process" (aws-nitro-enclaves-nsm-api,
docs/attestation_process.md): section 2.2 (the document), 3.1 (COSE and CBOR), 3.2.2 (syntactical
validation). Field names are the vendor's.

Procedure of :func:`parse`:

 1. The document is a COSE_Sign1 (``parse-cose``), tagged or not. Its protected header is ``alg``
    alone (``parse-header``), its unprotected header, which nothing signs, is empty
    (``parse-unsigned-bytes``), its payload has 1 to 16,384 bytes (``parse-document``).
 2. The payload is one map in strict CBOR, which may be of indefinite length: newer Nitro systems
    write it so. It has the mandatory fields and no unknown one (``parse-document``).
 3. Every field is of its type and size (``parse-document``): the digest is SHA384, so that a PCR
    has 48 bytes; PCRs are numbered 0 to 31; certificates have 1 to 1,024 bytes; public_key has 1
    to 1,024, user_data and nonce up to 512. The optional fields are null where they are not
    given: section 3.2.2.1 says that they are left out, all Nitro systems write null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import cbor, cose
from casemate.attest.kind import Files
from casemate.attest.verdict import refusal

FILE: Final = "document.cose"
MAX_PAYLOAD: Final = 16384
MAX_CABUNDLE: Final = 8  # AWS has four
DIGEST: Final = "SHA384"
PCR_BYTES: Final = 48
_PCRS: Final = range(32)
_CERTIFICATE_BYTES: Final = range(1, 1025)
# AWS says no more than that it is not empty; verdicts show it before anything is verified.
_MODULE_ID: Final = re.compile(r"[!-~]{1,255}")
_MANDATORY: Final = {"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"}
_OPTIONAL: Final = {
    "public_key": range(1, 1025), "user_data": range(513), "nonce": range(513),
}  # fmt: skip
# How the file starts, after the tag if there is one: an array of four, then {alg: ES384}.
_START: Final = b"\x84\x44\xa1\x01\x38\x22"


@dataclass(frozen=True, kw_only=True)
class Document:
    """An attestation document. ``message``: the COSE_Sign1 around it. ``timestamp``: milliseconds
    since 1970. ``cabundle``: root first; certificates are DER."""

    message: cose.Sign1
    module_id: str
    digest: str
    timestamp: int
    pcrs: Mapping[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None


def find(files: Files) -> str:
    """The name of the file that holds a document: ``document.cose``, or the only one that starts as
    a document does; "" where there is none."""
    if FILE in files:
        return FILE
    found = [name for name, data in files.items() if data.removeprefix(b"\xd2").startswith(_START)]
    return found[0] if len(found) == 1 else ""


def _bytes(value: cbor.Value, sizes: range, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise cbor.CborError(f"{name} is no byte string")
    if len(value) not in sizes:
        raise cbor.CborError(f"{name} has {len(value)} bytes")
    return value


def _optional(fields: Mapping[int | str, cbor.Value], name: str) -> bytes | None:
    value = fields.get(name)
    return None if value is None else _bytes(value, _OPTIONAL[name], name)


def _pcrs(value: cbor.Value) -> dict[int, bytes]:
    if not isinstance(value, dict) or not value:
        raise cbor.CborError("pcrs is no map of registers")
    out: dict[int, bytes] = {}
    for index, register in value.items():
        if not isinstance(index, int) or index not in _PCRS:
            raise cbor.CborError(f"there is no PCR {str(index)[:40]!r}")
        out[index] = _bytes(register, range(PCR_BYTES, PCR_BYTES + 1), f"PCR{index}")
    return out


def _document(message: cose.Sign1) -> Document:
    if not 1 <= len(message.payload) <= MAX_PAYLOAD:
        raise cbor.CborError(f"the payload has {len(message.payload)} bytes")
    fields = cbor.decode(message.payload, indefinite=True)
    if not isinstance(fields, dict):
        raise cbor.CborError("the payload is no map")
    for name in sorted(_MANDATORY - set(fields)):
        raise cbor.CborError(f"{name} is missing")
    for unknown in set(fields) - _MANDATORY - set(_OPTIONAL):
        raise cbor.CborError(f"{str(unknown)[:40]!r} is no field of it")
    module_id, digest, timestamp = fields["module_id"], fields["digest"], fields["timestamp"]
    cabundle = fields["cabundle"]
    if not isinstance(module_id, str) or not _MODULE_ID.fullmatch(module_id):
        raise cbor.CborError("module_id is no name")
    if digest != DIGEST:
        raise cbor.CborError(f"digest is not {DIGEST}")
    if not isinstance(timestamp, int) or isinstance(timestamp, bool) or timestamp < 1:
        raise cbor.CborError("timestamp is no time")
    if not isinstance(cabundle, tuple) or not 1 <= len(cabundle) <= MAX_CABUNDLE:
        raise cbor.CborError(f"cabundle is no list of 1 to {MAX_CABUNDLE} certificates")
    return Document(
        message=message,
        module_id=module_id,
        digest=DIGEST,
        timestamp=timestamp,
        pcrs=_pcrs(fields["pcrs"]),
        certificate=_bytes(fields["certificate"], _CERTIFICATE_BYTES, "certificate"),
        cabundle=tuple(_bytes(one, _CERTIFICATE_BYTES, "cabundle") for one in cabundle),
        public_key=_optional(fields, "public_key"),
        user_data=_optional(fields, "user_data"),
        nonce=_optional(fields, "nonce"),
    )


def parse(data: bytes, where: str = FILE) -> Document:
    """Follow the procedure above."""
    message = cose.parse(data, where)
    if set(message.protected) != {cose.ALG}:
        raise refusal("parse-header", f"The protected header of {where} is not alg alone.", where)
    if message.unprotected:
        raise refusal(
            "parse-unsigned-bytes", f"{where} has a header that nothing signs.", where
        )  # fmt: skip
    try:
        return _document(message)
    except cbor.CborError as e:
        raise refusal(
            "parse-document", f"{where} is no attestation document: {e}.", where
        ) from None

"""AWS Nitro Enclaves as a kind of evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from casemate.attest.kind import Claims, Files, Kind, whole
from casemate.attest.nitro import abi, collateral, verify
from casemate.attest.nitro.appraise import appraise, instance, is_debug
from casemate.attest.nitro.policy import DEFAULT, NitroPolicy
from casemate.attest.verdict import Checks
from casemate.spec.canonical import Json

PRODUCT: Final = "AWS Nitro Enclaves"


def _hex(data: bytes | None) -> str | None:
    return None if data is None else data.hex()


def _shown(document: abi.Document) -> dict[str, Json]:
    return {
        "module_id": document.module_id,
        "timestamp": document.timestamp,
        "digest": document.digest,
        "pcrs": {str(index): value.hex() for index, value in sorted(document.pcrs.items())},
        "public_key": _hex(document.public_key),
        "user_data": _hex(document.user_data),
        "nonce": _hex(document.nonce),
    }


def _fresh(document: abi.Document) -> tuple[bytes, ...]:
    user_data = document.user_data or b""
    found = (document.nonce or b"", user_data, user_data.rstrip(b"\0"))
    return tuple(dict.fromkeys(value for value in found if value))


def check(files: Files, policy: NitroPolicy, now: float, checks: Checks) -> Claims:
    """Parse, verify and appraise, in the order of the modules' procedures."""
    file = abi.find(files)
    with checks.step("parse") as step:
        document = abi.parse(files.get(file, b""), file or abi.FILE)
        chain = collateral.parse(document, files, file)
        form = "tagged" if document.message.tagged else "untagged"
        step.detail = f"{document.module_id}, {form} COSE_Sign1"
    verify.verify(document, chain, policy.roots, checks)
    checks.crypto = "valid"
    verify.current(chain, policy.crl, now=now, checks=checks)
    appraise(document, policy, now=now, checks=checks)
    return Claims(
        bound=document.user_data or b"",
        fresh=_fresh(document),
        product=PRODUCT,
        root=chain.root.fingerprint,
        measurement=document.pcrs.get(0, b"").hex(),
        chip_id="",
        tcb={},
        other={**_shown(document), "instance": instance(document), "debug": is_debug(document)},
    )


def fields(files: Files) -> Mapping[str, Json]:
    """The document field by field, with its certificates."""
    file = abi.find(files)
    document = abi.parse(files.get(file, b""), file or abi.FILE)
    return {
        **_shown(document),
        "certificate": document.certificate.hex(),
        "cabundle": [one.hex() for one in document.cabundle],
        "alg": document.message.algorithm,
        "signature": document.message.signature.hex(),
    }


KIND: Final = Kind(
    tee="nitro",
    recognises=lambda files: bool(abi.find(files)),
    check=check,
    policy=NitroPolicy,
    default=lambda: DEFAULT,
    field="user_data, all 64 bytes",
    of=whole,
    fields=fields,
    instances=("module_ids", "instances"),
    vendor="AWS",
)

"""Files beside a report that one of its signed fields names by hash, as container groups on Azure
carry them (Microsoft, "Confidential containers on Azure Container Instances").

 1. ``container-policy``: ``cce_policy.rego``, the policy that the container group runs under:
    HOST_DATA is its SHA-256. It may be in base64, as Azure passes it.
 2. ``public-key``: ``public_key.pem``, the key that the group shows: REPORT_DATA begins with the
    SHA-256, or is the SHA-512, of its text or of its DER.
 3. ``other-files``: what nothing here reads is listed as unchecked.

A file that is not what the field names is refused with ``evidence.endorsement-*``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Final

from casemate.attest.snp import collateral, uvm
from casemate.attest.snp.abi import Report
from casemate.attest.verdict import Checks, refusal

REPORT: Final = "report.bin"
POLICY: Final = "cce_policy.rego"
PUBLIC_KEY: Final = "public_key.pem"
READ: Final = frozenset({
    REPORT, POLICY, PUBLIC_KEY, uvm.FILE, "vcek.der", "vlek.der", "ask.pem", "asvk.pem", "ark.pem",
    *collateral.LISTS,
})  # fmt: skip
_PEM: Final = re.compile(
    rb"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*"
)
_MEND: Final = "Ask the operator for the files that belong to this report."


def _decoded(data: bytes) -> Iterator[bytes]:
    """``data``, and what it is base64 of."""
    yield data
    try:
        yield base64.b64decode(data.strip(), validate=True)
    except (binascii.Error, ValueError):
        return


def _key(text: bytes) -> Iterator[bytes]:
    yield text
    found = _PEM.fullmatch(text)
    if found:
        yield from list(_decoded(re.sub(rb"\s", b"", found[1])))[1:]


def verify(report: Report, files: Mapping[str, bytes], checks: Checks) -> None:
    """Follow the procedure above."""
    if POLICY in files:
        with checks.step("container-policy") as step:
            digests = {hashlib.sha256(data).digest() for data in _decoded(files[POLICY])}
            if report.host_data not in digests:
                raise refusal(
                    "endorsement-host-data", f"HOST_DATA is not the SHA-256 of {POLICY}.",
                    POLICY, _MEND,
                )  # fmt: skip
            step.detail = f"HOST_DATA is its SHA-256, {report.host_data.hex()}"
    if PUBLIC_KEY in files:
        with checks.step("public-key") as step:
            found = report.report_data
            keys = list(_key(files[PUBLIC_KEY]))
            short = found[:32] in {hashlib.sha256(key).digest() for key in keys}
            if not short and found not in {hashlib.sha512(key).digest() for key in keys}:
                raise refusal(
                    "endorsement-public-key", f"REPORT_DATA holds no hash of {PUBLIC_KEY}.",
                    PUBLIC_KEY, _MEND,
                )  # fmt: skip
            step.detail = "REPORT_DATA holds its hash"
    others = sorted(set(files) - READ)
    if others:
        with checks.step("other-files") as step:
            step.unchecked("not read: " + ", ".join(name[:40] for name in others[:16]))

"""The certificates that a host hands to a SEV-SNP guest beside its report.

Source: AMD, "SEV-ES Guest-Hypervisor Communication Block Standardization", publication 56421,
revision 2.03, section 4.1.8.1: a table of entries (GUID of 16 bytes in the order in which it is
written, offset and length as 32-bit little endian), ended by an entry of zeros; offsets count from
the table's begin. GUIDs: AMD publication 57230, section on the certificate table.

The host may write what it likes here: nothing is trusted, the client's verifier decides.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Final

from casemate.attest.snp import abi, collateral
from casemate.spec.errors import EvidenceError
from casemate.tee import errors

_ENTRY: Final = struct.Struct("<16sII")
MAX_ENTRIES: Final = 64
_GUIDS: Final = {
    bytes.fromhex(guid.replace("-", "")): name
    for guid, name in {
        "63da758d-e664-4564-adc5-f4b93be8accd": "vcek",
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1": "vlek",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782": "ask",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae": "ark",
        "92f81bc3-5811-4d3d-97ff-d19f88dc67ea": "crl",
    }.items()
}
_BEGIN: Final = b"-----BEGIN "


def _bad(reason: str) -> Exception:
    return errors.device(
        "auxblob",
        f"The host's certificate table is malformed: {reason}.",
        "Have the host's operator set it again (extended report of the GHCB), or leave it empty and"
        " run `casemate enclave collateral`.",
    )


def parse(auxblob: bytes) -> dict[str, bytes]:
    """Name (vcek, vlek, ask, ark, crl) to what stands there; other GUIDs are left out.

    An empty blob is an empty table. Raises ``usage.tee-device``.
    """
    out: dict[str, bytes] = {}
    if not auxblob.strip(b"\0"):
        return out
    for n in range(MAX_ENTRIES):
        if len(auxblob) < (n + 1) * _ENTRY.size:
            raise _bad("it has no end")
        guid, offset, length = _ENTRY.unpack_from(auxblob, n * _ENTRY.size)
        if not any(guid):
            return out
        if offset + length > len(auxblob) or offset < (n + 1) * _ENTRY.size:
            raise _bad("an entry lies outside")
        name = _GUIDS.get(guid)
        if name is not None and length:
            if name in out:
                raise _bad(f"two entries are the {name}")
            out[name] = auxblob[offset : offset + length]
    raise _bad(f"it has more than {MAX_ENTRIES} entries")


def der(data: bytes) -> bytes:
    """A certificate that stands as DER or, with some hosts, as PEM."""
    if not data.startswith(_BEGIN):
        return data
    try:
        body = data.split(b"-----")[2]
        return base64.b64decode(b"".join(body.split()), validate=True)
    except (IndexError, binascii.Error):
        raise _bad("a certificate is no PEM") from None


def pem(data: bytes) -> bytes:
    """DER as PEM in lines of 64."""
    text = base64.b64encode(data)
    lines = b"\n".join(text[i : i + 64] for i in range(0, len(text), 64))
    return b"-----BEGIN CERTIFICATE-----\n" + lines + b"\n-----END CERTIFICATE-----\n"


def files(auxblob: bytes) -> dict[str, bytes]:
    """The table as files of a folder of evidence: a VLEK's intermediate is the ASVK, which stands
    under the ASK's GUID; where both leaves stand there, the one that signs is not known here and
    both are given, for :func:`fitting`."""
    table = parse(auxblob)
    intermediate = "asvk.pem" if "vlek" in table and "vcek" not in table else "ask.pem"
    out = {f"{leaf}.der": der(table[leaf]) for leaf in ("vcek", "vlek") if leaf in table}
    for name, file in (("ask", intermediate), ("ark", "ark.pem")):
        if name in table:
            out[file] = pem(der(table[name]))
    if "crl" in table:
        out["crl.der"] = table["crl"]
    return out


# SIGNING_KEY of the report to the files that endorse the other kind of key.
_OTHER: Final = {"VCEK": ("vlek.der", "asvk.pem"), "VLEK": ("vcek.der", "ask.pem")}


def fitting(found: dict[str, bytes], signing_key: str) -> dict[str, bytes]:
    """The files without those of the other kind of key."""
    return {name: data for name, data in found.items() if name not in _OTHER[signing_key]}


def current(found: dict[str, bytes], report: abi.Report) -> dict[str, bytes]:
    """The host's files for this report: of its kind of key, and without a VCEK that is of another
    TCB, as hosts hand out for a while after a firmware update: one that was fetched since stands
    in for it."""
    fits = fitting(found, report.signing_key)
    try:
        chain = collateral.parse(fits)
    except EvidenceError:
        return fits  # incomplete, or malformed: the client's verifier says what is wrong
    if chain.kind == "VCEK" and chain.tcb != report.reported_tcb:
        del fits["vcek.der"]
    return fits

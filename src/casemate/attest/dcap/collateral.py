"""Collateral of a DCAP quote as it lies beside it: found, taken apart, and nothing believed yet.

Source: Intel, "SGX ECDSA QuoteLibReference DCAP API" section 3.3 (``sgx_ql_qve_collateral_t``,
version 3.1) and "PCS API" version 4 (responses, issuer chains in headers).

Layouts:

 - ``collateral.json``: an object with the members of :data:`MEMBERS` as strings: PEM chains, the
   JSON documents exactly as signed, lists and signatures in hex of one case (lists also in PEM).
   ``pck_certificate_chain`` stands there for a quote that does not hold its own.
 - single files: ``tcb_info.json`` and ``qe_identity.json`` (PCS responses, signature included),
   ``tcb_signing_chain.pem`` for both, ``pck_crl_issuer_chain.pem``, ``pck_certificate_chain.pem``,
   and ``pck_crl``, ``root_ca_crl`` with the ending ``.der``, ``.crl`` or ``.pem``.

Procedure:

 1. ``collateral.json`` where it stands, else the single files.
 2. Members that are absent, null or empty are missing; a document counts with its signature and its
    issuer chain. Members of other names are told, and not read.
 3. Lists and certificates are parsed strictly; documents only once they are verified.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import crl, x509
from casemate.attest.dcap import pck
from casemate.attest.dcap.abi import P256_ORDER, Signature
from casemate.attest.dcap.documents import MAX_BYTES
from casemate.attest.jws import strict_object
from casemate.attest.kind import Files
from casemate.attest.verdict import Refused, refusal

FILE: Final = "collateral.json"
MEMBERS: Final = (
    "pck_crl_issuer_chain", "root_ca_crl", "pck_crl", "tcb_info_issuer_chain", "tcb_info",
    "tcb_info_signature", "qe_identity_issuer_chain", "qe_identity", "qe_identity_signature",
    "pck_certificate_chain",
)  # fmt: skip
_MAX_FILE: Final = 4 << 20
_RESPONSE: Final = re.compile(
    rb'\{"(?:tcbInfo|enclaveIdentity)":(\{.*\}),"signature":"([0-9a-f]{128}|[0-9A-F]{128})"\}\s*',
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A document, not verified. ``chain``: its signer's certificates, leaf first."""

    text: bytes
    signature: Signature
    chain: tuple[x509.Certificate, ...]


@dataclass(frozen=True, kw_only=True)
class Collateral:
    """``None`` where a part is missing. ``unread``: names of members that say nothing here."""

    tcb_info: Signed | None
    qe_identity: Signed | None
    pck_crl: crl.RevocationList | None
    root_ca_crl: crl.RevocationList | None
    pck_crl_issuer_chain: tuple[x509.Certificate, ...] | None
    pck_certificate_chain: tuple[x509.Certificate, ...] | None
    unread: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Of the parts without which nothing can be said about a platform's TCB."""
        names = ("tcb_info", "qe_identity", "pck_crl", "pck_crl_issuer_chain", "root_ca_crl")
        return tuple(name for name in names if getattr(self, name) is None)


def _bad(where: str, problem: str) -> Refused:
    return refusal("parse-collateral", f"{where} {problem}.", where)


def _hex(text: bytes, where: str) -> bytes:
    if text not in (text.lower(), text.upper()) or not re.fullmatch(rb"(?:[0-9A-Fa-f]{2})+", text):
        raise _bad(where, "is no hex of one case")
    return bytes.fromhex(text.decode())


def _signature(text: bytes, where: str) -> Signature:
    raw = _hex(text, where)
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    if len(raw) != 64 or not (0 < r < P256_ORDER and 0 < s < P256_ORDER):
        raise _bad(where, "is no signature of P-256")
    return r, s


def _list(data: bytes, where: str) -> crl.RevocationList:
    if data[:1] != b"\x30" and not data.startswith(b"-----BEGIN"):
        data = _hex(data, where)
    return crl.parse(data, where)


def _signed(members: Mapping[str, bytes], name: str) -> Signed | None:
    parts = [name, f"{name}_signature", f"{name}_issuer_chain"]
    if not all(part in members for part in parts):
        return None
    text, signature, chain = (members[part] for part in parts)
    if len(text) > MAX_BYTES:
        raise _bad(name, f"has {len(text)} bytes")
    return Signed(
        text=text, signature=_signature(signature, parts[1]), chain=pck.chain(chain, parts[2])
    )


def _members(data: bytes) -> dict[str, bytes]:
    """The members of ``collateral.json`` that are there, those of other names included."""
    out: dict[str, bytes] = {}
    for name, value in strict_object(data, FILE, _MAX_FILE).items():
        if name in MEMBERS and value is not None and not isinstance(value, str):
            raise _bad(f"{name} of {FILE}", "is no string")
        if isinstance(value, str) and value:
            out[name] = value.encode()
        elif name not in MEMBERS:
            out[name] = b""
    return out


def _files(files: Files) -> dict[str, bytes]:
    """The same from single files."""
    out: dict[str, bytes] = {}
    for name in ("tcb_info", "qe_identity"):
        data = files.get(f"{name}.json")
        if data is None:
            continue
        found = _RESPONSE.fullmatch(data) if len(data) <= MAX_BYTES else None
        if not found:
            raise _bad(f"{name}.json", "is no response of Intel's service")
        out |= {name: found[1], f"{name}_signature": found[2]}
        if "tcb_signing_chain.pem" in files:
            out[f"{name}_issuer_chain"] = files["tcb_signing_chain.pem"]
    for name in ("pck_crl_issuer_chain", "pck_certificate_chain"):
        if f"{name}.pem" in files:
            out[name] = files[f"{name}.pem"]
    for name in ("pck_crl", "root_ca_crl"):
        stored = [f"{name}.{end}" for end in ("der", "crl", "pem") if f"{name}.{end}" in files]
        if len(stored) > 1:
            raise _bad(name, "lies there twice")
        if stored:
            out[name] = files[stored[0]]
    return out


def parse(files: Files) -> Collateral:
    """Follow the procedure above. Raises ``evidence.parse-json``, ``parse-collateral``,
    ``parse-certificate`` and ``parse-crl``; parts that are missing are left to ``verify``."""
    members = _members(files[FILE]) if FILE in files else _files(files)

    def chain(name: str) -> tuple[x509.Certificate, ...] | None:
        return pck.chain(members[name], name) if name in members else None

    def revoked(name: str) -> crl.RevocationList | None:
        return _list(members[name], name) if name in members else None

    return Collateral(
        tcb_info=_signed(members, "tcb_info"),
        qe_identity=_signed(members, "qe_identity"),
        pck_crl=revoked("pck_crl"),
        root_ca_crl=revoked("root_ca_crl"),
        pck_crl_issuer_chain=chain("pck_crl_issuer_chain"),
        pck_certificate_chain=chain("pck_certificate_chain"),
        unread=tuple(sorted(set(members) - set(MEMBERS))),
    )

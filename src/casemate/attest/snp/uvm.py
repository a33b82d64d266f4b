"""Microsoft's endorsement of the utility VM that Azure runs container groups in.

Source: the format that Azure's container instances carry as ``reference-info-base64`` (Microsoft,
"Confidential containers on Azure Container Instances, attestation"): COSE_Sign1 (RFC 9052) with the
certificates in its protected header (x5chain, RFC 9360), and an issuer in the form of the did:x509
method, version 0 (Microsoft, "did:x509 Method Specification": ca-fingerprint, eku). Two forms:

- ``iss`` and ``feed`` in the protected header, a payload in JSON with
  ``x-ms-sevsnpvm-launchmeasurement`` and ``x-ms-sevsnpvm-guestsvn``;
- CWT claims (RFC 8392, RFC 9597) ``iss``, ``sub`` (the feed) and ``svn`` in the protected header, a
  payload of the 48 bytes of the measurement.

Procedure. :func:`parse`: COSE, certificates, issuer, feed, measurement, SVN (``parse-*``).
:func:`verify`:

 1. ``uvm-chain``: each certificate is issued by the next, the last by itself; where the root was
    left out, casemate's own stands for it. The leaf may sign.
 2. ``uvm-issuer``: an issuer that the policy admits; its fingerprint is that of one of the chain's
    authorities, and the leaf has its extended key usage.
 3. ``uvm-signature``: the leaf's key signed the message (RSASSA-PSS or ECDSA). The unprotected
    header, which nothing signs, is listed and not looked at.
 4. ``uvm-measurement``: the payload's measurement is the report's.

:func:`standing`: ``uvm-validity``: the certificates were valid when the message says that it was
signed, and at ``now`` where the policy asks for it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from casemate.attest import cbor, cose, der, roots, x509
from casemate.attest.verdict import Checks, Refused, Unchecked, moment, refusal

FILE: Final = "uvm_endorsements.cose"
MAX_BYTES: Final = 64 << 10
ADMITTED: Final = (-38, -37, -39, -35, -7, -36)  # PS384 and others of PSS, ECDSA

_CWT: Final = 15  # RFC 9597
_CWT_ISS, _CWT_SUB, _CWT_IAT = 1, 2, 6  # RFC 8392 section 3.1
_HASH_ENVELOPE: Final = 258  # payload-hash-alg (RFC 9995): the measurement is a SHA-384
_SHA384: Final = -43  # RFC 9054
_EPOCH: Final = 1  # the tag of a time (RFC 8949 section 3.4.2)
_DIGITAL_SIGNATURE: Final = 0x80
_MEASUREMENT_BYTES: Final = 48
_DID: Final = re.compile(r"did:x509:0:sha256:([A-Za-z0-9_-]{43})::eku:([0-9]+(?:\.[0-9]+){1,30})")
_MEND: Final = "Ask the operator for the endorsement that Azure gives with this container group."


@dataclass(frozen=True, kw_only=True)
class Endorsement:
    """fingerprint: SHA-256 of the authority's certificate, eku: the leaf's usage, both as
    ``issuer`` spells them. signed_at: Unix seconds, None where the message does not say. unsigned:
    labels of the unprotected header."""

    message: cose.Sign1
    chain: tuple[x509.Certificate, ...]
    issuer: str
    fingerprint: bytes
    eku: str
    feed: str
    svn: int
    measurement: bytes
    signed_at: float | None
    unsigned: tuple[str, ...]


def _refuse(reason: str, message: str) -> Refused:
    return refusal(f"parse-{reason}", f"{FILE}: {message}.", FILE, _MEND)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _svn(found: object) -> int:
    if isinstance(found, str) and re.fullmatch(r"[0-9]{1,9}", found):
        return int(found)
    if type(found) is int and 0 <= found < 1 << 32:
        return found
    raise _refuse("uvm-payload", "its SVN is no number")


def _text(found: object, what: str) -> str:
    if not isinstance(found, str) or not 1 <= len(found) <= 512:
        raise _refuse("uvm-header", f"its protected header has no {what}")
    return found


def _json(payload: bytes) -> tuple[bytes, int]:
    try:
        found = json.loads(
            payload.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant
        )
        if not isinstance(found, dict):
            raise ValueError("no object")
        measured = found["x-ms-sevsnpvm-launchmeasurement"]
        if not isinstance(measured, str) or not re.fullmatch(r"[0-9a-f]{96}", measured):
            raise ValueError("no measurement")
        return bytes.fromhex(measured), _svn(found["x-ms-sevsnpvm-guestsvn"])
    except (ValueError, KeyError, RecursionError):
        raise _refuse("uvm-payload", "its payload is not that of a launch measurement") from None


def _time(found: object) -> float | None:
    if isinstance(found, cbor.Tag) and found.number == _EPOCH:
        found = found.value
    return float(found) if type(found) is int and 0 <= found < 1 << 40 else None


def _did(issuer: str) -> tuple[bytes, str]:
    parts = _DID.fullmatch(issuer)
    if not parts:
        raise _refuse("uvm-issuer", "its issuer is no did:x509 of a fingerprint and a key usage")
    fingerprint = base64.urlsafe_b64decode(parts[1] + "=")
    if base64.urlsafe_b64encode(fingerprint).rstrip(b"=") != parts[1].encode():
        raise _refuse("uvm-issuer", "its issuer's fingerprint is not canonical base64url")
    return fingerprint, parts[2]


def parse(data: bytes) -> Endorsement:
    """The endorsement in ``data``. Raises ``evidence.parse-*``."""
    if len(data) > MAX_BYTES:
        raise _refuse("cose", f"it has {len(data)} bytes")
    message = cose.parse(data, FILE)
    header = message.protected
    claims = header.get(_CWT)
    if isinstance(claims, dict):
        issuer, feed = _text(claims.get(_CWT_ISS), "issuer"), _text(claims.get(_CWT_SUB), "feed")
        svn, signed_at = _svn(claims.get("svn")), _time(claims.get(_CWT_IAT))
        measurement = message.payload
        if len(measurement) != _MEASUREMENT_BYTES or header.get(_HASH_ENVELOPE, _SHA384) != _SHA384:
            raise _refuse("uvm-payload", "its payload is not that of a launch measurement")
    else:
        issuer, feed = _text(header.get("iss"), "issuer"), _text(header.get("feed"), "feed")
        signed_at = _time(header.get("signingtime"))
        if header.get(cose.CONTENT_TYPE) != "application/json":
            raise _refuse("uvm-payload", "its payload is not said to be JSON")
        measurement, svn = _json(message.payload)
    fingerprint, eku = _did(issuer)
    return Endorsement(
        message=message, chain=cose.certificates(message, FILE), issuer=issuer,
        fingerprint=fingerprint, eku=eku, feed=feed, svn=svn, measurement=measurement,
        signed_at=signed_at, unsigned=tuple(str(label)[:40] for label in message.unprotected),
    )  # fmt: skip


def read(files: Mapping[str, bytes]) -> Endorsement | None:
    """The endorsement in an evidence's files, None where there is none."""
    return parse(files[FILE]) if FILE in files else None


def _path(found: Endorsement) -> tuple[tuple[x509.Certificate, str], ...]:
    chain = found.chain
    if chain[-1].issuer != chain[-1].subject and chain[-1].issuer == roots.uvm().subject:
        chain = (*chain, roots.uvm())
    return tuple((one, f"{FILE} x5chain[{n}]") for n, one in enumerate(chain))


def _usages(leaf: x509.Certificate) -> list[str]:
    out = []
    try:
        reader = der.Reader(der.only(leaf.extensions[x509.EXTENDED_KEY_USAGE].value, der.SEQUENCE))
        while reader:
            out.append(der.oid(reader.read(der.OID)))
    except (KeyError, der.DerError):
        return []
    return out


def verify(
    found: Endorsement,
    measurement: bytes | None,
    issuers: tuple[str, ...] | Unchecked,
    checks: Checks,
) -> None:
    """Steps 1 to 4. measurement: MEASUREMENT of the report, None without one. issuers: those that
    are admitted; Unchecked takes any, and the verdict says so."""
    path = _path(found)
    with checks.step("uvm-chain") as step:
        x509.check_chain(path)
        if not x509.key_usage(found.chain[0]) & _DIGITAL_SIGNATURE:
            raise refusal("chain-authority", f"{path[0][1]} may not sign messages.", FILE, _MEND)
        step.detail = ", ".join(one.name() or "?" for one, _ in path)
    with checks.step("uvm-issuer") as step:
        authorities = {hashlib.sha256(one.raw).digest() for one, _ in path[1:]}
        if found.fingerprint not in authorities or found.eku not in _usages(found.chain[0]):
            raise refusal(
                "endorsement-uvm-issuer",
                "The endorsement's certificates are not those of the issuer that it names.",
                FILE,
                _MEND,
            )
        if isinstance(issuers, Unchecked):
            step.unchecked(f"{issuers.reason} ({found.issuer})")
        elif found.issuer not in issuers:
            raise refusal(
                "root-uvm-issuer",
                f"The utility VM is endorsed by {found.issuer}, whom the policy does not admit.",
                FILE,
                _MEND,
            )
        else:
            step.detail = found.issuer
    with checks.step("uvm-signature") as step:
        key = x509.public_key(found.chain[0], path[0][1])
        name = cose.verify(found.message, key, FILE, ADMITTED, code="signature-uvm")
        unsigned = ", ".join(found.unsigned) or "nothing"
        step.detail = f"{name}; not signed and not looked at: {unsigned}"
    with checks.step("uvm-measurement") as step:
        if measurement is None:
            step.unchecked("there is no report")
        elif found.measurement != measurement:
            raise refusal(
                "endorsement-uvm-measurement",
                "The endorsement is for another utility VM than the report's.",
                FILE,
                _MEND,
            )
        else:
            step.detail = f"{found.feed}, SVN {found.svn}"


def standing(found: Endorsement, demanded: bool | Unchecked, checks: Checks, *, now: float) -> None:
    """``uvm-validity``: see the procedure. demanded: whether ``now`` (Unix seconds) counts."""
    path = _path(found)
    with checks.step("uvm-validity") as step:
        times = [] if found.signed_at is None else [found.signed_at]
        times += [now] if demanded is True else []
        for at in times:
            for certificate, where in path:
                x509.check_validity(certificate, where, at)
        if demanded is True:
            step.detail = f"at {moment(now)}"
        elif isinstance(demanded, Unchecked):
            step.unchecked(demanded.reason)
        else:
            step.unchecked("the policy does not ask for it")

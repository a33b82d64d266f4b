"""Answers of an OCSP responder (RFC 6960 section 4.2), as they may come with evidence.

The responder is the certificate's issuer, or one to whom that issuer gave the right by a
certificate of its own with the purpose OCSPSigning (section 4.2.2.2). An answer has a time until
which it holds (nextUpdate); whether it is current is a check against the time passed in. The
responder's nonce is for who asked it, so it is not looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from casemate.attest import der, x509
from casemate.attest.verdict import refusal

MAX_BYTES: Final = 64 << 10
MAX_ANSWERS: Final = 64
ENUMERATED: Final = 0x0A
_BASIC: Final = "1.3.6.1.5.5.7.48.1.1"
_OCSP_SIGNING: Final = "1.3.6.1.5.5.7.3.9"
_HASHES: Final = {
    "1.3.14.3.2.26": "sha1",
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
}
REASONS: Final = {
    0: "unspecified", 1: "keyCompromise", 2: "cACompromise", 3: "affiliationChanged",
    4: "superseded", 5: "cessationOfOperation", 6: "certificateHold", 8: "removeFromCRL",
    9: "privilegeWithdrawn", 10: "aACompromise",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """SingleResponse. status: ``good``, ``unknown``, or the reason for which it was revoked. Times
    are Unix seconds."""

    algorithm: str
    name_hash: bytes
    key_hash: bytes
    serial: int
    status: str
    this_update: float
    next_update: float


@dataclass(frozen=True, kw_only=True)
class Response:
    """BasicOCSPResponse. responder: (tag, content) of ResponderID."""

    tbs: bytes
    responder: tuple[int, bytes]
    answers: tuple[Answer, ...]
    signature_algorithm: str
    signature: bytes
    certificates: tuple[x509.Certificate, ...]


def _time(reader: der.Reader) -> float:
    return der.time(der.GENERALIZED_TIME, reader.read(der.GENERALIZED_TIME))


def _uncritical(reader: der.Reader, tag: int) -> None:
    if reader.peek() == tag:
        found = x509.extensions(reader.enter(tag).enter())
        if any(extension.critical for extension in found.values()):
            raise der.DerError("a critical extension is unknown")


def _status(tag: int, content: bytes) -> str:
    if tag in (der.context(0, constructed=False), der.context(2, constructed=False)):
        if content:
            raise der.DerError("a status with content")
        return "good" if tag & 0x1F == 0 else "unknown"
    if tag != der.context(1):
        raise der.DerError("a status of no known kind")
    reader = der.Reader(content)
    _time(reader)
    reason = 0
    if reader:
        wrapped = reader.enter(der.context(0))
        reason = der.integer(wrapped.read(ENUMERATED))
        wrapped.end()
    reader.end()
    return REASONS.get(reason, f"reason {reason}")


def _answer(reader: der.Reader) -> Answer:
    certificate = reader.enter()
    kind = certificate.enter()
    algorithm = der.oid(kind.read(der.OID))
    if kind and kind.read(der.NULL):
        raise der.DerError("hash parameters that are not NULL")
    kind.end()
    name_hash, key_hash = (certificate.read(der.OCTET_STRING) for _ in range(2))
    serial = der.integer(certificate.read(der.INTEGER))
    certificate.end()
    status = _status(*reader.element()[:2])
    this_update = _time(reader)
    wrapped = reader.enter(der.context(0))  # an answer without an end is none that can be kept
    next_update = _time(wrapped)
    wrapped.end()
    _uncritical(reader, der.context(1))
    reader.end()
    return Answer(
        algorithm=algorithm,
        name_hash=name_hash,
        key_hash=key_hash,
        serial=serial,
        status=status,
        this_update=this_update,
        next_update=next_update,
    )


def _parse(data: bytes, where: str) -> Response:
    outer = der.Reader(der.only(data, der.SEQUENCE))
    if outer.read(ENUMERATED) != b"\x00":
        raise der.DerError("the responder gave no answer")
    wrapped = outer.enter(der.context(0))
    outer.end()
    pair = wrapped.enter()
    wrapped.end()
    if der.oid(pair.read(der.OID)) != _BASIC:
        raise der.DerError("an answer of an unknown type")
    basic = der.Reader(der.only(pair.read(der.OCTET_STRING), der.SEQUENCE))
    pair.end()
    tbs = basic.raw(der.SEQUENCE)
    algorithm = x509.algorithm(basic.raw(der.SEQUENCE))
    signature = der.bits(basic.read(der.BIT_STRING))
    certificates: list[x509.Certificate] = []
    if basic:
        held = basic.enter(der.context(0)).enter()
        while held and len(certificates) < 4:
            certificates.append(x509.parse(held.raw(der.SEQUENCE), f"a certificate in {where}"))
        held.end()
    basic.end()
    reader = der.Reader(der.only(tbs, der.SEQUENCE))
    tag, content, _ = reader.element()
    if tag not in (der.context(1), der.context(2)):
        raise der.DerError("a responder of no known kind")
    _time(reader)
    answers: list[Answer] = []
    entries = reader.enter()
    while entries and len(answers) < MAX_ANSWERS:
        answers.append(_answer(entries.enter()))
    entries.end()
    _uncritical(reader, der.context(1))
    reader.end()
    return Response(
        tbs=tbs,
        responder=(tag, content),
        answers=tuple(answers),
        signature_algorithm=algorithm,
        signature=signature,
        certificates=tuple(certificates),
    )


def parse(data: bytes, where: str) -> Response:
    """A response in DER. Raises ``evidence.parse-ocsp``; ``where`` names it in errors."""
    try:
        if len(data) > MAX_BYTES:
            raise der.DerError(f"it has {len(data)} bytes")
        return _parse(data, where)
    except der.DerError as e:
        raise refusal("parse-ocsp", f"{where} is no OCSP response: {e}.", where) from None


def _key(certificate: x509.Certificate) -> bytes:
    """The subjectPublicKey's bits."""
    reader = der.Reader(der.only(certificate.spki, der.SEQUENCE))
    reader.raw(der.SEQUENCE)
    return der.bits(reader.read(der.BIT_STRING))


def find(
    response: Response, certificate: x509.Certificate, issuer: x509.Certificate
) -> Answer | None:
    """The answer about ``certificate``, which ``issuer`` issued, if there is one."""
    for answer in response.answers:
        name = _HASHES.get(answer.algorithm)
        if (
            name is not None
            and answer.serial == certificate.serial
            and answer.name_hash == hashlib.new(name, certificate.issuer).digest()
            and answer.key_hash == hashlib.new(name, _key(issuer)).digest()
        ):
            return answer
    return None


def _is(responder: tuple[int, bytes], certificate: x509.Certificate) -> bool:
    tag, content = responder
    if tag == der.context(1):
        return content == certificate.subject
    key_hash = hashlib.sha1(_key(certificate), usedforsecurity=False).digest()
    return der.only(content, der.OCTET_STRING) == key_hash


def _may_answer(certificate: x509.Certificate) -> bool:
    extension = certificate.extensions.get(x509.EXTENDED_KEY_USAGE)
    if extension is None:
        return False
    reader, found = der.Reader(der.only(extension.value, der.SEQUENCE)), []
    while reader:
        found.append(der.oid(reader.read(der.OID)))
    return _OCSP_SIGNING in found


def check(
    response: Response, answer: Answer, issuer: x509.Certificate, where: str, now: float,
    admitted: Collection[str],
) -> None:  # fmt: skip
    """EvidenceError unless the issuer, or who it named for that, signed the response, and the
    answer holds at ``now`` (Unix seconds). What it says is for the caller."""
    try:
        signers = [c for c in (issuer, *response.certificates) if _is(response.responder, c)]
        delegated = [c for c in signers if c is not issuer and _may_answer(c)]
    except der.DerError:
        raise refusal("parse-ocsp", f"{where} has a malformed certificate.", where) from None
    signer = issuer if issuer in signers else next(iter(delegated), None)
    if signer is None:
        raise refusal("chain-responder", f"{where} is of no responder of the issuer.", where)
    if signer is not issuer:
        inner = f"the responder's certificate in {where}"
        if signer.issuer != issuer.subject:
            raise refusal("chain-issuer", f"{inner} was issued by another.", where)
        x509.check_signature(
            signer.signature_algorithm, issuer, signer.signature, signer.tbs, inner, admitted
        )
        x509.check_validity(signer, inner, now)
    x509.check_signature(
        response.signature_algorithm, signer, response.signature, response.tbs, where, admitted
    )
    if not answer.this_update <= now <= answer.next_update:
        early = now < answer.this_update
        raise refusal(
            "validity-not-yet" if early else "validity-expired",
            f"{where} {'is not valid yet' if early else 'has expired'}.",
            where,
            "Ask the operator to renew collateral.",
        )

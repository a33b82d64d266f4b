"""Attestation tokens as kinds of evidence, one for each service, for the table of kinds."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from casemate.attest import jws
from casemate.attest.kind import Claims, Files, Kind
from casemate.attest.tokens import abi, appraise, collateral, policy, verify
from casemate.attest.tokens.abi import Device, Google, Ita, Maa, Tokens
from casemate.attest.tokens.verify import Signer
from casemate.attest.verdict import Checks
from casemate.spec.canonical import Json


def _readings(text: str) -> Iterator[bytes]:
    """What a text in a token may stand for: itself, and the bytes whose hex or base64 it is."""
    yield text.encode("utf-8")
    with suppress(ValueError):
        yield bytes.fromhex(text)
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    with suppress(ValueError):
        yield base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _member(value: Any, *path: str) -> str:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


_REPORT_DATA: Final = (
    "x_ms_sevsnpvm_reportdata", "tdx_report_data", "x_ms_sgx_report_data", "sgx_report_data",
    "sevsnp_reportdata",
)  # fmt: skip


def _nonces(tokens: Tokens) -> Iterator[str]:
    claims = tokens.overall.claims
    yield from claims.eat_nonce
    yield _member(claims.claims, "nonce")
    if isinstance(claims, Maa | Ita):
        for tee in (claims, claims.tee):
            yield from (getattr(tee, name) for name in _REPORT_DATA)
            yield from (tee.x_ms_sgx_ehd, tee.attester_held_data, tee.attester_user_data)
            for data in (tee.x_ms_runtime, tee.attester_runtime_data):
                yield _member(data, "client-payload", "nonce")
                yield _member(data, "user-data")
    if isinstance(claims, Ita):
        yield _member(claims.verifier_nonce, "val")


def fresh(tokens: Tokens) -> tuple[bytes, ...]:
    """Every value in the tokens that a challenger's nonce may be: texts as UTF-8 and, where they
    are hex or base64, decoded; report data also without the zeros at its end."""
    found = (data for text in _nonces(tokens) for data in _readings(text))
    out = dict.fromkeys(one for data in found for one in (data, data.rstrip(b"\0")))
    return tuple(data for data in out if data)


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _nonce(tokens: Tokens) -> bytes:
    claims = tokens.overall.claims
    nonce = claims.eat_nonce[0] if claims.eat_nonce else _member(claims.claims, "nonce")
    return nonce.encode("utf-8")


def _held(tokens: Tokens) -> bytes:
    """What the attester had put into its report: Intel's ``attester_held_data`` if it is there."""
    claims = tokens.overall.claims
    assert isinstance(claims, Maa | Ita)
    if claims.tee.attester_held_data:
        return list(_readings(claims.tee.attester_held_data))[-1]
    known = appraise.KINDS.get(claims.kind)
    return _hex(getattr(claims.tee, known.report_data)) if known else b""


def _digest_text(report_data: bytes) -> bytes:
    """A nonce of at most 88 characters (Google's limit; 74 in earlier versions)."""
    return hashlib.sha256(report_data).hexdigest().encode("ascii")


def _product(tokens: Tokens) -> str:
    claims = tokens.overall.claims
    if isinstance(claims, Google):
        return f"Google Confidential Space ({jws.plain(claims.hwmodel) or 'unknown hardware'})"
    if isinstance(claims, Maa):
        return f"Azure Attestation ({jws.plain(claims.kind) or 'unknown TEE'})"
    if isinstance(claims, Ita):
        return f"Intel Trust Authority ({jws.plain(claims.kind) or 'unknown TEE'})"
    models = {t.claims.hwmodel for t in tokens.devices.values() if isinstance(t.claims, Device)}
    if tokens.tee == abi.NRAS:
        said = jws.plain(", ".join(sorted(models)))
        return f"NVIDIA remote attestation service ({said or 'no device'})"
    return f"Token of {jws.plain(claims.iss, 200)}"


def _measurement(tokens: Tokens) -> str:
    claims = tokens.overall.claims
    if isinstance(claims, Google):
        return claims.submods.container.image_digest.removeprefix("sha256:")
    if isinstance(claims, Maa | Ita):
        return appraise.measurement(claims)
    return ""


_SVNS: Final = {
    "bootloader": "x_ms_sevsnpvm_bootloader_svn", "tee": "x_ms_sevsnpvm_tee_svn",
    "snp": "x_ms_sevsnpvm_snpfw_svn", "microcode": "x_ms_sevsnpvm_microcode_svn",
}  # fmt: skip


def _tcb(tokens: Tokens) -> dict[str, int]:
    claims = tokens.overall.claims
    if not isinstance(claims, Maa):
        return {}
    found = {part: getattr(claims.tee, name) for part, name in _SVNS.items()}
    return {part: number for part, number in found.items() if number is not None}


def _token_fields(token: abi.Token) -> dict[str, Json]:
    head = token.jws
    return {
        "header": {
            "alg": head.alg,
            "typ": head.typ,
            "kid": head.kid,
            "x5c": [one.hex() for one in head.x5c],
            "not_acted_upon": list(head.ignored),
        },
        "claims": dict(token.claims.claims),
        "signature": head.signature.hex(),
    }


def _tokens_fields(tokens: Tokens) -> dict[str, Json]:
    out = _token_fields(tokens.overall)
    if tokens.devices:
        out["devices"] = {name: _token_fields(token) for name, token in tokens.devices.items()}
    return out


def _show(tee: str, files: Files) -> Mapping[str, Json]:
    out = _tokens_fields(abi.parse(files, tee))
    found = collateral.parse(files)
    if found.root is not None:
        out["root"] = {"name": found.root.name(), "fingerprint": found.root.fingerprint}
    if found.keys is not None:
        out["keys"] = [{"kid": key.kid, "kty": key.kty, "alg": key.alg} for key in found.keys]
    return out


def _claims(tokens: Tokens, signer: Signer, bound: bytes) -> Claims:
    ids = [t.claims.ueid for t in tokens.devices.values() if isinstance(t.claims, Device)]
    return Claims(
        bound=bound,
        fresh=fresh(tokens),
        product=_product(tokens),
        root=signer.root,
        measurement=_measurement(tokens),
        chip_id=",".join(ids),
        tcb=_tcb(tokens),
        other={
            "issuer": tokens.overall.claims.iss,
            "keys": list(signer.thumbprints),
            "token": dict(tokens.overall.claims.claims),
            "devices": {n: dict(t.claims.claims) for n, t in tokens.devices.items()},
        },
    )


@dataclass(frozen=True)
class _Service:
    """What a service's row needs beside the steps that all share."""

    tee: str
    section: type[policy.TokenPolicy]
    default: policy.TokenPolicy
    field: str
    of: Callable[[bytes], bytes]
    bound: Callable[[Tokens], bytes]
    vendor: str


def _same(report_data: bytes) -> bytes:
    return report_data


_SERVICES: Final = (
    _Service(
        abi.GOOGLE, policy.GooglePolicy, policy.GOOGLE_DEFAULT,
        "eat_nonce (the first), SHA-256 in hex", _digest_text, _nonce, "Google",
    ),
    _Service(
        abi.MAA, policy.MaaPolicy, policy.MAA_DEFAULT, "report data", _same, _held, "Microsoft"
    ),
    _Service(
        abi.ITA, policy.ItaPolicy, policy.ITA_DEFAULT,
        "attester_held_data, else report data", _same, _held, "Intel",
    ),
    _Service(
        abi.NRAS, policy.NrasPolicy, policy.NRAS_DEFAULT, "eat_nonce, SHA-256",
        lambda report_data: hashlib.sha256(report_data).digest(),
        lambda tokens: _hex(_nonce(tokens).decode("utf-8")), "NVIDIA",
    ),
    _Service(
        abi.OTHER, policy.OtherPolicy, policy.OTHER_DEFAULT,
        "eat_nonce (the first) or nonce, SHA-256 in hex", _digest_text, _nonce, "",
    ),
)  # fmt: skip


def _kind(service: _Service) -> Kind:
    tee = service.tee

    def check(files: Files, wanted: Any, now: float, checks: Checks) -> Claims:
        with checks.step("parse") as step:
            tokens = abi.parse(files, tee)
            beside = collateral.parse(files)
            step.detail = (
                f"{len(tokens.all)} token(s) of {jws.plain(tokens.overall.claims.iss, 200)}"
            )
        signer = verify.verify(tokens, beside, wanted.roots, now=now, checks=checks)
        appraise.appraise(tokens, signer, wanted, now=now, checks=checks)
        return _claims(tokens, signer, service.bound(tokens))

    return Kind(
        tee=tee,
        recognises=lambda files: abi.service(files) == tee,
        check=check,
        policy=service.section,
        default=lambda: service.default,
        field=service.field,
        of=service.of,
        fields=lambda files: _show(tee, files),
        instances=("ueids",) if tee == abi.NRAS else (),
        vendor=service.vendor,
        device=tee == abi.NRAS,
    )


KINDS: Final[tuple[Kind, ...]] = tuple(map(_kind, _SERVICES))

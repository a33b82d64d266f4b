"""Attestation tokens made here, with keys and authorities of our own: for services whose keys the
captured evidence does not have, and for forgeries."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID

from casemate.attest import folder, jws
from casemate.attest.tokens import abi, verify
from casemate.attest.tokens import policy as policies

NOW = 1_760_000_000
HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
NONCE = "5a" * 32

GOOGLE = {
    "iss": "https://confidentialcomputing.googleapis.com", "aud": "https://example.test",
    "iat": NOW - 60, "nbf": NOW - 60, "exp": NOW + 3540, "sub": "instances/one",
    "eat_nonce": [NONCE, "a second nonce"], "eat_profile": "https://example.test/profile",
    "secboot": True, "oemid": 11129, "hwmodel": "GCP_AMD_SEV", "swname": "CONFIDENTIAL_SPACE",
    "swversion": ["250800"], "dbgstat": "disabled-since-boot",
    "submods": {
        "confidential_space": {"support_attributes": ["LATEST", "STABLE", "USABLE"]},
        "container": {
            "image_reference": "registry.test/image@sha256:" + "1" * 64,
            "image_digest": "sha256:" + "1" * 64, "restart_policy": "Never",
            "args": ["/run"], "env": {"PATH": "/bin"}, "cmd_override": None,
        },
        "gce": {"project_id": "project", "zone": "zone", "instance_id": "1"},
    },
    "google_service_accounts": ["workload@project.test"],
}  # fmt: skip
MAA = {
    "iss": "https://sharedweu.weu.attest.azure.net", "iat": NOW - 60, "nbf": NOW - 60,
    "exp": NOW + 28740, "jti": "0", "x-ms-ver": "1.0", "x-ms-attestation-type": "azurevm",
    "x-ms-policy-hash": "hash", "secureboot": True,
    "x-ms-runtime": {"client-payload": {"nonce": base64.b64encode(b"n" * 32).decode()}},
    "x-ms-isolation-tee": {
        "x-ms-attestation-type": "sevsnpvm", "x-ms-compliance-status": "azure-compliant-cvm",
        "x-ms-sevsnpvm-is-debuggable": False, "x-ms-sevsnpvm-migration-allowed": False,
        "x-ms-sevsnpvm-launchmeasurement": "AB" * 48, "x-ms-sevsnpvm-hostdata": "00" * 32,
        "x-ms-sevsnpvm-reportdata": "cd" * 32 + "00" * 32, "x-ms-sevsnpvm-vmpl": 0,
        "x-ms-sevsnpvm-bootloader-svn": 3, "x-ms-sevsnpvm-tee-svn": 0,
        "x-ms-sevsnpvm-snpfw-svn": 8, "x-ms-sevsnpvm-microcode-svn": 115,
        "x-ms-runtime": {"vm-configuration": {"secure-boot": True}, "user-data": "ee" * 64},
    },
}  # fmt: skip
_TDX = {
    "attester_type": "TDX", "attester_tcb_status": "UpToDate",
    "attester_held_data": base64.b64encode(b"h" * 64).decode(), "tdx_mrtd": "ab" * 48,
    "tdx_report_data": "cd" * 64, "tdx_is_debuggable": False, "tdx_td_attributes_debug": False,
}  # fmt: skip
_ITA = {
    "iss": "https://portal.trustauthority.intel.com", "iat": NOW - 60, "nbf": NOW - 60,
    "exp": NOW + 240, "dbgstat": "disabled", "eat_profile": "https://example.test/profile",
    "policy_ids_matched": [{"id": "p1", "version": "v1", "hash": "x"}],
    "policy_ids_unmatched": None, "verifier_nonce": {"val": "bm9uY2U=", "iat": "x"},
}  # fmt: skip
ITA_1 = _ITA | _TDX | {"ver": "1.0.0"}
ITA_2 = _ITA | {"ver": "2.0.0", "tdx": _TDX, "nvgpu": {"x-nvidia-overall-att-result": True}}
OTHER = {"iss": "https://verifier.test", "iat": NOW - 60, "exp": NOW + 240, "eat_nonce": NONCE,
         "submods": {"cpu0": {"ear.status": "affirming", "level": 1, "flag": True}}}  # fmt: skip

_GPU = ("driver-rim-fetched", "driver-rim-schema-validated", "driver-rim-signature-verified",
        "vbios-rim-fetched", "arch-check", "attestation-report-parsed",
        "attestation-report-signature-verified", "attestation-report-nonce-match",
        "attestation-report-cert-chain-fwid-match")  # fmt: skip
_CHAIN = {"x-nvidia-cert-status": "valid", "x-nvidia-cert-ocsp-status": "good"}
_TIMES = {"iss": "https://nras.attestation.nvidia.com", "iat": NOW - 60, "nbf": NOW - 60,
          "exp": NOW + 3540, "eat_nonce": NONCE}  # fmt: skip


def device(name: str = "gpu", **changes: Any) -> dict[str, Any]:
    """Claims of NVIDIA's service about one device."""
    claims = {
        **_TIMES, "measres": "success", "secboot": True, "dbgstat": "disabled",
        "hwmodel": "GH100", "ueid": "1234", "oemid": "5703", "x-nvidia-attestation-warning": None,
        **{f"x-nvidia-{name}-{check}": True for check in _GPU},
        f"x-nvidia-{name}-attestation-report-cert-chain": dict(_CHAIN),
    }  # fmt: skip
    if name == "gpu":
        claims |= {"x-nvidia-gpu-driver-version": "550.90.07",
                   "x-nvidia-gpu-vbios-version": "96.00.9F.00.01"}  # fmt: skip
    else:
        claims |= {"x-nvidia-switch-bios-version": "96.10.55.00.01"}
    return claims | changes


DEFAULTS = {
    abi.GOOGLE: policies.GOOGLE_DEFAULT, abi.MAA: policies.MAA_DEFAULT,
    abi.ITA: policies.ITA_DEFAULT, abi.NRAS: policies.NRAS_DEFAULT,
    abi.OTHER: policies.OTHER_DEFAULT,
}  # fmt: skip
CLAIMS = {abi.GOOGLE: GOOGLE, abi.MAA: MAA, abi.ITA: ITA_2, abi.OTHER: OTHER}


@cache
def _rsa_key(number: int, bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    return _rsa_key(number, bits)


@cache
def _ec_key(number: int, curve: type[ec.EllipticCurve]) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def ec_key(
    number: int = 0, curve: type[ec.EllipticCurve] = ec.SECP384R1
) -> ec.EllipticCurvePrivateKey:
    return _ec_key(number, curve)


def key_for(alg: str, number: int = 0) -> Any:
    if alg == "ES256":
        return ec_key(number, ec.SECP256R1)
    return ec_key(number) if alg == "ES384" else rsa_key(number)


def signature(alg: str, key: Any, signed: bytes) -> bytes:
    """A JWS signature (RFC 7518 section 3)."""
    digest = HASHES.get(str(alg)[2:])
    if isinstance(key, rsa.RSAPrivateKey):
        pad = padding.PKCS1v15()
        if str(alg).startswith("PS"):
            pad = padding.PSS(padding.MGF1(digest), digest.digest_size)
        return key.sign(signed, pad, digest or hashes.SHA256())
    r, s = utils.decode_dss_signature(key.sign(signed, ec.ECDSA(digest)))
    size = (key.curve.key_size + 7) // 8
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def _part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return jws.url_encode(raw)


def token(claims: Any, alg: str = "RS256", key: Any = None, **header: Any) -> str:
    """A signed compact JWS. claims, header: JSON, or the payload's bytes."""
    head = {"alg": alg, "typ": "JWT", "kid": "k1"} | header
    head = {name: value for name, value in head.items() if value is not None}
    signed = f"{_part(head)}.{_part(claims)}"
    return f"{signed}.{_part(signature(alg, key or key_for(alg), signed.encode()))}"


def jwk(key: Any, kid: str = "k1", **members: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    if isinstance(public, rsa.RSAPublicNumbers):
        size = (public.n.bit_length() + 7) // 8
        out = {"kty": "RSA", "n": jws.url_encode(public.n.to_bytes(size, "big")), "e": "AQAB"}
    else:
        size = (key.curve.key_size + 7) // 8
        x, y = (jws.url_encode(n.to_bytes(size, "big")) for n in (public.x, public.y))
        out = {"kty": "EC", "crv": {32: "P-256", 48: "P-384"}[size], "x": x, "y": y}
    return {"kid": kid, **out, **members}


def key_set(*keys: Any) -> bytes:
    found = [key if isinstance(key, dict) else jwk(key) for key in keys]
    return json.dumps({"keys": found}).encode()


def pin(key: Any) -> str:
    return jws.thumbprint(key.public_key())


ALG = {abi.GOOGLE: "RS256", abi.MAA: "RS256", abi.ITA: "PS384", abi.NRAS: "ES384",
       abi.OTHER: "ES256"}  # fmt: skip


def changed(claims: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The claims with ``changes`` (paths with ``/``); ``...`` takes a claim away."""
    out = copy.deepcopy(claims)
    for path, value in changes.items():
        *outer, last = path.split("/")
        at = out
        for name in outer:
            at = at[name]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return out


def files(tee: str, claims: Any = None, **changes: Any) -> dict[str, bytes]:
    """A folder: the token of a service but NVIDIA's, signed by our key, and the key set."""
    found = changed(claims or CLAIMS[tee], changes)
    key = key_for(ALG[tee])
    return {"token.jwt": token(found, ALG[tee]).encode(), "jwks.json": key_set(key)}


def detached(
    devices: dict[str, dict[str, Any]] | None = None, key: Any = None, **changes: Any
) -> dict[str, bytes]:
    """A folder with a detached bundle of NVIDIA's form; ``changes`` are of the overall token."""
    devices = {"GPU-0": device()} if devices is None else devices
    tokens = {n: token(c, "ES384", key, typ=None) for n, c in devices.items()}
    digests = {
        n: ["DIGEST", ["SHA-256", hashlib.sha256(t.encode()).hexdigest()]]
        for n, t in tokens.items()
    }
    overall = {**_TIMES, "sub": "NVIDIA-PLATFORM-ATTESTATION", "x-nvidia-ver": "3.0",
               "x-nvidia-overall-att-result": True, "submods": digests} | changes  # fmt: skip
    bundle = [["JWT", token(overall, "ES384", key, typ=None)], tokens]
    return {
        "detached_eat.json": json.dumps(bundle).encode(),
        "jwks.json": key_set(key or key_for("ES384")),
    }


def pinned(tee: str, **changes: Any) -> Any:
    """The service's default policy, with our key pinned."""
    given: dict[str, Any] = {"keys": (pin(key_for(ALG[tee])),)}
    return replace(DEFAULTS[tee], **(given | changes))


def judge(found: dict[str, bytes], policy: Any = None, now: float = NOW, **kw: Any) -> Any:
    """The judgement under ``policy``, for whatever service the files are of."""
    chosen = None if policy is None else dict.fromkeys(DEFAULTS, policy)
    return folder.judge(found, now=now, policies=chosen, **kw)


def code(found: dict[str, bytes], policy: Any = None, now: float = NOW) -> str:
    return judge(found, policy, now).code.removeprefix("evidence.")


# --- authorities of our own ---------------------------------------------------------------------


def name(common: str) -> made.Name:
    return made.Name([made.NameAttribute(NameOID.COMMON_NAME, common)])


def certificate(
    subject: str, key: Any, issuer: str, by: Any, authority: bool, start: int = NOW - 86400,
    days: int = 60, usage: bool = True,
) -> bytes:  # fmt: skip
    """DER of a certificate."""
    begin = datetime.fromtimestamp(start, UTC)
    builder = (
        made.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(made.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(made.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if usage:
        signs = {"key_cert_sign": authority, "crl_sign": authority}
        none = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False)  # fmt: skip
        usages = made.KeyUsage(digital_signature=not authority, **signs, **none)
        builder = builder.add_extension(usages, critical=True)
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@cache
def chain(number: int = 0) -> tuple[bytes, bytes, bytes]:
    """Leaf (of ``rsa_key(0)``), intermediate and root of authority ``number``, DER."""
    root, middle = rsa_key(10 + number), rsa_key(20 + number)
    return (
        certificate("leaf", rsa_key(), f"middle {number}", middle, False),
        certificate(f"middle {number}", middle, f"root {number}", root, True),
        certificate(f"root {number}", root, f"root {number}", root, True),
    )


def x5c(certificates: tuple[bytes, ...]) -> list[str]:
    return [base64.b64encode(one).decode() for one in certificates]


def pki(
    certificates: tuple[bytes, ...] | None = None, key: Any = None, **changes: Any
) -> dict[str, bytes]:
    """A folder with a Google token of the PKI type."""
    path = chain() if certificates is None else certificates
    found = changed(GOOGLE, changes)
    return {"token.jwt": token(found, key=key or rsa_key(), x5c=x5c(path)).encode()}


def root_pin(number: int = 0) -> str:
    return verify.spki(rsa_key(10 + number).public_key())


def under_root(number: int = 0, **changes: Any) -> Any:
    return replace(policies.GOOGLE_DEFAULT, roots=(root_pin(number),), **changes)

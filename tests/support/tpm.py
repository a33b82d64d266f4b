"""TPM quotes, event logs and certificates made up under a test root: no TPM made them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID

from casemate.attest import folder, x509
from casemate.attest.folder import Judgement
from casemate.attest.tpm import eventlog
from casemate.attest.tpm.policy import DEFAULT, TpmPolicy

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2028, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
NONCE = b"n" * 32
HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
IDS = {name: number for number, (name, _) in eventlog.ALGORITHMS.items()}
SIZES = dict(eventlog.ALGORITHMS.values())
SIGNER = b"\x00\x0b" + hashlib.sha256(b"signer").digest()
# A restricted signing key of a fixed TPM, as clouds' attestation keys are.
AK_ATTRIBUTES = 0x50072
ENDORSEMENT = 0x4000000B


def key(name: str, kind: str = "rsa") -> Key:
    """One key for each name and test process."""
    return _key(name, kind)


@cache
def _key(name: str, kind: str) -> Key:
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1()}[kind])


def der(thing: Any) -> bytes:
    out: bytes = thing.public_bytes(serialization.Encoding.DER)
    return out


def pem(thing: Any) -> bytes:
    out: bytes = thing.public_bytes(serialization.Encoding.PEM)
    return out


def spki(of: Key) -> bytes:
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return of.public_key().public_bytes(serialization.Encoding.DER, kind)


def _name(common: str) -> made.Name:
    return made.Name([made.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def certificate(
    name: str, issuer: str, of: Key, *, path: int | None = -1, usage: str | None = "2.23.133.8.3",
    lives: tuple[datetime, datetime] = (START, END), signer: Key | None = None, serial: int = 1,
    signs: bool = True,
) -> made.Certificate:  # fmt: skip
    """path: pathLen of an authority; -1: it is none. Signed by the key named for its issuer."""
    authority = path != -1
    bits = made.KeyUsage(
        digital_signature=signs and not authority, content_commitment=False,
        key_encipherment=not signs,
        data_encipherment=False, key_agreement=False, key_cert_sign=authority, crl_sign=authority,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    basic = made.BasicConstraints(authority, path if authority else None)
    builder = (
        made.CertificateBuilder().subject_name(_name(name)).issuer_name(_name(issuer))
        .public_key(of.public_key()).serial_number(serial).not_valid_before(lives[0])
        .not_valid_after(lives[1]).add_extension(bits, critical=True)
        .add_extension(basic, critical=True)
    )  # fmt: skip
    if usage:
        usages = made.ExtendedKeyUsage([made.ObjectIdentifier(usage)])
        builder = builder.add_extension(usages, critical=False)
    return builder.sign(signer or key(issuer), hashes.SHA256())


@cache
def authorities() -> tuple[made.Certificate, made.Certificate]:
    """Root and intermediate."""
    return (
        certificate("root", "root", key("root"), path=None, usage=None, serial=100),
        certificate("between", "root", key("between"), path=0, usage=None, serial=101),
    )


def root() -> str:
    return x509.parse(der(authorities()[0]), "root").fingerprint


def crl(issuer: str = "between", revoked: Sequence[int] = (), **changed: Any) -> bytes:
    lives = changed.get("lives", (START, END))
    builder = (
        made.CertificateRevocationListBuilder().issuer_name(_name(issuer))
        .last_update(lives[0]).next_update(lives[1])
    )  # fmt: skip
    for serial in revoked:
        entry = made.RevokedCertificateBuilder().serial_number(serial).revocation_date(START)
        builder = builder.add_revoked_certificate(entry.build())
    return der(builder.sign(changed.get("signer") or key(issuer), hashes.SHA256()))


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def banks(*names: str) -> dict[str, dict[int, bytes]]:
    return {
        name: {n: hashlib.new(name, f"{n}".encode()).digest() for n in range(24)} for name in names
    }


def _composite(select: Mapping[str, Sequence[int]], values: Any, digest: str) -> bytes:
    parts = (values[name][n] for name, indices in select.items() for n in sorted(indices))
    return hashlib.new(digest, b"".join(parts)).digest()


def attest(values: Mapping[str, Mapping[int, bytes]], **changed: Any) -> bytes:
    """TPMS_ATTEST. ``changed``: magic, type, signer, extra, clock, resets, restarts, safe,
    firmware, select (bank to PCRs), selection (its bytes), hash, digest, rest."""
    get = changed.get
    select = get("select", {name: range(24) for name in values})
    chosen = b"".join(
        struct.pack(">HB", IDS[name], 3) + sum(1 << n for n in found).to_bytes(3, "little")
        for name, found in select.items()
    )
    selection = get("selection", struct.pack(">I", len(select)) + chosen)
    digest = get("digest")
    if digest is None:
        digest = _composite(select, values, get("hash", "sha256"))
    return b"".join((
        struct.pack(">IH", get("magic", 0xFF544347), get("type", 0x8018)),
        sized(get("signer", SIGNER)),
        sized(get("extra", NONCE)),
        struct.pack(">QII", get("clock", 1000), get("resets", 3), get("restarts", 1)),
        struct.pack(">BQ", get("safe", 1), get("firmware", 0x20160511)),
        selection,
        sized(digest),
        get("rest", b""),
    ))  # fmt: skip


def bare(by: Key, data: bytes, scheme: str = "", digest: str = "sha256") -> bytes:
    if isinstance(by, ec.EllipticCurvePrivateKey):
        return by.sign(data, ec.ECDSA(HASHES[digest]))
    if scheme == "rsapss":
        pss = padding.PSS(padding.MGF1(HASHES[digest]), HASHES[digest].digest_size)
        return by.sign(data, pss, HASHES[digest])
    return by.sign(data, padding.PKCS1v15(), HASHES[digest])


def signature(by: Key, data: bytes, scheme: str = "", digest: str = "sha256") -> bytes:
    """TPMT_SIGNATURE."""
    made_ = bare(by, data, scheme, digest)
    if isinstance(by, ec.EllipticCurvePrivateKey):
        r, s = utils.decode_dss_signature(made_)
        return ecdsa(r, s, digest)
    number = {"": 0x0014, "rsassa": 0x0014, "rsapss": 0x0016}[scheme]
    return struct.pack(">HH", number, IDS[digest]) + sized(made_)


def ecdsa(r: int, s: int, digest: str = "sha256") -> bytes:
    numbers = (x.to_bytes((x.bit_length() + 7) // 8, "big") for x in (r, s))
    return struct.pack(">HH", 0x0018, IDS[digest]) + b"".join(map(sized, numbers))


def public(of: Key, attributes: int = AK_ATTRIBUTES) -> bytes:
    """TPMT_PUBLIC."""
    found = of.public_key()
    head = struct.pack(">HI", IDS["sha256"], attributes) + sized(b"") + struct.pack(">H", 0x10)
    if isinstance(found, rsa.RSAPublicKey):
        modulus = found.public_numbers().n.to_bytes(found.key_size // 8, "big")
        rest = struct.pack(">HHHI", 0x0014, IDS["sha256"], found.key_size, 0) + sized(modulus)
        return struct.pack(">H", 0x0001) + head + rest
    numbers, size = found.public_numbers(), (found.curve.key_size + 7) // 8
    number = {"secp256r1": 3, "secp384r1": 4}[found.curve.name]
    point = b"".join(sized(x.to_bytes(size, "big")) for x in (numbers.x, numbers.y))
    rest = struct.pack(">HHHH", 0x0018, IDS["sha256"], number, 0x10) + point
    return struct.pack(">H", 0x0023) + head + rest


def qualified(area: bytes, hierarchy: int = ENDORSEMENT) -> bytes:
    """The qualified name of a primary key."""
    name = b"\x00\x0b" + hashlib.sha256(area).digest()
    return b"\x00\x0b" + hashlib.sha256(struct.pack(">I", hierarchy) + name).digest()


def shown(values: Mapping[str, Mapping[int, bytes]]) -> bytes:
    return json.dumps({
        name: {str(n): value.hex() for n, value in bank.items()} for name, bank in values.items()
    }).encode()  # fmt: skip


# Event logs.


def event(register: int, kind: int, data: bytes, algorithms: Sequence[str] = ("sha256",),
          measured: bytes | None = None, **changed: Any) -> bytes:  # fmt: skip
    """TCG_PCR_EVENT2; ``measured``: what is hashed, where that is not the data."""
    hashed = data if measured is None else measured
    digests = changed.get("digests") or {
        name: bytes(SIZES[name]) if kind == 3 else hashlib.new(name, hashed).digest()
        for name in algorithms
    }
    packed = b"".join(struct.pack("<H", IDS[name]) + d for name, d in digests.items())
    count = changed.get("count", len(digests))
    return struct.pack("<III", register, kind, count) + packed + struct.pack("<I", len(data)) + data


def header(algorithms: Sequence[str] = ("sha256",), **changed: Any) -> bytes:
    listed = b"".join(struct.pack("<HH", IDS[name], SIZES[name]) for name in algorithms)
    data = changed.get("data") or (
        b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms)) + listed
        + bytes([0])
    )  # fmt: skip
    return old_event(changed.get("register", 0), changed.get("kind", 3), data,
                     changed.get("digest", bytes(20)))  # fmt: skip


def old_event(register: int, kind: int, data: bytes, digest: bytes | None = None) -> bytes:
    found = hashlib.sha1(data, usedforsecurity=False).digest() if digest is None else digest
    return struct.pack("<II", register, kind) + found + struct.pack("<I", len(data)) + data


def variable(name: str, data: bytes, guid: bytes = eventlog._GLOBAL) -> bytes:
    text = name.encode("utf-16-le")
    return guid + struct.pack("<QQ", len(name), len(data)) + text + data


def boot(algorithms: Sequence[str] = ("sha256",), *, secure: bool = True) -> bytes:
    """A small boot: version, Secure Boot, separators, a kernel whose bytes are not in the log."""
    state = variable("SecureBoot", bytes([secure]))
    events = [event(0, 8, b"version 1", algorithms), event(7, 0x80000001, state, algorithms)]
    events += [event(n, 4, bytes(4), algorithms) for n in range(8)]
    events += [event(4, 0x80000003, b"path of a kernel", algorithms, b"the kernel")]
    return header(algorithms) + b"".join(events)


def replayed(log: bytes, *names: str) -> dict[str, dict[int, bytes]]:
    """Banks of 24 PCRs that the log leads to, by another way of counting than the verifier's."""
    out: dict[str, dict[int, bytes]] = {}
    events = eventlog.parse(log).events
    for name in names:
        bank = {n: bytes(SIZES[name]) for n in range(24)}
        for one in events:
            if one.type != eventlog.EV_NO_ACTION:
                engine = hashlib.new(name)
                engine.update(bank[one.register])
                engine.update(one.digests[name])
                bank[one.register] = engine.digest()
        out[name] = bank
    return out


# Folders.


def evidence(
    files: Mapping[str, bytes | None] | None = None, *, by: Key | None = None, kind: str = "rsa",
    scheme: str = "", digest: str = "sha256", values: Any = None, log: bytes | None = None,
    **fields: Any,
) -> dict[str, bytes]:  # fmt: skip
    """A folder with one quote; ``files`` are added or replaced, or left out by None. by: who signs,
    where that is not the attestation key."""
    ak = key("ak", kind)
    known = values or (replayed(log, "sha256") if log else banks("sha256"))
    area = public(ak)
    quote = attest(known, hash=digest, **({"signer": qualified(area)} | fields))
    top, between = authorities()
    whole: dict[str, bytes | None] = {
        "quote.msg": quote,
        "quote.tpmt_signature": signature(by or ak, quote, scheme, digest),
        "pcrs.json": shown(known),
        "ak_cert.der": der(certificate("", "between", ak)),
        "ak_public.tpmt": area,
        "between.crt": der(between),
        "root.crt": pem(top),
        "event_log.bin": log,
        **(files or {}),
    }
    return {name: data for name, data in whole.items() if data is not None}


def policy(**changed: Any) -> TpmPolicy:
    """The default, under the test root."""
    return replace(DEFAULT, **({"roots": (root(),)} | changed))


def judge(files: Mapping[str, bytes], *, now: float = NOW, nonce: Any = None, **changed: Any
          ) -> Judgement:  # fmt: skip
    more = {} if nonce is None else {"nonce": nonce}
    return folder.judge(files, now=now, policies={"tpm": policy(**changed)}, **more)


def outcome(found: Judgement) -> tuple[str, str, str]:
    return found.crypto, found.decision, found.code.removeprefix("evidence.")


def check(found: Judgement, name: str) -> tuple[str, str]:
    return next((c.outcome, c.detail) for c in found.checks if c.name == name)

"""SEV-SNP evidence made up under a test root of AMD's form: every product line, VCEK and VLEK,
revocation lists, and endorsements of a utility VM. Only the roots differ from hardware's."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

import cbor2
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.x509.oid import NameOID

from casemate.attest import folder, x509
from casemate.attest.folder import Judgement
from casemate.attest.snp import abi, collateral
from casemate.attest.snp.policy import DEFAULT, SnpPolicy
from casemate.tee import simulated

DAY = 86400.0
START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2028, 1, 1, tzinfo=UTC)
AUTHORITY = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2045, 1, 1, tzinfo=UTC))
NOW = datetime(2026, 6, 1, tzinfo=UTC).timestamp()

CPUID = {"Milan": (0x19, 0x01, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 0x02, 1)}
TCB = {
    "Milan": bytes.fromhex("04000000000018db"),
    "Genoa": bytes.fromhex("0a00000000001954"),
    "Turin": bytes.fromhex("0101010400000051"),
}
CSP = "CN=cc-test-1.example"
NAMES = {"VCEK": "ask.pem", "VLEK": "asvk.pem"}
MEASURED = bytes(range(48))


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """One key for each name and test process: they take a second."""
    return rsa.generate_private_key(65537, 4096)


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def der(thing: Any) -> bytes:
    out: bytes = thing.public_bytes(serialization.Encoding.DER)
    return out


def _pem(thing: Any) -> bytes:
    out: bytes = thing.public_bytes(serialization.Encoding.PEM)
    return out


def hwid(product: str) -> bytes:
    return hashlib.sha512(product.encode()).digest()[: collateral.PRODUCTS[product].hwid]


def _leaf_extensions(product: str, kind: str, tcb: bytes, structure: int) -> list[Any]:
    line, name = collateral.PRODUCTS[product], product.encode()
    spl = [
        simulated._amd(f"3.{arc}", simulated._der_integer(byte))
        for (_, arc), byte in zip(line.tcb, tcb, strict=True)
    ]
    csp = CSP.encode()
    last = (
        simulated._amd("4", hwid(product))
        if kind == "VCEK"
        else simulated._amd("5", bytes([0x16, len(csp)]) + csp)
    )
    return [
        simulated._amd("1", simulated._der_integer(structure)),
        simulated._amd("2", bytes([0x16, len(name)]) + name),
        *spl, last,
    ]  # fmt: skip


@cache
def authorities(product: str, kind: str = "VCEK") -> tuple[made.Certificate, made.Certificate]:
    """ARK and ASK (or ASVK) of a line."""
    ark_name, name = f"ARK-{product}", collateral.INTERMEDIATES[kind].prefix + product
    ark = simulated._certificate(
        ark_name, ark_name, rsa_key("ark").public_key(), 0x10000, AUTHORITY,
        simulated._authority(None, crl=True), rsa_key("ark"),
    )  # fmt: skip
    between = simulated._certificate(
        name, ark_name, rsa_key("ask").public_key(), 0x10001 + (kind == "VLEK"), AUTHORITY,
        simulated._authority(0, crl=True), rsa_key("ark"),
    )  # fmt: skip
    return ark, between


@cache
def leaf(
    product: str, kind: str = "VCEK", tcb: bytes = b"", structure: int | None = None,
    serial: int = 1,
) -> bytes:  # fmt: skip
    """A VCEK or VLEK in DER; serial 0 as AMD writes it, which no builder does."""
    shape = int(product == "Turin") if structure is None else structure
    found = simulated._certificate(
        f"SEV-{kind}", collateral.INTERMEDIATES[kind].prefix + product,
        ec_key(f"{product} {kind}").public_key(), 1, (START, END),
        _leaf_extensions(product, kind, tcb or TCB[product], shape), rsa_key("ask"),
    )  # fmt: skip
    return der(found) if serial == 1 else reserialled(der(found), serial)


def reserialled(certificate: bytes, serial: int) -> bytes:
    """A certificate of serial 1 by the ASK's key with another of one byte, signed anew."""
    tbs = x509.parse(certificate, "made").tbs
    at = tbs.index(b"\x02\x01\x01", 4)
    changed = tbs[:at] + bytes([2, 1, serial]) + tbs[at + 3 :]
    rest = certificate[4 + len(tbs) :]
    signature = rsa_key("ask").sign(changed, simulated._PSS, hashes.SHA384())
    return certificate[:4] + changed + rest[: len(rest) - 512] + signature


def signed(raw: bytes, product: str, kind: str = "VCEK") -> bytes:
    """The report of which ``raw`` is bytes 0x000 to 0x29f."""
    key = ec_key(f"{product} {kind}")
    r, s = utils.decode_dss_signature(key.sign(raw, ec.ECDSA(hashes.SHA384())))
    signature = b"".join(x.to_bytes(abi.COMPONENT_BYTES, "little") for x in (r, s))
    return (raw + signature).ljust(abi.REPORT_BYTES, b"\0")


def report(product: str = "Genoa", kind: str = "VCEK", **fields: int | bytes) -> bytes:
    family, model, step = CPUID[product]
    tcb = TCB[product]
    values: dict[str, int | bytes] = {
        "version": 5, "policy": 1 << 17 | 1 << 16, "signature_algo": 1, "platform_info": 0x25,
        "flags": {"VCEK": 0, "VLEK": 1 << 2}[kind], "measurement": MEASURED,
        "report_data": b"n" * 32, "chip_id": hwid(product) if kind == "VCEK" else b"",
        "cpuid_fam_id": family, "cpuid_mod_id": model, "cpuid_step": step,
        "reported_tcb": tcb, "current_tcb": tcb, "committed_tcb": tcb, "launch_tcb": tcb,
        "current_major": 1, "current_minor": 55, "current_build": 30,
        "committed_major": 1, "committed_minor": 55, "committed_build": 30,
    }  # fmt: skip
    return signed(abi.pack(values | fields), product, kind)


def evidence(
    product: str = "Genoa", kind: str = "VCEK", files: Mapping[str, bytes | None] | None = None,
    **fields: int | bytes,
) -> dict[str, bytes]:  # fmt: skip
    """A folder; ``files`` are added or replaced, or left out by None."""
    ark, between = authorities(product, kind)
    whole = {
        "report.bin": report(product, kind, **fields),
        f"{kind.lower()}.der": leaf(product, kind),
        NAMES[kind]: _pem(between),
        "ark.pem": _pem(ark),
        **(files or {}),
    }
    return {name: data for name, data in whole.items() if data is not None}


def root(product: str = "Genoa") -> str:
    return x509.parse(der(authorities(product)[0]), "ark").fingerprint


def policy(**changed: Any) -> SnpPolicy:
    """The default, under the test root."""
    roots = {line: (root(line),) for line in CPUID}
    return replace(DEFAULT, **({"roots": roots} | changed))


def judge(files: Mapping[str, bytes], *, now: float = NOW, **changed: Any) -> Judgement:
    return folder.judge(files, now=now, policies={"sev-snp": policy(**changed)})


def outcome(found: Judgement) -> tuple[str, str, str]:
    return found.crypto, found.decision, found.code.removeprefix("evidence.")


def crl(
    product: str = "Genoa", revoked: tuple[int, ...] = (), *, kind: str = "", signer: str = "",
    lives: tuple[datetime, datetime] = (START, END), critical: bool = False,
) -> bytes:  # fmt: skip
    """A revocation list in DER: the ARK's, or with ``kind`` that of its intermediate."""
    ark, between = authorities(product, kind or "VCEK")
    issuer = between if kind else ark
    builder = (
        made.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(lives[0])
        .next_update(lives[1])
        .add_extension(made.CRLNumber(7), critical=critical)
    )
    for serial in revoked:
        entry = made.RevokedCertificateBuilder().serial_number(serial).revocation_date(START)
        builder = builder.add_revoked_certificate(entry.build())
    key = rsa_key(signer or ("ask" if kind else "ark"))
    return der(builder.sign(key, hashes.SHA384(), rsa_padding=simulated._PSS))


# Endorsements of a utility VM, under an EC root.

EKU = "1.3.6.1.4.1.311.76.59.1.2"
FEED = "ContainerPlat-AMD-UVM"


def _uvm_name(common: str) -> made.Name:
    return made.Name([made.NameAttribute(NameOID.COMMON_NAME, common)])


@cache
def uvm_chain(eku: str = EKU, *, signs: bool = True) -> tuple[bytes, ...]:
    """Leaf, intermediate and root in DER."""
    names = ("leaf", "between", "root")
    out = []
    for n, name in enumerate(names):
        issuer = names[min(n + 1, 2)]
        usage = made.KeyUsage(
            digital_signature=signs, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=n > 0, crl_sign=n > 0,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        life = (START, END) if n == 0 else AUTHORITY
        builder = (
            made.CertificateBuilder().subject_name(_uvm_name(name))
            .issuer_name(_uvm_name(issuer)).public_key(ec_key(f"uvm {name}").public_key())
            .serial_number(n + 1).not_valid_before(life[0]).not_valid_after(life[1])
            .add_extension(usage, critical=True)
            .add_extension(made.BasicConstraints(ca=n > 0, path_length=None), critical=True)
        )  # fmt: skip
        if n == 0:
            usages = made.ExtendedKeyUsage([made.ObjectIdentifier(eku)])
            builder = builder.add_extension(usages, critical=False)
        out.append(der(builder.sign(ec_key(f"uvm {issuer}"), hashes.SHA384())))
    return tuple(out)


def did(authority: bytes, eku: str = EKU) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(authority).digest()).rstrip(b"=").decode()
    return f"did:x509:0:sha256:{digest}::eku:{eku}"


def issuer() -> str:
    return did(uvm_chain()[2])


def cose(
    header: dict[Any, Any], payload: bytes, *, signer: str = "uvm leaf", tag: bool = True,
    unprotected: dict[Any, Any] | None = None,
) -> bytes:  # fmt: skip
    raw = cbor2.dumps(header)
    to_sign = cbor2.dumps(["Signature1", raw, b"", payload])
    r, s = utils.decode_dss_signature(ec_key(signer).sign(to_sign, ec.ECDSA(hashes.SHA384())))
    signature = r.to_bytes(48, "big") + s.to_bytes(48, "big")
    message = [raw, unprotected or {}, payload, signature]
    return cbor2.dumps(cbor2.CBORTag(18, message) if tag else message)


def endorsement(*, signer: str = "uvm leaf", unprotected: Any = None, **changed: Any) -> bytes:
    """In JSON's form. ``changed``: ``measurement``, ``svn``, ``payload``, ``chain``, ``iss``,
    ``feed``, ``content`` (its type) and ``signed_at`` (Unix seconds, None: left out)."""
    chain = changed.get("chain", uvm_chain())
    payload = changed.get("payload") or json.dumps({
        "x-ms-sevsnpvm-launchmeasurement": changed.get("measurement", MEASURED).hex(),
        "x-ms-sevsnpvm-guestsvn": changed.get("svn", "103"),
    }).encode()  # fmt: skip
    at = changed.get("signed_at", NOW)
    header = {
        1: -35, 3: changed.get("content", "application/json"), 33: list(chain),
        "iss": changed.get("iss", issuer()), "feed": changed.get("feed", FEED),
        **({} if at is None else {"signingtime": cbor2.CBORTag(1, int(at))}),
    }  # fmt: skip
    kept = {label: value for label, value in header.items() if value != ""}
    return cose(kept, payload, signer=signer, unprotected=unprotected)


def cwt(**changed: Any) -> bytes:
    """In the form of CWT claims."""
    claims = {1: issuer(), 2: FEED, 6: int(NOW), "svn": 104} | changed.get("claims", {})
    header = {
        1: -35, 15: claims, 33: list(uvm_chain()), 258: -43, 259: "application/octet-stream",
    } | changed.get("header", {})  # fmt: skip
    return cose(header, changed.get("payload", MEASURED))

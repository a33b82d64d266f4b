"""What stands beside a TPM's quotes: signatures, PCR values, the event log, certificates.

Files, as in an evidence folder: quotes ``<name>.msg`` (TPMS_ATTEST), each with its signature
``<name>.tpmt_signature`` (TPMT_SIGNATURE) or ``<name>.sig`` (the bare signature of RSASSA with
SHA-256, or of ECDSA with SHA-256 in DER); ``pcrs*.json`` (index to digest, or bank to such a
table); ``event_log.bin``; the attestation key as a certificate (``ak_cert.der``,
``aik_cert.der``), as TPMT_PUBLIC (``ak_public.tpmt``) or in PEM (``ak_public.pem``); certificates
of authorities (``.crt``, ``.cer``, ``.der``, ``.pem``) and revocation lists (``.crl``). Others are
not read.

Procedure of :func:`parse`:

 1. Each quote is parsed, and its signature where one is there.
 2. PCR values: strict JSON; indices 0 to 23, digests of a known bank, no bank twice.
 3. The event log, if any, by ``eventlog``.
 4. The key's certificate and public area, and all other certificates and lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from casemate.attest import crl, der, x509
from casemate.attest.jws import strict_json
from casemate.attest.kind import Files
from casemate.attest.tpm import abi, eventlog
from casemate.attest.tpm.policy import ROOTS
from casemate.attest.verdict import Refused, refusal
from casemate.spec.canonical import Json

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

MAX_QUOTES: Final = 8
MAX_AUTHORITIES: Final = 16
LOG: Final = "event_log.bin"
_AK_CERTIFICATE: Final = re.compile(r"ai?k[A-Za-z0-9_-]*\.(?:der|pem|crt|cer)")
_PUBLIC, _PEM_PUBLIC = ".tpmt", b"-----BEGIN PUBLIC KEY-----"
_BARE: Final = ".sig"
_SIGNATURES: Final = (".tpmt_signature", _BARE)
_CERTIFICATES: Final = (".crt", ".cer", ".der", ".pem")
_SIZES: Final = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
# Carried with casemate: roots that policies pin, and an authority that Azure's VMs do not ship.
_CARRIED: Final = (*ROOTS, "microsoft-vtpm-ca-03")

Banks = dict[str, dict[int, bytes]]


@dataclass(frozen=True)
class Quote:
    """``signature``: parsed, or bare bytes, or None where there is none."""

    file: str
    attest: abi.Attest
    signature: abi.Signature | bytes | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that was read. banks: hash algorithm to PCR to value. authorities, lists: each with its
    file. unread: files that play no part."""

    quotes: tuple[Quote, ...]
    banks: Banks
    log: eventlog.Log | None
    certificate: x509.Certificate | None
    certificate_file: str
    public: abi.Public | None
    public_file: str
    pem: Key | None
    pem_file: str
    authorities: tuple[tuple[x509.Certificate, str], ...]
    lists: tuple[tuple[crl.RevocationList, str], ...]
    unread: tuple[str, ...]


def _refuse(message: str, where: str) -> Refused:
    return refusal("parse-tpm", message, where)


@cache
def carried() -> tuple[tuple[x509.Certificate, str], ...]:
    """The certificates of authorities that casemate carries, with their files."""
    out = []
    for name in _CARRIED:
        file = f"{name}.pem"
        data = (resources.files("casemate.attest.roots") / file).read_bytes()
        out.append((x509.parse(data, file), file))
    return tuple(out)


def is_quote(file: str, data: bytes) -> bool:
    return file.endswith(".msg") or data.startswith(abi.QUOTE_HEAD)


def is_pcrs(file: str) -> bool:
    return re.fullmatch(r"pcrs[A-Za-z0-9_]*\.json", file) is not None


def quote(files: Files, file: str) -> Quote:
    """The quote in ``file`` with its signature."""
    stem = file.removesuffix(".msg")
    found = [stem + end for end in _SIGNATURES if stem + end in files]
    if len(found) > 1:
        raise _refuse("A quote has two signatures.", found[1])
    signature: abi.Signature | bytes | None = None
    if found:
        data = files[found[0]]
        bare = found[0].endswith(_BARE)
        signature = data if bare else abi.signature(data, found[0])
    return Quote(file, abi.attest(files[file], file), signature)


def ecdsa(bare: bytes, where: str) -> abi.Signature:
    """The bare signature of an elliptic curve's key, in DER."""
    try:
        r, s = utils.decode_dss_signature(bare)
    except ValueError:
        raise _refuse(f"{where}'s signature is no ECDSA signature.", where) from None
    return abi.Signature(scheme="ecdsa", hash="sha256", r=r, s=s)


def _bank(table: Json, name: str | None, where: str) -> tuple[str, dict[int, bytes]]:
    if not isinstance(table, dict) or not 1 <= len(table) <= abi.PCRS:
        raise _refuse(f"{where} is no table of PCRs.", where)
    values: dict[int, bytes] = {}
    for index, text in table.items():
        if not re.fullmatch(r"1?[0-9]|2[0-3]", index):
            raise _refuse(f"{where} names {index[:20]!r}, which is no PCR.", where)
        if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9a-fA-F]{2}){1,64}", text):
            raise _refuse(f"The value of PCR {index} in {where} is no digest.", where)
        values[int(index)] = bytes.fromhex(text)
    sizes = {len(value) for value in values.values()}
    known = name or next((n for n, size in _SIZES.items() if {size} == sizes), "")
    if _SIZES.get(known) is None or sizes != {_SIZES[known]}:
        raise _refuse(f"{where} holds digests of no one bank.", where)
    return known, values


def pcrs(files: Files) -> Banks:
    """The banks in all files of PCR values."""
    out: Banks = {}
    for file in sorted(filter(is_pcrs, files)):
        table = strict_json(files[file], file)
        if isinstance(table, dict) and table and all(isinstance(v, dict) for v in table.values()):
            found = [_bank(inner, name, file) for name, inner in table.items()]
        else:
            named = file.removesuffix(".json").partition("_")[2]
            found = [_bank(table, named if named in _SIZES else None, file)]
        for name, values in found:
            if name in out:
                raise _refuse(f"The {name} bank stands twice.", file)
            out[name] = values
    return out


def log(files: Files) -> eventlog.Log | None:
    return eventlog.parse(files[LOG]) if LOG in files else None


def _pem(data: bytes, where: str) -> Key:
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refuse("The attestation key cannot be read.", where) from None
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise _refuse("The attestation key is neither of RSA nor on a curve.", where)
    return key


def _only(files: Files, what: str, wanted: Callable[[str], bool]) -> str:
    """The one file that is wanted, or "" where there is none."""
    found = sorted(filter(wanted, files))
    if len(found) > 1:
        raise _refuse(f"The attestation key has two {what}.", found[1])
    return found[0] if found else ""


def authorities(files: Files, taken: frozenset[str]) -> tuple[tuple[x509.Certificate, str], ...]:
    """The certificates in files that are not ``taken``."""
    out: list[tuple[x509.Certificate, str]] = []
    for file, data in sorted(files.items()):
        if file in taken or not file.endswith(_CERTIFICATES):
            continue
        if data.startswith(b"-----BEGIN"):
            out += [(one, file) for one in x509.bundle(data, file)]
        else:
            out.append((x509.parse(data, file), file))
        if len(out) > MAX_AUTHORITIES:
            raise _refuse("There are too many certificates.", file)
    return tuple(out)


def parse(files: Files) -> Parts:
    """Follow the procedure above. Raises ``evidence.parse-*``."""
    names = sorted(n for n, data in files.items() if is_quote(n, data))
    if len(names) > MAX_QUOTES:
        raise _refuse(f"There are {len(names)} quotes.", names[-1])
    quotes = tuple(quote(files, name) for name in names)
    pem = _only(files, "keys in PEM", lambda n: files[n].startswith(_PEM_PUBLIC))
    public = _only(files, "public areas", lambda n: n.endswith(_PUBLIC))
    leaf = _only(
        files, "certificates", lambda n: n != pem and _AK_CERTIFICATE.fullmatch(n) is not None
    )
    taken = {leaf, public, pem, LOG, *names, *filter(is_pcrs, files)}
    taken |= {n for n in files if n.endswith(".crl")}
    taken |= {n.removesuffix(".msg") + end for n in names for end in _SIGNATURES}
    others = authorities(files, frozenset(taken))
    lists = sorted(n for n in files if n.endswith(".crl"))
    read = taken | {name for _, name in others}
    return Parts(
        quotes=quotes,
        banks=pcrs(files),
        log=log(files),
        certificate=x509.parse(files[leaf], leaf) if leaf else None,
        certificate_file=leaf,
        public=abi.public(files[public], public) if public else None,
        public_file=public,
        pem=_pem(files[pem], pem) if pem else None,
        pem_file=pem,
        authorities=others,
        lists=tuple((crl.parse(files[name], name), name) for name in lists),
        unread=tuple(sorted(set(files) - read)),
    )


# OID of what Google says in a certificate about the VM (project, zone, name).
_INSTANCE: Final = "1.3.6.1.4.1.11129.2.1.21"


def instance(certificate: x509.Certificate, where: str) -> dict[str, Json]:
    """What Google's certificate says of the VM: zone, project number and name, instance id and
    name; {} where it says nothing."""
    found = certificate.extensions.get(_INSTANCE)
    if found is None:
        return {}
    try:
        reader = der.Reader(der.only(found.value, der.SEQUENCE))
        return {
            "zone": der.text(der.UTF8_STRING, reader.read(der.UTF8_STRING)),
            "project_number": der.integer(reader.read(der.INTEGER)),
            "project_id": der.text(der.UTF8_STRING, reader.read(der.UTF8_STRING)),
            "instance_id": str(der.integer(reader.read(der.INTEGER)) % (1 << 64)),
            "instance_name": der.text(der.UTF8_STRING, reader.read(der.UTF8_STRING)),
        }
    except der.DerError as e:
        raise _refuse(f"{where} describes its VM in no known way: {e}.", where) from None

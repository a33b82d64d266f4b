"""PCK certificates: what Intel's extension says about a platform, and the chains to Intel's root.

Source: Intel, "SGX PCK Certificate and Certificate Revocation List Profile Specification" revision
1.5: section 1.3.5 (the extension, OID 1.2.840.113741.1.13.1) and sections 1.2, 1.3, 1.4 (names).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from casemate.attest import der, roots, x509
from casemate.attest.verdict import Refused, refusal

OID: Final = "1.2.840.113741.1.13.1"
# SHA-256 of the SubjectPublicKeyInfo of the Intel SGX Root CA; its two editions have one key.
ROOTS: Final = ("a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e",)

PCK: Final = ("Intel SGX PCK Certificate",)
PCK_CA: Final = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
SIGNER: Final = ("Intel SGX TCB Signing",)
ROOT: Final = ("Intel SGX Root CA",)
FLAGS: Final = ("dynamic_platform", "cached_keys", "smt_enabled")
_TYPES: Final = {0: "standard", 1: "scalable", 2: "scalable with integrity"}
_ENUMERATED: Final = 0x0A
_MAX_CHAIN: Final = 3

_BLOCK: Final = (
    rb"-----BEGIN CERTIFICATE-----\r?\n(?:[A-Za-z0-9+/]{64}\r?\n)*[A-Za-z0-9+/=]{1,64}\r?\n"
    rb"-----END CERTIFICATE-----(?:(?:\r?\n){1,4}|\Z)"
)
_BLOCKS: Final = re.compile(_BLOCK)
_PEM: Final = re.compile(rb"(?:%s){1,%d}" % (_BLOCK, _MAX_CHAIN))


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The SGX extension. ``svns``: the 16 components' security versions. ``instance``: Platform
    Instance ID, empty where the platform has none; ``flags``: of a multi-package platform."""

    ppid: bytes
    svns: bytes
    pcesvn: int
    pceid: bytes
    fmspc: bytes
    sgx_type: str
    instance: bytes
    flags: dict[str, bool]


@cache
def root() -> x509.Certificate:
    """The carried certificate of the Intel SGX Root CA."""
    file = "intel-sgx-root-ca.pem"
    return x509.parse((resources.files(roots) / file).read_bytes(), file)


def _values(reader: der.Reader) -> dict[str, tuple[int, bytes]]:
    """Last arc to (tag, content) of a sequence of pairs."""
    out: dict[str, tuple[int, bytes]] = {}
    while reader:
        pair = reader.enter()
        kind = der.oid(pair.read(der.OID))
        tag, content, _ = pair.element()
        pair.end()
        arc = kind.rpartition(".")[2]
        if not kind.startswith(OID + ".") or arc in out:
            raise der.DerError(f"{kind} does not belong there")
        out[arc] = (tag, content)
    return out


def _octets(found: tuple[int, bytes], size: int) -> bytes:
    tag, content = found
    if tag != der.OCTET_STRING or len(content) != size:
        raise der.DerError(f"a value that is no string of {size} bytes")
    return content


def _number(found: tuple[int, bytes], most: int, kind: int = der.INTEGER) -> int:
    tag, content = found
    value = der.integer(content) if tag == kind else -1
    if not 0 <= value <= most:
        raise der.DerError("a number out of its range")
    return value


def _flag(found: tuple[int, bytes]) -> bool:
    tag, content = found
    if tag != der.BOOLEAN:
        raise der.DerError("a flag that is no boolean")
    return der.boolean(content)


def _platform(value: bytes) -> Platform:
    found = _values(der.Reader(der.only(value, der.SEQUENCE)))
    if not {"1", "2", "3", "4", "5"} <= set(found) <= {"1", "2", "3", "4", "5", "6", "7"}:
        raise der.DerError("other fields than a platform has")
    for arc in {"2", "7"} & set(found):
        if found[arc][0] != der.SEQUENCE:
            raise der.DerError("a field that is no sequence")
    tcb = _values(der.Reader(found["2"][1]))
    if set(tcb) != {str(arc) for arc in range(1, 19)}:
        raise der.DerError("other TCB components than a platform has")
    svns = bytes(_number(tcb[str(arc)], 0xFF) for arc in range(1, 17))
    if _octets(tcb["18"], 16) != svns:
        raise der.DerError("CPUSVN is not what its components are")
    flags = _values(der.Reader(found["7"][1])) if "7" in found else {}
    if not set(flags) <= {"1", "2", "3"}:
        raise der.DerError("other flags than a platform has")
    return Platform(
        ppid=_octets(found["1"], 16),
        svns=svns,
        pcesvn=_number(tcb["17"], 0xFFFF),
        pceid=_octets(found["3"], 2),
        fmspc=_octets(found["4"], 6),
        sgx_type=_TYPES[_number(found["5"], max(_TYPES), _ENUMERATED)],
        instance=_octets(found["6"], 16) if "6" in found else b"",
        flags={name: _flag(flags[a]) for a, name in zip("123", FLAGS, strict=True) if a in flags},
    )


def platform(certificate: x509.Certificate, where: str) -> Platform:
    """What a PCK certificate says. Raises ``evidence.parse-pck``."""
    extension = certificate.extensions.get(OID)
    try:
        if extension is None:
            raise der.DerError("it lacks Intel's extension")
        return _platform(extension.value)
    except der.DerError as e:
        raise refusal("parse-pck", f"{where} is no PCK certificate: {e}.", where) from None


def chain(data: bytes, where: str) -> tuple[x509.Certificate, ...]:
    """1 to 3 certificates in PEM with lines of 64 characters, nothing around them but empty lines
    and, at the end, one zero byte as Intel's library writes it. Raises
    ``evidence.parse-certificate``."""
    text = data.removesuffix(b"\0")
    if len(text) > _MAX_CHAIN * 4096 or not _PEM.fullmatch(text):
        raise refusal("parse-certificate", f"{where} is no chain of certificates in PEM.", where)
    blocks = _BLOCKS.findall(text)
    return tuple(x509.parse(block, f"{where}[{n}]") for n, block in enumerate(blocks))


def _foreign(where: str, problem: str) -> Refused:
    return refusal("chain-name", f"{where} {problem}.", where)


def path(
    certificates: tuple[x509.Certificate, ...], names: tuple[tuple[str, ...], ...], where: str
) -> tuple[x509.Certificate, ...]:
    """The path from leaf to root, whose common names are of ``names`` one by one; the root is the
    carried one where it was left out. Every signature is by ECDSA P-256 with SHA-256 and no name is
    borrowed: what signs TCB info cannot be a PCK. Raises ``evidence.chain-*``."""
    if len(certificates) == len(names) - 1:
        certificates = (*certificates, root())
    if len(certificates) != len(names):
        raise _foreign(where, f"has {len(certificates)} certificates, not {len(names)}")
    steps = [(c, f"{where}[{n}]") for n, c in enumerate(certificates)]
    for (certificate, place), admitted in zip(steps, names, strict=True):
        if certificate.name() not in admitted:
            raise _foreign(place, f"is named {certificate.name()[:60]!r}, not {admitted[0]!r}")
    x509.check_chain(steps, {x509.ECDSA_SHA256})
    return certificates

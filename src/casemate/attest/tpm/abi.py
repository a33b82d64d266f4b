"""TPM 2.0 structures of a quote, byte for byte. All integers are big endian.

Source: TCG, "TPM 2.0 Library Specification", part 2 "Structures": section 10.12.8 (TPMS_ATTEST,
with TPMS_QUOTE_INFO and TPMS_CLOCK_INFO), 10.9.7 (TPML_PCR_SELECTION), 10.6.2
(TPMS_PCR_SELECTION), 10.5.3 (TPM2B_NAME), 11.3.4 (TPMT_SIGNATURE), 12.2.4 (TPMT_PUBLIC), 6.3
(TPM_ALG_ID), 6.4 (TPM_ECC_CURVE), 8.3 (TPMA_OBJECT); part 1, section 16 (names). Field names are
the specification's, in the style of Python.

Procedure of :func:`attest` (:func:`signature` and :func:`public` are alike):

 1. ``magic`` is TPM_GENERATED_VALUE and ``type`` TPM_ST_ATTEST_QUOTE: nothing else that a TPM signs
    is a quote.
 2. Each field has its size: names are empty, a handle, or an algorithm with a digest of its size;
    ``extraData`` is at most what TPM2B_DATA holds; ``safe`` is YES or NO.
 3. The selection names known hash algorithms, each once; the digest is one of a known hash.
 4. Nothing is left over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from casemate.attest.tpm.eventlog import ALGORITHMS
from casemate.attest.verdict import Refused, refusal

GENERATED: Final = 0xFF544347
ATTEST_QUOTE: Final = 0x8018
QUOTE_HEAD: Final = bytes.fromhex("ff5443478018")
MAX_BYTES: Final = 4096
PCRS: Final = 24

# TPM_ALG_ID.
RSA, NULL, RSASSA, RSAPSS, ECDSA, ECC = 0x0001, 0x0010, 0x0014, 0x0016, 0x0018, 0x0023
SCHEMES: Final = {RSASSA: "rsassa", RSAPSS: "rsapss", ECDSA: "ecdsa"}
# Hashes that signatures may use; SHA-1 may not.
SIGNED_HASHES: Final = ("sha256", "sha384", "sha512")
# TPM_ECC_CURVE.
CURVES: Final[dict[int, ec.EllipticCurve]] = {
    3: ec.SECP256R1(), 4: ec.SECP384R1(), 5: ec.SECP521R1(),
}  # fmt: skip
_MAX_DATA: Final = 66
_HANDLE: Final = 4

# TPMA_OBJECT: bits that an attestation key has, and those that it must not have.
FIXED_TPM, RESTRICTED, DECRYPT, SIGN = 1 << 1, 1 << 16, 1 << 17, 1 << 18
# Primary keys stand under one of these (part 2, section 7.4): owner, null, endorsement, platform.
HIERARCHIES: Final = {
    0x40000001: "owner", 0x40000007: "null", 0x4000000B: "endorsement", 0x4000000C: "platform",
}  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """TPMS_PCR_SELECTION: ``hash`` by name, ``pcrs`` ascending, as they are hashed."""

    hash: str
    pcrs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Attest:
    """TPMS_ATTEST of a quote. clock: milliseconds that the TPM has run; reset_count, restart_count:
    of TPM resets and restarts; safe: whether no higher clock was ever reported."""

    raw: bytes
    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    pcr_select: tuple[Selection, ...]
    pcr_digest: bytes


@dataclass(frozen=True, kw_only=True)
class Signature:
    """TPMT_SIGNATURE. scheme: of :data:`SCHEMES`; hash: of :data:`SIGNED_HASHES`. RSA has ``sig``,
    ECDSA ``r`` and ``s``."""

    scheme: str
    hash: str
    sig: bytes = b""
    r: int = 0
    s: int = 0


@dataclass(frozen=True, kw_only=True)
class Public:
    """TPMT_PUBLIC of a signing key. name: what a TPM calls it, an algorithm and a digest."""

    raw: bytes
    name_alg: str
    attributes: int
    name: bytes
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey

    def qualified(self, hierarchy: int) -> bytes:
        """Its qualified name if it is a primary key of that hierarchy (part 1, section 16)."""
        digest = hashlib.new(self.name_alg, hierarchy.to_bytes(4, "big") + self.name).digest()
        return self.name[:2] + digest


def _refuse(what: str, where: str) -> Refused:
    return refusal("parse-tpm", f"{where} is malformed: {what}.", where)


class _Reader:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.at, self.where = data, 0, where
        if len(data) > MAX_BYTES:
            raise self.refuse(f"it has {len(data)} bytes")

    def refuse(self, what: str) -> Refused:
        return _refuse(what, self.where)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.refuse("it is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self, most: int, what: str) -> bytes:
        """A TPM2B of at most that many bytes."""
        size = self.number(2)
        if size > most:
            raise self.refuse(f"{what} has {size} bytes")
        return self.take(size)

    def hash(self) -> tuple[str, int]:
        number = self.number(2)
        if number not in ALGORITHMS:
            raise self.refuse(f"hash algorithm {number:#06x} is unknown")
        return ALGORITHMS[number]

    def signed_hash(self) -> str:
        name, _ = self.hash()
        if name not in SIGNED_HASHES:
            raise self.refuse(f"{name} is no hash for signatures")
        return name

    def end(self) -> None:
        if self.at != len(self.data):
            raise self.refuse(f"{len(self.data) - self.at} bytes are left over")


def _name(reader: _Reader) -> bytes:
    name = reader.sized(_MAX_DATA, "a name")
    if len(name) in (0, _HANDLE):
        return name
    known = ALGORITHMS.get(int.from_bytes(name[:2], "big"))
    if known is None or len(name) != 2 + known[1]:
        raise reader.refuse("a name is none")
    return name


def _selection(reader: _Reader) -> Selection:
    name, _ = reader.hash()
    size = reader.number(1)
    if not 1 <= size <= 4:
        raise reader.refuse(f"a selection of PCRs has {size} bytes")
    bits = int.from_bytes(reader.take(size), "little")
    if bits >> PCRS:
        raise reader.refuse("it selects PCRs that there are none of")
    return Selection(name, tuple(n for n in range(PCRS) if bits >> n & 1))


def attest(data: bytes, where: str) -> Attest:
    """The quote in ``data``, a TPMS_ATTEST. Raises ``evidence.parse-tpm``."""
    reader = _Reader(data, where)
    if reader.number(4) != GENERATED:
        raise reader.refuse("no TPM made it")
    if reader.number(2) != ATTEST_QUOTE:
        raise reader.refuse("it is no quote")
    signer = _name(reader)
    extra = reader.sized(_MAX_DATA, "extraData")
    clock, resets, restarts = reader.number(8), reader.number(4), reader.number(4)
    safe, firmware = reader.number(1), reader.number(8)
    if safe > 1:
        raise reader.refuse("safe is neither YES nor NO")
    count = reader.number(4)
    if count > len(ALGORITHMS):
        raise reader.refuse(f"it has {count} selections of PCRs")
    selections = tuple(_selection(reader) for _ in range(count))
    if len({one.hash for one in selections}) != count:
        raise reader.refuse("it selects PCRs of one hash algorithm twice")
    digest = reader.sized(64, "pcrDigest")
    reader.end()
    return Attest(
        raw=data, qualified_signer=signer, extra_data=extra, clock=clock, reset_count=resets,
        restart_count=restarts, safe=bool(safe), firmware_version=firmware, pcr_select=selections,
        pcr_digest=digest,
    )  # fmt: skip


def signature(data: bytes, where: str) -> Signature:
    """The TPMT_SIGNATURE in ``data``. Raises ``evidence.parse-tpm``."""
    reader = _Reader(data, where)
    scheme = SCHEMES.get(reader.number(2))
    if scheme is None:
        raise reader.refuse("it is of no known signature scheme")
    name = reader.signed_hash()
    if scheme == "ecdsa":
        r, s = (int.from_bytes(reader.sized(66, "a signature"), "big") for _ in range(2))
        found = Signature(scheme=scheme, hash=name, r=r, s=s)
    else:
        found = Signature(scheme=scheme, hash=name, sig=reader.sized(1024, "a signature"))
    reader.end()
    return found


def public(data: bytes, where: str) -> Public:
    """The TPMT_PUBLIC (or TPM2B_PUBLIC) of a signing key in ``data``. Raises
    ``evidence.parse-tpm``."""
    if len(data) > 2 and int.from_bytes(data[:2], "big") == len(data) - 2:
        data = data[2:]
    reader = _Reader(data, where)
    kind = reader.number(2)
    if kind not in (RSA, ECC):
        raise reader.refuse("it is the public part of no signing key")
    name_alg = reader.signed_hash()
    attributes = reader.number(4)
    reader.sized(64, "authPolicy")
    if reader.number(2) != NULL:
        raise reader.refuse("a signing key has no symmetric algorithm")
    if reader.number(2) != NULL:
        reader.hash()  # of the scheme, whichever it is
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    key = _rsa(reader) if kind == RSA else _ecc(reader)
    reader.end()
    head = next(n for n, (known, _) in ALGORITHMS.items() if known == name_alg)
    name = head.to_bytes(2, "big") + hashlib.new(name_alg, data).digest()
    return Public(raw=data, name_alg=name_alg, attributes=attributes, name=name, key=key)


def _rsa(reader: _Reader) -> rsa.RSAPublicKey:
    bits, exponent = reader.number(2), reader.number(4) or 65537
    modulus = int.from_bytes(reader.sized(1024, "a modulus"), "big")
    if modulus.bit_length() != bits:
        raise reader.refuse("its modulus has another size than it says")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise reader.refuse("its RSA key is none") from None


def _ecc(reader: _Reader) -> ec.EllipticCurvePublicKey:
    curve = CURVES.get(reader.number(2))
    if curve is None:
        raise reader.refuse("its curve is unknown")
    if reader.number(2) != NULL:
        reader.hash()  # of the key derivation, which signing does not use
    x, y = (int.from_bytes(reader.sized(66, "a point"), "big") for _ in range(2))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise reader.refuse("its point is not on its curve") from None

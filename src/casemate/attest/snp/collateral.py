"""Certificates that endorse a SEV-SNP report's key: VCEK or VLEK, ASK or ASVK, and ARK.

Source: AMD, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification",
publication 57230, revision 1.00: section 3 (the certificates, their algorithms and names), table 9
and 10 (extensions under 1.3.6.1.4.1.3704.1); publication 56860, table 3 (TCB_VERSION).

Files, as in an evidence folder: ``vcek.der`` with ``ask.pem``, or ``vlek.der`` with ``asvk.pem``;
``ark.pem`` may stand beside and is never trusted for standing there. ``crl.der`` (or ``crl.pem``):
AMD's revocation list of the product line (57230 section 4.2: made by the ARK, it names revoked ASKs
and ASVKs); ``ask_crl.der`` (or ``.pem``): one made by the intermediate, about leaves, should AMD
come to make any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import crl, der, x509
from casemate.attest.verdict import Refused, refusal

OID: Final = "1.3.6.1.4.1.3704.1"
_STRUCT_VERSION, _PRODUCT_NAME, _HWID, _CSP_ID = f"{OID}.1", f"{OID}.2", f"{OID}.4", f"{OID}.5"


@dataclass(frozen=True)
class ProductLine:
    """``cpuid``: (family, models); ``tcb``: for each of the 8 bytes of TCB_VERSION its component
    (``""`` where reserved) and the last arc of its extension; ``hwid``: bytes of hwID."""

    names: tuple[str, ...]
    cpuid: tuple[tuple[int, range], ...]
    tcb: tuple[tuple[str, int], ...]
    hwid: int


_ZEN3_TCB: Final = (
    ("bootloader", 1), ("tee", 2), ("", 4), ("", 5), ("", 6), ("", 7), ("snp", 3), ("microcode", 8),
)  # fmt: skip
_ZEN5_TCB: Final = (
    ("fmc", 9), ("bootloader", 1), ("tee", 2), ("snp", 3), ("", 5), ("", 6), ("", 7),
    ("microcode", 8),
)  # fmt: skip

# Bergamo and Siena are endorsed by Genoa's keys.
PRODUCTS: Final[dict[str, ProductLine]] = {
    "Milan": ProductLine(("Milan",), ((0x19, range(0x10)),), _ZEN3_TCB, 64),
    "Genoa": ProductLine(
        ("Genoa", "Bergamo", "Siena"),
        ((0x19, range(0x10, 0x20)), (0x19, range(0xA0, 0xB0))),
        _ZEN3_TCB,
        64,
    ),
    "Turin": ProductLine(("Turin",), ((0x1A, range(0x12)),), _ZEN5_TCB, 8),
}


@dataclass(frozen=True)
class Intermediate:
    """What signs a leaf: its file, and its common name up to the product line."""

    file: str
    prefix: str


INTERMEDIATES: Final = {
    "VCEK": Intermediate("ask.pem", "SEV-"),
    "VLEK": Intermediate("asvk.pem", "SEV-VLEK-"),
}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The endorsement of one report. ``ark`` is the root that was carried, if one was.

    ``kind``: VCEK or VLEK. ``product``: the product line that the leaf names. ``tcb``: the
    8 bytes of TCB_VERSION that the extensions spell. ``hwid``: empty for a VLEK.
    """

    kind: str
    product: str
    leaf: x509.Certificate
    intermediate: x509.Certificate
    ark: x509.Certificate | None
    leaf_file: str
    intermediate_file: str
    tcb: bytes
    hwid: bytes
    csp_id: str


MISSING_MEND: Final = "Ask the operator to send AMD's certificates with the report."


def _refuse(reason: str, message: str, where: str) -> Refused:
    return refusal(f"parse-{reason}", message, where)


def tcb_components(product: str, tcb: bytes) -> dict[str, int]:
    """Component to security version, from the 8 bytes of a TCB_VERSION."""
    layout = PRODUCTS[product].tcb
    return {name: byte for (name, _), byte in zip(layout, tcb, strict=True) if name}


def _extension(leaf: x509.Certificate, oid: str, where: str) -> bytes:
    found = leaf.extensions.get(oid)
    if found is None:
        raise _refuse("extension", f"{where} lacks AMD's extension {oid}.", where)
    return found.value


def _small(leaf: x509.Certificate, oid: str, where: str) -> int:
    try:
        value = der.integer(der.only(_extension(leaf, oid, where), der.INTEGER))
    except der.DerError as e:
        raise _refuse(
            "extension", f"Extension {oid} of {where} is malformed: {e}.", where
        ) from None
    if not 0 <= value <= 255:
        raise _refuse("extension", f"Extension {oid} of {where} is {value}, no byte.", where)
    return value


def _text(leaf: x509.Certificate, oid: str, where: str) -> str:
    try:
        content = der.only(_extension(leaf, oid, where), der.IA5_STRING)
        return der.text(der.IA5_STRING, content)
    except der.DerError as e:
        raise _refuse(
            "extension", f"Extension {oid} of {where} is malformed: {e}.", where
        ) from None


def _product_line(named: str) -> str | None:
    name = named.split("-")[0]  # a stepping may follow, as in Milan-B0
    return next((line for line, product in PRODUCTS.items() if name in product.names), None)


def parse(files: Mapping[str, bytes]) -> Chain:
    """The chain in an evidence's files:

    1. exactly one of ``vcek.der`` and ``vlek.der`` (``needs-vcek``, ``parse-leaves``), with its
       intermediate (``needs-ask``, ``needs-asvk``);
    2. each is a certificate (``parse-certificate``), the leaf of a known product line
       (``root-product``: no other line's root is known);
    3. AMD's extensions are there and well formed: structure version, product name, every byte of
       the TCB, hwID of the line's length for a VCEK, CSP id for a VLEK (``parse-extension``).

    Whether the parts belong together is for ``verify``.
    """
    kinds = [kind for kind in INTERMEDIATES if f"{kind.lower()}.der" in files]
    if len(kinds) > 1:
        raise _refuse("leaves", "The evidence carries both a VCEK and a VLEK.", "vcek.der")
    if not kinds:
        raise refusal(
            "needs-vcek", "The evidence carries no VCEK or VLEK.", "vcek.der", MISSING_MEND
        )
    kind = kinds[0]
    leaf_file, intermediate_file = f"{kind.lower()}.der", INTERMEDIATES[kind].file
    if intermediate_file not in files:
        code = f"needs-{intermediate_file.removesuffix('.pem')}"
        message = f"The evidence carries no {intermediate_file}."
        raise refusal(code, message, intermediate_file, MISSING_MEND)
    leaf = x509.parse(files[leaf_file], leaf_file)
    _small(leaf, _STRUCT_VERSION, leaf_file)
    named = _text(leaf, _PRODUCT_NAME, leaf_file)
    product = _product_line(named)
    if product is None:
        message = f"{leaf_file} is of the unknown product {named[:60]!r}."
        raise refusal("root-product", message, leaf_file, "Use a casemate that knows its root.")
    line = PRODUCTS[product]
    hwid = _extension(leaf, _HWID, leaf_file) if kind == "VCEK" else b""
    if kind == "VCEK" and len(hwid) != line.hwid:
        message = f"hwID of {leaf_file} has {len(hwid)} bytes, not {line.hwid}."
        raise _refuse("extension", message, leaf_file)
    return Chain(
        kind=kind,
        product=product,
        leaf=leaf,
        intermediate=x509.parse(files[intermediate_file], intermediate_file),
        ark=x509.parse(files["ark.pem"], "ark.pem") if "ark.pem" in files else None,
        leaf_file=leaf_file,
        intermediate_file=intermediate_file,
        tcb=bytes(_small(leaf, f"{OID}.3.{arc}", leaf_file) for _, arc in line.tcb),
        hwid=hwid,
        csp_id=_text(leaf, _CSP_ID, leaf_file) if kind == "VLEK" else "",
    )


# A list's file to whether the intermediate made it, about leaves, and not the root.
LISTS: Final = {"crl.der": False, "crl.pem": False, "ask_crl.der": True, "ask_crl.pem": True}


def revocation_lists(files: Mapping[str, bytes]) -> dict[str, crl.RevocationList]:
    """The lists that were carried, by file. Raises ``evidence.parse-crl``."""
    return {file: crl.parse(files[file], file) for file in LISTS if file in files}

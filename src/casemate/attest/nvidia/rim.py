"""Reference integrity manifests (RIM) of drivers, VBIOS and switches' BIOS.

Sources: ISO/IEC 19770-2:2015 (SWID tags); TCG Reference Integrity Manifest Information Model 1.01;
NVIDIA, "RIM Guide" (docs.nvidia.com/attestation): a Payload of Resources of type ``Measurement``,
each with an index (0 to 63), whether it is active, and one or more golden values of SHA-384. Index
i stands for the SPDM measurement block i + 1.

Only what was signed is read: the octets whose digest the signature covers. A record that is not of
this form (NVIDIA's numeric ones for opaque data, say) is refused rather than left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from casemate.attest import x509
from casemate.attest.nvidia import abi, xmldsig
from casemate.attest.nvidia.xmldsig import refuse

if TYPE_CHECKING:
    from lxml.etree import _Element

_SWID: Final = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_TCG: Final = (
    "{https://trustedcomputinggroup.org/resource/"
    "tcg-reference-integrity-manifest-rim-information-model/}"
)
_SHA384: Final = "{http://www.w3.org/2001/04/xmlenc#sha384}"
_DRIVER: Final = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}")
_GOLDEN: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,2}")
INDICES: Final = range(64)
MAX_ALTERNATIVES: Final = 64
HASH_BYTES: Final = 48
DRIVER, FIRMWARE = "driver", "vbios"


@dataclass(frozen=True, kw_only=True)
class Rim:
    """A manifest that is parsed and not yet verified.

    file: its name. role: ``driver`` or ``vbios`` (a switch's BIOS too), by the form of its version.
    golden: index to the admitted values; of active records only. chain: the signer's certificate
    first. signed: for ``verify``.
    """

    file: str
    role: str
    tag_id: str
    name: str
    product: str
    version: str
    manufacturer: str
    golden: Mapping[int, tuple[bytes, ...]]
    records: int
    chain: tuple[x509.Certificate, ...]
    signed: xmldsig.Signed


def _attribute(element: _Element, name: str, where: str) -> str:
    found = element.get(name)
    if not found or not found.isprintable() or len(found) > 200:
        raise refuse(f"{name.rpartition('}')[2]} is missing or impossible", where)
    return str(found)


def _number(element: _Element, name: str, admitted: range, where: str) -> int:
    text = _attribute(element, name, where)
    if not _NUMBER.fullmatch(text) or int(text) not in admitted:
        raise refuse(f"{name} is {text[:20]}", where)
    return int(text)


def _golden(resource: _Element, where: str) -> tuple[int, bool, tuple[bytes, ...]]:
    if resource.tag != _SWID + "Resource" or _attribute(resource, "type", where) != "Measurement":
        raise refuse("its payload has records of an unknown type", where)
    index = _number(resource, "index", INDICES, where)
    active = _attribute(resource, "active", where)
    if active not in ("True", "False"):
        raise refuse(f"measurement {index} is neither active nor not", where)
    count = _number(resource, "alternatives", range(1, MAX_ALTERNATIVES + 1), where)
    _number(resource, "size", range(HASH_BYTES, HASH_BYTES + 1), where)
    names = {_SHA384 + f"Hash{n}" for n in range(count)}
    known = names | {"type", "index", "active", "alternatives", "size", "name"}
    if set(map(str, resource.attrib)) != known or len(resource):
        raise refuse(f"measurement {index} has other attributes than {count} values", where)
    values = [str(resource.get(_SHA384 + f"Hash{n}")) for n in range(count)]
    if not all(len(v) == 2 * HASH_BYTES and _GOLDEN.fullmatch(v) for v in values):
        raise refuse(f"a value of measurement {index} is no SHA-384", where)
    return index, active == "True", tuple(map(bytes.fromhex, values))


def _role(version: str, where: str) -> str:
    if abi.VBIOS.fullmatch(version.upper()):
        return FIRMWARE
    if _DRIVER.fullmatch(version):
        return DRIVER
    raise refuse(f"its version {version[:40]!r} is neither a driver's nor a VBIOS's", where)


def parse(data: bytes, file: str) -> Rim:
    """The manifest in ``data``. Raises ``evidence.parse-rim`` and ``parse-certificate``:

    1. an enveloped signature of the admitted form (:mod:`~casemate.attest.nvidia.xmldsig`);
    2. a SoftwareIdentity that is neither a patch nor a supplement, with one Meta and one Payload;
    3. measurement records, each index once, each with as many values as it says, one active.
    """
    signed = xmldsig.parse(data, file)
    chain = tuple(x509.parse(raw, f"{file}[{n}]") for n, raw in enumerate(signed.certificates))
    root = xmldsig.document(signed.content, file)
    if root.tag != _SWID + "SoftwareIdentity":
        raise refuse("it is no SoftwareIdentity", file)
    if root.get("patch") != "false" or root.get("supplemental") != "false":
        raise refuse("it is a patch or a supplement", file)
    parts = {name: root.findall(_SWID + name) for name in ("Entity", "Meta", "Payload")}
    if sum(map(len, parts.values())) != len(root) or [
        len(parts["Meta"]), len(parts["Payload"])
    ] != [1, 1]:  # fmt: skip
        raise refuse("it has not one Meta and one Payload", file)
    [meta], [payload] = parts["Meta"], parts["Payload"]
    golden: dict[int, tuple[bytes, ...]] = {}
    seen: set[int] = set()
    for resource in payload:
        index, active, values = _golden(resource, file)
        if index in seen:
            raise refuse(f"measurement {index} stands twice", file)
        seen.add(index)
        if active:
            golden[index] = values
    if not golden:
        raise refuse("no measurement of it is active", file)
    version = _attribute(meta, "colloquialVersion", file)
    return Rim(
        file=file,
        role=_role(version, file),
        tag_id=_attribute(root, "tagId", file),
        name=_attribute(root, "name", file),
        product=_attribute(meta, "product", file),
        version=version,
        manufacturer=_attribute(meta, _TCG + "FirmwareManufacturerId", file),
        golden=golden,
        records=len(seen),
        chain=chain,
        signed=signed,
    )

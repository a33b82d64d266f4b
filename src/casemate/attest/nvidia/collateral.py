"""What comes with an NVIDIA report: its certificates, reference values, revocation answers.

Sources: DSP0274 1.1 (device certificates: the subject's DMTF name ``vendor:product:serial``); TCG
DICE Attestation Architecture 1.1, section 6.1 (TcbInfo, 2.23.133.5.4.1.1); for Hopper and its
switches 2.23.133.5.4.1 with a version, the device's key and the FWID.

Files, as in an evidence folder: ``cert_chain.pem``, leaf first (the root may be left out; one that
comes is never trusted for that); reference values in files that end in ``.xml`` or ``.swidtag``;
``*.ocsp`` and ``*.crl`` with what NVIDIA's responder and authorities answered. ``device_root.pem``
and ``rim_root.pem`` are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from casemate.attest import crl, der, roots, x509
from casemate.attest.nvidia import ocsp
from casemate.attest.verdict import Refused, refusal

DMTF_NAME: Final = "1.3.6.1.4.1.412.274.1"
TCB_INFO: Final = "2.23.133.5.4.1.1"
COMPOSITE: Final = "2.23.133.5.4.1"
_SHA384: Final = "2.16.840.1.101.3.4.2.2"
CHIP: Final = re.compile(r"(?:GH|GB|GR)[0-9]{2,3}[A-Z]?|LS_[0-9]{2,3}")
_SWITCHES: Final = "LS"
MAX_RIMS: Final = 4
DEVICE_ROOT, RIM_ROOT = "nvidia-device-identity.pem", "nvidia-corim-signing.pem"


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that a chain is about. path: leaf (the report's key) to root, with names.

    chip: ``GH100``, ``GB100``, ``LS_10``; its family in the first two letters. device_id: the
    serial in its DMTF name, "" where it has none. fwid: of the firmware that holds the leaf's key,
    b"" where the leaf names none.
    """

    path: tuple[tuple[x509.Certificate, str], ...]
    chip: str
    device_id: str
    fwid: bytes

    @property
    def leaf(self) -> x509.Certificate:
        return self.path[0][0]

    @property
    def identity(self) -> x509.Certificate:
        """The certificate of the device's own key, which outlives its firmware."""
        return self.path[1][0]

    @property
    def family(self) -> str:
        return self.chip[:2]

    @property
    def is_switch(self) -> bool:
        return self.family == _SWITCHES


@dataclass(frozen=True)
class Answers:
    """Revocation answers by file name."""

    responses: Mapping[str, ocsp.Response]
    lists: Mapping[str, crl.RevocationList]


@cache
def carried(name: str) -> x509.Certificate:
    """A root that casemate carries: :data:`DEVICE_ROOT` or :data:`RIM_ROOT`."""
    return x509.parse((resources.files(roots.__package__) / name).read_bytes(), name)


def completed(
    path: tuple[tuple[x509.Certificate, str], ...], root: str
) -> tuple[tuple[x509.Certificate, str], ...]:
    """The path, ended with the carried root where the chain came without its root."""
    last, own = path[-1][0], carried(root)
    if last.subject != last.issuer and last.issuer == own.subject:
        return (*path, (own, root))
    return path


def _refuse(reason: str, message: str) -> Refused:
    return refusal(f"parse-{reason}", message, "cert_chain.pem")


def _dmtf_name(leaf: x509.Certificate) -> list[str]:
    """vendor, product and serial in the subject's alternative name, [] where it has none."""
    extension = leaf.extensions.get(x509.ALTERNATIVE_NAME)
    names = der.Reader(der.only(extension.value, der.SEQUENCE) if extension else b"")
    while names:
        tag, content, _ = names.element()
        other = der.Reader(content)
        if tag != der.context(0) or der.oid(other.read(der.OID)) != DMTF_NAME:
            continue
        value = other.enter(der.context(0))
        found = der.text(der.UTF8_STRING, value.read(der.UTF8_STRING)).split(":")
        if len(found) != 3 or not all(found):
            raise der.DerError("a name that is not vendor, product and serial")
        return found
    return []


def _digest(reader: der.Reader) -> bytes:
    """A FWID: algorithm and digest."""
    if der.oid(reader.read(der.OID)) != _SHA384:
        raise der.DerError("a FWID of another hash than SHA-384")
    found = reader.read(der.OCTET_STRING)
    reader.end()
    return found


def _fwid(leaf: x509.Certificate) -> bytes:
    if TCB_INFO in leaf.extensions:
        info = der.Reader(der.only(leaf.extensions[TCB_INFO].value, der.SEQUENCE))
        while info:
            tag, content, _ = info.element()
            if tag == der.context(6):
                return _digest(der.Reader(content).enter())
    elif COMPOSITE in leaf.extensions:
        info = der.Reader(der.only(leaf.extensions[COMPOSITE].value, der.SEQUENCE))
        der.integer(info.read(der.INTEGER))
        info.raw(der.SEQUENCE)
        found = _digest(info.enter())
        info.end()
        return found
    return b""


def device(files: Mapping[str, bytes]) -> Device:
    """The device's chain. Raises ``needs-cert-chain`` and ``evidence.parse-*``:

    1. two certificates at least, in PEM (``certificate``);
    2. the leaf's name, its DMTF name and its FWID are well-formed and speak of one chip
       (``device``).

    Whose word it is, is for ``verify``.
    """
    if "cert_chain.pem" not in files:
        raise refusal(
            "needs-cert-chain", "The device's certificates are not there.", "cert_chain.pem",
            "Ask the operator for the device's certificate chain.",
        )  # fmt: skip
    found = x509.bundle(files["cert_chain.pem"], "cert_chain.pem")
    path = completed(tuple((c, f"cert_chain.pem[{n}]") for n, c in enumerate(found)), DEVICE_ROOT)
    if len(path) < 3:
        raise _refuse("device", "The chain has no certificate of a device.")
    leaf = found[0]
    try:
        name, fwid = _dmtf_name(leaf), _fwid(leaf)
    except der.DerError as e:
        raise _refuse("device", f"The leaf certificate names no device: {e}.") from None
    chips = {c.name().partition(" ")[0] for c in found[:2]} | set(name[1:2])
    if len(chips) != 1:
        raise _refuse("device", "The certificates speak of several chips.")
    return Device(path=path, chip=chips.pop(), device_id=name[2].lower() if name else "", fwid=fwid)


def rim_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that hold reference values, by name."""
    return {n: data for n, data in sorted(files.items()) if n.endswith((".xml", ".swidtag"))}


def answers(files: Mapping[str, bytes]) -> Answers:
    """The revocation answers in ``files``. Raises ``evidence.parse-ocsp``, ``parse-crl``."""
    return Answers(
        {n: ocsp.parse(data, n) for n, data in sorted(files.items()) if n.endswith(".ocsp")},
        {n: crl.parse(data, n) for n, data in sorted(files.items()) if n.endswith(".crl")},
    )

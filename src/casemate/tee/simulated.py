"""A simulated SEV-SNP TEE: evidence of the true binary form, by a chain of its own.

NOTHING HERE PROTECTS ANYTHING FROM THE OPERATOR. Its root key, and the sealing key, are files in
the state folder. It is there so that everything else runs the same on a laptop as on hardware: the
reports are of version 3 in AMD's layout, signed with ECDSA P-384, the certificates have AMD's
names, algorithms and extensions (RSA-4096 ARK and ASK signing with RSASSA-PSS, a VCEK for each
start), as of a Genoa chip. Only the root differs, and each certificate's organisation says
``SIMULATED``. The measurement is SHA-384 over the installed casemate's files.

Keys of certificates come from OpenSSL's generator; sealing key, ids and chip from ``rng``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from casemate.attest.binding import REPORT_DATA_BYTES, carried
from casemate.attest.snp import abi, collateral
from casemate.attest.x509 import parse as parse_certificate
from casemate.seams import Clock, Disk, Rng
from casemate.seams.files import load, store
from casemate.spec.errors import LedgerError
from casemate.spec.evidence import Evidence
from casemate.tee import errors

CHAIN_FILE: Final = "tee/SIMULATED-chain.pem"
SEALING_FILE: Final = "tee/SIMULATED-sealing-key.txt"
LABEL: Final = (
    "SIMULATED TEE, FOR DEVELOPMENT ONLY. Whoever reads this file can forge this server's evidence"
    " and open its sealed state."
)
ORGANISATION: Final = "SIMULATED by casemate, no hardware"

PRODUCT: Final = "Genoa"
_PRODUCT_NAME: Final = "Genoa-B1"
_CPUID: Final = (0x19, 0x11, 0x01)
_TCB: Final = {"bootloader": 10, "tee": 0, "snp": 25, "microcode": 84}
_GUEST_POLICY: Final = 1 << 17 | 1 << 16  # SMT allowed; no debug, no migration
_PLATFORM_INFO: Final = 0x25  # SMT, ECC, alias check complete
_FIRMWARE: Final = (1, 55, 39)

_DAY: Final = timedelta(days=1)
_ROOT_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
_ROOT_TO: Final = datetime(2045, 1, 1, tzinfo=UTC)
_PSS: Final = padding.PSS(padding.MGF1(hashes.SHA384()), 48)


def _files(folder: Traversable, path: str = "") -> Iterator[tuple[str, bytes]]:
    for item in sorted(folder.iterdir(), key=lambda x: x.name):
        name = f"{path}{item.name}"
        if item.is_dir():
            if item.name != "__pycache__":
                yield from _files(item, f"{name}/")
        elif not item.name.endswith(".pyc"):
            yield name, item.read_bytes()


@cache
def measurement() -> bytes:
    """SHA-384 over the installed casemate's files: the same code has the same measurement.

    Hashed is ``"<SHA-384 of the file in hex>  <path>\\n"`` of each file, in the order of paths.
    """
    lines = sorted((path, hashlib.sha384(data).hexdigest()) for path, data in
                   _files(resources.files("casemate")))  # fmt: skip
    text = "".join(f"{digest}  {path}\n" for path, digest in lines)
    return hashlib.sha384(text.encode()).digest()


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _certificate(
    subject: str,
    issuer: str,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    serial: int,
    validity: tuple[datetime, datetime],
    extensions: list[tuple[x509.ExtensionType, bool]],
    signer: rsa.RSAPrivateKey,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer, hashes.SHA384(), rsa_padding=_PSS)


def _authority(depth: int | None, *, crl: bool) -> list[tuple[x509.ExtensionType, bool]]:
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=crl,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return [(x509.BasicConstraints(ca=True, path_length=depth), True), (usage, True)]


def _amd(arcs: str, value: bytes) -> tuple[x509.ExtensionType, bool]:
    oid = x509.ObjectIdentifier(f"{collateral.OID}.{arcs}")
    return x509.UnrecognizedExtension(oid, value), False


def _der_integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([0x02, len(content)]) + content


def _vcek_extensions(tcb: bytes, hwid: bytes) -> list[tuple[x509.ExtensionType, bool]]:
    name = _PRODUCT_NAME.encode()
    line = collateral.PRODUCTS[PRODUCT]
    return [
        _amd("1", _der_integer(0)),
        _amd("2", bytes([0x16, len(name)]) + name),
        *(
            _amd(f"3.{arc}", _der_integer(byte))
            for (_, arc), byte in zip(line.tcb, tcb, strict=True)
        ),
        _amd("4", hwid),
    ]


@dataclass(frozen=True)
class _Chain:
    """The two certificates in PEM, and the ASK's key, which signs VCEKs."""

    ark: bytes
    ask: bytes
    ask_key: rsa.RSAPrivateKey


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _make_chain() -> tuple[_Chain, bytes]:
    """A new chain and the text that keeps it. The ARK's key is forgotten: it signs nothing more."""
    ark_key = rsa.generate_private_key(65537, 4096)
    ask_key = rsa.generate_private_key(65537, 4096)
    validity = (_ROOT_FROM, _ROOT_TO)
    ark_name, ask_name = f"ARK-{PRODUCT}", f"SEV-{PRODUCT}"
    ark = _certificate(
        ark_name, ark_name, ark_key.public_key(), 0x20000, validity,
        _authority(None, crl=True), ark_key,
    )  # fmt: skip
    ask = _certificate(
        ask_name, ark_name, ask_key.public_key(), 0x20001, validity,
        _authority(0, crl=False), ark_key,
    )  # fmt: skip
    key = ask_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    text = f"# {LABEL}\n".encode() + key + _pem(ask) + _pem(ark)
    return _Chain(_pem(ark), _pem(ask), ask_key), text


def _damaged(path: str) -> LedgerError:
    return errors.state(
        path,
        f"The simulated TEE's file {path} is damaged.",
        "Restore it, or remove it: a new one is made, and what the old one sealed stays shut.",
    )


def _read_chain(text: bytes) -> _Chain:
    begin = b"-----BEGIN "
    try:
        head, *blocks = text.split(begin)
        key, ask, ark = (begin + block for block in blocks)
        ask_key = serialization.load_pem_private_key(key, None)
        for pem, holder in ((ark, None), (ask, ask_key)):
            certificate = x509.load_pem_x509_certificate(pem)
            if holder is not None and certificate.public_key() != holder.public_key():
                raise ValueError("the key is not the certificate's")
    except (ValueError, TypeError):
        raise _damaged(CHAIN_FILE) from None
    if head != f"# {LABEL}\n".encode() or not isinstance(ask_key, rsa.RSAPrivateKey):
        raise _damaged(CHAIN_FILE)
    return _Chain(ark, ask, ask_key)


def _chain(disk: Disk) -> _Chain:
    text = load(disk, CHAIN_FILE)
    if text is not None:
        return _read_chain(text)
    chain, text = _make_chain()
    store(disk, CHAIN_FILE, text)
    return chain


def _sealing_secret(disk: Disk, rng: Rng) -> bytes:
    text = load(disk, SEALING_FILE)
    if text is None:
        secret = rng.bytes(32)
        store(disk, SEALING_FILE, f"# {LABEL}\n{secret.hex()}\n".encode())
        return secret
    head, _, rest = text.partition(b"\n")
    try:
        secret = bytes.fromhex(rest.decode("ascii"))
    except ValueError:
        raise _damaged(SEALING_FILE) from None
    if head != f"# {LABEL}".encode() or len(secret) != 32:
        raise _damaged(SEALING_FILE)
    return secret


def _tcb_bytes() -> bytes:
    return bytes(_TCB.get(name, 0) for name, _ in collateral.PRODUCTS[PRODUCT].tcb)


def _vcek(
    chain: _Chain, key: ec.EllipticCurvePublicKey, start: datetime, tcb: bytes, hwid: bytes
) -> x509.Certificate:
    return _certificate(
        "SEV-VCEK",
        f"SEV-{PRODUCT}",
        key,
        1,  # AMD writes 0, which RFC 5280 forbids and the builder refuses
        (start - _DAY, start + 7 * 365 * _DAY),
        _vcek_extensions(tcb, hwid),
        chain.ask_key,
    )


class SimulatedTee:
    """See the module. ``root`` is the fingerprint to pin with ``Trust.simulated(root)``."""

    kind: Final = "sev-snp"
    simulated: Final = True
    sealing: Final = "development-file"

    def __init__(self, disk: Disk, rng: Rng, clock: Clock) -> None:
        self._chain = _chain(disk)
        self._secret = _sealing_secret(disk, rng)
        self.root = parse_certificate(self._chain.ark, CHAIN_FILE).fingerprint
        self.measurement = measurement().hex()
        # As on hardware the chip stays the same over restarts.
        self._chip = hashlib.sha512(b"casemate/simulated-chip/v1" + self._chain.ark).digest()
        self._report_id = rng.bytes(32)
        self._key = ec.generate_private_key(ec.SECP384R1())
        start = datetime.fromtimestamp(clock.wall() // 1, UTC)
        vcek = _vcek(self._chain, self._key.public_key(), start, _tcb_bytes(), self._chip)
        self._vcek = vcek.public_bytes(serialization.Encoding.DER)

    def attest(self, report_data: bytes) -> Evidence:
        """A fresh report over these 64 bytes; ValueError for another length."""
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report_data has {len(report_data)} bytes, not {REPORT_DATA_BYTES}")
        return self._evidence(abi.pack(self._fields(carried(self.kind, report_data))))

    def sealing_key(self, label: str) -> bytes:
        """HKDF-SHA256 of the development secret, for this label."""
        info = b"casemate/simulated-sealing/v1|" + label.encode()
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(self._secret)

    def _evidence(self, signed: bytes) -> Evidence:
        """The report of which ``signed`` is bytes 0x000 to 0x29f, with its chain."""
        r, s = utils.decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA384())))
        signature = b"".join(x.to_bytes(abi.COMPONENT_BYTES, "little") for x in (r, s))
        files = {
            "report.bin": (signed + signature).ljust(abi.REPORT_BYTES, b"\0"),
            "vcek.der": self._vcek,
            "ask.pem": self._chain.ask,
            "ark.pem": self._chain.ark,
        }
        return Evidence(tee=self.kind, simulated=True, files=files)

    def _fields(self, field: bytes) -> dict[str, int | bytes]:
        major, minor, build = _FIRMWARE
        family, model, step = _CPUID
        tcb = _tcb_bytes()
        return {
            "version": 3,
            "policy": _GUEST_POLICY,
            "signature_algo": abi.ECDSA_P384_SHA384,
            "platform_info": _PLATFORM_INFO,
            "report_data": field,
            "measurement": measurement(),
            "report_id": self._report_id,
            "report_id_ma": b"\xff" * 32,
            "cpuid_fam_id": family,
            "cpuid_mod_id": model,
            "cpuid_step": step,
            "chip_id": self._chip,
            **{f"{x}_tcb": tcb for x in ("current", "reported", "committed", "launch")},
            **{f"{x}_major": major for x in ("current", "committed")},
            **{f"{x}_minor": minor for x in ("current", "committed")},
            **{f"{x}_build": build for x in ("current", "committed")},
        }

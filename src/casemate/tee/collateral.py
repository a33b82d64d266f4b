"""Collateral on the server, so that a client needs no network.

What each kind of evidence needs beside what its machine gives, from where, as one table
(:data:`SOURCES`): each row looks at the evidence and says what to ask for.

 - SEV-SNP: AMD's Key Distribution Service (publication 57230, section 4): VCEK of this chip at this
   TCB, ASK and ARK of the product line (or ASVK and ARK), the revocation list.
 - SGX, TDX: Intel's Provisioning Certification Service, version 4: TCB info of this FMSPC, QE
   identity, PCK revocation list of the CA that issued, and the root's.
 - NVIDIA: the RIM service: reference values of this driver and this VBIOS.
 - TPM: issuers of the AK's certificate, as it names them (RFC 5280, section 4.2.2.1).

Nothing is trusted for having been fetched: a client's verifier checks all of it against its own
pinned roots. Files stand in ``collateral/<part>/`` of the state folder (``cpu``, ``gpu0``), each
with where it came from and when in ``collateral/index.json``. What cannot be fetched leaves what
was there before.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import quote, unquote

from casemate.attest import x509
from casemate.attest.azure import abi as azure_abi
from casemate.attest.binding import split
from casemate.attest.dcap import abi as dcap_abi
from casemate.attest.dcap import pck
from casemate.attest.nvidia import abi as nvidia_abi
from casemate.attest.nvidia import collateral as nvidia_collateral
from casemate.attest.snp import abi as snp_abi
from casemate.attest.snp import collateral as snp_collateral
from casemate.seams import Disk
from casemate.seams.files import load, store
from casemate.spec import canonical
from casemate.spec.errors import CasemateError, EvidenceError
from casemate.tee import snp_certificates
from casemate.tee.fetch import Ask, Fetch, Reply, answered, failed
from casemate.tee.protocol import Tee

FOLDER: Final = "collateral"
INDEX: Final = "collateral/index.json"
CPU: Final = "cpu"
AMD: Final = "https://kdsintf.amd.com"
INTEL: Final = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
NVIDIA: Final = "https://rim.attestation.nvidia.com/v1/rim"
MAX_ISSUERS: Final = 4

_FILE: Final = re.compile(r"[a-z0-9_]{1,40}\.[a-z]{3,4}")
_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"
_AIA: Final = "1.3.6.1.5.5.7.1.1"
# id-ad-caIssuers, then uniformResourceIdentifier.
_CA_ISSUERS: Final = re.compile(
    rb"\x06\x08\x2b\x06\x01\x05\x05\x07\x30\x02\x86(?:([\x00-\x7f])|\x81([\x80-\xff]))(http[!-~]+)"
)


@dataclass(frozen=True)
class Wanted:
    """``take``: files from a reply; ValueError or ``CasemateError`` for one that is none."""

    what: str
    url: str
    take: Callable[[Reply], dict[str, bytes]]


Files: TypeAlias = Mapping[str, bytes]


@dataclass(frozen=True)
class Outcome:
    """One question and what came of it. ``error``: "" when ``files`` were stored."""

    part: str
    what: str
    url: str
    files: tuple[str, ...]
    error: str


@dataclass(frozen=True)
class Stored:
    """A file that is kept. ``fetched``: Unix seconds; ``age``: seconds at the time of asking."""

    part: str
    file: str
    url: str
    fetched: float
    age: float
    size: int


def _as(file: str) -> Callable[[Reply], dict[str, bytes]]:
    return lambda reply: {file: reply.body}


def _der(file: str) -> Callable[[Reply], dict[str, bytes]]:
    def take(reply: Reply) -> dict[str, bytes]:
        body = reply.body
        if body[:1] != b"\x30":
            raise ValueError("it is no DER")
        return {file: body}

    return take


def _pems(data: bytes) -> list[bytes]:
    return [_BEGIN + part.rstrip() + b"\n" for part in data.split(_BEGIN)[1:]]


# AMD.


def _amd_line(report: snp_abi.Report) -> str:
    """By CPUID, which reports have from version 3."""
    family, model = report.cpuid_fam_id, report.cpuid_mod_id
    for name, line in snp_collateral.PRODUCTS.items():
        if any(family == f and model in models for f, models in line.cpuid):
            return name
    raise ValueError("the report does not say of which product line its chip is")


def _amd_chain(intermediate: str) -> Callable[[Reply], dict[str, bytes]]:
    def take(reply: Reply) -> dict[str, bytes]:
        found = _pems(reply.body)
        if len(found) != 2:
            raise ValueError(f"a chain of {len(found)} certificates")
        return {intermediate: found[0], "ark.pem": found[1]}

    return take


_TCB_QUERY: Final = {
    "fmc": "fmcSPL", "bootloader": "blSPL", "tee": "teeSPL", "snp": "snpSPL",
    "microcode": "ucodeSPL",
}  # fmt: skip


def _amd(report_bytes: bytes, files: Files) -> Iterator[Wanted]:
    report = snp_abi.parse(report_bytes)
    key = report.signing_key
    held = "vcek.der" if key == "VCEK" else "vlek.der"
    line = _line_of(report, files)
    intermediate = snp_collateral.INTERMEDIATES[key].file
    if key == "VCEK":
        if not any(report.chip_id):
            raise ValueError("the host hides the chip's id, so its VCEK cannot be asked for")
        tcb = snp_collateral.tcb_components(line, report.reported_tcb)
        query = "&".join(f"{_TCB_QUERY[name]}={value:02d}" for name, value in tcb.items())
        chip = report.chip_id[: snp_collateral.PRODUCTS[line].hwid].hex()
        yield Wanted("VCEK", f"{AMD}/vcek/v1/{line}/{chip}?{query}", _der(held))
    service = key.lower()
    chain = _amd_chain(intermediate)
    yield Wanted("certificates", f"{AMD}/{service}/v1/{line}/cert_chain", chain)
    yield Wanted("revocation list", f"{AMD}/{service}/v1/{line}/crl", _der("crl.der"))


def _line_of(report: snp_abi.Report, files: Files) -> str:
    """The product line by the certificate at hand, else by CPUID."""
    try:
        return snp_collateral.parse(files).product
    except EvidenceError:
        return _amd_line(report)


# Intel.


def _pcs(file: str, member: str, header: str, chain: str) -> Callable[[Reply], dict[str, bytes]]:
    """A document as it came, and its issuer chain from the reply's header."""

    def take(reply: Reply) -> dict[str, bytes]:
        found = json.loads(reply.body)
        if not isinstance(found, dict) or set(found) != {member, "signature"}:
            raise ValueError(f"no {member}")
        return {file: reply.body, chain: _issuers(reply, header)}

    return take


def _pck_crl(reply: Reply) -> dict[str, bytes]:
    taken = _der("pck_crl.der")(reply)
    return {**taken, "pck_crl_issuer_chain.pem": _issuers(reply, "sgx-pck-crl-issuer-chain")}


def _issuers(reply: Reply, header: str) -> bytes:
    chain = unquote(reply.headers.get(header, "")).encode()
    if not _pems(chain):
        raise ValueError(f"no {header}")
    return b"".join(_pems(chain))


def _intel(quote_bytes: bytes, tee: str) -> Iterator[Wanted]:
    parsed = dcap_abi.parse(quote_bytes)
    if parsed.certification_type != dcap_abi.PCK_CHAIN:
        raise ValueError("the quote does not hold its PCK certificate")
    leaf = pck.chain(parsed.certification_data, "the quote's PCK chain")[0]
    fmspc = pck.platform(leaf, "PCK certificate").fmspc.hex()
    issuer = "processor" if b"Processor" in leaf.issuer else "platform"
    base = f"{INTEL}/{tee}/certification/v4"
    yield Wanted(
        "TCB info", f"{base}/tcb?fmspc={fmspc}",
        _pcs("tcb_info.json", "tcbInfo", "tcb-info-issuer-chain", "tcb_signing_chain.pem"),
    )  # fmt: skip
    yield Wanted(
        "QE identity", f"{base}/qe/identity",
        _pcs(
            "qe_identity.json", "enclaveIdentity", "sgx-enclave-identity-issuer-chain",
            "tcb_signing_chain.pem",
        ),
    )  # fmt: skip
    crl = f"{INTEL}/sgx/certification/v4/pckcrl?ca={issuer}&encoding=der"
    yield Wanted("PCK revocation list", crl, _pck_crl)
    yield Wanted("root revocation list", INTEL_ROOT_CRL, _der("root_ca_crl.der"))


def _azure(files: Files) -> Iterator[Wanted]:
    report = azure_abi.parse(files["hcl_report.bin"])
    if report.hardware == "snp":
        return _amd(report.report, files)
    return _intel(files["td_quote.bin"], "tdx")


# NVIDIA.


def _rim(file: str) -> Callable[[Reply], dict[str, bytes]]:
    def take(reply: Reply) -> dict[str, bytes]:
        found = json.loads(reply.body)
        text = found.get("rim") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise ValueError("no rim")
        return {file: base64.b64decode(text, validate=True)}

    return take


def rim_ids(report: nvidia_abi.Report, device: nvidia_collateral.Device) -> dict[str, str]:
    """File to the id under which the RIM service has it."""
    version = report.vbios_version.replace(".", "").upper()
    if device.is_switch:
        return {"bios_rim.xml": f"NV_SWITCH_BIOS_5612_0002_890_{version}"}
    texts = report.texts
    board = "_".join(texts.get(name, "") for name in ("PROJECT", "PROJECT_SKU", "CHIP_SKU"))
    hopper = device.chip.replace("_", "") == "GH100"
    chip = device.chip.replace("_", "")
    driver = "NV_GPU_DRIVER_GH100" if hopper else f"NV_GPU_CC_DRIVER_{chip}"
    return {
        "driver_rim.xml": f"{driver}_{report.driver_version}",
        "vbios_rim.xml": f"NV_GPU_VBIOS_{board.upper()}_{version}",
    }


def _nvidia(files: Files) -> Iterator[Wanted]:
    report = nvidia_abi.parse(files["report.bin"])
    for file, name in rim_ids(report, nvidia_collateral.device(files)).items():
        yield Wanted(file.split("_")[0] + " RIM", f"{NVIDIA}/{quote(name)}", _rim(file))


# TPM.


def _issuer_url(data: bytes) -> str:
    found = x509.parse(data, "certificate").extensions.get(_AIA)
    match = _CA_ISSUERS.search(found.value) if found is not None else None
    if match is None:
        return ""
    size = (match[1] or match[2])[0]
    return match[3][:size].decode("ascii")


def _tpm(files: Files) -> Iterator[Wanted]:
    """The next issuer that is not there yet."""
    name = next((n for n in ("ak_cert.der", "aik_cert.der") if n in files), "")
    for n in range(1, MAX_ISSUERS + 1):
        if not name or not (url := _issuer_url(snp_certificates.der(files[name]))):
            return
        name = f"issuer{n}.der"
        if name not in files:
            yield Wanted(f"issuer {n}", url, _der(name))
            return


# One row for each kind of evidence that needs something; those without a row need nothing.
SOURCES: Final[dict[str, Callable[[Files], Iterator[Wanted]]]] = {
    "sev-snp": lambda files: _amd(files["report.bin"], files),
    "tdx": lambda files: _intel(files["quote.bin"], "tdx"),
    "sgx": lambda files: _intel(files["quote.bin"], "sgx"),
    "azure-cvm": _azure,
    "nvidia": _nvidia,
    "tpm": _tpm,
}


# What is kept.


def _index(disk: Disk) -> dict[str, dict[str, canonical.Json]]:
    """``part/file`` to url and time; a damaged index is an empty one: it can be fetched again."""
    data = load(disk, INDEX)
    try:
        found = canonical.decode(data) if data is not None else {}
    except CasemateError:
        found = {}
    if not isinstance(found, dict):
        return {}
    return {
        path: row
        for path, row in found.items()
        if isinstance(row, dict)
        and isinstance(row.get("url"), str)
        and type(row.get("fetched")) is int
    }


def keep(disk: Disk, part: str, files: Files, url: str, now: float) -> None:
    """Store files of one part as fetched from ``url`` at ``now``; ValueError for a name that is
    none of collateral's."""
    for file, data in files.items():
        if not _FILE.fullmatch(file):
            raise ValueError(f"{file!r} is no name of collateral")
        store(disk, f"{FOLDER}/{part}/{file}", data)
    rows = _index(disk)
    for file in files:
        rows[f"{part}/{file}"] = {"url": url, "fetched": int(now)}
    store(disk, INDEX, canonical.encode(rows))


def files(disk: Disk, part: str = CPU) -> dict[str, bytes]:
    """What is kept for a part (``cpu``, or a device's name), by file name."""
    out = {}
    for path in _index(disk):
        own, _, file = path.partition("/")
        if own == part and _FILE.fullmatch(file):
            data = load(disk, f"{FOLDER}/{own}/{file}")
            if data is not None:
                out[file] = data
    return out


def stored(disk: Disk, now: float) -> tuple[Stored, ...]:
    """All that is kept, with its age; the oldest first. ``now``: Unix seconds."""
    out = []
    for path, row in _index(disk).items():
        part, _, file = path.partition("/")
        data = load(disk, f"{FOLDER}/{part}/{file}") if _FILE.fullmatch(file) else None
        if data is not None:
            fetched = float(row["fetched"])  # type: ignore[arg-type]
            out.append(Stored(part, file, str(row["url"]), fetched, now - fetched, len(data)))
    return tuple(sorted(out, key=lambda row: (row.fetched, row.part, row.file)))


def _fetched(
    wanted: Wanted, part: str, disk: Disk, fetch: Fetch, now: float
) -> tuple[Outcome, dict[str, bytes]]:
    try:
        taken = wanted.take(answered(fetch, Ask(wanted.url)))
        keep(disk, part, taken, wanted.url, now)
    except (ValueError, binascii.Error) as e:
        reason = failed(wanted.url, str(e)[:80]).message
        return Outcome(part, wanted.what, wanted.url, (), reason), {}
    except CasemateError as e:
        return Outcome(part, wanted.what, wanted.url, (), e.message), {}
    return Outcome(part, wanted.what, wanted.url, tuple(sorted(taken)), ""), taken


def _part(
    kind: str, part: str, made: Files, disk: Disk, fetch: Fetch, now: float
) -> Iterator[Outcome]:
    """All questions of one part: again after each round that brought something new to ask."""
    known, asked = dict(made), set[str]()
    try:
        while new := [w for w in SOURCES[kind](known) if w.url not in asked]:
            for wanted in new:
                asked.add(wanted.url)
                outcome, taken = _fetched(wanted, part, disk, fetch, now)
                known |= taken
                yield outcome
    except (EvidenceError, ValueError, KeyError) as e:
        yield Outcome(part, kind, "", (), str(getattr(e, "message", e))[:160])


def refresh(tee: Tee, disk: Disk, fetch: Fetch, now: float) -> tuple[Outcome, ...]:
    """Ask for all that the evidence of ``tee`` needs, and keep it in the state folder.

    now: Unix seconds, kept as the time of fetching. A question that fails is an outcome with an
    error; nothing is raised for it.
    """
    evidence = tee.attest(bytes(64))
    if evidence.simulated:
        return ()
    own, further = split(evidence.files)
    out: list[Outcome] = []
    if evidence.tee in SOURCES:
        out += _part(evidence.tee, CPU, own, disk, fetch, now)
    for name, device in further.items():
        out += _part("nvidia", name, device, disk, fetch, now)
    return tuple(out)


def filler(disk: Disk) -> Callable[[str, Files], dict[str, bytes]]:
    """For ``HardwareTee``: what is kept for a part ("" is the CPU) and fits what was made."""

    def fill(part: str, made: Files) -> dict[str, bytes]:
        found = files(disk, part or CPU)
        if "report.bin" in made and not part:
            return snp_certificates.fitting(found, snp_abi.parse(made["report.bin"]).signing_key)
        return found

    return fill

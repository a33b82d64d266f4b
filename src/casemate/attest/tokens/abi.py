"""Tokens of attestation services: their files, and the claims that each service makes.

Sources: RFC 7519 (JWT), RFC 9711 (EAT; detached bundles in section 5), RFC 7515 (JWS, read in
:mod:`casemate.attest.jws`); Google, "Confidential Space attestation token claims"; Microsoft,
"Azure Attestation claim sets" and its EAT profile for TDX; Intel, "Trust Authority EAT profile"
(version 1: flat, version 2: one object for each TEE); NVIDIA, "Attestation claims guide", 3.0.

Files: ``token.jwt`` (a compact JWS) or ``detached_eat.json`` (``[["JWT", overall], {name: JWS}]``).
Claims keep the vendor's names, with ``_`` for ``-``. A claim of a known name must have its type;
``null`` counts as absent; claims of unknown names are kept in ``claims`` and not acted upon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Final, NoReturn, TypeVar

from casemate.attest import jws
from casemate.attest.jws import Jws, strict_json, strict_object
from casemate.attest.kind import Files
from casemate.attest.verdict import Refused, refusal
from casemate.spec.canonical import Json

TOKEN: Final = "token.jwt"
DETACHED: Final = "detached_eat.json"
MAX_DETACHED: Final = 1 << 20
MAX_DEVICES: Final = 64
MAX_ITEMS: Final = 256

GOOGLE, MAA, ITA, NRAS, OTHER = (
    "google-confidential-space", "azure-maa", "intel-trust-authority", "nvidia-nras", "token",
)  # fmt: skip
# Who issues tokens of which kind; one of no known service is an ``OTHER``.
_ISSUERS: Final = {
    GOOGLE: re.compile(r"https://confidentialcomputing\.googleapis\.com"),
    MAA: re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)*\.attest\.azure\.(net|us|cn)"),
    ITA: re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)*\.trustauthority\.intel\.com"
                    r"|(Intel )?Trust Authority"),
    NRAS: re.compile(r"https://nras\.attestation\.nvidia\.com"),
}  # fmt: skip

_DEVICE: Final = re.compile(r"[A-Za-z0-9._:-]{1,40}")  # NVIDIA writes GPU-0

T = TypeVar("T")


def _bad_claim(name: str, wanted: str) -> NoReturn:
    raise refusal("parse-claim", f"The claim {jws.plain(name)} is not {wanted}.", jws.plain(name))


def text(value: Json, name: str) -> str:
    if not isinstance(value, str) or len(value) > 8192:
        _bad_claim(name, "a text")
    return value


def flag(value: Json, name: str) -> bool:
    if not isinstance(value, bool):
        _bad_claim(name, "true or false")
    return value


def number(value: Json, name: str) -> int:
    if type(value) is not int or value < 0:
        _bad_claim(name, "a whole number")
    return value


def texts(value: Json, name: str) -> tuple[str, ...]:
    """A list of texts, or one."""
    if isinstance(value, str):
        return (text(value, name),)
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        _bad_claim(name, "a text or a list of texts")
    return tuple(text(item, name) for item in value)


def table(value: Json, name: str) -> Mapping[str, Json]:
    if not isinstance(value, dict):
        _bad_claim(name, "an object")
    return value


def words(value: Json, name: str) -> str:
    """A text, a number or a list of these, as one text: vendors differ from version to version."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return text(str(value), name)
    return " ".join(texts(value, name))


def _claim(read: Callable[[Json, str], Any], name: str = "", default: Any = None) -> Any:
    return field(default=default, metadata={"read": read, "claim": name})


def _as(cls: type[Any], name: str = "") -> dict[str, Any]:
    """For a claim that is an object with claims of its own."""

    def read(value: Json, where: str) -> Any:
        return claims_of(cls, table(value, where), f"{where}.")

    return {"read": read, "claim": name}


@cache
def _plan(cls: type[Any]) -> tuple[tuple[str, str, Callable[[Json, str], Any]], ...]:
    """Field, claim and reader of each claim of ``cls``."""
    return tuple(
        (f.name, f.metadata["claim"] or f.name, f.metadata["read"])
        for f in fields(cls)
        if "read" in f.metadata
    )


def claims_of(cls: type[T], found: Mapping[str, Json], prefix: str = "", **given: Any) -> T:
    """The dataclass ``cls`` from an object of claims. ``evidence.parse-claim``."""
    out = dict(given)
    for name, claim, read in _plan(cls):  # type: ignore[arg-type]
        value = found.get(claim)
        if value is not None:
            out[name] = read(value, prefix + claim)
    return cls(**out)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """Claims of RFC 7519 and RFC 9711 that all services make; times in Unix seconds. claims: all
    of the token's claims as they stand."""

    claims: Mapping[str, Json]
    iss: str = _claim(text, default="")
    sub: str = _claim(text, default="")
    aud: tuple[str, ...] = _claim(texts, default=())
    exp: int = _claim(number, default=-1)
    nbf: int | None = _claim(number)
    iat: int = _claim(number, default=-1)
    jti: str = _claim(text, default="")
    eat_nonce: tuple[str, ...] = _claim(texts, default=())
    eat_profile: str = _claim(text, default="")


@dataclass(frozen=True, kw_only=True)
class ConfidentialSpace:
    support_attributes: tuple[str, ...] = _claim(texts, default=())
    monitoring_enabled: Mapping[str, Json] | None = _claim(table)


@dataclass(frozen=True, kw_only=True)
class Container:
    image_reference: str = _claim(text, default="")
    image_digest: str = _claim(text, default="")
    image_id: str = _claim(text, default="")
    restart_policy: str = _claim(text, default="")
    args: tuple[str, ...] = _claim(texts, default=())
    env: Mapping[str, Json] | None = _claim(table)
    env_override: Mapping[str, Json] | None = _claim(table)
    cmd_override: tuple[str, ...] = _claim(texts, default=())


@dataclass(frozen=True, kw_only=True)
class Gce:
    zone: str = _claim(text, default="")
    project_id: str = _claim(text, default="")
    project_number: str = _claim(text, default="")
    instance_name: str = _claim(text, default="")
    instance_id: str = _claim(text, default="")


@dataclass(frozen=True, kw_only=True)
class Submods:
    confidential_space: ConfidentialSpace = field(
        default=ConfidentialSpace(), metadata=_as(ConfidentialSpace)
    )
    container: Container = field(default=Container(), metadata=_as(Container))
    gce: Gce = field(default=Gce(), metadata=_as(Gce))


@dataclass(frozen=True, kw_only=True)
class GoogleTdx:
    gcp_attester_tcb_status: str = _claim(text, default="")
    gcp_attester_tcb_date: str = _claim(text, default="")


@dataclass(frozen=True, kw_only=True)
class Google(Registered):
    """Claims of Google Cloud Attestation about Confidential Space."""

    secboot: bool | None = _claim(flag)
    oemid: int | None = _claim(number)
    hwmodel: str = _claim(text, default="")
    swname: str = _claim(text, default="")
    swversion: tuple[str, ...] = _claim(texts, default=())
    dbgstat: str = _claim(text, default="")
    attester_tcb: tuple[str, ...] = _claim(texts, default=())
    submods: Submods = field(default=Submods(), metadata=_as(Submods))
    tdx: GoogleTdx = field(default=GoogleTdx(), metadata=_as(GoogleTdx))
    google_service_accounts: tuple[str, ...] = _claim(texts, default=())


@dataclass(frozen=True, kw_only=True)
class Tee:
    """What Azure Attestation and Intel Trust Authority say of a TEE, in Intel's and Microsoft's
    names. Texts of digits are hex, as the services write them."""

    x_ms_attestation_type: str = _claim(text, "x-ms-attestation-type", "")
    x_ms_compliance_status: str = _claim(text, "x-ms-compliance-status", "")
    x_ms_policy_hash: str = _claim(text, "x-ms-policy-hash", "")
    x_ms_runtime: Mapping[str, Json] | None = _claim(table, "x-ms-runtime")
    secureboot: bool | None = _claim(flag)
    x_ms_sevsnpvm_is_debuggable: bool | None = _claim(flag, "x-ms-sevsnpvm-is-debuggable")
    x_ms_sevsnpvm_migration_allowed: bool | None = _claim(flag, "x-ms-sevsnpvm-migration-allowed")
    x_ms_sevsnpvm_launchmeasurement: str = _claim(text, "x-ms-sevsnpvm-launchmeasurement", "")
    x_ms_sevsnpvm_hostdata: str = _claim(text, "x-ms-sevsnpvm-hostdata", "")
    x_ms_sevsnpvm_reportdata: str = _claim(text, "x-ms-sevsnpvm-reportdata", "")
    x_ms_sevsnpvm_vmpl: int | None = _claim(number, "x-ms-sevsnpvm-vmpl")
    x_ms_sevsnpvm_bootloader_svn: int | None = _claim(number, "x-ms-sevsnpvm-bootloader-svn")
    x_ms_sevsnpvm_tee_svn: int | None = _claim(number, "x-ms-sevsnpvm-tee-svn")
    x_ms_sevsnpvm_snpfw_svn: int | None = _claim(number, "x-ms-sevsnpvm-snpfw-svn")
    x_ms_sevsnpvm_microcode_svn: int | None = _claim(number, "x-ms-sevsnpvm-microcode-svn")
    x_ms_sgx_is_debuggable: bool | None = _claim(flag, "x-ms-sgx-is-debuggable")
    x_ms_sgx_mrenclave: str = _claim(text, "x-ms-sgx-mrenclave", "")
    x_ms_sgx_mrsigner: str = _claim(text, "x-ms-sgx-mrsigner", "")
    x_ms_sgx_report_data: str = _claim(text, "x-ms-sgx-report-data", "")
    x_ms_sgx_ehd: str = _claim(text, "x-ms-sgx-ehd", "")
    attester_type: str = _claim(text, default="")
    attester_tcb_status: str = _claim(text, default="")
    attester_tcb_date: str = _claim(text, default="")
    attester_advisory_ids: tuple[str, ...] = _claim(texts, default=())
    attester_held_data: str = _claim(text, default="")
    attester_user_data: str = _claim(text, default="")
    attester_runtime_data: Mapping[str, Json] | None = _claim(table)
    dbgstat: str = _claim(text, default="")
    is_debuggable: bool | None = _claim(flag, "is-debuggable")
    tdx_is_debuggable: bool | None = _claim(flag)
    tdx_td_attributes_debug: bool | None = _claim(flag)
    tdx_mrtd: str = _claim(text, default="")
    tdx_report_data: str = _claim(text, default="")
    sgx_is_debuggable: bool | None = _claim(flag)
    sgx_mrenclave: str = _claim(text, default="")
    sgx_mrsigner: str = _claim(text, default="")
    sgx_report_data: str = _claim(text, default="")
    sevsnp_is_debuggable: bool | None = _claim(flag)
    sevsnp_launchmeasurement: str = _claim(text, default="")
    sevsnp_reportdata: str = _claim(text, default="")


@dataclass(frozen=True, kw_only=True)
class Maa(Registered, Tee):
    """Claims of Azure Attestation. x_ms_isolation_tee: those about the hardware, where the token is
    about a confidential VM as a whole."""

    nonce: str = _claim(text, default="")
    x_ms_ver: str = _claim(text, "x-ms-ver", "")
    x_ms_isolation_tee: Tee | None = field(default=None, metadata=_as(Tee, "x-ms-isolation-tee"))

    @property
    def tee(self) -> Tee:
        return self.x_ms_isolation_tee or self

    @property
    def kind(self) -> str:
        return self.tee.x_ms_attestation_type


def _policies(value: Json, name: str) -> tuple[str, ...]:
    """Ids of policies: texts, or objects that hold an ``id``."""
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        _bad_claim(name, "a list")
    ids = (item.get("id") if isinstance(item, dict) else item for item in value)
    return tuple(text(one, name) for one in ids)


@dataclass(frozen=True, kw_only=True)
class Ita(Registered, Tee):
    """Claims of Intel Trust Authority, version 1 (flat) or 2 (an object for each TEE)."""

    ver: str = _claim(text, default="")
    nvgpu: Mapping[str, Json] | None = _claim(table)
    tpm: Mapping[str, Json] | None = _claim(table)
    policy_ids_matched: tuple[str, ...] = _claim(_policies, default=())
    policy_ids_unmatched: tuple[str, ...] = _claim(_policies, default=())
    verifier_nonce: Mapping[str, Json] | None = _claim(table)
    tdx: Tee | None = field(default=None, metadata=_as(Tee))
    sgx: Tee | None = field(default=None, metadata=_as(Tee))
    sevsnp: Tee | None = field(default=None, metadata=_as(Tee))

    def __post_init__(self) -> None:
        if sum(tee is not None for tee in (self.tdx, self.sgx, self.sevsnp)) > 1:
            _bad_claim("tdx, sgx, sevsnp", "of one TEE")

    @property
    def tee(self) -> Tee:
        return self.tdx or self.sgx or self.sevsnp or self

    @property
    def kind(self) -> str:
        """TDX, SGX or SEVSNP; as it is written where it is none of these."""
        for name, tee in (("TDX", self.tdx), ("SGX", self.sgx), ("SEVSNP", self.sevsnp)):
            if tee is not None:
                return name
        kind = self.attester_type
        return "SEVSNP" if "SNP" in kind.upper() else kind


def _digests(value: Json, name: str) -> dict[str, str]:
    """``{name: ["DIGEST", ["SHA-256", hex]]}`` (RFC 9711 section 4.2.18.2)."""
    out = {}
    for device, entry in table(value, name).items():
        match entry:
            case ["DIGEST", ["SHA-256", str(digest)]] if re.fullmatch(r"[0-9a-f]{64}", digest):
                out[device] = digest
            case _:
                _bad_claim(f"{name}.{device}", "a SHA-256 digest")
    if len(out) > MAX_DEVICES:
        _bad_claim(name, f"of at most {MAX_DEVICES} devices")
    return out


@dataclass(frozen=True, kw_only=True)
class Nras(Registered):
    """Claims of NVIDIA's service about a platform as a whole. submods: device to the SHA-256 (hex)
    of its own token."""

    x_nvidia_ver: str = _claim(text, "x-nvidia-ver", "")
    x_nvidia_overall_att_result: bool | None = _claim(flag, "x-nvidia-overall-att-result")
    submods: Mapping[str, str] = field(
        default_factory=dict, metadata={"read": _digests, "claim": ""}
    )


@dataclass(frozen=True, kw_only=True)
class Device(Registered):
    """Claims of NVIDIA's service about one GPU or switch."""

    measres: str = _claim(text, default="")
    secboot: bool | None = _claim(flag)
    dbgstat: str = _claim(text, default="")
    hwmodel: str = _claim(text, default="")
    ueid: str = _claim(words, default="")
    oemid: str = _claim(words, default="")
    x_nvidia_gpu_driver_version: str = _claim(text, "x-nvidia-gpu-driver-version", "")
    x_nvidia_gpu_vbios_version: str = _claim(text, "x-nvidia-gpu-vbios-version", "")
    x_nvidia_switch_bios_version: str = _claim(text, "x-nvidia-switch-bios-version", "")


CLAIMS: Final[dict[str, type[Registered]]] = {
    GOOGLE: Google, MAA: Maa, ITA: Ita, NRAS: Nras, OTHER: Registered,
}  # fmt: skip


@dataclass(frozen=True)
class Token:
    """One token: where it stands, the JWS and its claims."""

    where: str
    jws: Jws
    claims: Registered


@dataclass(frozen=True)
class Tokens:
    """A token of a service, and those of single devices that it names (NVIDIA's), in order.
    unsigned: what stands around the tokens and nothing signs, in words, or ""."""

    tee: str
    overall: Token
    devices: Mapping[str, Token]
    unsigned: str = ""

    @property
    def all(self) -> tuple[Token, ...]:
        return (self.overall, *self.devices.values())


def _token(raw: str, where: str, cls: type[Registered]) -> Token:
    found = jws.parse(raw, where)
    payload = strict_object(found.payload, f"the payload of {where}")
    claims = claims_of(cls, payload, claims=payload)
    for name in ("iss", "iat", "exp"):
        if name not in payload:
            _bad_claim(f"{name} of {where}", "there")
    return Token(where, found, claims)


def _split(data: bytes) -> tuple[str, int]:
    """The text of a token file without one line end, and that one's length."""
    end = 2 if data.endswith(b"\r\n") else int(data.endswith(b"\n"))
    try:
        return data[: len(data) - end].decode("ascii"), end
    except UnicodeDecodeError:
        raise refusal("parse-token", f"{TOKEN} is not ASCII.", TOKEN) from None


def _detached(data: bytes) -> Tokens:
    value = strict_json(data, DETACHED, MAX_DETACHED)
    match value:
        case [["JWT", str(overall)], dict(devices)] if len(devices) <= MAX_DEVICES:
            pass
        case _:
            raise refusal(
                "parse-token", f'{DETACHED} is not [["JWT", token], {{name: token}}].', DETACHED
            )
    found = {}
    for name, raw in devices.items():
        where = f"{DETACHED}[{jws.plain(name, 40)}]"
        if not isinstance(raw, str) or not _DEVICE.fullmatch(name):
            raise refusal("parse-token", f"{where} is no token.", where)
        found[name] = _token(raw, where, Device)
    return Tokens(NRAS, _token(overall, DETACHED, Nras), found, "the bundle around the tokens")


def parse(files: Files, tee: str) -> Tokens:
    """The tokens in ``files``, read as claims of the service ``tee``. Raises ``evidence.parse-*``:

    1. ``token.jwt`` is one compact JWS, but for one line end; ``detached_eat.json`` is strict JSON
       of an overall token and one token for each device (``token``).
    2. Header and payload are strict JSON, the header admits no change of what is signed
       (``base64``, ``json``, ``header``).
    3. Claims of known names have their types; ``iss``, ``iat`` and ``exp`` are there (``claim``).
    """
    if (TOKEN in files) == (DETACHED in files) or (DETACHED in files and tee != NRAS):
        raise refusal(
            "parse-token", f"The evidence is not one {tee} token in {TOKEN} or {DETACHED}.", TOKEN
        )
    if DETACHED in files:
        return _detached(files[DETACHED])
    raw, end = _split(files[TOKEN])
    return Tokens(tee, _token(raw, TOKEN, CLAIMS[tee]), {}, "the line end" if end else "")


def service(files: Files) -> str:
    """The service whose token ``files`` holds, by its issuer; ``OTHER`` for a token of none (or one
    that cannot be read), "" where there is no token."""
    if DETACHED in files:
        return NRAS
    if TOKEN not in files:
        return ""
    try:
        payload = strict_object(jws.parse(_split(files[TOKEN])[0], TOKEN).payload, TOKEN)
    except Refused:
        return OTHER
    issuer = payload.get("iss")
    if isinstance(issuer, str):
        for tee, pattern in _ISSUERS.items():
            if pattern.fullmatch(issuer):
                return tee
    return OTHER


def issuer_of(tee: str, issuer: str) -> bool:
    """Whether ``issuer`` is one of the service ``tee``."""
    return tee not in _ISSUERS or _ISSUERS[tee].fullmatch(issuer) is not None

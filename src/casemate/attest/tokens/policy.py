"""What tokens of each service must show.

Every field is its value or ``Unchecked("reason")``; ``keys`` and ``roots`` are lists, and an empty
one admits nobody. What is a list of admitted values takes a token that has one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import fields
from casemate.attest.kind import unpinned
from casemate.attest.tokens.collateral import GOOGLE_ROOTS
from casemate.attest.verdict import Unchecked

_AGES: Final = range(1, 366 * 86400)
_HEX: Final = (64, 96)  # SHA-256, SHA-384
_SHA256: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{43}")
# What Intel calls a platform that is up to date, or that wants care of the software on it.
GOOD_TCB: Final = (
    "UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
)  # fmt: skip


def _pins(found: object, pattern: re.Pattern[str], where: str) -> None:
    if not isinstance(found, tuple) or not all(
        isinstance(x, str) and pattern.fullmatch(x) for x in found
    ):
        raise fields.bad(f"{where} must be a list of pins, which may be empty.", where)


@dataclass(frozen=True, kw_only=True)
class TokenPolicy:
    """What all services' tokens have. issuers: ``iss``. audiences: ``aud``, one of them. keys:
    RFC 7638 thumbprints (SHA-256, base64url) of the issuer's keys. roots: SHA-256 (hex) of the
    SubjectPublicKeyInfo of authorities that the certificates of a token, or of a key in a key set,
    may end in; a key that neither list vouches for is never accepted. eat_profiles:
    ``eat_profile``. nonces: ``eat_nonce`` as written, where they are fixed; a challenger's own is
    checked as freshness. max_age: most seconds since ``iat``."""

    issuers: tuple[str, ...] | Unchecked
    audiences: tuple[str, ...] | Unchecked
    keys: tuple[str, ...]
    roots: tuple[str, ...]
    eat_profiles: tuple[str, ...] | Unchecked
    nonces: tuple[str, ...] | Unchecked
    max_age: int | Unchecked

    def __post_init__(self) -> None:
        for name in ("issuers", "audiences", "eat_profiles", "nonces"):
            fields.words(getattr(self, name), None, name)
        _pins(self.keys, _THUMBPRINT, "keys")
        _pins(self.roots, _DIGEST, "roots")
        fields.integer(self.max_age, _AGES, "max_age")

    def _words(self, *names: str) -> None:
        for name in names:
            fields.words(getattr(self, name), None, name)


@dataclass(frozen=True, kw_only=True)
class GooglePolicy(TokenPolicy):
    """Google Confidential Space. hwmodels, dbgstats, swnames, swversions: ``hwmodel`` and so on.
    support_attributes: all of these must be there. secure_boot: ``secboot``. image_digests
    (``sha256:<hex>``), image_references: of the container. projects: ``gce.project_id``.
    service_accounts: one of these. tcb_statuses: ``tdx.gcp_attester_tcb_status``, where the token
    has one."""

    hwmodels: tuple[str, ...] | Unchecked
    dbgstats: tuple[str, ...] | Unchecked
    swnames: tuple[str, ...] | Unchecked
    swversions: tuple[str, ...] | Unchecked
    support_attributes: tuple[str, ...] | Unchecked
    secure_boot: bool | Unchecked
    image_digests: tuple[str, ...] | Unchecked
    image_references: tuple[str, ...] | Unchecked
    projects: tuple[str, ...] | Unchecked
    service_accounts: tuple[str, ...] | Unchecked
    tcb_statuses: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        self._words(
            "hwmodels", "dbgstats", "swnames", "swversions", "support_attributes",
            "image_references", "projects", "service_accounts", "tcb_statuses",
        )  # fmt: skip
        if not isinstance(self.image_digests, Unchecked):
            fields.words(self.image_digests, None, "image_digests")
            _pins(self.image_digests, _SHA256, "image_digests")
        fields.flag(self.secure_boot, "secure_boot")


@dataclass(frozen=True, kw_only=True)
class _TeePolicy(TokenPolicy):
    """What tokens about CPUs have. debug: whether the TEE may be debugged, as the token says.
    measurements: launch measurement, MRTD or MRENCLAVE (hex). signers: MRSIGNER (hex).
    tcb_statuses: ``attester_tcb_status``, where the token has one. denied_advisories: ids that are
    refused."""

    debug: bool | Unchecked
    measurements: tuple[str, ...] | Unchecked
    signers: tuple[str, ...] | Unchecked
    tcb_statuses: tuple[str, ...] | Unchecked
    denied_advisories: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.flag(self.debug, "debug")
        fields.digests(self.measurements, _HEX, "measurements")
        fields.digests(self.signers, 64, "signers")
        self._words("tcb_statuses", "denied_advisories")


@dataclass(frozen=True, kw_only=True)
class MaaPolicy(_TeePolicy):
    """Azure Attestation. attestation_types, compliance_statuses, policy_hashes: of the claims
    ``x-ms-attestation-type`` (of the hardware, where the token is about a VM as a whole) and so on.
    host_data: HOST_DATA (hex). vmpls: privilege levels. migration: whether SEV-SNP admits a
    migration agent. secure_boot: ``secureboot`` or vm-configuration's ``secure-boot``."""

    attestation_types: tuple[str, ...] | Unchecked
    compliance_statuses: tuple[str, ...] | Unchecked
    policy_hashes: tuple[str, ...] | Unchecked
    host_data: tuple[str, ...] | Unchecked
    vmpls: tuple[int, ...] | Unchecked
    migration: bool | Unchecked
    secure_boot: bool | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        self._words("attestation_types", "compliance_statuses", "policy_hashes")
        fields.digests(self.host_data, 64, "host_data")
        fields.integers(self.vmpls, range(4), "vmpls")
        fields.flag(self.migration, "migration")
        fields.flag(self.secure_boot, "secure_boot")


@dataclass(frozen=True, kw_only=True)
class ItaPolicy(_TeePolicy):
    """Intel Trust Authority. attester_types: ``attester_type`` (or the TEE's object in version 2).
    dbgstats: ``dbgstat``. policies: ids of policies, all of which must have matched."""

    attester_types: tuple[str, ...] | Unchecked
    dbgstats: tuple[str, ...] | Unchecked
    policies: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        self._words("attester_types", "dbgstats", "policies")


@dataclass(frozen=True, kw_only=True)
class NrasPolicy(TokenPolicy):
    """NVIDIA's remote attestation service. result: ``x-nvidia-overall-att-result``. devices: the
    least number of devices with a token of their own. Of each device: measres, dbgstats, hwmodels,
    driver_versions, vbios_versions (a switch's ``bios-version`` too), ueids; secure_boot:
    ``secboot``; checks: every yes or no that NVIDIA states of it is yes; certificate_statuses and
    ocsp_statuses of its certificate chains; warnings: whether it may carry a warning."""

    result: bool | Unchecked
    devices: int | Unchecked
    measres: tuple[str, ...] | Unchecked
    secure_boot: bool | Unchecked
    dbgstats: tuple[str, ...] | Unchecked
    checks: bool | Unchecked
    certificate_statuses: tuple[str, ...] | Unchecked
    ocsp_statuses: tuple[str, ...] | Unchecked
    warnings: bool | Unchecked
    hwmodels: tuple[str, ...] | Unchecked
    driver_versions: tuple[str, ...] | Unchecked
    vbios_versions: tuple[str, ...] | Unchecked
    ueids: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        self._words(
            "measres", "dbgstats", "certificate_statuses", "ocsp_statuses", "hwmodels",
            "driver_versions", "vbios_versions", "ueids",
        )  # fmt: skip
        for name in ("result", "secure_boot", "checks", "warnings"):
            fields.flag(getattr(self, name), name)
        fields.integer(self.devices, range(1, 65), "devices")


@dataclass(frozen=True, kw_only=True)
class OtherPolicy(TokenPolicy):
    """A service that casemate does not know, the owner's own for instance. claims: the path of a
    claim (names with ``/`` between) to its admitted values."""

    claims: Mapping[str, tuple[str | int | bool, ...]] | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.claims, Unchecked):
            return
        if not isinstance(self.claims, Mapping) or not all(
            isinstance(values, tuple | list)
            and values
            and all(isinstance(value, str | int) for value in values)
            for values in self.claims.values()
        ):
            raise fields.bad("claims must name admitted values of each claim.", "claims")


_FRESH: Final = Unchecked("a challenger's nonce is checked as freshness")
_AGE: Final = Unchecked("the token's own expiry stands for its age")

GOOGLE_DEFAULT: Final = GooglePolicy(
    issuers=("https://confidentialcomputing.googleapis.com",),
    audiences=unpinned("the audience"),
    keys=(),
    roots=GOOGLE_ROOTS,
    eat_profiles=unpinned("the profile"),
    nonces=_FRESH,
    max_age=_AGE,
    hwmodels=("GCP_AMD_SEV", "GCP_AMD_SEV_ES", "GCP_AMD_SEV_SNP", "GCP_INTEL_TDX"),
    dbgstats=("disabled-since-boot",),
    swnames=("CONFIDENTIAL_SPACE",),
    swversions=unpinned("the image's version"),
    support_attributes=unpinned("the image's support"),
    secure_boot=True,
    image_digests=unpinned("the container's image"),
    image_references=unpinned("the container's image"),
    projects=unpinned("the project"),
    service_accounts=unpinned("the service account"),
    tcb_statuses=GOOD_TCB,
)
MAA_DEFAULT: Final = MaaPolicy(
    issuers=unpinned("the instance of Azure Attestation"),
    audiences=Unchecked("Azure Attestation states none"),
    keys=(),
    roots=(),
    eat_profiles=unpinned("the profile"),
    nonces=_FRESH,
    max_age=_AGE,
    debug=False,
    measurements=unpinned("the measurement"),
    signers=unpinned("the enclave's signer"),
    tcb_statuses=GOOD_TCB,
    denied_advisories=Unchecked("no advisory is refused by name"),
    attestation_types=("sevsnpvm", "tdxvm", "sgx"),
    compliance_statuses=unpinned("the compliance with Azure's own baseline"),
    policy_hashes=unpinned("the policy of the instance"),
    host_data=unpinned("HOST_DATA"),
    vmpls=unpinned("the privilege level"),
    migration=False,
    secure_boot=unpinned("secure boot"),
)
ITA_DEFAULT: Final = ItaPolicy(
    issuers=unpinned("the region"),
    audiences=Unchecked("Trust Authority states none"),
    keys=(),
    roots=(),
    eat_profiles=unpinned("the profile"),
    nonces=_FRESH,
    max_age=_AGE,
    debug=False,
    measurements=unpinned("the measurement"),
    signers=unpinned("the enclave's signer"),
    tcb_statuses=GOOD_TCB,
    denied_advisories=Unchecked("no advisory is refused by name"),
    attester_types=unpinned("the kind of TEE"),
    dbgstats=("disabled", "disabled-since-boot", "disabled-permanently"),
    policies=unpinned("the service's policy"),
)
NRAS_DEFAULT: Final = NrasPolicy(
    issuers=("https://nras.attestation.nvidia.com",),
    audiences=Unchecked("NVIDIA's service states none"),
    keys=(),
    roots=(),
    eat_profiles=unpinned("the profile"),
    nonces=_FRESH,
    max_age=_AGE,
    result=True,
    devices=1,
    measres=("success",),
    secure_boot=True,
    dbgstats=("disabled", "disabled-since-boot", "disabled-permanently"),
    checks=True,
    certificate_statuses=("valid",),
    ocsp_statuses=("good",),
    warnings=False,
    hwmodels=unpinned("the model"),
    driver_versions=unpinned("the driver"),
    vbios_versions=unpinned("the VBIOS"),
    ueids=unpinned("the device"),
)
OTHER_DEFAULT: Final = OtherPolicy(
    issuers=unpinned("the issuer"),
    audiences=unpinned("the audience"),
    keys=(),
    roots=(),
    eat_profiles=unpinned("the profile"),
    nonces=_FRESH,
    max_age=_AGE,
    claims=unpinned("no claim"),
)

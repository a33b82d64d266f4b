"""A service's genuine token against a trust policy: do we want what it says?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are
``evidence.appraise-<check>`` but for ``tcb-status``, ``tcb-advisories`` (``evidence.<check>``) and
the two named here.

 1. ``key-pin``: a key that came in a key set is one that the policy pins by its RFC 7638
    thumbprint, or has certificates that end in a pinned root (``root-key-unpinned``); the root of a
    token's own certificates was compared when they were checked.
 2. ``issuer`` (of this very service), ``audience``, ``eat-profile``, ``nonce``, ``age``.
 3. Google: ``hwmodel``, ``dbgstat``, ``swname``, ``swversion``, ``support-attributes``,
    ``secure-boot``, ``image-digest``, ``image-reference``, ``project``, ``service-account``,
    ``tcb-status``.
 4. Azure and Intel: ``debug`` (the TEE's own claim, and no other says otherwise),
    ``measurement``, ``signer``, ``tcb-status``, ``tcb-advisories``; Azure: ``attestation-type``,
    ``compliance``, ``policy-hash``, ``host-data``, ``vmpl``, ``migration``, ``secure-boot``;
    Intel: ``attester-type``, ``dbgstat``, ``policies``.
 5. NVIDIA: ``result``; each device that the overall token names came with its token
    (``needs-device-tokens``), ``device-issuer`` and ``device-nonce`` as the overall one's; then
    ``devices``, ``measres``, ``secure-boot``, ``dbgstat``, ``device-checks``,
    ``certificate-status``, ``ocsp-status``, ``warnings``, ``hwmodel``, ``driver``, ``vbios``,
    ``ueid`` of every device.
 6. Others: ``claim <path>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from casemate.attest import jws
from casemate.attest.judge import every
from casemate.attest.tokens import abi
from casemate.attest.tokens.abi import Device, Google, Ita, Maa, Nras, Tokens
from casemate.attest.tokens.policy import (
    GooglePolicy,
    ItaPolicy,
    MaaPolicy,
    NrasPolicy,
    OtherPolicy,
    TokenPolicy,
)
from casemate.attest.tokens.verify import Signer
from casemate.attest.verdict import Checks, Step, Unchecked, refusal
from casemate.spec.canonical import Json

_MEND: Final = (
    "Ask the operator to run what the trust policy admits, or change the policy knowingly."
)
# What NVIDIA must have looked at for a result to mean anything: one of each line. Version 2.0 of
# the claims has "validated" where 3.0 has the certificates' statuses and the FWID.
_DEVICE_CHECKS: Final = (
    ("attestation-report-parsed",),
    ("attestation-report-signature-verified",),
    ("attestation-report-nonce-match",),
    ("attestation-report-cert-chain-fwid-match", "attestation-report-cert-chain-validated"),
)


@dataclass(frozen=True)
class _Judged:
    """A check: whether it holds, or why it is not made; what was found, what is wanted. code,
    message: where they are not the usual ones."""

    name: str
    ok: bool | Unchecked
    found: str = ""
    wanted: str = ""
    code: str = ""
    message: str = ""


def _shown(values: Iterable[object]) -> str:
    return ", ".join(map(jws.plain, list(values)[:8])) or "nothing"


def _among(name: str, found: object, admitted: Any) -> _Judged:
    """One value, of the admitted ones."""
    if isinstance(admitted, Unchecked):
        return _Judged(name, admitted)
    return _Judged(name, found in admitted, _shown([found]), f"one of {_shown(admitted)}")


def _any(name: str, found: Iterable[object], admitted: Any) -> _Judged:
    """Several values, one of them admitted."""
    if isinstance(admitted, Unchecked):
        return _Judged(name, admitted)
    values = list(found)
    ok = any(value in admitted for value in values)
    return _Judged(name, ok, _shown(values), f"one of {_shown(admitted)}")


def _every(name: str, found: Mapping[str, object], admitted: Any) -> _Judged:
    """Values by device (or claim), all of them admitted, and one at least."""
    if isinstance(admitted, Unchecked):
        return _Judged(name, admitted)
    wrong = {k: v for k, v in found.items() if v not in admitted}
    shown = _shown(f"{k} {v}" for k, v in (wrong or found).items())
    return _Judged(name, bool(found) and not wrong, shown, f"one of {_shown(admitted)}")


def _all_of(name: str, found: tuple[str, ...], wanted: tuple[str, ...] | Unchecked) -> _Judged:
    if isinstance(wanted, Unchecked):
        return _Judged(name, wanted)
    return _Judged(name, set(wanted) <= set(found), _shown(found), f"all of {_shown(wanted)}")


def _flag(name: str, found: Iterable[bool | None], wanted: bool | Unchecked) -> _Judged:
    """Statements of one thing, absent ones left out: all as wanted, and one at least."""
    if isinstance(wanted, Unchecked):
        return _Judged(name, wanted)
    said = [value for value in found if value is not None]
    ok = bool(said) and all(value is wanted for value in said)
    return _Judged(name, ok, _shown(said).lower(), str(wanted).lower())


def _tcb(status: str, admitted: tuple[str, ...] | Unchecked) -> _Judged:
    if not status and not isinstance(admitted, Unchecked):
        return _Judged("tcb-status", Unchecked("the token states none"))
    return replace(_among("tcb-status", status, admitted), code="tcb-status")


def _common(tokens: Tokens, signer: Signer, policy: TokenPolicy, now: float) -> Iterator[_Judged]:
    claims = tokens.overall.claims
    if signer.thumbprints:
        good = {*policy.keys, *signer.vouched}
        loose = [pin for pin in signer.thumbprints if pin not in good]
        yield _Judged(
            "key-pin", not loose, _shown(signer.thumbprints), code="root-key-unpinned",
            message=f"The key {_shown(loose)} came with the evidence, and the policy pins no such"
            " key.",
        )  # fmt: skip
    if isinstance(policy.issuers, Unchecked) and not abi.issuer_of(tokens.tee, claims.iss):
        yield _Judged("issuer", False, _shown([claims.iss]), f"an issuer of {tokens.tee}")
    else:
        yield _among("issuer", claims.iss, policy.issuers)
    yield _any("audience", claims.aud, policy.audiences)
    yield _among("eat-profile", claims.eat_profile, policy.eat_profiles)
    yield _any("nonce", claims.eat_nonce, policy.nonces)
    if isinstance(policy.max_age, Unchecked):
        yield _Judged("age", policy.max_age)
    else:
        age = now - min(token.claims.iat for token in tokens.all)
        yield _Judged("age", age <= policy.max_age, f"{age:.0f} s", f"at most {policy.max_age} s")


def _google(tokens: Tokens, policy: GooglePolicy, checks: Checks) -> Iterator[_Judged]:
    claims = tokens.overall.claims
    assert isinstance(claims, Google)
    space, container = claims.submods.confidential_space, claims.submods.container
    checks.tcb_status = claims.tdx.gcp_attester_tcb_status
    yield _among("hwmodel", claims.hwmodel, policy.hwmodels)
    yield _among("dbgstat", claims.dbgstat, policy.dbgstats)
    yield _among("swname", claims.swname, policy.swnames)
    yield _any("swversion", claims.swversion, policy.swversions)
    yield _all_of("support-attributes", space.support_attributes, policy.support_attributes)
    yield _flag("secure-boot", [claims.secboot], policy.secure_boot)
    yield _among("image-digest", container.image_digest, policy.image_digests)
    yield _among("image-reference", container.image_reference, policy.image_references)
    yield _among("project", claims.submods.gce.project_id, policy.projects)
    yield _any("service-account", claims.google_service_accounts, policy.service_accounts)
    yield _tcb(claims.tdx.gcp_attester_tcb_status, policy.tcb_statuses)


@dataclass(frozen=True)
class _Kind:
    """Names of a TEE's own claims: any other is another TEE's, or a tenant's invention."""

    debug: tuple[str, ...]
    measurement: str
    report_data: str
    signer: str = ""


# Of ``x-ms-attestation-type`` and Intel's ``attester_type``.
_TDX: Final = _Kind(("tdx_td_attributes_debug", "tdx_is_debuggable"), "tdx_mrtd", "tdx_report_data")
KINDS: Final = {
    "sevsnpvm": _Kind(
        ("x_ms_sevsnpvm_is_debuggable",), "x_ms_sevsnpvm_launchmeasurement",
        "x_ms_sevsnpvm_reportdata",
    ),
    "tdxvm": _TDX,
    "sgx": _Kind(
        ("x_ms_sgx_is_debuggable",), "x_ms_sgx_mrenclave", "x_ms_sgx_report_data",
        "x_ms_sgx_mrsigner",
    ),
    "TDX": _TDX,
    "SGX": _Kind(("sgx_is_debuggable",), "sgx_mrenclave", "sgx_report_data", "sgx_mrsigner"),
    "SEVSNP": _Kind(("sevsnp_is_debuggable",), "sevsnp_launchmeasurement", "sevsnp_reportdata"),
}  # fmt: skip
_DEBUG: Final = tuple(dict.fromkeys(name for kind in KINDS.values() for name in kind.debug))


def measurement(claims: Maa | Ita) -> str:
    """Launch measurement, MRTD or MRENCLAVE (hex), or ""."""
    known = KINDS.get(claims.kind)
    return str(getattr(claims.tee, known.measurement)).lower() if known else ""


def _debug(claims: Maa | Ita, wanted: bool | Unchecked) -> _Judged:
    if isinstance(wanted, Unchecked):
        return _Judged("debug", wanted)
    said = {
        name: value
        for tee in (claims, claims.tee)
        for name in (*_DEBUG, "is_debuggable")
        if (value := getattr(tee, name)) is not None
    }
    known = KINDS.get(claims.kind)
    own = known is not None and any(name in said for name in known.debug)
    ok = own and all(value is wanted for value in said.values())
    shown = _shown(f"{name} {str(value).lower()}" for name, value in said.items())
    return _Judged("debug", ok, shown, f"{str(wanted).lower()}, as this TEE's own claim")


def _tees(claims: Maa | Ita, policy: MaaPolicy | ItaPolicy, checks: Checks) -> Iterator[_Judged]:
    tee, known = claims.tee, KINDS.get(claims.kind)
    advisories = tee.attester_advisory_ids
    checks.tcb_status, checks.advisories = tee.attester_tcb_status, advisories
    yield _debug(claims, policy.debug)
    yield _among("measurement", measurement(claims), policy.measurements)
    signer = str(getattr(tee, known.signer)).lower() if known and known.signer else ""
    yield _among("signer", signer, policy.signers)
    yield _tcb(tee.attester_tcb_status, policy.tcb_statuses)
    if isinstance(policy.denied_advisories, Unchecked):
        yield _Judged("tcb-advisories", policy.denied_advisories)
    else:
        denied = [a for a in advisories if a in policy.denied_advisories]
        shown = _shown(denied or advisories)
        yield _Judged("tcb-advisories", not denied, shown, "none denied", "tcb-advisories")


def _member(value: Json, *path: str) -> Json:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _maa(tokens: Tokens, policy: MaaPolicy, checks: Checks) -> Iterator[_Judged]:
    claims = tokens.overall.claims
    assert isinstance(claims, Maa)
    tee = claims.tee
    yield from _tees(claims, policy, checks)
    yield _among("attestation-type", claims.kind, policy.attestation_types)
    yield _among("compliance", tee.x_ms_compliance_status, policy.compliance_statuses)
    yield _among("policy-hash", claims.x_ms_policy_hash, policy.policy_hashes)
    yield _among("host-data", tee.x_ms_sevsnpvm_hostdata.lower(), policy.host_data)
    yield _among("vmpl", tee.x_ms_sevsnpvm_vmpl, policy.vmpls)
    if claims.kind in ("tdxvm", "sgx"):
        yield _Judged("migration", Unchecked(f"{claims.kind} has no migration agent"))
    else:
        yield _flag("migration", [tee.x_ms_sevsnpvm_migration_allowed], policy.migration)
    boot: list[bool | None] = [claims.secureboot]
    for one in (claims, tee):
        said = _member(dict(one.x_ms_runtime or {}), "vm-configuration", "secure-boot")
        boot.append(said if isinstance(said, bool) else None)
    yield _flag("secure-boot", boot, policy.secure_boot)


def _ita(tokens: Tokens, policy: ItaPolicy, checks: Checks) -> Iterator[_Judged]:
    claims = tokens.overall.claims
    assert isinstance(claims, Ita)
    yield from _tees(claims, policy, checks)
    yield _among("attester-type", claims.kind, policy.attester_types)
    states = {"token": claims.dbgstat, claims.kind or "TEE": claims.tee.dbgstat}
    said = {name: state for name, state in states.items() if state}
    if said:
        yield _every("dbgstat", said, policy.dbgstats)
    else:  # a token about SEV-SNP has none; ``debug`` needs the TEE's own claim in any case
        yield _Judged("dbgstat", Unchecked("the token states none"))
    yield _all_of("policies", claims.policy_ids_matched, policy.policies)
    for name in ("nvgpu", "tpm"):
        if getattr(claims, name) is not None:
            yield _Judged(name, Unchecked("the policy says nothing about what it holds"))


def _statements(claims: Mapping[str, Json]) -> Iterator[tuple[str, bool]]:
    """NVIDIA's yes or no about a device, those about its certificate chains too."""
    for name, value in claims.items():
        if name.startswith("x-nvidia-") and name != "x-nvidia-attestation-warning":
            if isinstance(value, bool):
                yield name, value
            elif isinstance(value, dict):
                yield from ((f"{name}.{k}", v) for k, v in value.items() if isinstance(v, bool))


def _device_checks(devices: Mapping[str, Device]) -> list[str]:
    """What failed, or was not looked at."""
    wrong = []
    for name, claims in devices.items():
        said = dict(_statements(claims.claims))
        wrong += [f"{name} {check}" for check, value in said.items() if not value]
        wrong += [
            f"{name} no {line[0]}"
            for line in _DEVICE_CHECKS
            if not any(one.endswith(f"-{check}") for one in said for check in line)
        ]
    return wrong


def _nested(devices: Mapping[str, Device], member: str) -> dict[str, object]:
    """What NVIDIA says of each certificate chain; a device without its own report's has nothing."""
    out: dict[str, object] = {}
    for name, claims in devices.items():
        chains = {
            claim: value.get(member)
            for claim, value in claims.claims.items()
            if claim.startswith("x-nvidia-") and claim.endswith("-cert-chain")
            and isinstance(value, dict)
        }  # fmt: skip
        if not any(claim.endswith("-attestation-report-cert-chain") for claim in chains):
            chains["attestation-report-cert-chain"] = None
        out |= {f"{name} {claim}": value for claim, value in chains.items()}
    return out


def _warnings(devices: Mapping[str, Device]) -> list[str]:
    found = {n: d.claims.get("x-nvidia-attestation-warning") for n, d in devices.items()}
    return [f"{name}: {said}" for name, said in found.items() if said not in (None, False, "")]


def _nras(tokens: Tokens, policy: NrasPolicy, checks: Checks) -> Iterator[_Judged]:
    claims = tokens.overall.claims
    assert isinstance(claims, Nras)
    devices = {n: t.claims for n, t in tokens.devices.items() if isinstance(t.claims, Device)}
    yield _flag("result", [claims.x_nvidia_overall_att_result], policy.result)
    absent = [name for name in claims.submods if name not in devices]
    yield _Judged(
        "device-tokens", not absent, _shown(devices), code="needs-device-tokens",
        message=f"The overall token names {_shown(absent)}, whose own token is not at hand.",
    )  # fmt: skip
    issuers = {name: d.iss for name, d in devices.items() if d.iss != claims.iss}
    yield _Judged("device-issuer", not issuers, _shown(issuers.values()), _shown([claims.iss]))
    nonces = {n: d.eat_nonce for n, d in devices.items() if d.eat_nonce != claims.eat_nonce}
    yield _Judged("device-nonce", not nonces, _shown(nonces), "the overall token's nonce")
    if isinstance(policy.devices, Unchecked):
        yield _Judged("devices", policy.devices)
    else:
        count = len(devices)
        yield _Judged("devices", count >= policy.devices, str(count), f"at least {policy.devices}")
    yield _every("measres", {n: d.measres for n, d in devices.items()}, policy.measres)
    yield _flag("secure-boot", [d.secboot is True for d in devices.values()], policy.secure_boot)
    yield _every("dbgstat", {n: d.dbgstat for n, d in devices.items()}, policy.dbgstats)
    if policy.checks is True:
        wrong = _device_checks(devices)
        yield _Judged("device-checks", not wrong, _shown(wrong), "all of NVIDIA's checks passed")
    else:
        reason = policy.checks or Unchecked("the policy admits devices whose checks failed")
        yield _Judged("device-checks", reason)
    for name, member, admitted in (
        ("certificate-status", "x-nvidia-cert-status", policy.certificate_statuses),
        ("ocsp-status", "x-nvidia-cert-ocsp-status", policy.ocsp_statuses),
    ):
        if claims.x_nvidia_ver == "2.0":
            yield _Judged(name, Unchecked("version 2.0 of the claims states none"))
        else:
            yield _every(name, _nested(devices, member), admitted)
    if policy.warnings is False:
        warnings = _warnings(devices)
        yield _Judged("warnings", not warnings, _shown(warnings), "no warning")
    else:
        reason = Unchecked("the policy admits warnings")
        yield _Judged("warnings", reason if policy.warnings is True else policy.warnings)
    for name, read, pins in _DEVICE_PINS:
        values = {n: value for n, d in devices.items() if (value := read(d)) is not None}
        yield _every(name, values, getattr(policy, pins))


# A device's claim: its check, how it is read (None: a switch has none) and the policy's field.
_DEVICE_PINS: Final[tuple[tuple[str, Callable[[Device], str | None], str], ...]] = (
    ("hwmodel", lambda d: d.hwmodel, "hwmodels"),
    (
        "driver",
        lambda d: None if d.x_nvidia_switch_bios_version else d.x_nvidia_gpu_driver_version,
        "driver_versions",
    ),
    (
        "vbios",
        lambda d: d.x_nvidia_switch_bios_version or d.x_nvidia_gpu_vbios_version,
        "vbios_versions",
    ),
    ("ueid", lambda d: d.ueid, "ueids"),
)


def _other(tokens: Tokens, policy: OtherPolicy, checks: Checks) -> Iterator[_Judged]:
    if isinstance(policy.claims, Unchecked):
        yield _Judged("claims", policy.claims)
        return
    for path, admitted in policy.claims.items():
        found = _member(dict(tokens.overall.claims.claims), *path.split("/"))
        said = found if isinstance(found, list) else [found]
        # 1 and true are equal in Python, and are two values in JSON.
        ok = any(type(one) is type(value) and one == value for one in said for value in admitted)
        yield _Judged("claim", ok, f"{path}: {_shown(said)}", f"one of {_shown(admitted)}")


_SERVICES: Final[dict[str, Callable[..., Iterator[_Judged]]]] = {
    abi.GOOGLE: _google, abi.MAA: _maa, abi.ITA: _ita, abi.NRAS: _nras, abi.OTHER: _other,
}  # fmt: skip


def _told(one: _Judged, step: Step) -> None:
    if isinstance(one.ok, Unchecked):
        step.unchecked(one.ok.reason)
    elif not one.ok:
        message = one.message or f"The token's {one.name} is {one.found}; wanted is {one.wanted}."
        raise refusal(one.code or f"appraise-{one.name}", message, one.name, _MEND)
    else:
        step.detail = one.found


def appraise(
    tokens: Tokens, signer: Signer, policy: TokenPolicy, *, now: float, checks: Checks
) -> None:
    """Follow the procedure above; raises the first failure once all checks are recorded."""
    judged = [*_common(tokens, signer, policy, now)]
    judged += _SERVICES[tokens.tee](tokens, policy, checks)
    every(((one.name, partial(_told, one)) for one in judged), checks)

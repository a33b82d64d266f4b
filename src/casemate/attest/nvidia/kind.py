"""NVIDIA GPUs and NVSwitches as a kind of evidence.

The binding: a GPU signs 32 bytes of the challenger's choice, the nonce of the SPDM request. They
are SHA-256 of the report data that the CPU's evidence binds, so that this GPU answered this machine
for this binding.

A folder with reference values and no report is judged as what it is: a statement by NVIDIA about
software. It binds nothing and is fresh for no one, so it never vouches for a machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from casemate.attest.kind import Claims, Files, Kind, hashed
from casemate.attest.nvidia import abi, appraise, collateral, rim, verify
from casemate.attest.nvidia.policy import DEFAULT, NvidiaPolicy
from casemate.attest.verdict import Checks, refusal
from casemate.spec.canonical import Json

_REPORT: Final = "report.bin"
_REQUEST: Final = bytes((abi.VERSION, abi.GET_MEASUREMENTS))


def recognises(files: Files) -> bool:
    """A report that starts with an SPDM request, or stands beside a device's chain; or manifests
    alone."""
    if _REPORT in files:
        foreign = "vcek.der" in files or "vlek.der" in files
        return files[_REPORT].startswith(_REQUEST) or ("cert_chain.pem" in files and not foreign)
    return any(b"SoftwareIdentity" in data for data in collateral.rim_files(files).values())


def _rims(files: Files) -> dict[str, bytes]:
    """The files of manifests, not too many."""
    found = collateral.rim_files(files)
    if len(found) > collateral.MAX_RIMS:
        raise refusal("collateral-rim-conflict", "There are too many manifests.", min(found))
    return found


def _alone(files: Files, policy: NvidiaPolicy, now: float, checks: Checks) -> Claims:
    """Manifests without a report."""
    rims: list[rim.Rim] = []
    with checks.step("rim-files") as step:
        held = _rims(files)
        step.detail = ", ".join(held) or "none"
    for file, data in held.items():
        with checks.step("rim") as step:
            rims.append(verify.rim(data, file, policy, step))
    checks.crypto = "valid"
    with checks.step("revocation-files") as step:
        answers = collateral.answers(files)
        step.detail = ", ".join((*answers.responses, *answers.lists)) or "none"
    unanswered: list[str] = []
    for found in rims:
        unanswered += verify.rim_current(found, policy, answers, now=now, checks=checks)
    with checks.step("rim-conflict"):
        golden = appraise.merged(rims)
    with checks.step("revocation-answers") as step:
        appraise.answered(unanswered, policy, step)
    root = verify.rim_path(rims[0])[-1][0]
    return Claims(
        bound=b"",
        fresh=(),
        product=", ".join(f"{r.product} {r.role} {r.version}" for r in rims),
        root=root.fingerprint,
        measurement="",
        chip_id="",
        tcb={},
        other={"tag_ids": [r.tag_id for r in rims], "active": len(golden)},
    )


def check(files: Files, policy: NvidiaPolicy, now: float, checks: Checks) -> Claims:
    """Parse, verify and appraise; ``now`` in Unix seconds."""
    if _REPORT not in files:
        return _alone(files, policy, now, checks)
    with checks.step("parse") as step:
        report = abi.parse(files[_REPORT])
        device = collateral.device(files)
        step.detail = f"{len(report.measurements)} measurements, {len(report.opaque)} opaque fields"
    verify.verify(report, device, policy, checks=checks)
    checks.crypto = "valid"
    with checks.step("revocation-files") as step:
        answers = collateral.answers(files)
        step.detail = ", ".join((*answers.responses, *answers.lists)) or "none"
    unanswered = verify.current(
        device.path, device.path[1:-1], policy, answers, "", now=now, checks=checks
    )
    rims: list[rim.Rim] = []
    with checks.step("rim-files") as step:
        held = _rims(files)
        step.detail = ", ".join(held) or "none"
    for file, data in held.items():
        with checks.step("rim") as step, verify.as_collateral():
            rims.append(verify.rim(data, file, policy, step))
    for found in rims:
        unanswered += verify.rim_current(found, policy, answers, now=now, checks=checks)
    appraise.appraise(report, device, rims, unanswered, policy, checks)
    golden = appraise.merged(rims)
    return Claims(
        bound=report.request_nonce,
        fresh=(report.request_nonce,),
        product=device.chip,
        root=device.path[-1][0].fingerprint,
        measurement=hashlib.sha384(report.record).hexdigest(),
        chip_id=device.identity.fingerprint,
        tcb={},
        other={
            "device_id": device.device_id,
            "driver_version": report.driver_version,
            "vbios_version": report.vbios_version,
            "mode": report.mode,
            "protected_pcie": report.protected_pcie,
            "without_reference": [n - 1 for n in report.measurements if n - 1 not in golden],
        },
    )


def fields(files: Files) -> Mapping[str, Json]:
    """The report, its certificates and the manifests, field by field; bytes in hex."""
    out: dict[str, Json] = {}
    if _REPORT in files:
        report = abi.parse(files[_REPORT])
        opaque: dict[str, Json] = {name: data.hex() for name, data in report.opaque.items()}
        out = {
            "request_nonce": report.request_nonce.hex(),
            "slot": report.slot,
            "response_nonce": report.response_nonce.hex(),
            "measurements": {
                str(n): {"type": m.kind, "value": m.value.hex()}
                for n, m in report.measurements.items()
            },
            "opaque": opaque | dict(report.texts),
            "opaque_version": report.opaque_version,
            "vbios_version": report.vbios_version,
            "mode": report.mode,
            "r": f"{report.r:096x}",
            "s": f"{report.s:096x}",
        }
        if "cert_chain.pem" in files:
            device = collateral.device(files)
            out["device"] = {
                "chip": device.chip,
                "device_id": device.device_id,
                "fwid": device.fwid.hex(),
                "certificates": [c.name() for c, _ in device.path],
                "key": device.identity.fingerprint,
            }
    for file, data in _rims(files).items():
        found = rim.parse(data, file)
        out[file] = {
            "role": found.role,
            "product": found.product,
            "version": found.version,
            "tagId": found.tag_id,
            "golden": {str(n): [v.hex() for v in vs] for n, vs in sorted(found.golden.items())},
            "certificates": [c.name() for c in found.chain],
        }
    return out


KIND: Final = Kind(
    tee="nvidia",
    recognises=recognises,
    check=check,
    policy=NvidiaPolicy,
    default=lambda: DEFAULT,
    field="nonce of the SPDM request",
    of=hashed,
    fields=fields,
    instances=("instances",),
    vendor="NVIDIA",
    device=True,
)

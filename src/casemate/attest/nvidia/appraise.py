"""A genuine NVIDIA report against reference values and a trust policy: do we want what it says?

Procedure. All checks are recorded before the first failure is raised.

 1. ``rim-product``, ``rim-version`` (codes ``collateral-rim-*``): each manifest is for the chip's
    family and for the very version of driver or VBIOS that the report states, one for each.
 2. ``measurements``: at each index that is active in a manifest, in one of them alone, the block of
    index + 1 has one of the golden values. Index 35 is left out where the report says that NVDEC0
    is off (NVIDIA's verifiers' rule). Codes ``collateral-rim-conflict``, ``appraise-measurements``.
 3. ``model``, ``driver-version``, ``vbios-version``, ``mode``, ``protected-pcie``, ``instance``:
    as the policy says; an ``Unchecked`` field is reported with its reason.
 4. ``revocation-answers``: where the policy demands them, there was one about each certificate;
    ``needs-revocation``.
 5. ``reference-values``: a manifest for each of driver and VBIOS was there (a switch has a BIOS
    only); ``needs-driver-rim``, ``needs-vbios-rim``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from casemate.attest.judge import Judged, among, every, fields, unwanted
from casemate.attest.nvidia.abi import Report
from casemate.attest.nvidia.collateral import Device
from casemate.attest.nvidia.policy import NvidiaPolicy
from casemate.attest.nvidia.rim import DRIVER, FIRMWARE, Rim
from casemate.attest.verdict import Checks, Step, Unchecked, refusal

NVDEC0_INDEX: Final = 35
_MEND = "Ask the operator to run what the trust policy admits, or change the policy knowingly."
_RIM_MEND = "Ask the operator for NVIDIA's manifests of this very driver and VBIOS."


def versions(report: Report) -> dict[str, str]:
    """What the report states, by a manifest's role."""
    return {DRIVER: report.driver_version, FIRMWARE: report.vbios_version}


def _product(rim: Rim, device: Device, step: Step) -> None:
    if rim.product[:2] != device.family:
        raise refusal(
            "collateral-rim-product", f"{rim.file} is for {rim.product}, not for {device.chip}.",
            rim.file, _RIM_MEND,
        )  # fmt: skip
    step.detail = rim.product


def _version(rim: Rim, report: Report, step: Step) -> None:
    stated = versions(report)[rim.role]
    if rim.version.upper() != stated.upper():
        raise refusal(
            "collateral-rim-version",
            f"{rim.file} is for {rim.role} {rim.version}; the report states {stated or 'none'}.",
            rim.file,
            _RIM_MEND,
        )
    step.detail = stated


def merged(rims: Sequence[Rim]) -> dict[int, tuple[bytes, ...]]:
    """Index to golden values over all manifests; ``collateral-rim-conflict`` where two manifests
    speak of one index, or two are of one role."""
    golden: dict[int, tuple[bytes, ...]] = {}
    for n, rim in enumerate(rims):
        if any(other.role == rim.role for other in rims[:n]) or golden.keys() & rim.golden.keys():
            raise refusal(
                "collateral-rim-conflict", f"{rim.file} and another manifest speak of the same.",
                rim.file, _RIM_MEND,
            )  # fmt: skip
        golden |= rim.golden
    return golden


def _measurements(report: Report, rims: Sequence[Rim], step: Step) -> None:
    golden = merged(rims)
    left_out = {NVDEC0_INDEX} & golden.keys() if report.nvdec0 is False else set()
    wrong = [
        index
        for index, values in sorted(golden.items())
        if index not in left_out
        and (index + 1 not in report.measurements
             or report.measurements[index + 1].value not in values)
    ]  # fmt: skip
    if wrong:
        raise refusal(
            "appraise-measurements",
            f"Measurements {', '.join(map(str, wrong))} are none of NVIDIA's golden values.",
            "measurements",
            "Do not use this device: its firmware, driver or mode is not what NVIDIA released.",
        )
    step.detail = f"{len(golden) - len(left_out)} of {len(report.measurements)} measurements match"
    if left_out:
        step.detail += f"; {NVDEC0_INDEX} is left out, since NVDEC0 is off"


def _needed(device: Device, rims: Sequence[Rim], policy: NvidiaPolicy, step: Step) -> None:
    roles = (FIRMWARE,) if device.is_switch else (DRIVER, FIRMWARE)
    missing = [role for role in roles if not any(rim.role == role for rim in rims)]
    if not missing:
        step.detail = ", ".join(rim.file for rim in rims)
    elif isinstance(policy.reference_values, Unchecked):
        step.unchecked(policy.reference_values.reason)
    else:
        raise refusal(
            f"needs-{missing[0]}-rim",
            f"NVIDIA's manifest for the {' and the '.join(missing)} is not there.",
            f"{missing[0]}_rim.xml",
            _RIM_MEND,
        )


def answered(unanswered: Sequence[str], policy: NvidiaPolicy, step: Step) -> None:
    """``needs-revocation`` where the policy demands answers that did not come."""
    if isinstance(policy.revocation, Unchecked):
        step.unchecked(policy.revocation.reason)
    elif unanswered:
        raise refusal(
            "needs-revocation",
            f"No revocation answer came for {', '.join(unanswered)}.",
            unanswered[0],
            "Ask the operator to send the responder's answers with the evidence.",
        )


def _judge(report: Report, device: Device, policy: NvidiaPolicy) -> Iterator[Judged]:
    yield among("model", device.chip, policy.models, "none")
    yield among("driver-version", report.driver_version, policy.driver_versions, "none")
    yield among("vbios-version", report.vbios_version, policy.vbios_versions, "none")
    yield among("mode", report.mode, policy.modes, "none")
    wanted = policy.protected_pcie
    if isinstance(wanted, Unchecked):
        yield "protected-pcie", wanted, "", ""
    else:
        on = report.protected_pcie
        yield "protected-pcie", on is wanted, str(on).lower(), str(wanted).lower()
    yield among("instance", device.identity.fingerprint, policy.instances, "none")


def appraise(
    report: Report, device: Device, rims: Sequence[Rim], unanswered: Sequence[str],
    policy: NvidiaPolicy, checks: Checks,
) -> None:  # fmt: skip
    """Follow the procedure above; ``rims`` are verified ones, ``unanswered`` the certificates that
    no revocation answer spoke of."""
    todo: list[tuple[str, Callable[[Step], None]]] = []
    for rim in rims:
        todo.append((f"{rim.role}-rim-product", partial(_product, rim, device)))
        todo.append((f"{rim.role}-rim-version", partial(_version, rim, report)))
    if rims:
        todo.append(("measurements", partial(_measurements, report, rims)))
    todo += fields(_judge(report, device, policy), partial(unwanted, "report", _MEND))
    todo.append(("revocation-answers", partial(answered, unanswered, policy)))
    todo.append(("reference-values", partial(_needed, device, rims, policy)))
    every(todo, checks)

"""A genuine SEV-SNP report against a trust policy: do we want what it says?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are ``evidence.appraise-*``.

 1. ``signing-key-kind``: VCEK or VLEK, as the policy admits.
 2. ``report-version``, ``vmpl``, ``chip``: admitted ones only.
 3. ``guest-policy``: each bit of POLICY that the policy names has its value (56860 section 4.3).
 4. ``measurement``, ``host-data``, ``id-key``: admitted ones only.
 5. ``guest-svn``, ``firmware`` (COMMITTED_MAJOR, MINOR, BUILD): at least.
 6. ``reported-tcb``, ``committed-tcb``, ``launch-tcb``: every component at least (56860 table 3).
    A product line without a floor is refused.
"""

from __future__ import annotations

from collections.abc import Collection

from casemate.attest.snp.abi import Report
from casemate.attest.snp.collateral import Chain, tcb_components
from casemate.attest.trust import SnpPolicy, TcbFloor
from casemate.attest.verdict import Checks, Unchecked, refusal

_MEND = "Ask the operator to run what the trust policy admits, or change the policy knowingly."


def _judge(name: str, ok: bool, found: str, wanted: str, checks: Checks) -> None:
    if ok:
        checks.passed(name, found)
    else:
        message = f"The report's {name} is {found}; the policy wants {wanted}."
        checks.failed(name, refusal(f"appraise-{name}", message, name, _MEND))


def _among(
    name: str, found: str | int, admitted: Collection[object] | Unchecked, checks: Checks
) -> None:
    if isinstance(admitted, Unchecked):
        checks.unchecked(name, admitted.reason)
    else:
        listed = ", ".join(map(str, list(admitted)[:8]))
        _judge(name, found in admitted, str(found), f"one of {listed}", checks)


def _at_least(
    name: str, product: str, tcb: bytes, floor: TcbFloor | Unchecked, checks: Checks
) -> None:
    if isinstance(floor, Unchecked):
        checks.unchecked(name, floor.reason)
        return
    found = tcb_components(product, tcb)
    least = floor.get(product)
    shown = " ".join(f"{k}={v}" for k, v in found.items())
    if least is None:
        _judge(name, False, shown, f"no {product}, for which it gives no floor", checks)
        return
    ok = all(found.get(component, -1) >= version for component, version in least.items())
    wanted = "at least " + " ".join(f"{k}={v}" for k, v in least.items())
    _judge(name, ok, shown, wanted, checks)


def appraise(report: Report, chain: Chain, policy: SnpPolicy, checks: Checks) -> None:
    """Follow the procedure above; raises the first failure once all checks are recorded."""
    _among("signing-key-kind", report.signing_key, policy.signing_keys, checks)
    _among("report-version", report.version, policy.report_versions, checks)
    _among("vmpl", report.vmpl, policy.vmpl, checks)
    _among("chip", report.chip_id.hex(), policy.chip_ids, checks)
    if isinstance(policy.guest_policy, Unchecked):
        checks.unchecked("guest-policy", policy.guest_policy.reason)
    else:
        for bit, wanted in policy.guest_policy.items():
            found = getattr(report.policy, bit)
            name = f"guest-policy-{bit.replace('_', '-')}"
            _judge(name, found is wanted, str(found).lower(), str(wanted).lower(), checks)
    _among("measurement", report.measurement.hex(), policy.measurements, checks)
    _among("host-data", report.host_data.hex(), policy.host_data, checks)
    _among("id-key", report.id_key_digest.hex(), policy.id_keys, checks)
    if isinstance(policy.guest_svn, Unchecked):
        checks.unchecked("guest-svn", policy.guest_svn.reason)
    else:
        least = policy.guest_svn
        _judge("guest-svn", report.guest_svn >= least, str(report.guest_svn), f">= {least}", checks)
    if isinstance(policy.firmware, Unchecked):
        checks.unchecked("firmware", policy.firmware.reason)
    else:
        shown, wanted_firmware = (
            ".".join(map(str, v)) for v in (report.committed_version, policy.firmware)
        )
        ok = report.committed_version >= policy.firmware
        _judge("firmware", ok, shown, f"at least {wanted_firmware}", checks)
    for name, tcb, floor in (
        ("reported-tcb", report.reported_tcb, policy.reported_tcb),
        ("committed-tcb", report.committed_tcb, policy.committed_tcb),
        ("launch-tcb", report.launch_tcb, policy.launch_tcb),
    ):
        _at_least(name, chain.product, tcb, floor, checks)
    checks.settle()

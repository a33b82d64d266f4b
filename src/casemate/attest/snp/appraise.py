"""A genuine SEV-SNP report against a trust policy: do we want what it says?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are
``evidence.appraise-<check>``.

 1. ``signing-key-kind``, ``report-version``, ``vmpl``, ``chip``: admitted ones only.
 2. ``guest-policy-<bit>``: each bit of POLICY that the policy names has its value (56860 section
    4.3); ``guest-policy-reserved``: no bit whose meaning is unknown is set.
 3. ``measurement``, ``host-data``, ``id-key``: admitted ones only.
 4. ``guest-svn``, ``firmware`` (COMMITTED_MAJOR, MINOR, BUILD): at least.
 5. ``reported-tcb``, ``committed-tcb``, ``launch-tcb``: every component at least (56860 table 3);
    a product line without a floor is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from casemate.attest.snp.abi import Report
from casemate.attest.snp.collateral import Chain, tcb_components
from casemate.attest.snp.policy import GUEST_POLICY_BITS, SnpPolicy, TcbFloor
from casemate.attest.verdict import Checks, Refused, Unchecked, refusal

_MEND = "Ask the operator to run what the trust policy admits, or change the policy knowingly."

# A check: its name, whether it holds (or why it is not made), what was found, what is wanted.
_Judged: TypeAlias = tuple[str, bool | Unchecked, str, str]


def _among(name: str, found: str | int, admitted: tuple[Any, ...] | Unchecked) -> _Judged:
    if isinstance(admitted, Unchecked):
        return name, admitted, "", ""
    return name, found in admitted, str(found), "one of " + ", ".join(map(str, admitted[:8]))


def _least(name: str, found: Any, least: Any, show: Any = str) -> _Judged:
    if isinstance(least, Unchecked):
        return name, least, "", ""
    return name, found >= least, show(found), f"at least {show(least)}"


def _tcb(name: str, product: str, tcb: bytes, floors: TcbFloor | Unchecked) -> _Judged:
    if isinstance(floors, Unchecked):
        return name, floors, "", ""
    found = tcb_components(product, tcb)
    shown = " ".join(f"{k}={v}" for k, v in found.items())
    floor = floors.get(product)
    if floor is None:
        return name, False, shown, f"no {product}: it gives no floor for that line"
    ok = all(found.get(component, -1) >= least for component, least in floor.items())
    return name, ok, shown, "at least " + " ".join(f"{k}={v}" for k, v in floor.items())


def _version(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _judge(report: Report, chain: Chain, policy: SnpPolicy) -> Iterator[_Judged]:
    yield _among("signing-key-kind", report.signing_key, policy.signing_keys)
    yield _among("report-version", report.version, policy.report_versions)
    yield _among("vmpl", report.vmpl, policy.vmpl)
    yield _among("chip", report.chip_id.hex(), policy.chip_ids)
    if isinstance(policy.guest_policy, Unchecked):
        yield "guest-policy", policy.guest_policy, "", ""
    else:
        for bit, wanted in policy.guest_policy.items():
            found = getattr(report.policy, bit)
            name = f"guest-policy-{bit.replace('_', '-')}"
            yield name, found is wanted, str(found).lower(), str(wanted).lower()
        others = [bit for bit in GUEST_POLICY_BITS if bit not in policy.guest_policy]
        if others:
            reason = f"the policy wants no value of {', '.join(others)}"
            yield "guest-policy-others", Unchecked(reason), "", ""
        reserved = report.policy.reserved
        yield "guest-policy-reserved", not reserved, f"{reserved:#x}", "0x0"
    yield _among("measurement", report.measurement.hex(), policy.measurements)
    yield _among("host-data", report.host_data.hex(), policy.host_data)
    yield _among("id-key", report.id_key_digest.hex(), policy.id_keys)
    yield _least("guest-svn", report.guest_svn, policy.guest_svn)
    yield _least("firmware", report.committed_version, policy.firmware, _version)
    yield _tcb("reported-tcb", chain.product, report.reported_tcb, policy.reported_tcb)
    yield _tcb("committed-tcb", chain.product, report.committed_tcb, policy.committed_tcb)
    yield _tcb("launch-tcb", chain.product, report.launch_tcb, policy.launch_tcb)


def appraise(report: Report, chain: Chain, policy: SnpPolicy, checks: Checks) -> None:
    """Follow the procedure above; raises the first failure once all checks are recorded."""
    failed: list[Refused] = []
    for name, ok, found, wanted in _judge(report, chain, policy):
        try:
            with checks.step(name) as step:
                if isinstance(ok, Unchecked):
                    step.unchecked(ok.reason)
                elif not ok:
                    message = f"The report's {name} is {found}; the policy wants {wanted}."
                    raise refusal(f"appraise-{name}", message, name, _MEND)
                else:
                    step.detail = found
        except Refused as e:
            failed.append(e)
    if failed:
        failed[0].checks = tuple(checks.done)
        raise failed[0]

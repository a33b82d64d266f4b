"""A genuine DCAP quote against a trust policy: do we want what it says?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are
``evidence.appraise-<check>``, but for ``tcb-status`` and ``tcb-advisories``, which are
``evidence.tcb-...``.

Procedure:

 1. ``tcb-status``: admitted ones only; never Revoked. ``tcb-advisories``: none that is denied.
 2. ``instance`` (PPID), ``fmspc``: admitted ones only. ``platform-<flag>``: with its value.
 3. SGX: ``mrenclave``, ``mrsigner``, ``isvprodid``, ``configid``: admitted ones only; ``isvsvn``:
    at least; ``attributes-<bit>``: with its value.
    TDX: measurements and ``xfam``: admitted ones only; ``td-attributes-<bit>``: with its value;
    ``td-attributes-reserved``: no bit whose meaning is unknown is set.

``debug`` is a check of its own, made before collateral is looked at: a debug enclave or TD is
refused whatever its platform is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from casemate.attest.dcap.abi import Body, EnclaveReport, TdReport
from casemate.attest.dcap.documents import REVOKED
from casemate.attest.dcap.policy import MEASUREMENTS, DcapPolicy, SgxPolicy, TdxPolicy
from casemate.attest.dcap.tcb import Tcb
from casemate.attest.dcap.verify import Endorsed
from casemate.attest.judge import Judged, among, every, fields
from casemate.attest.verdict import Checks, Refused, Unchecked, refusal

_MEND: Final = (
    "Ask the operator to run what the trust policy admits, or change the policy knowingly."
)
_STAGES: Final = {"tcb-status": "tcb-status", "tcb-advisories": "tcb-advisories"}


def _flags(
    name: str, found: Mapping[str, bool], wanted: Mapping[str, bool] | Unchecked
) -> Iterator[Judged]:
    if isinstance(wanted, Unchecked):
        yield name, wanted, "", ""
        return
    for bit, value in wanted.items():
        if bit == "debug":
            continue
        own = found.get(bit)
        yield f"{name}-{bit.replace('_', '-')}", own is value, str(own).lower(), str(value).lower()


def _platform(of: Endorsed, tcb: Tcb, policy: DcapPolicy) -> Iterator[Judged]:
    admitted = policy.tcb_statuses
    if isinstance(admitted, Unchecked) and tcb.status == REVOKED:
        admitted = ()
    yield among("tcb-status", tcb.status, admitted)
    denied = policy.denied_advisories
    if isinstance(denied, Unchecked):
        yield "tcb-advisories", denied, "", ""
    else:
        found = {advisory.upper() for advisory in tcb.advisories}
        hit = sorted(found & {advisory.upper() for advisory in denied})
        yield "tcb-advisories", not hit, ", ".join(hit) or "none that is denied", "none of them"
    yield among("instance", of.platform.ppid.hex(), policy.instances)
    yield among("fmspc", of.platform.fmspc.hex(), policy.fmspcs)
    yield from _flags("platform", of.platform.flags, policy.platform)


def _enclave(report: EnclaveReport, policy: SgxPolicy) -> Iterator[Judged]:
    yield among("mrenclave", report.mrenclave.hex(), policy.mrenclave)
    yield among("mrsigner", report.mrsigner.hex(), policy.mrsigner)
    yield among("isvprodid", report.isvprodid, policy.isvprodid)
    if isinstance(policy.isvsvn, Unchecked):
        yield "isvsvn", policy.isvsvn, "", ""
    else:
        least = f"at least {policy.isvsvn}"
        yield "isvsvn", report.isvsvn >= policy.isvsvn, str(report.isvsvn), least
    yield among("configid", report.configid.hex(), policy.configid)
    names: Iterable[str] = () if isinstance(policy.attributes, Unchecked) else policy.attributes
    found = {name: report.attribute(name) for name in names}
    yield from _flags("attributes", found, policy.attributes)


def _td(report: TdReport, policy: TdxPolicy) -> Iterator[Judged]:
    for name in MEASUREMENTS:
        admitted, found = getattr(policy, name), getattr(report, name)
        if found is None:
            if not isinstance(admitted, Unchecked):
                admitted = Unchecked("a TD report 1.0 has none")
            yield name, admitted, "", ""
        else:
            yield among(name, found.hex(), admitted)
    yield among("xfam", report.xfam.hex(), policy.xfam)
    names: Iterable[str] = (
        () if isinstance(policy.td_attributes, Unchecked) else policy.td_attributes
    )
    bits = {name: report.attribute(name) for name in names}
    yield from _flags("td-attributes", bits, policy.td_attributes)
    if not isinstance(policy.td_attributes, Unchecked):
        reserved = report.reserved_attributes
        yield "td-attributes-reserved", not reserved, f"{reserved:#x}", "0x0"


def debug(body: Body, policy: SgxPolicy | TdxPolicy, checks: Checks) -> None:
    """``evidence.appraise-debug`` unless the debug attribute is what the policy wants."""
    wanted = policy.attributes if isinstance(policy, SgxPolicy) else policy.td_attributes
    with checks.step("debug") as step:
        if isinstance(wanted, Unchecked):
            step.unchecked(wanted.reason)
        elif body.attribute("debug") is not wanted["debug"]:
            raise refusal(
                "appraise-debug",
                f"The debug attribute is {str(body.attribute('debug')).lower()}: its host can read"
                " and change what runs in a debug enclave or TD.",
                "debug",
                _MEND,
            )
        else:
            step.detail = str(wanted["debug"]).lower()


def _refused(name: str, found: str, wanted: str) -> Refused:
    message = f"The evidence's {name} is {found}; the policy wants {wanted}."
    return refusal(_STAGES.get(name, f"appraise-{name}"), message, name, _MEND)


def appraise(of: Endorsed, tcb: Tcb, policy: SgxPolicy | TdxPolicy, checks: Checks) -> None:
    """Follow the procedure above; raises the first failure once all checks are recorded."""
    body = of.quote.body
    judged = list(_platform(of, tcb, policy))
    if isinstance(body, EnclaveReport) and isinstance(policy, SgxPolicy):
        judged += _enclave(body, policy)
    if isinstance(body, TdReport) and isinstance(policy, TdxPolicy):
        judged += _td(body, policy)
    every(fields(judged, _refused), checks)

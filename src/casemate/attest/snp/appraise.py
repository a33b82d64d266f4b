"""A genuine SEV-SNP report against a trust policy: do we want what it says?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are
``evidence.appraise-<check>``, but for ``needs-uvm-endorsement``. Source: AMD 56860 (the sections
and tables named), 57230 section 3.

 1. ``unsigned-bytes``: bytes 0x330 to 0x49f, which nothing signs, are zero, whatever the policy.
 2. ``signing-key-kind``, ``report-version``, ``vmpl``: admitted ones only.
 3. ``chip``, ``csp``: admitted ones only; ``extractable``: no chip of a line whose secrets can be
    taken out, unless the policy lists it, or the cloud whose VLEK it signs with.
 4. ``guest-policy-<bit>``: each bit of POLICY that the policy names has its value (section 4.3);
    ``guest-policy-reserved``: no bit whose meaning is unknown is set. ``platform-info-<bit>``:
    likewise for PLATFORM_INFO (table 24), where bits of unknown meaning are shown.
 5. ``measurement``, ``host-data``, ``id-key``, ``author-key``, ``family-id``, ``image-id``:
    admitted ones only. An author's key counts only where the report says that one was used
    (AUTHOR_KEY_EN).
 6. ``guest-svn``, ``firmware`` (COMMITTED_MAJOR, MINOR, BUILD): at least. ``provisional``: the
    running firmware and TCB are the committed ones, so that they cannot be taken back.
 7. ``reported-tcb``, ``committed-tcb``, ``launch-tcb``: every component at least (table 3); a
    product line without a floor is refused.
 8. ``launch-mitigations``, ``current-mitigations``: the bits are set; reports before version 5
    have none.
 9. ``uvm-feed``, ``uvm-svn``: the utility VM's endorsement, which must be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from casemate.attest.judge import Judged, among, every, fields
from casemate.attest.snp.abi import PLATFORM_BITS, POLICY_BITS, Report
from casemate.attest.snp.collateral import Chain, tcb_components
from casemate.attest.snp.policy import SnpPolicy, TcbFloor
from casemate.attest.snp.uvm import FILE, Endorsement
from casemate.attest.verdict import Checks, Refused, Unchecked, refusal

_MEND = "Ask the operator to run what the trust policy admits, or change the policy knowingly."


def _least(name: str, found: Any, least: Any, show: Any = str) -> Judged:
    if isinstance(least, Unchecked):
        return name, least, "", ""
    return name, found >= least, show(found), f"at least {show(least)}"


def _set(name: str, found: int, wanted: int | Unchecked) -> Judged:
    if isinstance(wanted, Unchecked):
        return name, wanted, "", ""
    return name, found & wanted == wanted, f"{found:#x}", f"all bits of {wanted:#x}"


def _tcb(name: str, product: str, tcb: bytes, floors: TcbFloor | Unchecked) -> Judged:
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


def _bits(
    name: str, found: Mapping[str, bool], wanted: Mapping[str, bool] | Unchecked
) -> Iterator[Judged]:
    if isinstance(wanted, Unchecked):
        yield name, wanted, "", ""
        return
    for bit, value in wanted.items():
        shown = str(found[bit]).lower(), str(value).lower()
        yield f"{name}-{bit.replace('_', '-')}", found[bit] is value, *shown
    others = [bit for bit in found if bit not in wanted]
    if others:
        reason = f"the policy wants no value of {', '.join(others)}"
        yield f"{name}-others", Unchecked(reason), "", ""


def _chip(report: Report, chain: Chain, policy: SnpPolicy) -> Iterator[Judged]:
    chips, clouds = (
        listed if isinstance(listed, tuple) else () for listed in (policy.chip_ids, policy.csp_ids)
    )
    chip = report.chip_id.hex() if any(report.chip_id) else "masked"
    yield among("chip", chip, policy.chip_ids)
    if isinstance(policy.extractable, Unchecked):
        yield "extractable", policy.extractable, "", ""
    else:
        listed = chain.csp_id in clouds if chain.kind == "VLEK" else chip in chips
        ok = chain.product not in policy.extractable or listed
        wanted = "a chip or cloud that it lists, since this line's secrets can be extracted"
        yield "extractable", ok, chain.product, wanted
    if chain.kind == "VLEK" or isinstance(policy.csp_ids, Unchecked):
        yield among("csp", chain.csp_id, policy.csp_ids)


def _firmware(report: Report, policy: SnpPolicy) -> Judged:
    if isinstance(policy.provisional, Unchecked):
        return "provisional", policy.provisional, "", ""
    current = f"{_version(report.current_version)} {report.current_tcb.hex()}"
    committed = f"{_version(report.committed_version)} {report.committed_tcb.hex()}"
    return "provisional", policy.provisional or current == committed, current, committed


def _identity(report: Report, policy: SnpPolicy) -> Iterator[Judged]:
    yield among("measurement", report.measurement.hex(), policy.measurements)
    yield among("host-data", report.host_data.hex(), policy.host_data)
    yield among("id-key", report.id_key_digest.hex(), policy.id_keys)
    author = report.author_key_digest.hex() if report.author_key_en else "none"
    yield among("author-key", author, policy.author_keys)
    yield among("family-id", report.family_id.hex(), policy.family_ids)
    yield among("image-id", report.image_id.hex(), policy.image_ids)


def _judge(report: Report, chain: Chain, policy: SnpPolicy) -> Iterator[Judged]:
    unsigned = int.from_bytes(report.unsigned, "big")
    yield "unsigned-bytes", not unsigned, "zeros" if not unsigned else "not zero", "zeros"
    yield among("signing-key-kind", report.signing_key, policy.signing_keys)
    yield among("report-version", report.version, policy.report_versions)
    yield among("vmpl", report.vmpl, policy.vmpl)
    yield from _chip(report, chain, policy)
    bits = {bit: getattr(report.policy, bit) for bit in POLICY_BITS}
    yield from _bits("guest-policy", bits, policy.guest_policy)
    if not isinstance(policy.guest_policy, Unchecked):
        reserved = report.policy.reserved
        yield "guest-policy-reserved", not reserved, f"{reserved:#x}", "0x0"
    yield from _bits("platform-info", report.platform, policy.platform_info)
    unknown = report.platform_info >> len(PLATFORM_BITS)
    if unknown:
        yield "platform-info-reserved", Unchecked(f"bits of unknown meaning: {unknown:#x}"), "", ""
    yield from _identity(report, policy)
    yield _least("guest-svn", report.guest_svn, policy.guest_svn)
    yield _least("firmware", report.committed_version, policy.firmware, _version)
    yield _firmware(report, policy)
    yield _tcb("reported-tcb", chain.product, report.reported_tcb, policy.reported_tcb)
    yield _tcb("committed-tcb", chain.product, report.committed_tcb, policy.committed_tcb)
    yield _tcb("launch-tcb", chain.product, report.launch_tcb, policy.launch_tcb)
    yield _set("launch-mitigations", report.launch_mit_vector, policy.launch_mitigations)
    yield _set("current-mitigations", report.current_mit_vector, policy.current_mitigations)


def _uvm(found: Endorsement | None, policy: SnpPolicy) -> Iterator[Judged]:
    feed, svn = ("", -1) if found is None else (found.feed, found.svn)
    yield among("uvm-feed", feed, policy.uvm_feeds)
    yield _least("uvm-svn", svn, policy.uvm_svn)


def _refused(endorsed: bool, name: str, found: str, wanted: str) -> Refused:
    if name.startswith("uvm-") and not endorsed:
        message = "The evidence carries no endorsement of the utility VM."
        return refusal("needs-uvm-endorsement", message, FILE, _MEND)
    message = f"The report's {name} is {found}; the policy wants {wanted}."
    return refusal(f"appraise-{name}", message, name, _MEND)


def appraise(
    report: Report,
    chain: Chain,
    policy: SnpPolicy,
    checks: Checks,
    endorsement: Endorsement | None = None,
) -> None:
    """Follow the procedure above; raises the first failure once all checks are recorded."""
    judged = (*_judge(report, chain, policy), *_uvm(endorsement, policy))
    every(fields(judged, partial(_refused, endorsement is not None)), checks)

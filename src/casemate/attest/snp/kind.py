"""AMD SEV-SNP as a kind of evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from casemate.attest.kind import Claims, Files, Kind, whole
from casemate.attest.snp import abi, beside, collateral, uvm, verify
from casemate.attest.snp.abi import Report
from casemate.attest.snp.appraise import appraise
from casemate.attest.snp.policy import DEFAULT, SnpPolicy
from casemate.attest.verdict import Checks, refusal
from casemate.spec.canonical import Json

_SIZES: Final = (16, 20, 24, 32, 48)


def _is_report(raw: bytes) -> bool:
    """By size, version and algorithm: other kinds name a file of theirs the same."""
    version, algorithm = (int.from_bytes(raw[at : at + 4], "little") for at in (0x00, 0x34))
    return len(raw) == abi.REPORT_BYTES and version in abi.VERSIONS and algorithm <= 1


def recognises(files: Files) -> bool:
    """A report of 1,184 bytes, or a VCEK or VLEK certificate; a paravisor's report is another
    kind's."""
    if "hcl_report.bin" in files:
        return False
    return bool({"vcek.der", "vlek.der"} & set(files)) or _is_report(files.get(beside.REPORT, b""))


def fresh(report_data: bytes) -> tuple[bytes, ...]:
    """What a challenge may have been: all of REPORT_DATA, or what stands before its zeros."""
    bare = report_data.rstrip(b"\0")
    if not bare:
        return (report_data,)
    shorter = (report_data[:size] for size in _SIZES if size >= len(bare))
    return tuple(dict.fromkeys((report_data, bare, *shorter)))


def _tcbs(report: Report, product: str) -> dict[str, Json]:
    versions = {
        "current_tcb": report.current_tcb,
        "reported_tcb": report.reported_tcb,
        "committed_tcb": report.committed_tcb,
        "launch_tcb": report.launch_tcb,
    }
    return {
        name: dict(collateral.tcb_components(product, tcb)) if product else tcb.hex()
        for name, tcb in versions.items()
    }


def shown(report: Report, product: str = "") -> dict[str, Json]:
    """The report's fields by the vendor's names, bytes as hex; TCB versions by component where the
    product line is known."""
    out: dict[str, Json] = {}
    for name in Report.__dataclass_fields__:
        value = getattr(report, name)
        if name in ("raw", "r", "s"):
            continue
        if isinstance(value, bytes):
            out[name] = value.hex()
        elif isinstance(value, tuple):
            out[name] = ".".join(map(str, value))
        elif isinstance(value, abi.GuestPolicy):
            out[name] = dict(vars(value))
        else:
            out[name] = value
    out["platform_info"] = {"value": f"{report.platform_info:#x}", **report.platform}
    for name in ("launch_mit_vector", "current_mit_vector"):
        out[name] = f"{out[name]:#x}"
    return {**out, **_tcbs(report, product)}


def _endorsed(found: uvm.Endorsement | None) -> Json:
    if found is None:
        return None
    return {
        "issuer": found.issuer,
        "feed": found.feed,
        "svn": found.svn,
        "measurement": found.measurement.hex(),
        "signed_at": found.signed_at,
    }


def check(files: Files, policy: SnpPolicy, now: float, checks: Checks) -> Claims:
    """Parse, verify and appraise, in the order of the modules' procedures; all signatures first."""
    with checks.step("parse") as step:
        raw = files.get(beside.REPORT)
        report = None if raw is None else abi.parse(raw)
        chain = collateral.parse(files)
        lists = collateral.revocation_lists(files)
        endorsement = uvm.read(files)
        found = "no report" if report is None else f"report version {report.version}"
        step.detail = f"{found}, {chain.kind} chain"
    ark = verify.signatures(report, chain, policy.roots, checks, lists)
    if endorsement is not None:
        measured = None if report is None else report.measurement
        uvm.verify(endorsement, measured, policy.uvm_issuers, checks)
    if report is not None:
        beside.verify(report, files, checks)
    checks.crypto = "valid"
    verify.standing(chain, ark, checks, now=now, lists=lists, demanded=policy.crl)
    if endorsement is not None:
        uvm.standing(endorsement, policy.uvm_validity, checks, now=now)
    if report is None:
        with checks.step("report"):
            raise refusal(
                "absent-report",
                "There is a chain of certificates, but no report.",
                beside.REPORT,
                "Ask the server for the report that these certificates endorse.",
            )
    appraise(report, chain, policy, checks, endorsement)
    return Claims(
        bound=report.report_data,
        fresh=fresh(report.report_data),
        product=chain.product,
        root=ark.fingerprint,
        measurement=report.measurement.hex(),
        chip_id=chain.hwid.hex(),
        tcb=collateral.tcb_components(chain.product, report.reported_tcb),
        other={
            "report": shown(report, chain.product),
            "signing_key": chain.kind,
            "csp_id": chain.csp_id,
            "uvm": _endorsed(endorsement),
        },
    )


def fields(files: Files) -> Mapping[str, Json]:
    """The report field by field, its signature, and what its certificates say."""
    out: dict[str, Json] = {}
    chain = None
    if {"vcek.der", "vlek.der"} & set(files):
        chain = collateral.parse(files)
        out["chain"] = {
            "kind": chain.kind,
            "product": chain.product,
            "tcb": dict(collateral.tcb_components(chain.product, chain.tcb)),
            "hwid": chain.hwid.hex(),
            "csp_id": chain.csp_id,
            "serial": chain.leaf.serial,
            "not_before": chain.leaf.not_before,
            "not_after": chain.leaf.not_after,
        }
    if beside.REPORT in files:
        report = abi.parse(files[beside.REPORT])
        out["report"] = shown(report, "" if chain is None else chain.product)
        out["signature"] = {"r": f"{report.r:096x}", "s": f"{report.s:096x}"}
        out["unsigned"] = report.unsigned.rstrip(b"\0").hex()
    endorsement = uvm.read(files)
    if endorsement is not None:
        out["uvm"] = _endorsed(endorsement)
    return out


KIND: Final = Kind(
    tee="sev-snp",
    recognises=recognises,
    check=check,
    policy=SnpPolicy,
    default=lambda: DEFAULT,
    field="REPORT_DATA",
    of=whole,
    fields=fields,
    instances=("chip_ids",),
    vendor="AMD",
)

"""The hardware's report inside the paravisor's, verified: SEV-SNP by its certificates, TDX by a
quote over the same TDREPORT.

Source: as ``snp.verify``, ``dcap.verify`` and ``azure.abi`` name it; Microsoft, "Confidential VM
Guest Attestation Design Detail" (hardware vendor certificate chain).

Procedure, first of both kinds the signatures, then (:attr:`Hardware.rest`) what else there is to
say:

 1. SEV-SNP: the report with its chain (``snp.verify.signatures``); a bare copy beside it
    (``snp_report.bin``, ``report.bin``) is the same, byte for byte. The rest:
    ``snp.verify.standing`` and ``snp.appraise``.
 2. TDX: the quote ``td_quote.bin`` (``dcap.verify.quote``); ``td-report``: each field of its body
    is that of the TDREPORT, whose MAC only the machine itself could check. The rest: validity,
    debug, collateral, TCB and policy, as ``dcap.kind`` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from casemate.attest.azure import abi
from casemate.attest.azure.abi import HclReport
from casemate.attest.azure.policy import AzurePolicy
from casemate.attest.dcap import abi as dcap_abi
from casemate.attest.dcap import appraise as dcap_appraise
from casemate.attest.dcap import collateral as dcap_collateral
from casemate.attest.dcap import tcb as dcap_tcb
from casemate.attest.dcap import verify as dcap_verify
from casemate.attest.dcap.abi import TdReport
from casemate.attest.kind import Files
from casemate.attest.snp import abi as snp_abi
from casemate.attest.snp import collateral as snp_collateral
from casemate.attest.snp import verify as snp_verify
from casemate.attest.snp.appraise import appraise as snp_appraise
from casemate.attest.verdict import Checks, Refused, Unchecked, refusal

T = TypeVar("T")
TD_QUOTE: Final = "td_quote.bin"
COPIES: Final = ("snp_report.bin", "report.bin")
# Names of files that are the hardware's; those of DCAP collateral by how they begin.
SNP_FILES: Final = frozenset({
    *COPIES, "vcek.der", "vlek.der", "ask.pem", "asvk.pem", "ark.pem", *snp_collateral.LISTS,
})  # fmt: skip
_TDX_FILES: Final = (TD_QUOTE, dcap_collateral.FILE)
_TDX_PARTS: Final = ("tcb_", "pck_", "qe_identity", "root_ca_crl")
_MEND: Final = "Ask the operator for evidence of one and the same machine."


def is_hardware(file: str) -> bool:
    return file in SNP_FILES or file in _TDX_FILES or file.startswith(_TDX_PARTS)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A report whose signatures hold. rest: what remains to be said at a time (Unix seconds); it
    records and returns its failures, in order. files: those that were read."""

    product: str
    root: str
    report_data: bytes
    measurement: str
    chip_id: str
    tcb: Mapping[str, int]
    rest: Callable[[float], list[Refused]]
    files: frozenset[str]


def _attempt(failed: list[Refused], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except Refused as e:
        failed.append(e)
        return None


def snp(hcl: HclReport, files: Files, policy: AzurePolicy, checks: Checks) -> Hardware:
    """Step 1."""
    part = _admitted(policy.snp, "SEV-SNP", checks)
    with checks.step("parse-hardware") as step:
        report = snp_abi.parse(hcl.report)
        chain = snp_collateral.parse(files)
        lists = snp_collateral.revocation_lists(files)
        step.detail = f"SEV-SNP report version {report.version}, {chain.kind} chain"
    ark = snp_verify.signatures(report, chain, part.roots, checks, lists)
    copies = [name for name in COPIES if name in files]
    if copies:
        with checks.step("report-copy") as step:
            for name in copies:
                if files[name] != report.raw:
                    raise refusal(
                        "endorsement-report-copy",
                        f"{name} is not the report inside {abi.FILE}.", name, _MEND,
                    )  # fmt: skip
            step.detail = ", ".join(copies)

    def rest(now: float) -> list[Refused]:
        failed: list[Refused] = []
        _attempt(failed, lambda: snp_verify.standing(
            chain, ark, checks, now=now, lists=lists, demanded=part.crl
        ))  # fmt: skip
        _attempt(failed, lambda: snp_appraise(report, chain, part, checks))
        return failed

    return Hardware(
        product=f"Azure CVM, AMD {chain.product}",
        root=ark.fingerprint,
        report_data=report.report_data,
        measurement=report.measurement.hex(),
        chip_id=chain.hwid.hex(),
        tcb=snp_collateral.tcb_components(chain.product, report.reported_tcb),
        rest=rest,
        files=SNP_FILES,
    )


def tdx(hcl: HclReport, files: Files, policy: AzurePolicy, checks: Checks) -> Hardware:
    """Step 2."""
    part = _admitted(policy.tdx, "TDX", checks)
    failed: list[Refused] = []
    with checks.step("parse-hardware") as step:
        report = abi.td_report(hcl.report)
        if TD_QUOTE not in files:
            raise refusal(
                "needs-td-quote",
                "The TDREPORT is for its own machine; there is no quote over it.",
                TD_QUOTE,
                "Ask the server to have its TDREPORT quoted.",
            )
        quote = dcap_abi.parse(files[TD_QUOTE])
        body = quote.body
        if not isinstance(body, TdReport):
            raise refusal("parse-quote-version", f"{TD_QUOTE} is no quote of a TD.", TD_QUOTE)
        step.detail = f"TDREPORT, quote version {quote.header.version}"
        if quote.padding:
            step.detail += f"; {len(quote.padding)} bytes follow it that nothing covers"
    parts = _attempt(failed, lambda: dcap_collateral.parse(files))
    of = dcap_verify.quote(quote, parts, part.roots, checks)
    with checks.step("td-report") as step:
        names = abi.QUOTED + (abi.QUOTED_15 if body.mrservicetd is not None else ())
        for name in names:
            if report[name] != getattr(body, name):
                raise refusal(
                    "endorsement-td-report",
                    f"{name} of the TDREPORT is not what the quote says.", abi.FILE, _MEND,
                )  # fmt: skip
        step.detail = f"{len(names)} fields are the quote's; CPUSVN and MAC are the machine's own"

    def rest(now: float) -> list[Refused]:
        _attempt(failed, lambda: dcap_verify.validity(of, now=now, checks=checks))
        _attempt(failed, lambda: dcap_appraise.debug(body, part, checks))
        if parts is not None:
            current = _attempt(failed, lambda: dcap_verify.collateral(
                parts, of, part, now=now, checks=checks
            ))  # fmt: skip
            if current is not None:
                found = _attempt(failed, lambda: dcap_tcb.evaluate(of, current, checks))
                if found is not None:
                    _attempt(failed, lambda: dcap_appraise.appraise(of, found, part, checks))
        return failed

    return Hardware(
        product=f"Azure CVM, TDX (FMSPC {of.platform.fmspc.hex()})",
        root=of.root.fingerprint,
        report_data=body.report_data,
        measurement=body.mrtd.hex(),
        chip_id=of.platform.ppid.hex(),
        tcb={f"tee_tcb_svn{n:02d}": svn for n, svn in enumerate(body.tee_tcb_svn)},
        rest=rest,
        files=frozenset(
            name for name in files if name.startswith(_TDX_PARTS) or name in _TDX_FILES
        ),
    )


def _admitted(part: T | Unchecked, name: str, checks: Checks) -> T:
    if isinstance(part, Unchecked):
        with checks.step("hardware"):
            raise refusal(
                "appraise-hardware", f"The policy admits no {name} hardware: {part.reason}.",
                abi.FILE, "Add its section to the trust policy, or use another server.",
            )  # fmt: skip
    return part


HARDWARE: Final[dict[str, Callable[[HclReport, Files, AzurePolicy, Checks], Hardware]]] = {
    "snp": snp,
    "tdx": tdx,
}

"""What trust policies may ask of SGX and TDX evidence.

Source: Intel SDM volume 3D (REPORT), "TDX Module Base Architecture" (TDREPORT), "PCS API" version 4
(TCB statuses, advisories, evaluation data numbers), PCK certificate profile section 1.3.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import fields
from casemate.attest.dcap import pck
from casemate.attest.dcap.abi import SGX_ATTRIBUTES, TD_ATTRIBUTES
from casemate.attest.dcap.documents import PLATFORM_STATUSES, REVOKED
from casemate.attest.kind import unpinned
from casemate.attest.verdict import HARDENING, Unchecked

RELAUNCH: Final = "TDRelaunchAdvised"
RELAUNCH_CONFIGURATION: Final = "TDRelaunchAdvisedConfigurationNeeded"
# A revoked TCB, and one that no level matches, is never admitted.
ADMISSIBLE: Final = (
    *(status for status in PLATFORM_STATUSES if status != REVOKED),
    RELAUNCH, RELAUNCH_CONFIGURATION,
)  # fmt: skip
DAY: Final = 86400


@dataclass(frozen=True, kw_only=True)
class DcapPolicy:
    """What SGX and TDX have in common. Digests and ids are lower-case hex.

    roots: admitted SHA-256 of the root key's SubjectPublicKeyInfo. tcb_statuses: admitted statuses
    of the platform, its quoting enclave and its TDX module, merged. denied_advisories: advisories
    (INTEL-SA-...) none of which may be open. tcb_evaluation: the least tcbEvaluationDataNumber.
    same_evaluation: true if TCB info and QE identity must be of one and the same. collateral_age:
    the most days since TCB info, QE identity and both revocation lists were issued.
    collateral_grace: days for which they are taken after they should have been renewed. instances:
    admitted PPIDs. fmspcs: admitted FMSPCs (families of processors). platform: flags of
    multi-package platforms and the value that each must have; one that says nothing has none.
    """

    roots: tuple[str, ...] | Unchecked
    tcb_statuses: tuple[str, ...] | Unchecked
    denied_advisories: tuple[str, ...] | Unchecked
    tcb_evaluation: int | Unchecked
    same_evaluation: bool | Unchecked
    collateral_age: int | Unchecked
    collateral_grace: int
    instances: tuple[str, ...] | Unchecked
    fmspcs: tuple[str, ...] | Unchecked
    platform: Mapping[str, bool] | Unchecked

    def __post_init__(self) -> None:
        fields.digests(self.roots, 64, "roots")
        fields.words(self.tcb_statuses, ADMISSIBLE, "tcb_statuses")
        fields.words(self.denied_advisories, None, "denied_advisories")
        fields.integer(self.tcb_evaluation, range(1 << 31), "tcb_evaluation")
        fields.flag(self.same_evaluation, "same_evaluation")
        fields.integer(self.collateral_age, range(3660), "collateral_age")
        if isinstance(self.collateral_grace, Unchecked):
            raise fields.bad("collateral_grace must be a number of days.", "collateral_grace")
        fields.integer(self.collateral_grace, range(3660), "collateral_grace")
        fields.digests(self.instances, 32, "instances")
        fields.digests(self.fmspcs, 12, "fmspcs")
        fields.flags(self.platform, (), pck.FLAGS, "platform")


@dataclass(frozen=True, kw_only=True)
class SgxPolicy(DcapPolicy):
    """Of an enclave: admitted MRENCLAVEs, MRSIGNERs, ISVPRODIDs and CONFIGIDs, the least ISVSVN,
    and attributes with the value that each must have."""

    mrenclave: tuple[str, ...] | Unchecked
    mrsigner: tuple[str, ...] | Unchecked
    isvprodid: tuple[int, ...] | Unchecked
    isvsvn: int | Unchecked
    configid: tuple[str, ...] | Unchecked
    attributes: Mapping[str, bool] | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.digests(self.mrenclave, 64, "mrenclave")
        fields.digests(self.mrsigner, 64, "mrsigner")
        fields.integers(self.isvprodid, range(1 << 16), "isvprodid")
        fields.integer(self.isvsvn, range(1 << 16), "isvsvn")
        fields.digests(self.configid, 128, "configid")
        fields.flags(self.attributes, ("debug",), SGX_ATTRIBUTES, "attributes")


MEASUREMENTS: Final = (
    "mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mrconfigid", "mrowner", "mrownerconfig", "mrseam",
    "mrservicetd",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TdxPolicy(DcapPolicy):
    """Of a TD: admitted MRTDs, RTMRs, MRCONFIGIDs, MROWNERs, MROWNERCONFIGs, MRSEAMs (TDX modules)
    and MRSERVICETDs (of TD reports 1.5), admitted XFAMs, and TDATTRIBUTES with the value that each
    must have; attributes whose meaning is not known are refused. event_log: true if a log that
    replays to the RTMRs must come; one that comes must replay whatever stands here."""

    mrtd: tuple[str, ...] | Unchecked
    rtmr0: tuple[str, ...] | Unchecked
    rtmr1: tuple[str, ...] | Unchecked
    rtmr2: tuple[str, ...] | Unchecked
    rtmr3: tuple[str, ...] | Unchecked
    mrconfigid: tuple[str, ...] | Unchecked
    mrowner: tuple[str, ...] | Unchecked
    mrownerconfig: tuple[str, ...] | Unchecked
    mrseam: tuple[str, ...] | Unchecked
    mrservicetd: tuple[str, ...] | Unchecked
    xfam: tuple[str, ...] | Unchecked
    td_attributes: Mapping[str, bool] | Unchecked
    event_log: bool | Unchecked

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in MEASUREMENTS:
            fields.digests(getattr(self, name), 96, name)
        fields.digests(self.xfam, 16, "xfam")
        fields.flags(self.td_attributes, ("debug",), TD_ATTRIBUTES, "td_attributes")
        fields.flag(self.event_log, "event_log")


_ROOTS: Final = pck.ROOTS
_STATUSES: Final = ("UpToDate", *HARDENING)
_ADVISORIES: Final = Unchecked("no advisory is denied by name; the status speaks for them")
_EVALUATION: Final = Unchecked("no floor was given")
_AGE: Final = Unchecked("collateral is taken until it must be renewed")
_INSTANCES: Final = Unchecked("any genuine platform is accepted")
_PLATFORM: Final = Unchecked("any configuration of the platform is accepted")

# Nothing is pinned; what its host can read or debug, and a TCB that is not current, is refused.
SGX: Final = SgxPolicy(
    roots=_ROOTS,
    tcb_statuses=_STATUSES,
    denied_advisories=_ADVISORIES,
    tcb_evaluation=_EVALUATION,
    same_evaluation=True,
    collateral_age=_AGE,
    collateral_grace=0,
    instances=_INSTANCES,
    fmspcs=_INSTANCES,
    platform=_PLATFORM,
    mrenclave=unpinned("MRENCLAVE"),
    mrsigner=unpinned("MRSIGNER"),
    isvprodid=unpinned("ISVPRODID"),
    isvsvn=Unchecked("no versions are assigned"),
    configid=unpinned("CONFIGID"),
    attributes={"init": True, "debug": False},
)
TDX: Final = TdxPolicy(
    roots=_ROOTS,
    tcb_statuses=_STATUSES,
    denied_advisories=_ADVISORIES,
    tcb_evaluation=_EVALUATION,
    same_evaluation=True,
    collateral_age=_AGE,
    collateral_grace=0,
    instances=_INSTANCES,
    fmspcs=_INSTANCES,
    platform=_PLATFORM,
    mrtd=unpinned("MRTD"),
    rtmr0=unpinned("RTMR0"),
    rtmr1=unpinned("RTMR1"),
    rtmr2=unpinned("RTMR2"),
    rtmr3=unpinned("RTMR3"),
    mrconfigid=unpinned("MRCONFIGID"),
    mrowner=unpinned("MROWNER"),
    mrownerconfig=unpinned("MROWNERCONFIG"),
    mrseam=Unchecked("any TDX module that Intel signed is accepted"),
    mrservicetd=("00" * 48,),
    xfam=unpinned("XFAM"),
    td_attributes={"debug": False, "sept_ve_disable": True, "migratable": False},
    event_log=Unchecked("no event log is asked for"),
)

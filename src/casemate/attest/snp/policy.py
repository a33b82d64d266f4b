"""What a trust policy may ask of SEV-SNP evidence.

Source: AMD 56860 (SEV-SNP Firmware ABI), tables 3 (TCB_VERSION), 9 (POLICY), 23
(ATTESTATION_REPORT) and 24 (PLATFORM_INFO); AMD 57230 (product lines, CSP_ID).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import fields
from casemate.attest.kind import unpinned
from casemate.attest.roots import AMD, UVM_ISSUERS
from casemate.attest.snp.abi import PLATFORM_BITS, POLICY_BITS
from casemate.attest.snp.collateral import PRODUCTS
from casemate.attest.verdict import Unchecked

# Product line to component to its least security version.
TcbFloor = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class SnpPolicy:
    """What a SEV-SNP report must show. Digests and ids are lower-case hex.

    roots: product line to the admitted SHA-256 of its root key's SubjectPublicKeyInfo; a line that
    is not named is refused. signing_keys: VCEK, VLEK. crl: true if AMD's revocation list must come
    with the evidence (one that comes is checked whatever stands here).

    measurements, host_data, id_keys, author_keys, family_ids, image_ids: admitted MEASUREMENTs,
    HOST_DATA, ID_KEY_DIGESTs, AUTHOR_KEY_DIGESTs, FAMILY_IDs, IMAGE_IDs. guest_svn: the least
    GUEST_SVN. vmpl: admitted privilege levels. guest_policy: bits of the guest policy and the value
    that each must have.

    uvm_issuers: admitted issuers (did:x509) of an endorsement of the utility VM's measurement, as
    Azure's container instances carry it; it is verified wherever it is carried. uvm_feeds: its
    admitted feeds; uvm_svn: the least guest SVN that it states. Either of them demands that there
    be an endorsement. uvm_validity: true if its certificates must be valid at the time given, not
    only at its own signing time.

    chip_ids: admitted CHIP_IDs. csp_ids: the clouds whose VLEK is admitted. extractable: product
    lines whose chips' secrets can be taken out by who holds the chip; of those a chip is admitted
    only if ``chip_ids`` lists it, or ``csp_ids`` the cloud whose VLEK it signs with.
    report_versions: admitted versions of the report.

    firmware: the least committed firmware (major, minor, build). reported_tcb, committed_tcb,
    launch_tcb: the least version of each component, for each product line. provisional: whether
    the running firmware may be newer than what is committed, so that it could be taken back.
    platform_info: bits of PLATFORM_INFO and the value that each must have. launch_mitigations,
    current_mitigations: bits of the mitigation vectors (version 5) that must be set.
    """

    roots: Mapping[str, tuple[str, ...]] | Unchecked
    signing_keys: tuple[str, ...]
    crl: bool | Unchecked
    measurements: tuple[str, ...] | Unchecked
    host_data: tuple[str, ...] | Unchecked
    id_keys: tuple[str, ...] | Unchecked
    author_keys: tuple[str, ...] | Unchecked
    family_ids: tuple[str, ...] | Unchecked
    image_ids: tuple[str, ...] | Unchecked
    guest_svn: int | Unchecked
    vmpl: tuple[int, ...] | Unchecked
    guest_policy: Mapping[str, bool] | Unchecked
    uvm_issuers: tuple[str, ...] | Unchecked
    uvm_feeds: tuple[str, ...] | Unchecked
    uvm_svn: int | Unchecked
    uvm_validity: bool | Unchecked
    chip_ids: tuple[str, ...] | Unchecked
    extractable: tuple[str, ...] | Unchecked
    csp_ids: tuple[str, ...] | Unchecked
    report_versions: tuple[int, ...] | Unchecked
    firmware: tuple[int, int, int] | Unchecked
    reported_tcb: TcbFloor | Unchecked
    committed_tcb: TcbFloor | Unchecked
    launch_tcb: TcbFloor | Unchecked
    provisional: bool | Unchecked
    platform_info: Mapping[str, bool] | Unchecked
    launch_mitigations: int | Unchecked
    current_mitigations: int | Unchecked

    def __post_init__(self) -> None:
        if not isinstance(self.roots, Unchecked):
            if not self.roots:
                raise fields.bad("The policy admits no root.", "roots")
            for pins in self.roots.values():
                fields.digests(pins, 64, "roots")
        if isinstance(self.signing_keys, Unchecked):
            raise fields.bad("signing_keys must be of VCEK and VLEK.", "signing_keys")
        fields.words(self.signing_keys, ("VCEK", "VLEK"), "signing_keys")
        for name, digits in _DIGESTS.items():
            fields.digests(getattr(self, name), digits, name)
        if isinstance(self.uvm_issuers, Unchecked) and not (
            isinstance(self.uvm_feeds, Unchecked) and isinstance(self.uvm_svn, Unchecked)
        ):
            raise fields.bad(
                "uvm_feeds and uvm_svn are somebody's word: give uvm_issuers.", "uvm_issuers"
            )
        for name in ("crl", "uvm_validity", "provisional"):
            fields.flag(getattr(self, name), name)
        for name in ("uvm_issuers", "uvm_feeds", "csp_ids"):
            fields.words(getattr(self, name), None, name)
        fields.words(self.extractable, AMD, "extractable")
        fields.integers(self.vmpl, range(4), "vmpl")
        fields.integers(self.report_versions, range(2, 1 << 32), "report_versions")
        for name, bits in _INTEGERS.items():
            fields.integer(getattr(self, name), range(1 << bits), name)
        if not isinstance(self.firmware, Unchecked):
            if len(self.firmware) != 3:
                raise fields.bad("firmware must be major, minor and build.", "firmware")
            fields.integers(self.firmware, range(256), "firmware")
        for name in ("reported_tcb", "committed_tcb", "launch_tcb"):
            _floor(getattr(self, name), name)
        fields.flags(self.guest_policy, ("debug", "migrate_ma"), POLICY_BITS, "guest_policy")
        fields.flags(self.platform_info, (), PLATFORM_BITS, "platform_info")


_DIGESTS: Final = {
    "measurements": 96, "host_data": 64, "id_keys": 96, "author_keys": 96, "family_ids": 32,
    "image_ids": 32, "chip_ids": 128,
}  # fmt: skip
_INTEGERS: Final = {
    "guest_svn": 32, "uvm_svn": 32, "launch_mitigations": 64, "current_mitigations": 64,
}  # fmt: skip


def _floor(found: object, where: str) -> None:
    if isinstance(found, Unchecked):
        return
    if not isinstance(found, Mapping) or not found:
        raise fields.bad(f"{where} must name product lines.", where)
    for line, floor in found.items():
        if line not in AMD:
            raise fields.bad(f"{where} names the unknown product line {str(line)[:40]!r}.", where)
        components = {name for name, _ in PRODUCTS[line].tcb if name}
        if not isinstance(floor, Mapping) or set(floor) != components:
            wanted = ", ".join(sorted(components))
            raise fields.bad(f"{where} of {line} must give {wanted}.", where)
        fields.integers(tuple(floor.values()), range(256), where)


# Nothing is pinned; a guest that its host may read, or move to where it may, is refused.
DEFAULT: Final = SnpPolicy(
    roots=AMD,
    signing_keys=("VCEK", "VLEK"),
    crl=Unchecked("no revocation list is demanded"),
    measurements=unpinned("the measurement"),
    host_data=unpinned("HOST_DATA"),
    id_keys=unpinned("the id block's key"),
    author_keys=unpinned("the id block's author"),
    family_ids=unpinned("FAMILY_ID"),
    image_ids=unpinned("IMAGE_ID"),
    guest_svn=Unchecked("no guest versions are assigned"),
    vmpl=unpinned("the privilege level"),
    guest_policy={"debug": False, "migrate_ma": False},
    uvm_issuers=UVM_ISSUERS,
    uvm_feeds=unpinned("an endorsement of the utility VM"),
    uvm_svn=unpinned("the utility VM's version"),
    uvm_validity=Unchecked("an endorsement outlives the certificate that signed it"),
    chip_ids=Unchecked("any genuine chip of the product lines is accepted"),
    extractable=Unchecked("chips whose secrets can be extracted are accepted"),
    csp_ids=Unchecked("any cloud's VLEK is accepted"),
    report_versions=unpinned("the report's version"),
    firmware=Unchecked("the TCB floors stand for it"),
    reported_tcb=Unchecked("no floor was given"),
    committed_tcb=Unchecked("no floor was given"),
    launch_tcb=Unchecked("no floor was given"),
    provisional=Unchecked("firmware that is not committed is accepted"),
    platform_info=unpinned("PLATFORM_INFO"),
    launch_mitigations=Unchecked("no mitigations are asked for"),
    current_mitigations=Unchecked("no mitigations are asked for"),
)

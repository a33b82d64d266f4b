"""What a trust policy may ask of an Azure confidential VM.

Source: Microsoft, "Confidential VM Guest Attestation Design Detail" (runtime claims); the policies
of the hardware's report and of the vTPM's quote are those of ``snp``, ``dcap`` and ``tpm``.

In TOML the parts are tables of the section: ``[azure-cvm.snp]``, ``[azure-cvm.tdx]`` and
``[azure-cvm.tpm]``, each in the form of its own kind; roots that a part does not name are the
vendor's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from casemate.attest import fields
from casemate.attest.dcap.policy import TDX, TdxPolicy
from casemate.attest.kind import unpinned
from casemate.attest.roots import AMD
from casemate.attest.snp.policy import DEFAULT as SNP
from casemate.attest.snp.policy import SnpPolicy
from casemate.attest.tpm.policy import DEFAULT as TPM
from casemate.attest.tpm.policy import TpmPolicy
from casemate.attest.verdict import Unchecked

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AzurePolicy:
    """What the evidence of a confidential VM must show.

    snp, tdx: the policies of the hardware's report; ``Unchecked`` is a kind of hardware that is
    refused, with its reason; one at least is given. tpm: of the vTPM's quote; its roots are those
    of a certificate of the attestation key, which the hardware vouches for already.

    aik: true if such a certificate, up to one of these roots, must come along (one that comes must
    be of the same key, whatever stands here). secure_boot, console: the value that the runtime
    claims must state of secure-boot and console-enabled. vm_ids: admitted vmUniqueIds, upper case.
    user_data: admitted user-data of the runtime claims, 128 lower-case hex digits.
    """

    snp: SnpPolicy | Unchecked
    tdx: TdxPolicy | Unchecked
    tpm: TpmPolicy
    aik: bool | Unchecked
    secure_boot: bool | Unchecked
    console: bool | Unchecked
    vm_ids: tuple[str, ...] | Unchecked
    user_data: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        object.__setattr__(self, "snp", _part(SnpPolicy, self.snp, "snp"))
        object.__setattr__(self, "tdx", _part(TdxPolicy, self.tdx, "tdx"))
        object.__setattr__(self, "tpm", _part(TpmPolicy, self.tpm, "tpm"))
        if isinstance(self.tpm, Unchecked):
            raise fields.bad("The quote of the vTPM cannot be left unchecked.", "tpm")
        if isinstance(self.snp, Unchecked) and isinstance(self.tdx, Unchecked):
            raise fields.bad("The policy admits no hardware.", "snp")
        for name in ("aik", "secure_boot", "console"):
            fields.flag(getattr(self, name), name)
        fields.words(self.vm_ids, None, "vm_ids")
        if not isinstance(self.vm_ids, Unchecked) and any(x != x.upper() for x in self.vm_ids):
            raise fields.bad("vm_ids must be in upper case.", "vm_ids")
        fields.digests(self.user_data, 128, "user_data")


_ROOTS: Final = {SnpPolicy: AMD, TdxPolicy: TDX.roots, TpmPolicy: TPM.roots}


def _part(policy: type[T], found: Any, where: str) -> T | Unchecked:
    """A part's policy, also from its table in TOML."""
    if isinstance(found, policy | Unchecked):
        return found
    if not isinstance(found, Mapping):
        raise fields.bad(f"{where} must be a table.", where)
    table = dict(found)
    if "products" in table and policy is SnpPolicy:
        lines = fields.toml(table.pop("products"))
        fields.words(lines, AMD, f"{where}.products")
        if not isinstance(lines, tuple):
            raise fields.bad(f"products must be of {', '.join(AMD)}.", "products")
        table["roots"] = {line: AMD[line] for line in lines}
    if isinstance(firmware := table.get("firmware"), str):
        if not re.fullmatch(r"\d{1,3}\.\d{1,3}\.\d{1,3}", firmware):
            raise fields.bad("firmware must be MAJOR.MINOR.BUILD.", "firmware")
        table["firmware"] = list(map(int, firmware.split(".")))
    return fields.load(policy, {"roots": _ROOTS[policy]} | table, where)


# Nothing is pinned; each part as its own kind's default has it.
DEFAULT: Final = AzurePolicy(
    snp=SNP,
    tdx=TDX,
    tpm=replace(
        TPM, aks=Unchecked("any attestation key that the hardware vouches for is accepted")
    ),
    aik=Unchecked("the hardware's report vouches for the attestation key"),
    secure_boot=unpinned("secure-boot of the VM's configuration"),
    console=unpinned("console-enabled of the VM's configuration"),
    vm_ids=unpinned("the VM"),
    user_data=unpinned("user-data"),
)

"""What a trust policy may ask of NVIDIA's evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from casemate.attest import fields
from casemate.attest.kind import unpinned
from casemate.attest.nvidia.abi import MODES
from casemate.attest.verdict import Unchecked

# SHA-256 of the roots' SubjectPublicKeyInfo: "NVIDIA Device Identity CA" and "NVIDIA CoRIM signing
# Root CA", as NVIDIA's own verifiers carry them.
DEVICE_ROOTS: Final = ("a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4",)
RIM_ROOTS: Final = ("dec1dc316477aa851eebdf51327ae9f864bc8d89254657ed1e7eb9168af1e1a3",)
# Keys of devices whose certificates NVIDIA has revoked or put on hold, as far as it was published:
# the H100 with the serial 41ad48ff92cdc93d9a, "certificateHold" (NVIDIA/attestation-sdk, unit test
# Certhold, at 73c032e). It stands for no revocation service; see ``revocation``.
REVOKED: Final = ("2b7bd0d01dd79d8e9d4a40766b5034df703847bedd8a85a9df77288172890fc9",)


@dataclass(frozen=True, kw_only=True)
class NvidiaPolicy:
    """What a GPU or NVSwitch must show. Digests are lower-case hex.

    roots, rim_roots: admitted SHA-256 of the root keys' SubjectPublicKeyInfo, of devices and of
    reference values. revoked: SHA-256 of keys in chains that are refused whatever else holds.
    revocation: true if an answer about each certificate above the device's own must come with the
    evidence (those that come are checked whatever stands here).

    reference_values: true if the measurements must be those of NVIDIA's manifests for the driver
    and the VBIOS (a switch's BIOS), which then must come with the evidence; those that come are
    checked whatever stands here. They also show that no debug or developer mode is on, since
    those are measured.

    models: admitted chips (``GH100``: H100 and H200; ``GB100``: B100 and B200; ``LS_10``: the
    NVSwitch). driver_versions, vbios_versions: admitted ones. modes: admitted ways in which GPUs
    are passed through, of ``spt``, ``mpt`` and ``ppcie``. protected_pcie: whether it must be on.
    instances: admitted devices, by the SHA-256 of the device key's SubjectPublicKeyInfo.
    """

    roots: tuple[str, ...] | Unchecked
    rim_roots: tuple[str, ...] | Unchecked
    revoked: tuple[str, ...] | Unchecked
    revocation: bool | Unchecked
    reference_values: bool | Unchecked
    models: tuple[str, ...] | Unchecked
    driver_versions: tuple[str, ...] | Unchecked
    vbios_versions: tuple[str, ...] | Unchecked
    modes: tuple[str, ...] | Unchecked
    protected_pcie: bool | Unchecked
    instances: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        for name in ("roots", "rim_roots", "revoked", "instances"):
            fields.digests(getattr(self, name), 64, name)
        for name in ("models", "driver_versions", "vbios_versions"):
            fields.words(getattr(self, name), None, name)
        fields.words(self.modes, MODES.values(), "modes")
        fields.flag(self.protected_pcie, "protected_pcie")
        for name in ("revocation", "reference_values"):
            fields.flag(getattr(self, name), name)
            if getattr(self, name) is False:
                raise fields.bad(f"{name} is true, or unchecked with a reason.", name)


# Nothing is pinned; what runs must be what NVIDIA released.
DEFAULT: Final = NvidiaPolicy(
    roots=DEVICE_ROOTS,
    rim_roots=RIM_ROOTS,
    revoked=REVOKED,
    revocation=Unchecked("answers of NVIDIA's responder are not demanded"),
    reference_values=True,
    models=unpinned("the chip"),
    driver_versions=unpinned("the driver's version"),
    vbios_versions=unpinned("the VBIOS's version"),
    modes=unpinned("how GPUs are passed through"),
    protected_pcie=unpinned("protected PCIe"),
    instances=Unchecked("any genuine device is accepted"),
)

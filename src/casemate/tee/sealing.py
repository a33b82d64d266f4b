"""Keys that survive a restart: the kinds, what each protects from, and how each is had.

A sealing key for a label is HKDF-SHA256 of the kind's 32-byte secret; the label separates uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from casemate.seams import Disk, Rng
from casemate.seams.files import load, store
from casemate.spec.evidence import Evidence
from casemate.tee import errors, sev_guest, tpm_device

SECRET_BYTES: Final = 32
TPM_FILE: Final = "tee/tpm-sealed.bin"
# Firmware code, option ROMs, boot loader, secure boot policy, the loader's commands, what it read
# (kernel, initrd), unified kernel image. Configuration (1, 3, 5) may change from boot to boot.
TPM_PCRS: Final = (0, 2, 4, 7, 8, 9, 11)

# One row for each kind of sealing key, in words for `casemate doctor` and the documents.
KINDS: Final = {
    "snp-derived": "derived by the SEV-SNP chip for this measurement and guest policy; nobody"
    " outside the guest has it; another image or chip has another",
    "tpm-pcr": "sealed by the TPM to the boot's PCRs; whoever controls the TPM can have it: the"
    " operator, unless it is a vTPM inside the TEE",
    "owner-release": "held by a data owner, who wraps it at each start to a key that the evidence"
    " attests; nothing opens without the owner",
    "development-file": "a file beside the state: protects from nobody",
}


# Evidence over 64 bytes, for a secret that is given for evidence only.
Attest: TypeAlias = Callable[[bytes], Evidence]


@dataclass(frozen=True)
class Sealing:
    """``kind``: of :data:`KINDS`. ``secret`` gives the same 32 bytes after each restart, or raises
    ``usage.tee-*`` or ``ledger.tee-state``; it is asked for once."""

    kind: str
    secret: Callable[[Attest], bytes]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of sealing key")


def key(secret: bytes, kind: str, label: str) -> bytes:
    """32 bytes for this label."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a sealing secret has {len(secret)} bytes, not {SECRET_BYTES}")
    info = f"casemate/sealing/v1|{kind}|{label}".encode()
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def snp_derived(derive: Callable[[], bytes] = sev_guest.derived_key) -> Sealing:
    """For the guest's own privilege level."""
    return Sealing("snp-derived", lambda _: derive())


def _tpm_secret(tcti: str, disk: Disk, rng: Rng) -> bytes:
    with tpm_device.Tpm(tcti) as tpm:
        return _sealed_secret(tpm, disk, rng)


def _sealed_secret(tpm: tpm_device.Tpm, disk: Disk, rng: Rng) -> bytes:
    sealed = load(disk, TPM_FILE)
    if sealed is None:
        secret = rng.bytes(SECRET_BYTES)
        store(disk, TPM_FILE, tpm.seal(secret, TPM_PCRS))
        return secret
    found = tpm.unseal(sealed, TPM_PCRS)
    if found is None or len(found) != SECRET_BYTES:
        raise errors.state(
            TPM_FILE,
            f"The TPM does not open {TPM_FILE}: the machine booted otherwise (PCRs"
            f" {', '.join(map(str, TPM_PCRS))}), the TPM is another, or the file is damaged.",
            "Boot the firmware, kernel and command line that sealed it; what was sealed stays shut"
            " for any other.",
        )
    return found


def tpm_pcr(disk: Disk, rng: Rng, tcti: str = tpm_device.TCTI) -> Sealing:
    """A secret of ``rng``, sealed at the first start and kept as :data:`TPM_FILE`."""
    return Sealing("tpm-pcr", lambda _: _tpm_secret(tcti, disk, rng))


def unavailable(reason: str, mend: str) -> Sealing:
    """No secret: evidence can be made all the same, say for ``casemate doctor``."""

    def refuse(_: Attest) -> bytes:
        raise errors.sealing("sealing", reason, mend)

    return Sealing("owner-release", refuse)

"""What a trust policy may ask of a TPM's quotes.

Source: TPM 2.0 Library part 2 (TPMS_ATTEST, TPMS_CLOCK_INFO); TCG PC Client Platform Firmware
Profile (what each PCR holds, the event log).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest import fields
from casemate.attest.kind import unpinned
from casemate.attest.verdict import Unchecked

# Authorities of cloud vendors' virtual TPMs, by the file of their root's certificate: SHA-256 of
# the key's SubjectPublicKeyInfo.
ROOTS: Final = {
    "google-tpm-ek-root-1": "f23057f4f97d1d90e4cae0ce91d5a0fc99069f0a1bc147021dca33b1e9c4d0d9",
    "google-tpm-ek-ak-root": "56a613f57126a385dd6949294e93b0b566f96ab0573be0c2368e6f5ca779831f",
    "microsoft-vtpm-root-2023": "5cbc52672ae101263c2976736044a964c1182ce9412c39937183baddcccb8cdf",
}
PRODUCTS: Final = {
    ROOTS["google-tpm-ek-root-1"]: "Google Cloud vTPM",
    ROOTS["google-tpm-ek-ak-root"]: "Google Cloud vTPM",
    ROOTS["microsoft-vtpm-root-2023"]: "Azure vTPM",
}
# Banks that count, and the hex digits of their digests. SHA-1's collisions are made at will.
BANKS: Final = {"sha256": 64, "sha384": 96, "sha512": 128}

Pins = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class TpmPolicy:
    """What a quote must show. Digests are lower-case hex.

    roots: admitted SHA-256 of the SubjectPublicKeyInfo of the root that vouches for the attestation
    key (AK). aks: admitted SHA-256 of the AK's own SubjectPublicKeyInfo, which needs no certificate
    then; a pinned AK is one machine. revocation: true if each authority's revocation list must come
    along (one that comes is checked whatever stands here).

    hash_algorithms: banks of which at least one is quoted. pcrs: index of a PCR ("0" to "23") to
    its admitted digests; their length tells the bank. event_log: true if there must be an event log
    that replays to the quoted PCRs (one that comes must replay whatever stands here). secure_boot:
    whether the log must say that Secure Boot is on (true) or off.

    firmware_versions: admitted firmwareVersion, as 16 hex digits. clock_safe: the value that
    clockInfo.safe must have. reset_counts, restart_counts: admitted counts of resets and restarts.
    """

    roots: tuple[str, ...]
    aks: tuple[str, ...] | Unchecked
    revocation: bool | Unchecked
    hash_algorithms: tuple[str, ...]
    pcrs: Pins | Unchecked
    event_log: bool | Unchecked
    secure_boot: bool | Unchecked
    firmware_versions: tuple[str, ...] | Unchecked
    clock_safe: bool | Unchecked
    reset_counts: tuple[int, ...] | Unchecked
    restart_counts: tuple[int, ...] | Unchecked

    def __post_init__(self) -> None:
        for name in ("roots", "hash_algorithms"):
            if isinstance(getattr(self, name), Unchecked):
                raise fields.bad(f"{name} cannot be left unchecked.", name)
        fields.digests(self.roots, 64, "roots")
        fields.digests(self.aks, 64, "aks")
        fields.words(self.hash_algorithms, BANKS, "hash_algorithms")
        for name in ("revocation", "event_log", "secure_boot", "clock_safe"):
            fields.flag(getattr(self, name), name)
        fields.digests(self.firmware_versions, 16, "firmware_versions")
        fields.integers(self.reset_counts, range(1 << 32), "reset_counts")
        fields.integers(self.restart_counts, range(1 << 32), "restart_counts")
        object.__setattr__(self, "pcrs", _pins(self.pcrs))


def _pins(found: object) -> Pins | Unchecked:
    """Index to digests, with TOML's lists as tuples."""
    if isinstance(found, Unchecked):
        return found
    if not isinstance(found, Mapping) or not found:
        raise fields.bad("pcrs must name PCRs and their digests.", "pcrs")
    out: dict[str, tuple[str, ...]] = {}
    for index, digests in found.items():
        if not (isinstance(index, str) and re.fullmatch(r"1?[0-9]|2[0-3]", index)):
            raise fields.bad(f"pcrs names {str(index)[:20]!r}, which is no PCR.", "pcrs")
        out[index] = tuple(digests) if isinstance(digests, list) else digests
        fields.digests(out[index], tuple(BANKS.values()), f"pcrs.{index}")
        if isinstance(out[index], Unchecked):
            raise fields.bad("Leave out a PCR that is not to be checked.", "pcrs")
    return out


# Nothing is pinned; the AK is one that Google's or Microsoft's authority vouches for.
DEFAULT: Final = TpmPolicy(
    roots=tuple(ROOTS.values()),
    aks=Unchecked("any attestation key that a trusted root vouches for is accepted"),
    revocation=Unchecked("no revocation list is demanded"),
    hash_algorithms=tuple(BANKS),
    pcrs=Unchecked("no PCRs are pinned"),
    event_log=Unchecked("no event log is demanded"),
    secure_boot=unpinned("Secure Boot"),
    firmware_versions=unpinned("the firmware's version"),
    clock_safe=unpinned("the clock's safety"),
    reset_counts=unpinned("the count of resets"),
    restart_counts=unpinned("the count of restarts"),
)

"""What a trust policy may ask of a Nitro document.

Source: AWS, "Nitro Enclaves Attestation Process", section 2.2; AWS, "Nitro Enclaves User Guide",
"Cryptographic attestation" (what each PCR holds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from casemate.attest import fields
from casemate.attest.kind import unpinned
from casemate.attest.nitro.collateral import AWS
from casemate.attest.verdict import Unchecked

_YEAR: Final = 366 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class NitroPolicy:
    """What a Nitro document must show. Digests are lower-case hex.

    roots: admitted SHA-256 of the root key's SubjectPublicKeyInfo. crl: true if revocation lists
    must come with the document (one that comes is checked whatever stands here). debug: whether an
    enclave in debug mode, whose console its host reads, is admitted.

    pcrs: number of a register to its admitted values (96 digits). 0: the enclave's image; 1: kernel
    and first ramdisk; 2: the application; 3: the parent instance's IAM role; 4: the parent
    instance; 8: the key that signed the image.

    module_ids: admitted enclaves (``i-...-enc...``, another at each start); instances: admitted
    parent instances (``i-...``). max_age: the most seconds since the document was made.
    """

    roots: tuple[str, ...] = AWS
    crl: bool | Unchecked
    debug: bool | Unchecked
    pcrs: Mapping[int, tuple[str, ...]] | Unchecked
    module_ids: tuple[str, ...] | Unchecked
    instances: tuple[str, ...] | Unchecked
    max_age: int | Unchecked

    def __post_init__(self) -> None:
        if isinstance(self.roots, Unchecked):
            raise fields.bad("A Nitro document's root cannot be left unchecked.", "roots")
        fields.digests(self.roots, 64, "roots")
        fields.flag(self.crl, "crl")
        fields.flag(self.debug, "debug")
        object.__setattr__(self, "pcrs", _pcrs(self.pcrs))
        fields.words(self.module_ids, None, "module_ids")
        fields.words(self.instances, None, "instances")
        fields.integer(self.max_age, range(1, _YEAR), "max_age")


def _pcrs(found: Any) -> Mapping[int, tuple[str, ...]] | Unchecked:
    """In TOML the keys are strings and the values lists."""
    if isinstance(found, Unchecked):
        return found
    numbers = {str(n): n for n in range(32)}
    if not isinstance(found, Mapping) or not found or not {*map(str, found)} <= set(numbers):
        raise fields.bad("pcrs must name registers from 0 to 31.", "pcrs")
    out: dict[int, tuple[str, ...]] = {}
    for key, values in found.items():
        if isinstance(values, Unchecked):
            raise fields.bad("pcrs names only registers that are to be checked.", "pcrs")
        out[numbers[str(key)]] = tuple(values) if isinstance(values, list) else values
        fields.digests(out[numbers[str(key)]], 96, "pcrs")
    return out


# Nothing is pinned; an enclave that its host may read is refused.
DEFAULT: Final = NitroPolicy(
    crl=Unchecked("no revocation list is demanded"),
    debug=False,
    pcrs=unpinned("the measurement"),
    module_ids=unpinned("the enclave"),
    instances=unpinned("the parent instance"),
    max_age=Unchecked("a document's certificate lives three hours"),
)

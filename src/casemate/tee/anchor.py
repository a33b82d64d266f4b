"""An anchor against rollback in a TPM 2.0: an NV index that only this enclave can extend.

The rule is in ``ledger.anchor``; its 32 bytes are kept here, in an index of type EXTEND. To read or
extend it takes one authorisation, an HMAC key that follows from 32 secret bytes of the sealed
store.

Why not a counter. The rule needs to know *which* state moved the anchor, not how often one did
(``ledger.anchor`` has the attack). Deleting and defining anew helps the operator with neither: a
TPM starts a new counter above every value that its counters ever had (TCG, "Trusted Platform Module
Library" 2.0, part 3, 31.8, TPM2_NV_Increment), and a new chain starts from 32 random bytes that the
enclave draws, so that no earlier value comes again. A chain defined by somebody else has another
authorisation, and is refused.

The bus. Authorisations are HMACs over command, answer and fresh nonces of both sides, keyed by the
authorisation value, so who sits between TPM and CPU can neither read for another TPM, nor replay or
change an answer or an extension. What an error says is not authenticated: it can only make the
server refuse. The authorisation value crosses the bus once, at the definition, encrypted to the
TPM's endorsement key. That this key is a TPM's is not checked; its fingerprint stands in the
anchor's name, and so in the log, for who has the maker's certificate (``1C0000A`` in most TPMs).

What it does not do. It is as good as the TPM's own memory: a TPM that the hypervisor emulates has
its memory in a file of the operator's, and restoring that file with the state is not seen. The
operator can always destroy it (TPM2_Clear, TPM2_NV_UndefineSpace): the server then stops until the
owners consent to a recovery. Each move is a write to the TPM's flash, whose endurance is limited.

The simulated TEE has none: its TPM would be a file of the operator's, like all that it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from casemate.ledger.anchor import BYTES, Anchor, foreign, missing
from casemate.spec.errors import CasemateError
from casemate.tee import errors, tpm_device
from casemate.tee.tpm_device import NotOurs, Tpm

__all__ = ["INDEX", "Anchor", "TpmAnchor", "look"]

T = TypeVar("T")

# In the owner's range of TCG's "Registry of Reserved TPM 2.0 Handles", 0x01800000 to 0x01BFFFFF.
INDEX: Final = 0x0180CA5E
_RANGE: Final = range(0x01800000, 0x01C00000)


def _auth(secret: bytes, index: int) -> bytes:
    """An authorisation value. It ends in no zero byte: TPMs drop those."""
    if len(secret) != BYTES:
        raise ValueError(f"an anchor's secret has {len(secret)} bytes, not {BYTES}")
    info = f"casemate/anchor/v1|{index:#010x}".encode()
    return HKDF(hashes.SHA256(), 31, salt=None, info=info).derive(secret) + b"\x01"


class TpmAnchor:
    """Uses a connection of its own each time. Everything raises ``usage.extra`` and
    ``usage.tee-device``; after an error the state may not go on, and a restart may."""

    def __init__(self, secret: bytes, tcti: str = tpm_device.TCTI, index: int = INDEX) -> None:
        """``secret``: 32 bytes of the sealed store, for as long as it lives."""
        if index not in _RANGE:
            raise errors.absent(
                "anchor",
                f"The NV index {index:#x} is not the TPM owner's to define.",
                f"Choose one from {_RANGE[0]:#010x} to {_RANGE[-1]:#010x}.",
            )
        self._auth, self._tcti, self._index = _auth(secret, index), tcti, index

    @cached_property
    def name(self) -> str:
        """``tpm2:`` the index, and SHA-256 of the endorsement key's SubjectPublicKeyInfo, in
        hex."""
        with Tpm(self._tcti) as tpm:
            return f"tpm2:{self._index:08x}:{hashlib.sha256(tpm.ek()).hexdigest()}"

    def _using(self, work: Callable[[Tpm], T]) -> T:
        try:
            with Tpm(self._tcti) as tpm:
                return work(tpm)
        except NotOurs:
            raise foreign(
                self.name,
                f"The NV index {self._index:#010x} is not this state's: another server, another"
                " state or another software has defined it.",
            ) from None

    def read(self) -> bytes | None:
        """The value, 32 bytes, or None where the index is absent or was never extended. Raises
        ``ledger.anchor-foreign``."""
        return self._using(lambda tpm: tpm.chain_read(self._index, self._auth))

    def begin(self, base: bytes) -> None:
        """Define the index where it is absent, and extend it with ``base``. Raises
        ``ledger.anchor-foreign``."""

        def work(tpm: Tpm) -> None:
            if tpm.chain_state(self._index) == "absent":
                tpm.chain_define(self._index, self._auth)
            tpm.chain_extend(self._index, self._auth, base)

        self._using(work)

    def extend(self, step: bytes) -> None:
        """Raises ``ledger.anchor-foreign``, and ``ledger.anchor-missing`` where the index is not
        defined."""
        if not self._using(lambda tpm: tpm.chain_extend(self._index, self._auth, step)):
            raise missing(self.name, f"The NV index {self._index:#010x} has been removed.")


# Whether the server can be anchored there, and why.
_SEEN: Final = {
    "absent": (True, "free: the server can define it"),
    "empty": (True, "defined, with no value yet"),
    "written": (True, "in use as an anchor"),
    "other": (False, "taken by something else"),
}


def look(path: Path, tcti: str = tpm_device.TCTI, index: int = INDEX) -> tuple[bool, str]:
    """Whether the TPM at ``path`` holds an anchor or can, and what was seen; changes nothing,
    raises nothing."""
    if not path.exists():
        return False, f"no {path}"
    try:
        with Tpm(tcti) as tpm:
            fit, what = _SEEN[tpm.chain_state(index)]
    except CasemateError as e:
        return False, f"{path}: {e.message}"
    return fit, f"{path}: NV index {index:#010x} is {what}"

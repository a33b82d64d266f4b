"""An owner's consent that a dataset's state passes on: to other software, or out of a backup.

What is signed names the log, so that it serves for no other server's state (``spec.consent``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from casemate.client.memory import Memory, Mirror, enclave_name, log_id
from casemate.seal import checkpoint, dsse, note
from casemate.seal.identity import Identity
from casemate.seal.note import Verifier
from casemate.spec import codec
from casemate.spec.consent import (
    CONSENT_TYPE,
    Consent,
    Head,
    RecoveryConsent,
    RecoveryRequest,
    SoftwareConsent,
)
from casemate.spec.errors import ReceiptError, UsageError
from casemate.spec.job import Charge

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.client.enclave import Enclave

MAX_FILE: Final = 1 << 22


def sign(consent: Consent, identity: Identity) -> str:
    """The envelope, one line of JSON."""
    return dsse.sign(CONSENT_TYPE, codec.encode(consent), identity.sign, identity.id)


def to_software(origin: str, dataset: str, measurement: str, trust: str, identity: Identity) -> str:
    """Sign that a dataset of the log ``origin`` may pass to software of ``measurement`` (hex) whose
    evidence holds under ``trust``: a policy in TOML, or ``simulated[:ROOT]``. Both "": take an
    earlier consent back."""
    try:
        found = SoftwareConsent(
            origin=origin, dataset=dataset, measurement=measurement.lower(), trust=trust
        )
    except ValueError as e:
        raise UsageError(
            "usage.value", f"This is no consent: {e}.", mend="Name a measurement in hex."
        ) from None
    return sign(found, identity)


def load_request(path: str | Path) -> RecoveryRequest:
    """The file that ``casemate state recover`` wrote. Raises ``usage.file``, ``FormatError``."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE)
    except OSError as e:
        raise UsageError(
            "usage.file",
            f"{path} cannot be read: {e.strerror}.",
            mend="Name the operator's request for a recovery.",
            where=str(path),
        ) from None
    return codec.decode(RecoveryRequest, raw.removesuffix(b"\n"), limit=MAX_FILE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What this client knows of a restored log. ``newest``: the newest head it has seen. ``lost``:
    how many entries beyond the restored head it, or the operator, has seen. ``compared``: the
    restored head is one that this client has seen go by."""

    newest: Head | None
    lost: int
    compared: bool


def compare(asked: RecoveryRequest, memory: Memory) -> Seen:
    """Hold a restored head against what was seen of the log. Raises ``receipt.fork`` where it is
    none of its heads."""
    head = asked.head
    operators = 0
    if asked.newest is not None:
        operators = checkpoint.read(note.parse(asked.newest).text).size - head.size
    mirror = _mirror(memory, head.origin)
    seen = mirror.seen()
    if seen is None:
        return Seen(None, max(0, operators), False)
    newest = Head(origin=seen.head.origin, size=seen.head.size, root=seen.head.root)
    lost = max(0, operators, newest.size - head.size)
    if newest.size < head.size:
        return Seen(newest, lost, False)
    if mirror.root(head.size) != head.root:
        raise ReceiptError(
            "receipt.fork",
            f"The restored head at {head.size} entries is none that this log had: you have seen"
            f" {newest.size} of them.",
            mend="Do not consent. Show the request to the other owners.",
            where=head.origin,
        )
    return Seen(newest, lost, True)


def _mirror(memory: Memory, origin: str) -> Mirror:
    name = origin.rpartition("/")[2]
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        raise UsageError(
            "usage.value",
            f"{origin[:80]!r} names no log of an enclave.",
            mend="Ask the operator for the request that casemate wrote.",
            where="origin",
        )
    return Mirror(memory.folder / "logs" / name, proofs=memory.proofs)


def follow(url: str, asked: RecoveryRequest, key: bytes) -> Verifier:
    """The log that a recovery goes on as, if ``key``, which the enclave's evidence binds, is its.
    Raises ``receipt.log-replaced``."""
    if not asked.next.endswith(log_id(key)):
        raise ReceiptError(
            "receipt.log-replaced",
            f"The enclave at {url} shows another log than {asked.next}, which the request names.",
            mend="Do not consent; ask the operator which enclave was recovered.",
            where=asked.next,
        )
    return checkpoint.log_key(asked.next, key)


def met(
    asked: RecoveryRequest, url: str, trust: Trust, identity: Identity, memory: Memory
) -> Enclave:
    """The enclave that was recovered. From now on its log is the one that the request names, for
    this client. Raises as :func:`follow`, and as ``enclave.connect``."""
    from casemate.client.connection import Connection
    from casemate.client.enclave import connect

    bare = Connection(url, trust=trust, identity=identity)
    try:
        line = bare.line()
        root = line.verdict.root if line.verdict.simulated else None
        found = follow(url, asked, line.attestation.binding.log_key)
        memory.accept(enclave_name(bare.url, root), found)
    finally:
        bare.close()
    return connect(url, trust=trust, identity=identity, memory=memory)


def to_recovery(
    asked: RecoveryRequest,
    dataset: str,
    identity: Identity,
    *,
    newest: Head | None,
    rest: bool,
    charge: Charge | None = None,
) -> str:
    """Sign that a dataset serves again from the restored head. ``rest``: all that is left of its
    budget is charged for what was lost; else ``charge``, or nothing."""
    found = RecoveryConsent(
        head=asked.head, next=asked.next, dataset=dataset, newest=newest, rest=rest, charge=charge
    )
    return sign(found, identity)

"""What an owner signs when a state passes on: to other software, or out of a backup; and what of
this stands in the log.

A consent is a DSSE envelope (payload type :data:`CONSENT_TYPE`) by the owner's identity over one of
two closed formats. Both name the log and the dataset, so that neither serves for another server's
state; one for a recovery also names the head that was restored and the log that goes on from it, so
that it serves once.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from casemate.spec.codec import value
from casemate.spec.data import BudgetState
from casemate.spec.evidence import Evidence, ServerPolicy
from casemate.spec.identity import SEAL_KEY_BYTES, SIGN_KEY_BYTES
from casemate.spec.job import Charge

CONSENT_TYPE: Final = "application/vnd.casemate.consent+json"
HASH_BYTES: Final = 32
MAX_TRUST: Final = 1 << 14


@value("head/v1")
class Head:
    """A tree head of a log: its name, its number of entries, the root over them (32 bytes)."""

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.root) != HASH_BYTES:
            raise ValueError("a head has a size and a root of 32 bytes")


@value("consent-software/v1")
class SoftwareConsent:
    """The dataset's state may pass to software of ``measurement`` (hex, as the TEE shows it; ""
    takes an earlier consent back), if its evidence holds under ``trust``: a trust policy in TOML,
    or ``simulated`` or ``simulated:ROOT``."""

    origin: str
    dataset: str
    measurement: str
    trust: str

    def __post_init__(self) -> None:
        if len(self.measurement) > 256 or set(self.measurement) - set("0123456789abcdef"):
            raise ValueError("a measurement is in hex, lower case")
        if len(self.trust) > MAX_TRUST:
            raise ValueError(f"a trust policy has at most {MAX_TRUST} characters")
        if bool(self.measurement) != bool(self.trust):
            raise ValueError("a measurement and a trust policy stand together")


@value("consent-recovery/v1")
class RecoveryConsent:
    """The dataset may serve again from the restored ``head``, under the log ``next``.

    ``newest``: the newest head of the old log that the owner has seen. What was spent after
    ``head`` is forgotten; the owner says what to charge for it: ``rest``, all that is left of the
    budget, or ``charge``, or neither.
    """

    head: Head
    next: str
    dataset: str
    newest: Head | None = None
    rest: bool = False
    charge: Charge | None = None

    def __post_init__(self) -> None:
        if self.rest and self.charge is not None:
            raise ValueError("either the rest is charged, or a charge is given")
        if self.charge is not None and min((*self.charge.rdp_nano, self.charge.delta_femto)) < 0:
            raise ValueError("a charge is never negative")


Consent: TypeAlias = SoftwareConsent | RecoveryConsent


@value("recovery-dataset/v1")
class RecoveryDataset:
    """A dataset of a restored state: whose it is, and what its budget was at the restored head."""

    dataset: str
    owner: str
    budget: BudgetState


@value("recovery-request/v1")
class RecoveryRequest:
    """What the owners are asked: to go on from ``head`` under the log ``next``.

    ``newest``: a later checkpoint of the old log that the operator knows of (a signed note); what
    it covers beyond ``head`` is lost.
    """

    head: Head
    next: str
    newest: str | None
    datasets: tuple[RecoveryDataset, ...]


@value("handover-request/v2")
class HandoverRequest:
    """An enclave asks for another one's state. ``hpke_key``: to seal to; ``policy``: what its
    server promises of itself; ``anchor``: the name of what its machine has against rollback, or
    ""; ``evidence`` binds them (``server.handover``)."""

    hpke_key: bytes
    policy: ServerPolicy
    anchor: str
    evidence: Evidence

    def __post_init__(self) -> None:
        if len(self.hpke_key) != SEAL_KEY_BYTES:
            raise ValueError("the key has the wrong length")


# Bodies of log entries; their kinds are in ``spec.log``.


@value("log-consent/v1")
class Consented:
    """An owner's consent (a DSSE envelope), with the keys that the owner's id is made of."""

    envelope: str
    sign_key: bytes
    seal_key: bytes

    def __post_init__(self) -> None:
        if len(self.sign_key) != SIGN_KEY_BYTES or len(self.seal_key) != SEAL_KEY_BYTES:
            raise ValueError("a key has the wrong length")


@value("log-recover/v1")
class Recovered:
    """The state was restored: the log ends at ``head`` and goes on, with this entry, as ``origin``
    under the key ``key`` (Ed25519). All datasets are frozen until their owners' consents, which
    follow; every quote is void, every unfinished job abandoned."""

    head: Head
    origin: str
    key: bytes
    newest: str | None = None


@value("log-rotate/v1")
class Rotated:
    """The store lies under a new key: the sealing key's ``generation``."""

    generation: int


@value("log-handover/v1")
class HandedOver:
    """The state passed to the enclave of ``measurement`` that made the request of this digest; the
    one that wrote this entry never starts again. ``dropped``: datasets whose owners had not signed
    for that measurement; their keys were destroyed. ``anchor``: how many times the state has then
    moved its anchor, where it has one."""

    measurement: str
    request: str
    dropped: tuple[str, ...]
    anchor: int | None = None

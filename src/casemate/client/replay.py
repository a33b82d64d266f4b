"""The ledger as its public log tells it, recomputed from the entries alone.

Written apart from the writer (``ledger``) and its checker (``ledger.fsck``). What stands in the log
only as a commitment (policies, quotes, results) is compared where it is named twice; caps per
scientist and approvals follow from policies and are left to ``casemate audit fsck``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from casemate.accounting.filters import NOTHING, RdpFilter
from casemate.seal import dsse
from casemate.spec import canonical, codec, merkle
from casemate.spec.consent import (
    CONSENT_TYPE,
    Consented,
    HandedOver,
    Recovered,
    RecoveryConsent,
    Rotated,
    SoftwareConsent,
)
from casemate.spec.data import MAX_RESUMES, Budget, BudgetState
from casemate.spec.errors import CasemateError, ReceiptError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Charge
from casemate.spec.log import (
    BODIES,
    Abandoned,
    Approval,
    Committed,
    Debit,
    Enrolled,
    EpochAdvanced,
    Granted,
    PolicyChanged,
    Registered,
    Reserved,
    Revoked,
    Started,
    TakenOver,
)
from casemate.spec.receipt import LogEntry

_CONSENTS: Final = {"consent-software/v1": SoftwareConsent, "consent-recovery/v1": RecoveryConsent}


@dataclass(slots=True)
class Lineage:
    """The ledger that all versions of a dataset share; what it has spent."""

    owner: str
    budget: Budget
    filter: str
    rdp_nano: tuple[int, ...] = field(default_factory=RdpFilter.empty)
    delta_femto: int = 0
    jobs: int = 0

    def admits(self, charge: Charge) -> bool:
        return RdpFilter(self.budget).admits(self.rdp_nano, self.delta_femto, charge)

    def add(self, charge: Charge) -> None:
        pairs = zip(self.rdp_nano, charge.rdp_nano, strict=True)
        self.rdp_nano = tuple(min(a + b, canonical.MAX_INT) for a, b in pairs)
        self.delta_femto += charge.delta_femto
        self.jobs += 1

    @property
    def state(self) -> BudgetState:
        """Spent and left in the filter's epsilon."""
        return RdpFilter(self.budget).state(self.rdp_nano, self.delta_femto, self.jobs)


@dataclass(slots=True)
class Dataset:
    """``frozen``: it waits for its owner's consent, to other software or to a recovery."""

    owner: str
    lineage: str
    units: int
    policy: str
    epoch: int = 0
    revoked: bool = False
    accepted: str | None = None
    recovering: bool = False

    @property
    def state(self) -> str:
        if self.revoked:
            return "revoked"
        return "frozen" if self.accepted is not None or self.recovering else "registered"


@dataclass(slots=True)
class Job:
    """``place``: of its reservation; ``boot``: the one that may run it."""

    reserved: Reserved
    boot: bytes
    place: int
    takeovers: int = 0
    state: Literal["reserved", "committed", "failed", "cancelled", "crashed"] = "reserved"


@dataclass(slots=True)
class Ledger:
    """What the log says. ``starts``: (place, boot, what it said); ``origins``: names of the log
    with the place at which each began; ``unsaid``: no owner has consented yet to
    the last recovery; ``sales``: the commitments on them."""

    size: int = 0
    hashes: list[bytes] = field(default_factory=list)
    boot: bytes = b""
    boots: set[bytes] = field(default_factory=set)
    starts: list[tuple[int, bytes, Started]] = field(default_factory=list)
    identities: set[str] = field(default_factory=set)
    lineages: dict[str, Lineage] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    recovered: list[tuple[int, Recovered]] = field(default_factory=list)
    agreed: dict[str, str] = field(default_factory=dict)
    handed: HandedOver | None = None
    unsaid: bool = False
    sales: set[str] = field(default_factory=set)

    @property
    def debits(self) -> int:
        """How many charges were taken from ledgers."""
        return sum(len(job.reserved.debits) for job in self.jobs.values())

    def key_at(self, place: int) -> tuple[str | None, bytes | None]:
        """The log's name and key when it got an entry: both unknown here before the first
        recovery but for the name, which that recovery tells."""
        for at, body in self.recovered:
            if place < at:
                return body.head.origin, None
        if self.recovered:
            return self.recovered[-1][1].origin, self.recovered[-1][1].key
        return None, None


def replay(leaves: Iterable[bytes]) -> Ledger:
    """Go through a log's entries. Raises ``ReceiptError`` at the first that cannot stand there:
    ``receipt.log-gap``, ``receipt.log-charge``, ``receipt.log-impossible``; ``FormatError``."""
    ledger = Ledger()
    for raw in leaves:
        entry = codec.decode(LogEntry, raw)
        if entry.sequence != ledger.size:
            where = f"entry {ledger.size}"
            raise _refuse("log-gap", f"Entry {ledger.size} says it is {entry.sequence}.", where)
        body: Any = codec.decode(BODIES[entry.kind], entry.body)
        where = f"entry {entry.sequence}"
        for reason in _findings(ledger, entry, body):
            what = f"{where} ({entry.kind} {entry.subject[:60]})"
            if reason == _COST:
                raise _refuse("log-charge", f"In {what} {reason}.", where)
            raise _refuse("log-impossible", f"It cannot be: in {what} {reason}.", where)
        ledger.hashes.append(merkle.leaf_hash(raw))
        ledger.size += 1
    if ledger.unsaid:
        raise _refuse("log-impossible", f"It cannot be: {_UNSAID}.", f"entry {ledger.size}")
    return ledger


def _refuse(reason: str, message: str, where: str) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Keep this log and do not rely on the server's ledger.",
        where=where,
    )


def _findings(ledger: Ledger, entry: LogEntry, body: Any) -> Iterator[str]:
    unsaid = ledger.unsaid
    if entry.boot != ledger.boot and entry.kind not in _ELSEWHERE:
        yield "another boot than the last that started wrote"
    if ledger.size == 0 and entry.kind != "start":
        yield "the log begins without a start"
    if ledger.handed is not None and entry.kind not in _ELSEWHERE:
        yield "a state that was handed over goes on"
    subject = _SUBJECTS.get(entry.kind, "dataset")
    due = entry.boot.hex() if entry.kind == "start" else getattr(body, subject, entry.subject)
    if entry.subject != due:
        yield "the subject is another one than the body's"
    yield from _RULES[entry.kind](ledger, entry, body)
    if unsaid and entry.kind not in RECOVERING:
        yield _UNSAID


_SUBJECTS: Final = {
    "identity": "identity", "recover": "origin", "handover": "measurement",
    "grant": "sale", "reserve": "job", "takeover": "job", "commit": "job", "abandon": "job",
}  # fmt: skip
# Written at a start, before it or without one, by the operator's commands.
_ELSEWHERE: Final = {"start", "abandon", "consent", "recover", "rotate", "handover"}
# What a recovery writes itself, behind the entry that it begins with.
RECOVERING: Final = ("abandon", "consent")
_UNSAID: Final = "the log goes on from a recovery that waits for an owner's consent"
_COST: Final = "the charge is another amount than its events cost"


def _start(ledger: Ledger, entry: LogEntry, body: Started) -> Iterator[str]:
    if entry.boot in ledger.boots:
        yield "the boot started before"
    if ledger.handed is not None and ledger.handed.measurement != body.measurement:
        yield "other software starts than the state was handed to"
    before = ledger.starts[-1][2].measurement if ledger.starts else body.measurement
    if before != body.measurement:
        _other_software(ledger, before, body.measurement)
    ledger.boots.add(entry.boot)
    ledger.starts.append((entry.sequence, entry.boot, body))
    ledger.boot, ledger.handed = entry.boot, None


def _other_software(ledger: Ledger, before: str, measurement: str) -> None:
    for name, dataset in ledger.datasets.items():
        if dataset.accepted is None and not dataset.revoked:
            dataset.accepted = before
        if measurement in (dataset.accepted, ledger.agreed.get(name)):
            dataset.accepted = None
    _use_up(ledger, measurement)


def _use_up(ledger: Ledger, measurement: str) -> None:
    ledger.agreed = {k: m for k, m in ledger.agreed.items() if m != measurement}


def _identity(ledger: Ledger, entry: LogEntry, body: Enrolled) -> Iterator[str]:
    if body.identity in ledger.identities:
        yield "an identity enrols twice"
    ledger.identities.add(body.identity)


def _register(ledger: Ledger, entry: LogEntry, body: Registered) -> Iterator[str]:
    if body.dataset in ledger.datasets:
        yield "a dataset is registered twice"
    if body.owner not in ledger.identities:
        yield "the owner never enrolled"
    known = ledger.lineages.get(body.lineage)
    if known is None and body.lineage != body.dataset:
        yield "a version continues a ledger that there is not"
    terms = (body.owner, body.budget, body.filter)
    if known is not None and (known.owner, known.budget, known.filter) != terms:
        yield "a new version has another owner, budget or filter"
    ledger.lineages.setdefault(body.lineage, Lineage(*terms))
    ledger.datasets[body.dataset] = Dataset(body.owner, body.lineage, body.units, body.policy)


def _live(ledger: Ledger, name: str) -> Iterator[str]:
    if name not in ledger.datasets:
        yield "there is no such dataset"
    elif ledger.datasets[name].revoked:
        yield "the dataset was revoked"


def _policy(ledger: Ledger, entry: LogEntry, body: PolicyChanged) -> Iterator[str]:
    yield from _live(ledger, body.dataset)
    ledger.datasets[body.dataset].policy = body.policy


def _epoch(ledger: Ledger, entry: LogEntry, body: EpochAdvanced) -> Iterator[str]:
    yield from _live(ledger, body.dataset)
    if body.epoch <= ledger.datasets[body.dataset].epoch:
        yield "the epoch does not go forward"
    ledger.datasets[body.dataset].epoch = body.epoch


def _revoke(ledger: Ledger, entry: LogEntry, body: Revoked) -> Iterator[str]:
    yield from _live(ledger, body.dataset)
    _forget(ledger, body.dataset)


def _forget(ledger: Ledger, name: str) -> None:
    ledger.datasets[name].revoked = True
    ledger.agreed.pop(name, None)


def _approval(ledger: Ledger, entry: LogEntry, body: Approval) -> Iterator[str]:
    dataset = ledger.datasets.get(body.dataset)
    if dataset is None or dataset.owner != body.owner:
        yield "someone who is not the owner approves or rejects"


def _reserve(ledger: Ledger, entry: LogEntry, body: Reserved) -> Iterator[str]:
    if body.job in ledger.jobs:
        yield "the job is reserved a second time"
    if body.scientist not in ledger.identities:
        yield "the scientist never enrolled"
    if not body.debits or len({d.lineage for d in body.debits}) != len(body.debits):
        yield "no ledger is debited, or one twice"
    if body.charge != _cost(body):
        yield _COST
    for debit in body.debits:
        yield from _debit(ledger, body, debit)
    ledger.jobs[body.job] = Job(body, entry.boot, entry.sequence)


def _cost(body: Reserved) -> Charge | None:
    if not body.events:
        return NOTHING
    extra = body.delta_truncation + body.delta_sampler
    try:
        return RdpFilter.charge(body.events, extra, delta_shown=body.delta_shown)
    except (CasemateError, ValueError, ArithmeticError):
        return None


def _debit(ledger: Ledger, body: Reserved, debit: Debit) -> Iterator[str]:
    yield from _live(ledger, debit.dataset)
    dataset = ledger.datasets[debit.dataset]
    if dataset.state == "frozen":
        yield f"{debit.dataset} is used while it waits for its owner's consent"
    if dataset.lineage != debit.lineage:
        yield f"another ledger than that of {debit.dataset} is debited"
    if (dataset.policy, dataset.epoch) != (debit.policy, debit.epoch):
        yield f"{debit.dataset} is used under another policy or epoch than it has"
    lineage = ledger.lineages[dataset.lineage]
    if not lineage.admits(body.charge):
        yield f"more is spent than the budget of {debit.lineage} holds"
    lineage.add(body.charge)


def _job(ledger: Ledger, name: str, boot: bytes | None = None) -> Iterator[str]:
    """A job that may still end: reserved, by ``boot`` where that matters."""
    job = ledger.jobs.get(name)
    if job is None:
        yield "the job was never reserved"
    elif job.state != "reserved":
        yield f"the job ended before: {job.state}"
    elif boot is not None and job.boot != boot:
        yield "the job was reserved by another boot, and not taken over"


def _recovering(ledger: Ledger, job: Job) -> bool:
    return any(job.place < at for at, _ in ledger.recovered)


def _takeover(ledger: Ledger, entry: LogEntry, body: TakenOver) -> Iterator[str]:
    yield from _job(ledger, body.job)
    job = ledger.jobs[body.job]
    if job.boot == entry.boot:
        yield "a boot takes over its own job"
    if job.takeovers >= MAX_RESUMES:
        yield "the job is taken over too often"
    if _recovering(ledger, job):
        yield "a job from before a recovery goes on"
    job.boot, job.takeovers = entry.boot, job.takeovers + 1


def _commit(ledger: Ledger, entry: LogEntry, body: Committed) -> Iterator[str]:
    yield from _job(ledger, body.job, entry.boot)
    job = ledger.jobs[body.job]
    if _recovering(ledger, job):
        yield "a job from before a recovery is committed"
    for debit in job.reserved.debits:
        yield from _live(ledger, debit.dataset)
        if ledger.datasets[debit.dataset].state == "frozen":
            yield f"{debit.dataset} waits for its owner's consent"
    job.state = "committed"


def _abandon(ledger: Ledger, entry: LogEntry, body: Abandoned) -> Iterator[str]:
    job = ledger.jobs.get(body.job)
    void = job is not None and (
        _recovering(ledger, job)
        or any(ledger.datasets[d.dataset].revoked for d in job.reserved.debits)
    )
    if job is None or job.state != "committed" or not void:
        yield from _job(ledger, body.job)
    ledger.jobs[body.job].state = body.reason


def consented(body: Consented) -> tuple[str, Any]:
    """Whose consent an entry holds, and to what; None for one that does not hold."""
    owner = PublicIdentity(name="-", sign_key=body.sign_key, seal_key=body.seal_key).id
    try:
        kind, payload = dsse.verify(body.envelope, {owner: body.sign_key})
        named = canonical.decode(payload)
        if kind == CONSENT_TYPE and isinstance(named, dict):
            return owner, codec.decode(_CONSENTS[str(named.get("type"))], payload)
    except (CasemateError, KeyError):
        pass
    return owner, None


def _consent(ledger: Ledger, entry: LogEntry, body: Consented) -> Iterator[str]:
    owner, signed = consented(body)
    if signed is None:
        yield "the consent's signature or form does not hold"
    yield from _live(ledger, signed.dataset)
    dataset = ledger.datasets[signed.dataset]
    if dataset.owner != owner:
        yield "someone who is not the owner consents"
    if isinstance(signed, RecoveryConsent):
        last = ledger.recovered[-1][1] if ledger.recovered else None
        if last is None or (last.head, last.origin) != (signed.head, signed.next):
            yield "the consent is for another recovery"
        if not dataset.recovering:
            yield "the dataset does not wait for this consent"
        dataset.recovering = ledger.unsaid = False
        lineage = ledger.lineages[dataset.lineage]
        charge = _rest(lineage) if signed.rest else signed.charge
        if charge is not None and len(charge.rdp_nano) != len(NOTHING.rdp_nano):
            yield "the consent charges by another filter"
        if charge is not None:
            lineage.add(charge)
        return
    ledger.agreed.pop(signed.dataset, None)
    if signed.measurement and signed.measurement == ledger.starts[-1][2].measurement:
        dataset.accepted = None
    if signed.measurement:
        ledger.agreed[signed.dataset] = signed.measurement


def _rest(lineage: Lineage) -> Charge:
    rdp = RdpFilter(lineage.budget)
    left = zip(rdp.capacity, lineage.rdp_nano, strict=True)
    return Charge(
        rdp_nano=tuple(max(0, c - s) for c, s in left),
        delta_femto=max(0, rdp.delta_capacity - lineage.delta_femto),
        epsilon=0.0,
    )


def _recover(ledger: Ledger, entry: LogEntry, body: Recovered) -> Iterator[str]:
    tree = _tree(ledger.hashes)
    if body.head.size != entry.sequence or body.head.root != merkle.root(ledger.size, tree):
        yield "the log does not go on from where it says it ended"
    if not body.origin.endswith(hashlib.sha256(body.key).hexdigest()[:32]):
        yield "the log's new name is not that of its key"
    if body.origin == body.head.origin:
        yield "the log goes on under the name it had"
    ledger.recovered.append((entry.sequence, body))
    ledger.agreed = {}
    for dataset in ledger.datasets.values():
        dataset.recovering = not dataset.revoked
    ledger.unsaid = any(dataset.recovering for dataset in ledger.datasets.values())


def _tree(hashes: list[bytes]) -> merkle.Node:
    rows = [list(hashes)]
    while len(rows[-1]) > 1:
        row = rows[-1]
        pairs = zip(row[::2], row[1::2], strict=False)
        rows.append([merkle.node_hash(a, b) for a, b in pairs])
    return lambda level, place: rows[level][place]


def _rotate(ledger: Ledger, entry: LogEntry, body: Rotated) -> Iterator[str]:
    yield from ()


def _handover(ledger: Ledger, entry: LogEntry, body: HandedOver) -> Iterator[str]:
    for name in body.dropped:
        yield from _live(ledger, name)
        _forget(ledger, name)
    if body.measurement == ledger.starts[-1][2].measurement:
        _use_up(ledger, body.measurement)
    ledger.handed = body


def _grant(ledger: Ledger, entry: LogEntry, body: Granted) -> Iterator[str]:
    if body.sale in ledger.sales:
        yield "a sale is made twice"
    ledger.sales.add(body.sale)


_RULES: Final[dict[str, Callable[[Ledger, LogEntry, Any], Iterator[str]]]] = {
    "start": _start,
    "identity": _identity,
    "register": _register,
    "policy": _policy,
    "epoch": _epoch,
    "revoke": _revoke,
    "approve": _approval,
    "reject": _approval,
    "reserve": _reserve,
    "takeover": _takeover,
    "commit": _commit,
    "abandon": _abandon,
    "consent": _consent,
    "recover": _recover,
    "rotate": _rotate,
    "handover": _handover,
    "grant": _grant,
}

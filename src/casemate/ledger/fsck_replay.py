"""The log as ``fsck`` understands it: what each entry may do after those before it.

Shares no code with the writer but ``spec``. A rule yields what is wrong with an entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from casemate.ledger import fsck_budget as budgets
from casemate.ledger import fsck_costs as costs
from casemate.ledger import fsck_passing as passes
from casemate.spec import canonical, codec
from casemate.spec.data import MAX_RESUMES, Budget, Policy
from casemate.spec.job import Charge, JobRequest
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

Rows = Callable[[str], list[tuple[Any, ...]]]


def commitment(salt: bytes, digest: str) -> str:
    """As the log's entries have it (``spec.log``)."""
    return "sha256:" + hashlib.sha256(b"casemate/log/v1\0" + salt + digest.encode()).hexdigest()


@dataclass
class Account:
    """``free``: jobs that charged nothing. ``slack``: by how much each order may differ, where a
    charge was all that was left."""

    rdp_nano: tuple[int, ...] = budgets.EMPTY
    delta_femto: int = 0
    jobs: int = 0
    free: int = 0
    slack: int = 0

    def add(self, charge: Charge) -> None:
        pairs = zip(self.rdp_nano, charge.rdp_nano, strict=True)
        self.rdp_nano = tuple(min(a + b, canonical.MAX_INT) for a, b in pairs)
        self.delta_femto += charge.delta_femto
        self.jobs += 1


@dataclass
class Lineage:
    owner: str
    budget: Budget
    filter: str
    accounts: dict[str, Account] = field(default_factory=lambda: {"": Account()})


@dataclass
class Dataset:
    owner: str
    lineage: str
    schema: str
    policy: str
    epoch: int = 0
    revoked: bool = False


@dataclass
class Job:
    reserved: Reserved
    boot: bytes
    sequence: int
    granted: int
    takeovers: int = 0
    state: str = "reserved"
    ended: int | None = None
    result: str = ""
    receipt: str = ""


@dataclass
class Replay:
    """What the log says. ``findings`` is empty for a sound store."""

    entries: int = 0
    leaves: list[bytes] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    # Files that nothing names: a crash leaves them, and the next start removes them.
    left: list[str] = field(default_factory=list)
    receipts: int = 0
    identities: set[str] = field(default_factory=set)
    lineages: dict[str, Lineage] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], str] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    attestations: dict[bytes, str] = field(default_factory=dict)
    # Where each boot started; the log's names with their public keys.
    started: dict[bytes, int] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    # Commitment on a quote -> the datasets of it; digest of a quote -> its salt.
    quotes: dict[str, frozenset[str]] = field(default_factory=dict)
    salts: dict[str, bytes] = field(default_factory=dict)
    # What evaluations ask for, by the commitments on their quotes.
    evaluations: dict[str, JobRequest] = field(default_factory=dict)
    passing: passes.Passing = field(default_factory=passes.Passing)
    # Commitment on a sale -> (its place, the commitment on its receipt, its boot).
    sales: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    # What is known of the policies behind commitments: those of today and of registration.
    policies: dict[str, Policy] = field(default_factory=dict)
    # How often the anchor was moved, and by which entry; whether another one may begin.
    anchored: tuple[int, int] | None = None
    anew: bool = True
    recompute: bool = False

    def commit(self, quote: str, digest: str) -> str:
        """A commitment under the salt of a quote."""
        return commitment(self.salts.get(quote, b""), digest)

    def void(self, names: set[str]) -> None:
        """Forget the owners' words on quotes of these datasets."""
        self.verdicts = {
            key: word
            for key, word in self.verdicts.items()
            if names.isdisjoint(self.quotes.get(key[0], ()))
        }

    def expect(self, holds: bool, finding: str) -> bool:
        if not holds:
            self.findings.append(finding)
        return holds


def read(replay: Replay, sequence: int, raw: bytes) -> bool:
    """Whether the entry is the next one."""
    entry = codec.decode(LogEntry, raw)
    place = replay.entries
    if not replay.expect(
        sequence == entry.sequence == place, f"entry {place} of the log is missing"
    ):
        return False
    if place == 0:
        replay.expect(entry.kind == "start", "the log does not begin with a start")
    body: Any = codec.decode(BODIES[entry.kind], entry.body)
    replay.expect(
        entry.subject in _subjects(entry, body), f"entry {place} ({entry.kind}) is on another thing"
    )
    _anchor(replay, entry, getattr(body, "anchor", None))
    for rule in (passes.before, _APPLY[entry.kind]):
        for finding in rule(replay, entry, body):
            replay.findings.append(f"entry {place} ({entry.kind} {entry.subject}): {finding}")
    replay.leaves.append(hashlib.sha256(b"\0" + raw).digest())
    replay.entries += 1
    return True


def _anchor(replay: Replay, entry: LogEntry, moved: int | None) -> None:
    """An anchor is moved one by one, by a hand-over too, also by one that does not say so; after
    that, and after a recovery, another anchor may begin."""
    count = 0 if replay.anchored is None else replay.anchored[0]
    if entry.kind == "handover" and replay.anchored is not None and moved is None:
        moved = count + 1
    replay.anew |= entry.kind == "recover"
    if moved is not None:
        replay.expect(
            moved == count + 1 or (moved == 1 and replay.anew),
            f"entry {entry.sequence}: the anchor did not go forward by one",
        )
        replay.anchored = (moved, entry.sequence)
        replay.anew = entry.kind == "handover"


def _subjects(entry: LogEntry, body: Any) -> set[str]:
    """What an entry may be on: what its body is about."""
    if isinstance(body, Reserved | TakenOver | Committed | Abandoned):
        return {body.job}
    if isinstance(body, Started):
        return {entry.boot.hex()}
    if isinstance(body, Enrolled):
        return {body.identity}
    if isinstance(body, Granted):
        return {body.sale}
    return {getattr(body, "dataset", entry.subject)}


def _start(replay: Replay, entry: LogEntry, body: Started) -> Iterator[str]:
    if entry.boot in replay.started:
        yield "this boot started before"
    replay.started[entry.boot] = entry.sequence
    replay.attestations[entry.boot] = body.attestation
    yield from passes.start(replay, body)


def _identity(replay: Replay, entry: LogEntry, body: Enrolled) -> Iterator[str]:
    if body.identity in replay.identities:
        yield "enrolled twice"
    replay.identities.add(body.identity)


def _register(replay: Replay, entry: LogEntry, body: Registered) -> Iterator[str]:
    if body.dataset in replay.datasets:
        yield "registered twice"
    if body.owner not in replay.identities:
        yield "its owner never enrolled"
    lineage = replay.lineages.get(body.lineage)
    if lineage is None:
        if body.lineage != body.dataset:
            yield "it continues a ledger that does not exist"
        replay.lineages[body.lineage] = Lineage(body.owner, body.budget, body.filter)
    elif (lineage.owner, lineage.budget, lineage.filter) != (body.owner, body.budget, body.filter):
        yield "a new version changed owner, budget or filter"
    replay.datasets[body.dataset] = Dataset(body.owner, body.lineage, body.schema, body.policy)


def _changed(replay: Replay, name: str) -> Iterator[str]:
    """What policy, epoch and revoke have in common: approvals are void."""
    if name not in replay.datasets:
        yield "there is no such dataset"
    elif replay.datasets[name].revoked:
        yield "the dataset was revoked before"
    replay.void({name})


def _policy(replay: Replay, entry: LogEntry, body: PolicyChanged) -> Iterator[str]:
    yield from _changed(replay, body.dataset)
    if body.dataset in replay.datasets:
        replay.datasets[body.dataset].policy = body.policy


def _epoch(replay: Replay, entry: LogEntry, body: EpochAdvanced) -> Iterator[str]:
    yield from _changed(replay, body.dataset)
    if body.dataset in replay.datasets:
        if body.epoch <= replay.datasets[body.dataset].epoch:
            yield "the epoch did not go forward"
        replay.datasets[body.dataset].epoch = body.epoch


def _revoke(replay: Replay, entry: LogEntry, body: Revoked) -> Iterator[str]:
    yield from _changed(replay, body.dataset)
    if body.dataset in replay.datasets:
        replay.datasets[body.dataset].revoked = True
        passes.forget(replay, body.dataset)


def _verdict(replay: Replay, entry: LogEntry, body: Approval) -> Iterator[str]:
    dataset = replay.datasets.get(body.dataset)
    if dataset is None or dataset.owner != body.owner:
        yield "the word is not the owner's"
    if body.dataset not in replay.quotes.get(body.quote, ()):
        yield "the quote is missing, or not on this dataset"
    replay.verdicts[body.quote, body.dataset] = entry.kind


def _reserve(replay: Replay, entry: LogEntry, body: Reserved) -> Iterator[str]:
    if body.job in replay.jobs:
        yield "the job was reserved before"
    if entry.boot not in replay.started:
        yield "its boot never started"
    lineages = [d.lineage for d in body.debits]
    if not lineages or len(set(lineages)) != len(lineages):
        yield "it debits no ledger, or one twice"
    if not budgets.possible(body.charge):
        yield "its charge is none of the filter's"
        return
    for debit in body.debits:
        dataset = replay.datasets.get(debit.dataset)
        lineage = replay.lineages.get(debit.lineage)
        if dataset is None or lineage is None or dataset.lineage != debit.lineage:
            yield f"{debit.dataset} is not on that ledger"
            continue
        if dataset.revoked or (dataset.policy, dataset.epoch) != (debit.policy, debit.epoch):
            yield f"{debit.dataset} was revoked, or had another policy or epoch"
        for whose in ("", body.scientist):
            lineage.accounts.setdefault(whose, Account()).add(body.charge)
        everyone = lineage.accounts[""]
        everyone.free += body.charge.delta_femto == 0 == max(body.charge.rdp_nano)
        if not budgets.fits(lineage.budget, everyone.rdp_nano, everyone.delta_femto):
            yield f"it exceeds the budget of {debit.lineage}"
        policy = replay.policies.get(debit.policy)
        if policy is not None:
            yield from _under(replay, body, debit, policy, lineage.accounts)
    if replay.recompute:
        yield from costs.charge(body)
    replay.jobs[body.job] = Job(body, entry.boot, entry.sequence, entry.sequence)


def _under(
    replay: Replay, body: Reserved, debit: Debit, policy: Policy, accounts: dict[str, Account]
) -> Iterator[str]:
    """What a policy that is known forbids. What is for evaluation is that from its registration
    on, so that its free jobs are its exact evaluations."""
    cap, account = policy.scientist_budget, accounts[body.scientist]
    if cap is not None and not budgets.fits(cap, account.rdp_nano, account.delta_femto):
        yield f"it exceeds what {debit.dataset} allows one scientist"
    said = replay.verdicts.get((body.quote, debit.dataset))
    if said == "reject" or (policy.approval == "each-quote" and said != "approve"):
        yield f"the owner of {debit.dataset} did not approve"
    if not {"*", body.scientist} & set(policy.scientists):
        yield f"{debit.dataset} is not for this scientist"
    if policy.last_epoch is not None and debit.epoch > policy.last_epoch:
        yield f"{debit.dataset} had expired"
    if policy.evaluation and body.quote not in replay.evaluations:
        yield f"{debit.dataset} is for evaluation only"
    if (contest := policy.contest) is not None and body.quote in replay.evaluations:
        if not contest.takes(replay.evaluations[body.quote]):
            yield f"{debit.dataset} scores entries of its contest alone"
        if account.jobs > contest.entries:
            yield f"{debit.dataset} takes no more entries of this participant"
    if body.events:
        return
    if policy.evaluation and accounts[""].free > policy.evaluations:
        yield f"{debit.dataset} gives no more exact evaluations"
    if not policy.evaluation and policy.nonprivate is None:
        yield f"{debit.dataset} is not for training without privacy"


def _takeover(replay: Replay, entry: LogEntry, body: TakenOver) -> Iterator[str]:
    found = replay.jobs.get(body.job)
    if found is None or found.state != "reserved" or found.boot == entry.boot:
        yield "the job was not reserved by another boot, or had ended"
        return
    now = {replay.datasets[d.dataset].policy for d in found.reserved.debits}
    known = [replay.policies[policy].resumes for policy in now & replay.policies.keys()]
    if found.takeovers >= min(known, default=MAX_RESUMES):
        yield "the job was taken over too often"
    found.boot, found.granted, found.takeovers = entry.boot, entry.sequence, found.takeovers + 1


def _commit(replay: Replay, entry: LogEntry, body: Committed) -> Iterator[str]:
    found = replay.jobs.get(body.job)
    if found is None or found.state != "reserved" or found.boot != entry.boot:
        yield "the job was not reserved by this boot, or had ended"
        return
    if any(replay.datasets[d.dataset].revoked for d in found.reserved.debits):
        yield "a dataset of it was revoked"
    found.state, found.ended = "committed", entry.sequence
    found.result, found.receipt = body.result, body.receipt


def _abandon(replay: Replay, entry: LogEntry, body: Abandoned) -> Iterator[str]:
    found = replay.jobs.get(body.job)
    if found is None or found.state == "abandoned":
        yield "the job was not reserved, or had ended"
        return
    revoked = any(replay.datasets[d.dataset].revoked for d in found.reserved.debits)
    recovered = found.sequence < replay.passing.began
    if found.state == "committed" and not (revoked or recovered):
        yield "the job was committed, and no owner revoked"
    found.state, found.ended = "abandoned", entry.sequence


def _grant(replay: Replay, entry: LogEntry, body: Granted) -> Iterator[str]:
    if body.sale in replay.sales:
        yield "the sale was made before"
    if entry.boot not in replay.started:
        yield "its boot never started"
    replay.sales[body.sale] = (entry.sequence, body.receipt, entry.boot)


_APPLY: Final[dict[str, Callable[[Replay, LogEntry, Any], Iterator[str]]]] = {
    "start": _start,
    "identity": _identity,
    "register": _register,
    "policy": _policy,
    "epoch": _epoch,
    "revoke": _revoke,
    "approve": _verdict,
    "reject": _verdict,
    "reserve": _reserve,
    "takeover": _takeover,
    "commit": _commit,
    "abandon": _abandon,
    "consent": passes.consent,
    "recover": passes.recover,
    "rotate": passes.rotate,
    "handover": passes.handover,
    "grant": _grant,
}

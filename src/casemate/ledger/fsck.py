"""An independent check of a store: replay the log, and compare every table with the outcome.

Shares no code with the writer but ``spec``, ``accounting`` and the file system; it reads rows and
knows no rule from elsewhere. ``casemate audit verify`` also recomputes each charge from its events.
What it cannot see is a store that was restored as a whole from an older copy: that takes a witness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import apsw

from casemate.accounting.filters import RdpFilter
from casemate.ledger.copy import CopyDisk
from casemate.ledger.sealed import FILE, FOLDER, connect, failure, let_go
from casemate.ledger.vfs import Mount
from casemate.seams import Disk
from casemate.spec import codec
from casemate.spec.data import Budget, DatasetKey, Policy, Registration
from casemate.spec.errors import CasemateError, LedgerError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Charge, Quote
from casemate.spec.log import (
    BODIES,
    Abandoned,
    Approval,
    Committed,
    Enrolled,
    EpochAdvanced,
    PolicyChanged,
    Registered,
    Reserved,
    Revoked,
    Started,
)
from casemate.spec.receipt import LogEntry, ReceiptBundle

Rows = Callable[[str], list[tuple[Any, ...]]]
_ZERO: Final = "sha256:" + "0" * 64
# Table states that each state of the log allows.
_STATES: Final = {
    "reserved": {"reserved", "running"},
    "done": {"done"},
    "abandoned": {"failed", "cancelled", "abandoned"},
}


@dataclass
class _Lineage:
    owner: str
    budget: Budget
    filter: str
    spent: list[int]
    delta_femto: int = 0
    jobs: int = 0


@dataclass
class _Dataset:
    owner: str
    lineage: str
    policy_digest: str
    epoch: int = 0
    revoked: bool = False


@dataclass
class _Job:
    reserved: Reserved
    boot: bytes
    sequence: int
    state: str = "reserved"
    ended: int | None = None
    result_digest: str | None = None


@dataclass
class Replay:
    """What the log says. ``findings`` is empty for a sound store."""

    entries: int = 0
    head: str = _ZERO
    boots: set[bytes] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)
    identities: set[str] = field(default_factory=set)
    lineages: dict[str, _Lineage] = field(default_factory=dict)
    datasets: dict[str, _Dataset] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], str] = field(default_factory=dict)
    jobs: dict[str, _Job] = field(default_factory=dict)
    quotes: dict[str, bytes] = field(default_factory=dict)
    recompute: bool = False

    def expect(self, holds: bool, finding: str) -> bool:
        if not holds:
            self.findings.append(finding)
        return holds


def verify(disk: Disk, key: bytes) -> Replay:
    """Check the store that lies on ``disk``, charges recomputed; nothing is changed there.

    Raises ``LedgerError`` when it cannot be read: ``ledger.missing``, ``ledger.key``,
    ``ledger.corrupt``. No server may have it open.
    """
    if not disk.exists(f"{FOLDER}/{FILE}"):
        raise LedgerError(
            "ledger.missing", "There is no store in this folder.", mend="Name the state folder."
        )
    mount = Mount(CopyDisk(disk), FOLDER)
    try:
        connection = connect(mount, key)
        try:
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise apsw.CorruptError("the file's pages contradict each other")
            return check(lambda sql: connection.execute(sql).fetchall(), recompute=True)
        finally:
            let_go(connection)
    except apsw.Error as e:
        raise failure(mount.failed or e) from e
    finally:
        mount.close()


def check(rows: Rows, *, recompute: bool = False) -> Replay:
    """Check a store through ``rows`` (SQL to rows); ``recompute`` each charge from its events."""
    replay = Replay(recompute=recompute)
    try:
        _read_quotes(replay, rows)
        for row in rows("SELECT sequence, digest, entry FROM entries ORDER BY sequence"):
            if not _entry(replay, *row):
                break  # behind a broken link nothing can be believed
        else:
            for compare in (_compare_people, _compare_datasets, _compare_budgets, _compare_jobs):
                compare(replay, rows)
    except CasemateError as e:
        if e.family == "ledger":
            raise
        replay.findings.append(f"a stored value cannot be read: {e}")
    return replay


def _read_quotes(replay: Replay, rows: Rows) -> None:
    for digest, raw in rows("SELECT digest, quote FROM quotes"):
        said = "sha256:" + hashlib.sha256(raw).hexdigest()
        replay.expect(said == digest, f"quote {digest} was changed")
        replay.quotes[digest] = raw


def _names(replay: Replay, quote: str) -> set[str]:
    """The datasets of a quote that is there."""
    raw = replay.quotes.get(quote)
    if raw is None:
        return set()
    return {d.dataset for d in codec.decode(Quote, raw).request.datasets}


def _entry(replay: Replay, sequence: int, digest: str, raw: bytes) -> bool:
    """Whether the entry is the next link of the chain."""
    entry = codec.decode(LogEntry, raw)
    place = replay.entries
    if not replay.expect(
        sequence == entry.sequence == place
        and entry.previous == replay.head
        and codec.digest(entry) == digest,
        f"the chain breaks at entry {place}",
    ):
        return False
    if place == 0:
        replay.expect(entry.kind == "start", "the log does not begin with a start")
    body: Any = codec.decode(BODIES[entry.kind], entry.body)
    for finding in _APPLY[entry.kind](replay, entry, body):
        replay.findings.append(f"entry {place} ({entry.kind} {entry.subject}): {finding}")
    replay.head = digest
    replay.entries += 1
    return True


def _start(replay: Replay, entry: LogEntry, body: Started) -> Iterator[str]:
    if entry.boot in replay.boots:
        yield "this boot started before"
    replay.boots.add(entry.boot)


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
        empty = [0] * len(RdpFilter(body.budget).capacity)
        replay.lineages[body.lineage] = _Lineage(body.owner, body.budget, body.filter, empty)
    elif (lineage.owner, lineage.budget, lineage.filter) != (body.owner, body.budget, body.filter):
        yield "a new version changed owner, budget or filter"
    replay.datasets[body.dataset] = _Dataset(body.owner, body.lineage, body.policy_digest)


def _changed(replay: Replay, name: str) -> Iterator[str]:
    """What policy, epoch and revoke have in common: approvals are void."""
    if name not in replay.datasets:
        yield "there is no such dataset"
    elif replay.datasets[name].revoked:
        yield "the dataset was revoked before"
    judged = {quote for quote, _ in replay.verdicts}
    void = {quote for quote in judged if name in _names(replay, quote)}
    replay.verdicts = {k: v for k, v in replay.verdicts.items() if k[0] not in void}


def _policy(replay: Replay, entry: LogEntry, body: PolicyChanged) -> Iterator[str]:
    yield from _changed(replay, body.dataset)
    if body.dataset in replay.datasets:
        replay.datasets[body.dataset].policy_digest = body.policy_digest


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


def _verdict(replay: Replay, entry: LogEntry, body: Approval) -> Iterator[str]:
    dataset = replay.datasets.get(body.dataset)
    if dataset is None or dataset.owner != body.owner:
        yield "the word is not the owner's"
    if body.dataset not in _names(replay, body.quote_digest):
        yield "the quote is missing, or not on this dataset"
    replay.verdicts[body.quote_digest, body.dataset] = entry.kind


def _reserve(replay: Replay, entry: LogEntry, body: Reserved) -> Iterator[str]:
    if body.job in replay.jobs:
        yield "the job was reserved before"
    if entry.boot not in replay.boots:
        yield "its boot never started"
    lineages = [d.lineage for d in body.debits]
    if not lineages or len(set(lineages)) != len(lineages):
        yield "it debits no ledger, or one twice"
    for debit in body.debits:
        dataset = replay.datasets.get(debit.dataset)
        lineage = replay.lineages.get(debit.lineage)
        if dataset is None or lineage is None or dataset.lineage != debit.lineage:
            yield f"{debit.dataset} is not on that ledger"
            continue
        if dataset.revoked or (dataset.policy_digest, dataset.epoch) != (
            debit.policy_digest,
            debit.epoch,
        ):
            yield f"{debit.dataset} was revoked, or had another policy or epoch"
        rdp = RdpFilter(lineage.budget)
        if not rdp.admits(tuple(lineage.spent), lineage.delta_femto, debit.charge):
            yield f"it exceeds the budget of {debit.lineage}"
        if replay.recompute and debit.charge != _charge(rdp, body):
            yield f"the charge on {debit.dataset} is not what its events cost"
        for place, nano in enumerate(debit.charge.rdp_nano):
            lineage.spent[place] += nano
        lineage.delta_femto += debit.charge.delta_femto
        lineage.jobs += 1
    replay.jobs[body.job] = _Job(body, entry.boot, entry.sequence)


def _charge(rdp: RdpFilter, body: Reserved) -> Charge:
    if not body.events:
        return Charge(rdp_nano=(0,) * len(rdp.capacity), delta_femto=0, epsilon=0.0)
    extra = body.delta_truncation + body.delta_sampler
    return rdp.charge(body.events, extra, delta_shown=body.delta_shown)


def _end(replay: Replay, entry: LogEntry, job: str, request: str, state: str) -> Iterator[str]:
    found = replay.jobs.get(job)
    if found is None or found.state != "reserved" or found.reserved.request_digest != request:
        yield "the job was not reserved so, or had ended"
        return
    if state == "done":
        if found.boot != entry.boot:
            yield "another boot had reserved it"
        if any(replay.datasets[d.dataset].revoked for d in found.reserved.debits):
            yield "a dataset of it was revoked"
    found.state, found.ended = state, entry.sequence


def _commit(replay: Replay, entry: LogEntry, body: Committed) -> Iterator[str]:
    yield from _end(replay, entry, body.job, body.request_digest, "done")
    if body.job in replay.jobs:
        replay.jobs[body.job].result_digest = body.result_digest


def _abandon(replay: Replay, entry: LogEntry, body: Abandoned) -> Iterator[str]:
    yield from _end(replay, entry, body.job, body.request_digest, "abandoned")


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
    "commit": _commit,
    "abandon": _abandon,
}


def _compare_people(replay: Replay, rows: Rows) -> None:
    found = set()
    for name, raw in rows("SELECT id, identity FROM identities"):
        found.add(name)
        replay.expect(codec.decode(PublicIdentity, raw).id == name, f"identity {name} was changed")
    replay.expect(found == replay.identities, "identities are missing or too many")
    verdicts = {
        (quote, dataset): verdict
        for quote, dataset, verdict in rows("SELECT quote, dataset, verdict FROM quote_datasets")
        if verdict is not None
    }
    replay.expect(verdicts == replay.verdicts, "approvals are not those of the log")


def _compare_datasets(replay: Replay, rows: Rows) -> None:
    keys = {name: codec.decode(DatasetKey, raw) for name, raw in rows("SELECT * FROM dataset_keys")}
    columns = "id, owner, lineage, registration, policy, policy_digest, epoch, state"
    found = set()
    for name, owner, lineage, raw, policy, digest, epoch, state in rows(
        f"SELECT {columns} FROM datasets"
    ):
        found.add(name)
        said = replay.datasets.get(name)
        registration = codec.decode(Registration, raw)
        replay.expect(
            said is not None
            and (registration.dataset, registration.owner) == (name, owner)
            and (said.owner, said.lineage, said.policy_digest, said.epoch, said.revoked)
            == (owner, lineage, digest, epoch, state == "revoked")
            and codec.digest(codec.decode(Policy, policy)) == digest,
            f"dataset {name} is not as the log says",
        )
        replay.expect(
            (name in keys) == (state in ("checking", "ready")),
            f"dataset {name} is {state} and its key is {'there' if name in keys else 'missing'}",
        )
    replay.expect(found == set(replay.datasets), "datasets are missing or too many")


def _compare_budgets(replay: Replay, rows: Rows) -> None:
    spent: dict[str, list[int]] = {}
    for name, place, nano in rows("SELECT * FROM spent ORDER BY lineage, place"):
        spent.setdefault(name, []).append(nano)
        replay.expect(place == len(spent[name]) - 1, f"an order of budget {name} is missing")
    found = set()
    columns = "id, owner, filter, budget, delta_femto, jobs"
    for name, owner, kind, budget, delta, jobs in rows(f"SELECT {columns} FROM lineages"):
        found.add(name)
        said = replay.lineages.get(name)
        replay.expect(
            said is not None
            and (said.owner, said.filter, said.budget)
            == (owner, kind, codec.decode(Budget, budget)),
            f"budget {name} is not as it was registered",
        )
        replay.expect(
            said is not None
            and (said.spent, said.delta_femto, said.jobs) == (spent.get(name), delta, jobs),
            f"what is spent of budget {name} is not the sum of its reservations",
        )
    replay.expect(found == set(replay.lineages), "budgets are missing or too many")


def _compare_jobs(replay: Replay, rows: Rows) -> None:
    charges: dict[str, set[tuple[str, str, bytes]]] = {}
    for job, dataset, lineage, charge in rows("SELECT * FROM job_datasets"):
        charges.setdefault(job, set()).add((dataset, lineage, charge))
    found = set()
    columns = "id, request_digest, quote, scientist, state, boot, reserved, ended, result_digest"
    for row in rows(f"SELECT {columns}, blob, bundle FROM jobs"):
        name, request, quote, scientist, state, boot, reserved, ended, result, blob, bundle = row
        found.add(name)
        said = replay.jobs.get(name)
        if said is None:
            replay.expect(
                state in ("queued", "failed", "cancelled") and reserved is None and blob is None,
                f"job {name} is {state} but was never reserved",
            )
            continue
        body = said.reserved
        debits = {(d.dataset, d.lineage, codec.encode(d.charge)) for d in body.debits}
        replay.expect(
            state in _STATES[said.state]
            and (request, quote, scientist)
            == (body.request_digest, body.quote_digest, body.scientist)
            and (boot, reserved, ended) == (said.boot, said.sequence, said.ended)
            and result == said.result_digest
            and charges.get(name) == debits,
            f"job {name} is not as the log says",
        )
        visible = state == "done"
        if (
            replay.expect(
                (blob is not None) == visible and (bundle is not None) == visible,
                f"job {name} is {state}: result and receipt must be there only when it is done",
            )
            and bundle is not None
        ):
            codec.decode(ReceiptBundle, bundle)
    replay.expect(set(replay.jobs) <= found, "reserved jobs are missing")

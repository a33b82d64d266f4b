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
from casemate.ledger import fsck_passing as passes
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
    TakenOver,
)
from casemate.spec.receipt import LogEntry, ReceiptBundle

Rows = Callable[[str], list[tuple[Any, ...]]]
# Table states that each state of the log allows.
_STATES: Final = {
    "reserved": {"reserved", "running"},
    "committed": {"committed", "done"},
    "abandoned": {"failed", "cancelled", "abandoned"},
}


@dataclass
class _Account:
    rdp_nano: tuple[int, ...] = RdpFilter.empty()
    delta_femto: int = 0
    jobs: int = 0

    def add(self, charge: Charge) -> None:
        self.rdp_nano = tuple(a + b for a, b in zip(self.rdp_nano, charge.rdp_nano, strict=True))
        self.delta_femto += charge.delta_femto
        self.jobs += 1


@dataclass
class _Lineage:
    owner: str
    budget: Budget
    filter: str
    accounts: dict[str, _Account] = field(default_factory=lambda: {"": _Account()})


@dataclass
class _Dataset:
    owner: str
    lineage: str
    schema: str
    policy: str
    epoch: int = 0
    revoked: bool = False


@dataclass
class _Job:
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
    boots: set[bytes] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)
    identities: set[str] = field(default_factory=set)
    lineages: dict[str, _Lineage] = field(default_factory=dict)
    datasets: dict[str, _Dataset] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], str] = field(default_factory=dict)
    jobs: dict[str, _Job] = field(default_factory=dict)
    attestations: dict[bytes, str] = field(default_factory=dict)
    # Commitment on a quote -> the datasets of it; digest of a quote -> its salt.
    quotes: dict[str, frozenset[str]] = field(default_factory=dict)
    salts: dict[str, bytes] = field(default_factory=dict)
    passing: passes.Passing = field(default_factory=passes.Passing)
    recompute: bool = False

    def commit(self, quote: str, digest: str) -> str:
        """A commitment under the salt of a quote."""
        return _commitment(self.salts.get(quote, b""), digest)

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
        passes.read_keys(replay, rows)
        for row in rows("SELECT sequence, entry FROM entries ORDER BY sequence"):
            if not _entry(replay, *row):
                break  # behind a gap nothing can be believed
        else:
            for compare in (
                _compare_tree,
                _compare_people,
                _compare_datasets,
                _compare_budgets,
                _compare_jobs,
                passes.compare,
            ):
                compare(replay, rows)
    except CasemateError as e:
        if e.family == "ledger":
            raise
        replay.findings.append(f"a stored value cannot be read: {e}")
    return replay


def _read_quotes(replay: Replay, rows: Rows) -> None:
    for digest, salt, raw in rows("SELECT digest, salt, quote FROM quotes"):
        said = "sha256:" + hashlib.sha256(raw).hexdigest()
        replay.expect(said == digest, f"quote {digest} was changed")
        datasets = codec.decode(Quote, raw).request.datasets
        replay.salts[digest] = salt
        replay.quotes[replay.commit(digest, digest)] = frozenset(d.dataset for d in datasets)


def _commitment(salt: bytes, digest: str) -> str:
    return "sha256:" + hashlib.sha256(b"casemate/log/v1\0" + salt + digest.encode()).hexdigest()


def _entry(replay: Replay, sequence: int, raw: bytes) -> bool:
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
    for rule in (passes.before, _APPLY[entry.kind]):
        for finding in rule(replay, entry, body):
            replay.findings.append(f"entry {place} ({entry.kind} {entry.subject}): {finding}")
    replay.leaves.append(hashlib.sha256(b"\0" + raw).digest())
    replay.entries += 1
    return True


def _start(replay: Replay, entry: LogEntry, body: Started) -> Iterator[str]:
    if entry.boot in replay.boots:
        yield "this boot started before"
    replay.boots.add(entry.boot)
    replay.attestations[entry.boot] = body.attestation
    yield from passes.start(replay, entry, body)


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
        replay.lineages[body.lineage] = _Lineage(body.owner, body.budget, body.filter)
    elif (lineage.owner, lineage.budget, lineage.filter) != (body.owner, body.budget, body.filter):
        yield "a new version changed owner, budget or filter"
    replay.datasets[body.dataset] = _Dataset(body.owner, body.lineage, body.schema, body.policy)


def _changed(replay: Replay, name: str) -> Iterator[str]:
    """What policy, epoch and revoke have in common: approvals are void."""
    if name not in replay.datasets:
        yield "there is no such dataset"
    elif replay.datasets[name].revoked:
        yield "the dataset was revoked before"
    void = {quote for quote, datasets in replay.quotes.items() if name in datasets}
    replay.verdicts = {k: v for k, v in replay.verdicts.items() if k[0] not in void}


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
        if dataset.revoked or (dataset.policy, dataset.epoch) != (debit.policy, debit.epoch):
            yield f"{debit.dataset} was revoked, or had another policy or epoch"
        rdp, account = RdpFilter(lineage.budget), lineage.accounts[""]
        if not rdp.admits(account.rdp_nano, account.delta_femto, body.charge):
            yield f"it exceeds the budget of {debit.lineage}"
        if replay.recompute and body.charge != _charge(rdp, body):
            yield f"the charge on {debit.dataset} is not what its events cost"
        for whose in ("", body.scientist):
            lineage.accounts.setdefault(whose, _Account()).add(body.charge)
    replay.jobs[body.job] = _Job(body, entry.boot, entry.sequence, entry.sequence)


def _charge(rdp: RdpFilter, body: Reserved) -> Charge:
    if not body.events:
        return Charge(rdp_nano=(0,) * len(rdp.capacity), delta_femto=0, epsilon=0.0)
    extra = body.delta_truncation + body.delta_sampler
    return rdp.charge(body.events, extra, delta_shown=body.delta_shown)


def _takeover(replay: Replay, entry: LogEntry, body: TakenOver) -> Iterator[str]:
    found = replay.jobs.get(body.job)
    if found is None or found.state != "reserved" or found.boot == entry.boot:
        yield "the job was not reserved by another boot, or had ended"
        return
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
}


def _compare_tree(replay: Replay, rows: Rows) -> None:
    """The kept subtrees are those of RFC 6962 over the entries, each and no more."""
    level, row = 0, replay.leaves
    expected: dict[tuple[int, int], bytes] = {}
    while row:
        expected |= {(level, place): hashed for place, hashed in enumerate(row)}
        pairs = zip(row[::2], row[1::2], strict=False)
        level, row = level + 1, [hashlib.sha256(b"\1" + a + b).digest() for a, b in pairs]
    found = {(lv, place): hashed for lv, place, hashed in rows("SELECT * FROM nodes")}
    replay.expect(found == expected, "the log's tree is not the one over its entries")
    kept = {boot: digest for boot, digest, raw in rows("SELECT * FROM attestations")
            if "sha256:" + hashlib.sha256(raw).hexdigest() == digest}  # fmt: skip
    replay.expect(kept == replay.attestations, "attestations are missing or were changed")


def _compare_people(replay: Replay, rows: Rows) -> None:
    found = set()
    for name, raw in rows("SELECT id, identity FROM identities"):
        found.add(name)
        replay.expect(codec.decode(PublicIdentity, raw).id == name, f"identity {name} was changed")
    replay.expect(found == replay.identities, "identities are missing or too many")
    verdicts = {
        (replay.commit(quote, quote), dataset): verdict
        for quote, dataset, verdict in rows("SELECT quote, dataset, verdict FROM quote_datasets")
        if verdict is not None
    }
    replay.expect(verdicts == replay.verdicts, "approvals are not those of the log")


def _compare_datasets(replay: Replay, rows: Rows) -> None:
    keys = {name: codec.decode(DatasetKey, raw) for name, raw in rows("SELECT * FROM dataset_keys")}
    columns = "id, owner, lineage, registration, policy, policy_digest, salt, epoch, state"
    found = set()
    for name, owner, lineage, raw, policy, digest, salt, epoch, state in rows(
        f"SELECT {columns} FROM datasets"
    ):
        found.add(name)
        said = replay.datasets.get(name)
        registration = codec.decode(Registration, raw)
        replay.expect(
            said is not None
            and (registration.dataset, registration.owner) == (name, owner)
            and (said.owner, said.lineage, said.epoch, said.revoked)
            == (owner, lineage, epoch, state == "revoked")
            and said.schema == _commitment(salt, codec.digest(registration.schema))
            and said.policy == _commitment(salt, digest)
            and codec.digest(codec.decode(Policy, policy)) == digest,
            f"dataset {name} is not as the log says",
        )
        replay.expect(
            (name in keys) == (state in ("checking", "ready")),
            f"dataset {name} is {state} and its key is {'there' if name in keys else 'missing'}",
        )
    replay.expect(found == set(replay.datasets), "datasets are missing or too many")


def _compare_budgets(replay: Replay, rows: Rows) -> None:
    accounts: dict[str, dict[str, _Account]] = {}
    for name, whose, rdp, delta, jobs in rows("SELECT * FROM accounts"):
        account = _Account(tuple(map(int, rdp.split())), delta, jobs)
        accounts.setdefault(name, {})[whose] = account
    found = set()
    for name, owner, kind, budget in rows("SELECT id, owner, filter, budget FROM lineages"):
        found.add(name)
        said = replay.lineages.get(name)
        replay.expect(
            said is not None
            and (said.owner, said.filter, said.budget)
            == (owner, kind, codec.decode(Budget, budget)),
            f"budget {name} is not as it was registered",
        )
        spent = {} if said is None else {w: a for w, a in said.accounts.items() if a.jobs}
        replay.expect(
            said is not None and spent == accounts.get(name, {}),
            f"what is spent of budget {name} is not the sum of its reservations",
        )
    replay.expect(found == set(replay.lineages), "budgets are missing or too many")


def _compare_jobs(replay: Replay, rows: Rows) -> None:
    charges: dict[str, set[tuple[str, str, bytes]]] = {}
    for job, dataset, lineage, charge in rows("SELECT * FROM job_datasets"):
        charges.setdefault(job, set()).add((dataset, lineage, charge))
    found = set()
    columns = (
        "id, request_digest, quote, scientist, state, boot, reserved, granted, takeovers, ended,"
        " result_digest, blob, result_key, envelope, bundle"
    )
    for row in rows(f"SELECT {columns} FROM jobs"):
        name, request, quote, scientist, state, *log, result, blob, key, envelope, bundle = row
        found.add(name)
        said = replay.jobs.get(name)
        if said is None:
            replay.expect(
                state in ("queued", "failed", "cancelled") and log[1] is None and blob is None,
                f"job {name} is {state} but was never reserved",
            )
            continue
        body = said.reserved
        charge = codec.encode(body.charge)
        replay.expect(
            state in _STATES[said.state]
            and scientist == body.scientist
            and body.request == replay.commit(quote, request)
            and body.quote == replay.commit(quote, quote)
            and log == [said.boot, said.sequence, said.granted, said.takeovers, said.ended]
            and charges.get(name) == {(d.dataset, d.lineage, charge) for d in body.debits},
            f"job {name} is not as the log says",
        )
        committed = said.state == "committed"
        whole = replay.expect(
            all((x is not None) == committed for x in (result, blob, key))
            and (envelope is not None) == (state == "committed")
            and (bundle is not None) == (state == "done")
            and (not committed or said.result == replay.commit(quote, result)),
            f"job {name} is {state}: result and receipt are not those of its commit",
        )
        if whole and committed:
            if bundle is not None:
                envelope = codec.decode(ReceiptBundle, bundle).envelope
            digest = "sha256:" + hashlib.sha256(envelope.encode()).hexdigest()
            replay.expect(
                said.receipt == replay.commit(quote, digest), f"the receipt of {name} was changed"
            )
    replay.expect(set(replay.jobs) <= found, "reserved jobs are missing")

"""An independent check of a store: replay the log, and compare every table with the outcome.

Shares no code with the writer but ``spec`` (and ``seams``, whose Disk it reads): its own filter and
accountant, its own trees and signatures, its own way to the pages; tests/architecture holds it to
that. Every start does what :func:`check` does; ``casemate audit fsck`` does :func:`audit`. What it
cannot see is a store that was restored as a whole from an older copy: that takes a checkpoint that
somebody kept (:func:`extends`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from typing import Final

from casemate.ledger import fsck_budget as budgets
from casemate.ledger import fsck_folder, fsck_models, fsck_notes, fsck_receipts
from casemate.ledger import fsck_passing as passes
from casemate.ledger.fsck_replay import Account, Replay, Rows, commitment, read
from casemate.seams import Disk
from casemate.spec import codec
from casemate.spec.consent import Head
from casemate.spec.data import Budget, DatasetKey, Policy, Registration
from casemate.spec.errors import CasemateError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Quote, Submission
from casemate.spec.receipt import ReceiptBundle

# Table states that each state of the log allows.
_STATES: Final = {
    "reserved": {"reserved", "running"},
    "committed": {"committed", "done"},
    "abandoned": {"failed", "cancelled", "abandoned"},
}
_LIVE: Final = ("queued", "reserved", "running")


def verify(disk: Disk, key: bytes) -> Replay:
    """Check the tables of the store that lies on ``disk``, charges recomputed; nothing is changed
    there.

    Raises ``LedgerError`` when it cannot be read: ``ledger.missing``, ``ledger.key``,
    ``ledger.corrupt``; ``usage.extra`` without a second accountant. No server may have it open.
    """
    with fsck_folder.opened(disk, key) as rows:
        return check(rows, recompute=True)


def audit(disk: Disk, key: bytes) -> Replay:
    """As :func:`verify`, with all signatures and receipts, and the files that the store names."""
    with fsck_folder.opened(disk, key) as rows:
        replay = check(rows, recompute=True)
        for part in (fsck_receipts.check, fsck_folder.check):
            _guarded(replay, partial(part, replay, rows, disk))
        return replay


def head(replay: Replay) -> Head:
    """The newest head of the log that was replayed."""
    root = fsck_notes.tree(replay.leaves)
    return Head(origin=replay.passing.origin(replay.entries), size=replay.entries, root=root)


def extends(replay: Replay, signed: str) -> None:
    """Hold the log against a checkpoint (a signed note) that somebody kept; what does not agree is
    a finding. Only so is seen that a whole store is an older copy."""
    text = signed.rpartition("\n\n")[0] + "\n"
    origin, size, *_ = [*text.split("\n"), ""]
    if not passes.signed_by(replay, origin, signed) or not re.fullmatch("[0-9]{1,18}", size):
        replay.findings.append("the checkpoint to compare with is not signed by this log")
        return
    ended = dict(replay.passing.origins)[origin]
    here = replay.entries if ended is None else ended
    said = fsck_notes.head(origin, int(size), fsck_notes.tree(replay.leaves[: int(size)]))
    if int(size) > here:
        replay.findings.append(f"the log lacks entries: a checkpoint has {size}, of which {here}"
                               " are here")  # fmt: skip
    elif not text.startswith(said):
        replay.findings.append(f"the log is not the one of a checkpoint of {size} entries: a fork")


def check(rows: Rows, *, recompute: bool = False) -> Replay:
    """Check a store through ``rows`` (SQL to rows); ``recompute`` each charge from its events."""
    replay = Replay(recompute=recompute)
    _guarded(replay, partial(_check, replay, rows))
    return replay


def _guarded(replay: Replay, part: Callable[[], None]) -> None:
    try:
        part()
    except CasemateError as e:
        if e.family in ("ledger", "usage"):
            raise
        replay.findings.append(f"a stored value cannot be read: {e}")


def _check(replay: Replay, rows: Rows) -> None:
    _read_quotes(replay, rows)
    _read_policies(replay, rows)
    passes.read_keys(replay, rows)
    for row in rows("SELECT sequence, entry FROM entries ORDER BY sequence"):
        if not read(replay, *row):
            return  # behind a gap nothing can be believed
    for compare in (
        _compare_tree,
        _compare_log,
        _compare_people,
        _compare_datasets,
        _compare_uploads,
        _compare_budgets,
        _compare_quotes,
        _compare_jobs,
        _compare_states,
        fsck_models.compare,
        passes.compare,
    ):
        compare(replay, rows)


def _read_quotes(replay: Replay, rows: Rows) -> None:
    for digest, salt, raw in rows("SELECT digest, salt, quote FROM quotes"):
        said = "sha256:" + hashlib.sha256(raw).hexdigest()
        replay.expect(said == digest, f"quote {digest} was changed")
        request = codec.decode(Quote, raw).request
        replay.salts[digest] = salt
        commit = replay.commit(digest, digest)
        replay.quotes[commit] = frozenset(d.dataset for d in request.datasets)
        if request.metrics:
            replay.evaluations[commit] = request


def _read_policies(replay: Replay, rows: Rows) -> None:
    """Those of today and of registration, by their commitments: what the log's entries name."""
    for salt, raw, registered in rows("SELECT salt, policy, registration FROM datasets"):
        registration = codec.decode(Registration, registered)
        for policy in (codec.decode(Policy, raw), registration.policy):
            replay.policies[commitment(salt, codec.digest(policy))] = policy


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


def _compare_log(replay: Replay, rows: Rows) -> None:
    """Attestations, cosignatures and the anchor's mark are of this log."""
    kept = {
        boot: digest
        for boot, digest, raw in rows("SELECT * FROM attestations")
        if "sha256:" + hashlib.sha256(raw).hexdigest() == digest
    }
    replay.expect(kept == replay.attestations, "attestations are missing or were changed")
    replay.expect(bool(replay.passing.origins) or not replay.entries, "the log's keys are missing")
    for witness, size, text in rows("SELECT * FROM cosignatures"):
        by = fsck_notes.signer(witness)
        signature = None if by is None else fsck_notes.line(text, by)
        whole = 0 < size <= replay.entries
        replay.expect(
            whole
            and by is not None
            and by.kind == fsck_notes.WITNESS
            and signature is not None
            and any(by.signed(head, signature) for head in _heads(replay, size)),
            f"the cosignature of {witness[:80]} is not on this log",
        )
    for secret, name, *mark in rows("SELECT secret, name, count, before, step FROM anchor"):
        replay.expect(len(secret) == 32, "the anchor's secret was changed")
        if name is not None:
            replay.expect(_marked(replay, *mark), "the anchor's mark is not that of the log")


def _heads(replay: Replay, size: int) -> list[str]:
    """What a checkpoint of so many entries may say: at a recovery a log has two names."""
    names = {replay.passing.origin(at) for at in (size - 1, size)}
    root = fsck_notes.tree(replay.leaves[:size])
    return [fsck_notes.head(name, size, root) for name in sorted(names)]


def _marked(replay: Replay, count: int, before: bytes, step: bytes) -> bool:
    """The newest mark is that of the last entry that moved the anchor; its step is the root of the
    log as that transaction left it, so one of the first from there: a log that anybody can make
    long is not gone through from its end."""
    if replay.anchored is None or replay.anchored[0] != count or len(before) != 32:
        return False
    sizes = range(replay.anchored[1] + 1, replay.entries + 1)
    return any(fsck_notes.tree(replay.leaves[:size]) == step for size in sizes)


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
            and said.schema == commitment(salt, codec.digest(registration.schema))
            and said.policy == commitment(salt, digest)
            and codec.digest(codec.decode(Policy, policy)) == digest,
            f"dataset {name} is not as the log says",
        )
        replay.expect(
            (name in keys) == (state in ("checking", "ready")),
            f"dataset {name} is {state} and its key is {'there' if name in keys else 'missing'}",
        )
    replay.expect(found == set(replay.datasets), "datasets are missing or too many")


def _compare_budgets(replay: Replay, rows: Rows) -> None:
    accounts: dict[str, dict[str, Account]] = {}
    for name, whose, rdp, delta, jobs in rows("SELECT * FROM accounts"):
        if replay.expect(
            re.fullmatch(r"(0|[1-9][0-9]*)( (0|[1-9][0-9]*))*", rdp) is not None
            and len(rdp.split()) == len(budgets.ORDERS),
            f"what is spent of budget {name} is not written as it should be",
        ):
            account = Account(tuple(map(int, rdp.split())), delta, jobs)
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
        kept = accounts.get(name, {})
        replay.expect(
            spent.keys() == kept.keys() and all(_same(spent[w], kept[w]) for w in spent),
            f"what is spent of budget {name} is not the sum of its reservations",
        )
    replay.expect(found == set(replay.lineages), "budgets are missing or too many")


def _same(said: Account, kept: Account) -> bool:
    """Equal, but for what a charge of all that was left may differ by."""
    pairs = zip((*said.rdp_nano, said.delta_femto), (*kept.rdp_nano, kept.delta_femto), strict=True)
    return said.jobs == kept.jobs and all(0 <= a - b <= said.slack for a, b in pairs)


def _compare_quotes(replay: Replay, rows: Rows) -> None:
    """A quote's columns are those of its body; its datasets are named once each."""
    named: dict[str, set[str]] = {}
    for digest, dataset in rows("SELECT quote, dataset FROM quote_datasets"):
        named.setdefault(digest, set()).add(dataset)
    columns = "digest, job, scientist, quote, submission, model_key, salt"
    for digest, job, scientist, raw, submission, key, salt in rows(f"SELECT {columns} FROM quotes"):
        request = codec.decode(Quote, raw).request
        said = codec.decode(Submission, submission).request
        replay.expect(
            (job, scientist, said) == (request.job, request.scientist, request)
            and named.pop(digest, set()) == {d.dataset for d in request.datasets}
            and scientist in replay.identities
            and len(key) == len(salt) == 32,
            f"quote {digest} does not agree with its rows",
        )
    replay.expect(not named, "quotes are missing")


def _compare_uploads(replay: Replay, rows: Rows) -> None:
    """What was uploaded is the part of one thing of its owner."""
    uploads = {name: (owner, used) for name, owner, _, used in rows("SELECT * FROM uploads")}
    for name, (owner, _) in uploads.items():
        replay.expect(owner in replay.identities, f"the owner of upload {name} never enrolled")
    for name, raw, state in rows("SELECT id, registration, state FROM datasets"):
        registration = codec.decode(Registration, raw)
        found = uploads.get(registration.upload)
        replay.expect(
            found == (registration.owner, name)
            or (found is None and state in ("revoked", "refused")),
            f"the upload of dataset {name} is missing or another's",
        )
    live = {quote for quote, state in rows("SELECT quote, state FROM jobs") if state in _LIVE}
    for digest, raw in rows("SELECT digest, submission FROM quotes"):
        submission = codec.decode(Submission, raw)
        found = uploads.get(submission.upload)
        used = (submission.request.scientist, f"model:{submission.request.model_digest}")
        replay.expect(
            found == used or (found is None and digest not in live),
            f"the model of quote {digest} is missing or another's",
        )


def _compare_states(replay: Replay, rows: Rows) -> None:
    """Training states are of jobs that still go on."""
    sql = (
        "SELECT s.job, s.step, s.path, s.key, j.state, q.quote FROM states s"
        " LEFT JOIN jobs j ON j.id = s.job LEFT JOIN quotes q ON q.digest = j.quote"
    )
    for job, step, path, key, state, raw in rows(sql):
        steps = 0 if raw is None else codec.decode(Quote, raw).plan.steps
        replay.expect(
            state in ("reserved", "running")
            and 0 < step < steps
            and path == f"states/{job}.{step}"
            and len(key) == 32,
            f"the training state of {job} is not that of a job that goes on",
        )


def _compare_jobs(replay: Replay, rows: Rows) -> None:
    charges: dict[str, set[tuple[str, str, bytes]]] = {}
    for job, dataset, lineage, charge in rows("SELECT * FROM job_datasets"):
        charges.setdefault(job, set()).add((dataset, lineage, charge))
    quotes = {d: codec.decode(Quote, raw) for d, raw in rows("SELECT digest, quote FROM quotes")}
    found = set()
    columns = (
        "id, request_digest, quote, scientist, state, boot, reserved, granted, takeovers, ended,"
        " result_digest, blob, result_key, envelope, bundle"
    )
    for row in rows(f"SELECT {columns} FROM jobs"):
        name, request, quote, scientist, state, *log, result, blob, key, envelope, bundle = row
        found.add(name)
        said = replay.jobs.get(name)
        asked = quotes.get(quote)
        replay.expect(
            asked is not None
            and (asked.request.job, asked.request.scientist) == (name, scientist)
            and codec.digest(asked.request) == request
            and {(c[0], c[2]) for c in charges.get(name, ())}
            == {(d.dataset, codec.encode(d.charge)) for d in asked.datasets},
            f"job {name} is not the one that was quoted",
        )
        if said is None:
            replay.expect(
                state in ("queued", "failed", "cancelled")
                and log == [None, None, None, 0, None]
                and all(x is None for x in (result, blob, key, envelope, bundle)),
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
            and (not committed or said.result == replay.commit(quote, result))
            and blob in (None, f"results/{name}"),
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
    replay.expect(set(charges) <= found, "jobs are missing")

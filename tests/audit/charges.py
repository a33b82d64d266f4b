"""What jobs are charged, and what costs nothing: the ledger's rules, on datasets of a store."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch

from audit import accountant, lab
from audit.law import holds
from casemate.accounting import filters
from casemate.engine import prepare
from casemate.ledger import catalog, ledger
from casemate.ledger.store import Store
from casemate.plan import quote
from casemate.server import release
from casemate.spec import tensors
from casemate.spec.errors import CasemateError, InternalError, ModelError
from casemate.spec.job import Metric, NonPrivate, Sgd, TrainSpec
from support import ledgers
from support.disk import SimDisk


def charged(seed: int) -> None:
    """Rule P8: a job is charged whole before it reads, once; neither its end nor a crash gives
    anything back, and no job passes a budget that is spent. All its datasets are charged, whoever
    asks; a new version has what was spent; keys are given out once for a charge."""
    del seed
    _charged_by_whom()
    _budgets()
    _uncharged()
    _told()
    disk = SimDisk()
    store = ledgers.open_store(disk)
    try:
        name = ledgers.push(store)
        lineage = catalog.dataset(store, name).lineage

        def account() -> tuple[int, ...]:
            return _spent(store, lineage)

        one = None
        for i, end in enumerate(("commit", "fail", "cancel", "crash")):
            before = account()
            job = ledgers.queue(store, f"job {i}", (name,))
            ledger.reserve(store, job)
            took = tuple(b - a for a, b in zip(before, account(), strict=True))
            one = one or took
            holds(took == one and min(took) > 0, f"charged: job {i} is charged when reserved")
            ledger.begin(store, job)
            if end == "commit":
                ledgers.finish(store, job)
            elif end == "crash":
                store.close()
                store = ledgers.open_store(disk, 2)
            else:
                how: Any = "failed" if end == "fail" else "cancelled"
                ledger.abandon(store, job, how, "job.failed", "The job failed.")
            after = tuple(b - a for a, b in zip(before, account(), strict=True))
            holds(after == one, f"charged: a job that ends by {end} is refunded")
        granted = 4
        with suppress(CasemateError):
            while granted < 500:
                ledger.reserve(store, ledgers.queue(store, f"more {granted}", (name,)))
                granted += 1
        event = ledgers.EVENT
        low = accountant.bounds(
            event.rate, event.noise_multiplier, event.steps * granted, ledgers.BUDGET.delta
        ).low
        spent = f"charged: {granted} jobs on one budget make epsilon {low:.3f}"
        holds(low <= ledgers.BUDGET.epsilon, spent)
        most = filters.capacities(ledgers.BUDGET.epsilon, ledgers.BUDGET.delta)
        inside = any(a <= b for a, b in zip(account(), most, strict=False))
        holds(inside, "charged: what was granted is beyond the filter at every order")
    finally:
        store.close()


def _budgets() -> None:
    """Every dataset's budget holds, and in it the extra deltas."""
    store = ledgers.open_store(SimDisk())
    try:
        fresh, spent = (ledgers.push(store, name) for name in ("fresh", "spent"))
        jobs = 0
        while _taken(store, f"on one {jobs}", (spent,)):
            jobs += 1
        both = _taken(store, "on both", (fresh, spent))
        holds(not both, "charged: a job is taken beside whose budget one of its datasets is")
        quiet = dataclasses.replace(ledgers.EVENT, noise_multiplier=16.0)
        most, jobs = filters.delta_capacity(ledgers.BUDGET.delta), 0
        more: dict[str, Any] = {"event": quiet, "extra": most / 1e15 / 5, "delta": 1e-5}
        while jobs < 9 and _taken(store, f"quiet {jobs}", (fresh,), **more):
            jobs += 1
        each = 2 * filters.femto(more["extra"])
        holds(0 < jobs * each <= most, f"charged: {jobs} jobs take {jobs * each} of {most} femto")
    finally:
        store.close()


def _told() -> None:
    """What leaves of a run that has read rows: of a failure that it failed, of a result no more
    than its form, of an evaluation its metrics alone."""
    ends = {
        release.end(CasemateError(code, what, mend=""), read=True)
        for code in ("model.failed", "data.bounds", "plan.unsound", "worker.ended", "internal.x")
        for what in ("Row 7 holds 1.5.", "The loss is 0.25.")
    }
    holds(len(ends) == 1, f"charged: of a run that failed {len(ends)} things are told")
    plain, other = (_weights(**{name: 2}) for name in ("w", "v"))
    head = plain[: 8 + int.from_bytes(plain[:8], "little")]
    said: Any = SimpleNamespace(
        result="sha256:" + hashlib.sha256(head).hexdigest(), result_bytes=len(plain)
    )
    asked: Any = SimpleNamespace(request=SimpleNamespace(released=None), parameters=9)
    release.check_result(plain, asked, said)
    for wrong in (other, _weights(w=3), _weights(w=2, loss=1), plain + bytes(4)):
        refused = False
        try:
            release.check_result(wrong, asked, said)
        except CasemateError:
            refused = True
        holds(refused, "charged: a result leaves that holds other than the weights told of")
    for sizes in ((2, 3), (3,), (1, 1)):
        sample = {"x": torch.zeros(3, sum(sizes)), "target": torch.zeros(3)}
        packed, inputs = lab.exported(lab.Meter(sizes), sample, loss=lab.total, dropout=False)
        digest = "sha256:" + hashlib.sha256(packed.data).hexdigest()
        train = TrainSpec(
            batch_size=6, steps=1, privacy=NonPrivate(words=""), optimizer=Sgd(lr=1.0)
        )
        schemas = (lab.schema_of(sum(sizes), 6),)
        refused = False
        try:
            prepare.prepare(
                packed.data, digest, schemas, inputs, train, 4 << 30, "record", released=2
            )
        except ModelError:
            refused = True
        holds(refused, f"charged: weights of sizes {sizes} leave as two metrics")


def _weights(**sizes: int) -> bytes:
    return tensors.dump({n: ("f32", (size,), bytes(4 * size)) for n, size in sizes.items()})


def _taken(store: Store, job: str, names: tuple[str, ...], **more: Any) -> bool:
    """Whether such a job is queued."""
    with suppress(CasemateError):
        ledgers.queue(store, job, names, **more)
        return True
    return False


def _receipt(store: Store, job: str) -> None:
    """A job's receipt claims what was quoted; there is one result for one charge."""
    stored = ledger.quote(store, job)
    envelope = json.loads(ledgers.finish(store, job).envelope)
    said = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["guarantee"]
    claim = (said["epsilon"], said["delta"], said["private"])
    holds(claim == (stored.epsilon, stored.delta, True), f"charged: a receipt claims {claim}")
    words = f"({stored.epsilon:.6g}, {stored.delta:g})-differentially private"
    holds(words in said["statement"], "charged: a receipt says in words what it claims")
    less = dataclasses.replace(stored, epsilon=0.99 * stored.epsilon)
    refused = False
    try:
        tight = quote.recompute(less.plan, less.delta)[1]
        release.check_guarantee(dataclasses.replace(less, epsilon=0.99 * tight))
    except InternalError:
        refused = True
    holds(refused, "charged: a receipt claims less than the events cost")
    again = False
    with suppress(CasemateError):
        ledger.commit(
            store, job, result_digest="sha256:" + "1" * 64, blob="results/another",
            result_key=bytes(32), envelope="",
        )  # fmt: skip
        again = True
    holds(not again, "charged: a job that has its result is given another")


def _uncharged() -> None:
    """What costs no epsilon is for those rows alone whose owner says so, and as often."""
    words = "Anyone may have these rows."
    exact: dict[str, Any] = {"words": "", "metrics": (Metric(name="accuracy"),)}
    store = ledgers.open_store(SimDisk())
    try:
        policy = dataclasses.replace(ledgers.OPEN, nonprivate=words)
        training = (ledgers.push(store, "training", policy=policy),)
        for what, job in (
            ("exact metrics", exact), ("exact metrics in its words", {**exact, "words": words}),
            ("training in other words", {"words": words[:-1]}),
        ):  # fmt: skip
            taken = _taken(store, what, training, **job)
            holds(not taken, f"charged: rows to train on are used for {what} without a charge")
        holds(_taken(store, "public", training, words=words), "charged: an owner's words permit")
        policy = dataclasses.replace(ledgers.OPEN, evaluation=True, evaluations=2)
        held = (ledgers.push(store, "held out", policy=policy),)
        taken = _taken(store, "private training", held)
        holds(not taken, "charged: rows for evaluation are trained on")
        times = 0
        for name in ("1", "2", "3"):
            times += _taken(store, name, held, **exact)
            if times == 1:
                ledgers.run(store, ledger.jobs(store, ledgers.SCIENTIST.id)[0].id)
        newer = (ledgers.push(store, "held out, again", policy=policy, previous="held out"),)
        times += _taken(store, "4", newer, **exact)
        holds(times == 2, f"charged: of two exact evaluations {times} are given")
    finally:
        store.close()


def _spent(store: Store, lineage: str, whose: str = catalog.EVERYONE) -> tuple[int, ...]:
    """What was taken of a lineage at each order, and of its delta."""
    found = catalog.account(store, lineage, whose)
    return (*found.rdp_nano, found.delta_femto)


def _charged_by_whom() -> None:
    """One job on two datasets; another scientist's; a new version."""
    store = ledgers.open_store(SimDisk())
    try:
        names = ledgers.push(store, "a"), ledgers.push(store, "b", owner=ledgers.OTHER)
        first, second = (catalog.dataset(store, name).lineage for name in names)
        job = ledgers.queue(store, "on both", names)
        ledger.reserve(store, job)
        took = _spent(store, first)
        whole = (*filters.nano([ledgers.EVENT]), filters.femto(2e-9))
        right = took == _spent(store, second) == whole
        holds(right, "charged: each dataset of a job is charged, and all that the job costs")
        ledger.begin(store, job)
        again = False
        with suppress(CasemateError):
            ledger.begin(store, job)
            again = True
        holds(not again, "charged: a dataset's keys are given out twice for one charge")
        _receipt(store, job)
        newer = ledgers.push(store, "a, again", previous="a")
        twice = _taken(store, "on two versions", (names[0], newer))
        holds(not twice, "charged: a job is on two versions of one dataset, charged once")
        same = _spent(store, catalog.dataset(store, newer).lineage) == took
        holds(same, "charged: a new version of a dataset has what was spent")
        third = ledgers.push(store, "a, once more", previous="a, again")
        same = _spent(store, catalog.dataset(store, third).lineage) == took
        holds(same, "charged: so has the version after that")
        other = ledgers.ask(store, "another's", (names[0],), scientist=ledgers.OTHER)
        ledger.reserve(store, ledger.submit(store, other, ledgers.OTHER.id).id)
        both = tuple(2 * part for part in took)
        holds(_spent(store, first) == both, "charged: jobs of two scientists add up")
        for who in (ledgers.SCIENTIST, ledgers.OTHER):
            mine = _spent(store, first, who.id)
            holds(mine == took, "charged: a scientist's account is of one job")
        holds(_spent(store, second) == took, "charged: a dataset that a job does not name")
    finally:
        store.close()

"""A random life of a state with every operation that writes: people's, the server's, and the
operator's commands in any order, on several machines and from older copies of the disk."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from casemate.accounting.filters import NOTHING
from casemate.client import replay
from casemate.ledger import (
    catalog,
    consent,
    fsck,
    handover,
    ledger,
    log,
    models,
    quotes,
    recovery,
    rekey,
)
from casemate.ledger.ledger import TrainingState
from casemate.ledger.store import Store
from casemate.seams.files import load
from casemate.server import records
from casemate.spec import codec
from casemate.spec.consent import Rotated
from casemate.spec.data import Budget
from casemate.spec.errors import CasemateError, PolicyError
from casemate.spec.job import Charge, Metric
from support import sales
from support.anchors import FakeAnchor
from support.disk import SimDisk
from support.ledgers import (
    BUDGET,
    EVENT,
    KEY,
    OPEN,
    SCIENTIST,
    CountingRng,
    Witness,
    attestation,
    boot,
    commit,
    dataset_id,
    hexes,
    make_quote,
    person,
    register,
)
from support.passing import NEW, OLD, OTHER, owner, to_recovery, to_software

OWNERS = {owner(name).id: owner(name) for name in ("owner", "second", "third")}
SCIENTISTS = (SCIENTIST, person("another scientist"))
WITNESS = Witness()
WORDS = "train without privacy"
CAP = Budget(epsilon=2.5, delta=1e-5)
SMALL = replace(EVENT, steps=20)
METRICS = (Metric(name="accuracy"),)

PICK = st.integers(0, 1 << 16)
SOFTWARE = st.sampled_from([OLD, NEW, OTHER])
BUDGETS = st.sampled_from([BUDGET, replace(BUDGET, epsilon=3.0)])
COMMON = {
    "approval": st.sampled_from(["none", "none", "each-quote"]),
    "max_epsilon": st.sampled_from([None, None, 2.0]),
    "scientist_budget": st.sampled_from([None, None, CAP]),
    "resumes": st.integers(0, 3),
    "last_epoch": st.sampled_from([None, None, 1]),
    "scientists": st.sampled_from([("*",), ("*",), (SCIENTIST.id,)]),
}
WITNESSED = st.sampled_from([(), (), (WITNESS.vkey,)]).map(
    lambda keys: {"witnesses": keys, "cosignatures": len(keys)}
)
TRAINING = st.fixed_dictionaries(COMMON | {"nonprivate": st.sampled_from([None, WORDS])})
EVALUATION = st.fixed_dictionaries(COMMON | {"evaluations": st.integers(0, 3)}).map(
    lambda fields: fields | {"evaluation": True}
)
POLICY = st.builds(
    lambda fields, more: replace(OPEN, **fields | more), TRAINING | EVALUATION, WITNESSED
)
JOBS = st.sampled_from(
    [
        {},
        {},
        {"event": SMALL},
        {"event": SMALL, "metrics": METRICS},
        {"words": WORDS},
        {"words": "", "metrics": METRICS},
        {"words": "", "metrics": METRICS},
    ]
)
ASSUMED = st.sampled_from(
    [
        {},
        {"rest": True},
        {"charge": NOTHING},
        {"charge": Charge(rdp_nano=(10**8,) * 28, delta_femto=10**8, epsilon=0.0)},
    ]
)
# What may stop a start, or a command, of a state that is sound.
ELSEWHERE = ("ledger.rolled-back", "ledger.handed-over", "ledger.anchor-missing",
             "ledger.anchor-foreign")  # fmt: skip
# What no operation may answer: the state contradicts itself, or the writer its tables.
BROKEN = ("ledger.inconsistent", "ledger.corrupt", "ledger.stopped", "internal.ledger")


def tried(call, *arguments, **more):
    """What it answers; False where the writer refuses."""
    try:
        return call(*arguments, **more) or True
    except CasemateError as e:
        if e.code in BROKEN:
            raise
        return False


def serving(act):
    """A rule of people or of the server, which is started for it where that is possible."""

    @wraps(act)
    def rule_of_a_server(self, **drawn):
        if not self.up:
            self.start(measurement=None)
        if self.up:
            act(self, **drawn)

    return rule_of_a_server


def have(table):
    return precondition(lambda self: self.store.one(f"SELECT 1 FROM {table}") is not None)


def _of_purpose(found, policy, pick):
    """Mostly one that may follow."""
    if pick % 8 and found.policy.evaluation != policy.evaluation:
        most = 2 * found.policy.evaluation
        return replace(policy, evaluation=found.policy.evaluation, evaluations=most)
    return policy


class Life(RuleBasedStateMachine):
    """Things are picked by number. ``up``: a server runs; else the store lies there for the
    operator's commands, each of which opens it as another boot."""

    def __init__(self) -> None:
        super().__init__()
        self.chips = [None, FakeAnchor(name="tpm2:one"), FakeAnchor(name="tpm2:two")]
        self.disk, self.key, self.generation = SimDisk(), KEY, 0
        self.boots = self.made = 0
        self.saved = self.newest = self.note = self.due = None
        self.asked = []

    @initialize(chip=st.integers(0, 2), before=st.sampled_from(["", "", "rotate", "recover"]))
    def begin_life(self, chip, before=""):
        """``before``: a command on a state whose first start was refused."""
        self.chip = self.chips[chip]
        self._open()
        if before == "rotate":
            self.rotate()
        elif before == "recover":
            self.recover(who=0, assumed={}, stale=False)
        self.start(measurement=OLD)
        self.push(pick=0, policy=OPEN, budget=BUDGET, end="ready")
        self.push(pick=1, policy=OPEN, budget=BUDGET, end="ready")

    def _open(self):
        self.boots += 1
        self.up = False
        self.store = Store.open(self.disk, self.key, boot(self.boots), CountingRng(self.boots))

    def _command(self):
        self.store.close()
        self._open()

    def _number(self):
        self.made += 1
        return f"n{self.made}"

    def _one(self, pick, sql):
        rows = self.store.all(sql)
        return rows[pick % len(rows)]

    def _dataset(self, pick):
        """Mostly one that can be used."""
        ready = [d for d in catalog.datasets(self.store) if d.state == "ready"]
        found = (pick % 4 and ready) or catalog.datasets(self.store)
        one = found[(pick >> 2) % len(found)]
        return one.id, OWNERS[one.owner]

    # Owners.

    @rule(
        pick=PICK,
        policy=POLICY,
        budget=BUDGETS,
        end=st.sampled_from(["ready", "ready", "ready", "refused", "checking"]),
    )
    @serving
    def push(self, pick, policy, budget, end):
        made = register(self.store, self._number(), self._owner(pick).public, policy, budget)
        self._settle(made, end)

    def _owner(self, pick):
        return list(OWNERS.values())[pick % len(OWNERS)]

    @rule(pick=PICK, policy=POLICY, end=st.sampled_from(["ready", "refused"]))
    @serving
    def push_version(self, pick, policy, end):
        before, by = self._dataset(pick)
        found = catalog.dataset(self.store, before).registration
        policy = _of_purpose(found, policy, pick)
        names = {dataset_id(f"n{i}"): f"n{i}" for i in range(self.made + 1)}
        name = self._number()
        more = (by.public, policy, found.budget, names[before])
        if tried(register, self.store, name, *more):
            self._settle(dataset_id(name), end)

    def _settle(self, dataset, end):
        if end != "checking":
            catalog.settle(self.store, dataset, None if end == "ready" else "it is damaged")
        if end == "refused":
            self._drop(catalog.dataset(self.store, dataset).registration.upload)

    def _drop(self, upload):
        catalog.drop_upload(self.store, upload)

    @rule(pick=PICK)
    @serving
    def settle(self, pick):
        self._settle(self._dataset(pick)[0], "ready")

    @rule(pick=PICK, policy=POLICY)
    @serving
    def change_policy(self, pick, policy):
        name, by = self._dataset(pick)
        policy = _of_purpose(catalog.dataset(self.store, name).registration, policy, pick)
        tried(catalog.set_policy, self.store, name, by.id, policy)

    @rule(pick=PICK, epoch=st.integers(0, 2))
    @serving
    def advance_epoch(self, pick, epoch):
        name, by = self._dataset(pick)
        tried(catalog.advance_epoch, self.store, name, by.id, epoch)

    @rule(pick=PICK)
    @serving
    def revoke(self, pick):
        name, by = self._dataset(pick)
        catalog.revoke(self.store, name, by.id)
        sql = "SELECT job FROM job_datasets JOIN jobs ON id = job WHERE dataset = ? AND boot = ?"
        for (job,) in self.store.all(sql, name, self.store.boot):
            ledger.abandon(self.store, job, "failed", "policy.revoked")
        self._drop(catalog.dataset(self.store, name).registration.upload)

    @have("quotes")
    @rule(pick=PICK, verdict=st.sampled_from(["approve", "approve", "reject"]))
    @serving
    def judge(self, pick, verdict):
        self._judge(self._one(pick, "SELECT digest FROM quotes ORDER BY place")[0], verdict)

    def _judge(self, quote, verdict):
        for by in quotes.owners(self.store, quote):
            tried(quotes.judge, self.store, quote, by, verdict)

    # Scientists, and the server at their jobs.

    @rule(
        picks=st.lists(PICK, min_size=1, max_size=2),
        who=st.sampled_from(SCIENTISTS),
        kind=JOBS,
        stage=st.sampled_from([0, 2, 3, 4, 5, 6, 7, 7]),
    )
    @serving
    def train(self, picks, who, kind, stage):
        """A new job, taken some way at once."""
        used = tuple(dict.fromkeys(self._dataset(pick)[0] for pick in picks))
        made = make_quote(self.store, self._number(), used, scientist=who, **kind)
        quote = tried(quotes.add, self.store, *made, b"m" * 32)
        if quote:
            self._walk(quote, stage)

    def _walk(self, quote, stage):
        if stage > 0:
            self._judge(quote, "approve")
        whose = quotes.get(self.store, quote).quote.request.scientist
        job = stage > 1 and tried(ledger.submit, self.store, quote, whose)
        if job:
            for _ in range(stage - 2):
                self._go_on(job.id)

    def _go_on(self, id):
        """The next step of a job."""
        found = ledger.job(self.store, id)
        step = {
            "queued": ledger.reserve,
            "reserved": ledger.begin,
            "running": commit,
            "committed": self._release,
        }.get(found.state)
        WITNESS.cosign(self.store)
        if step is not None:
            tried(step, self.store, id)

    def _release(self, store, id):
        try:
            ledger.release(store, id, log.sign(store), b"sealed")
        except PolicyError as e:
            ledger.abandon(store, id, "failed", e.code, e.message)

    @have("quotes")
    @rule(pick=PICK, stage=st.integers(1, 7))
    @serving
    def submit(self, pick, stage):
        self._walk(self._one(pick, "SELECT digest FROM quotes ORDER BY place")[0], stage)

    @have("quotes")
    @rule(pick=PICK, other=st.booleans(), stage=st.integers(0, 4))
    @serving
    def quote_again(self, pick, other, stage):
        """The same quote, or another of the same model and its upload."""
        (digest,) = self._one(pick, "SELECT digest FROM quotes ORDER BY place")
        found = quotes.get(self.store, digest)
        quote, submission = found.quote, found.submission
        if other:
            request = replace(quote.request, job="job_" + hexes(self._number(), 32))
            plan = replace(quote.plan, request_digest=codec.digest(request))
            quote = replace(quote, request=request, plan=plan)
            submission = replace(submission, request=request)
        made = tried(quotes.add, self.store, quote, submission, b"m" * 32)
        if made:
            self._walk(made, stage)

    @have("jobs")
    @rule(pick=PICK)
    @serving
    def go_on(self, pick):
        self._go_on(self._one(pick, "SELECT id FROM jobs ORDER BY place")[0])

    @have("jobs")
    @rule(pick=PICK, step=st.integers(1, 19))
    @serving
    def keep_state(self, pick, step):
        (job,) = self._one(pick, "SELECT id FROM jobs ORDER BY place")
        if step < ledger.quote(self.store, job).plan.steps:
            state = TrainingState(step, f"states/{job}.{step}", b"k" * 32)
            tried(ledger.keep_state, self.store, job, state)

    @have("jobs")
    @rule(pick=PICK, state=st.sampled_from(["failed", "cancelled"]))
    @serving
    def end(self, pick, state):
        (job,) = self._one(pick, "SELECT id FROM jobs ORDER BY place")
        ledger.abandon(self.store, job, state, "job.ended")

    @rule()
    @serving
    def sweep(self):
        for upload in catalog.uploads(self.store):
            if upload.used_by is None:
                self._drop(upload.id)
        for upload in records.spent_models(self.store):
            self._drop(upload)

    @rule(late=st.booleans())
    @serving
    def cosign(self, late):
        """At once, or what a witness said a while ago."""
        if self.note is not None and late:
            tried(log.cosign, self.store, self.note, [WITNESS.verifier])
        self.note = WITNESS.sign(log.sign(self.store))

    # Sellers of models.

    @rule(pick=PICK, words=st.sampled_from(["", "10 crowns"]))
    @serving
    def sell(self, pick, words):
        """A model that is deployed, or a new one."""
        found = models.models(self.store)
        if not found or pick % 4 == 0:
            found = [sales.deploy(self.store, self._number())]
        sales.sell(self.store, model=found[pick % len(found)].id, terms=words)

    @have("models")
    @rule(pick=PICK)
    @serving
    def undeploy(self, pick):
        (name,) = self._one(pick, "SELECT id FROM models ORDER BY id")
        self._drop(models.undeploy(self.store, name).deployment.upload)

    # States that pass on.

    @rule(pick=PICK, measurement=SOFTWARE | st.just(""))
    @serving
    def agree(self, pick, measurement):
        name, by = self._dataset(pick)
        signed = to_software(self.store, name, measurement, by=by)
        tried(consent.give, self.store, signed, by.id)

    @rule(measurement=SOFTWARE, but=PICK)
    @serving
    def agree_all(self, measurement, but):
        """All owners but perhaps one."""
        for i, found in enumerate(catalog.datasets(self.store)):
            if i != but % 8:
                by = OWNERS[found.owner]
                signed = to_software(self.store, found.id, measurement, by=by)
                tried(consent.give, self.store, signed, by.id)

    @precondition(lambda self: self.asked)
    @rule(pick=PICK, ask=PICK, assumed=ASSUMED)
    def agree_late(self, pick, ask, assumed):
        """To a recovery: to the server, or by the operator's command."""
        name, by = self._dataset(pick)
        asked = self.asked[-1 - min(ask % 4, len(self.asked) - 1)]
        if not self.up:
            self._command()
        tried(consent.give, self.store, to_recovery(asked, name, by, **assumed), by.id)

    @rule(measurement=SOFTWARE | st.none())
    def start(self, measurement):
        """A state that is sound starts, but where another one has gone on. None: what is due."""
        measurement = measurement or self.due or consent.running(self.store)
        self._command()
        try:
            self.store.hold(self.chip)
            shown = attestation(self.store)
            recovery.start(self.store, shown, software="a test", measurement=measurement)
        except CasemateError as e:
            assert e.code in ELSEWHERE, e.message
        else:
            self.up, self.due = True, None

    @rule()
    def back_up(self):
        self.store.empty_wal()
        self.saved = (self.disk.snapshot(), self.key, self.generation, self.chip)

    @precondition(lambda self: self.saved)
    @rule()
    def restore(self):
        self.newest = str(log.sign(self.store))
        self.store.close()
        files, self.key, self.generation, self.chip = self.saved
        self.disk = SimDisk.of(files)
        self._open()
        self.due = None

    @rule(who=st.sampled_from([63, 63, 63, 1, 62, 0]), assumed=ASSUMED, stale=st.booleans())
    def recover(self, who, assumed, stale):
        """With the consents of some owners; now, or when the log has gone on."""
        self._command()
        asked = tried(recovery.request, self.store, self.newest if stale else None)
        asked = asked or tried(recovery.request, self.store)
        if not asked:
            return
        given = [
            to_recovery(asked, d.dataset, OWNERS[d.owner], **assumed)
            for i, d in enumerate(asked.datasets)
            if who >> (i % 6) & 1
        ]
        tried(recovery.recover, self.store, asked, given)
        self.asked.append(asked)

    @rule()
    def rotate(self):
        self._command()
        if not tried(handover.require_here, self.store):
            return
        self.store.empty_wal()
        self.store.close()
        fresh = hexes(f"key {self._number()}", 32).encode()
        rekey.copy(self.disk, self.key, fresh, rekey.NEXT)
        if tried(self._enter, fresh):
            rekey.install(self.disk, rekey.NEXT)
            self.key, self.generation = fresh, self.generation + 1
        self._open()

    def _enter(self, key):
        self.boots += 1
        number = self.boots
        copied = Store.open(self.disk, key, boot(number), CountingRng(number), folder=rekey.NEXT)
        try:
            with copied.transaction():
                copied.append("rotate", "", Rotated(generation=self.generation + 1))
            copied.empty_wal()
        finally:
            copied.close()

    @rule(measurement=SOFTWARE, drop=st.booleans(), doubt=PICK, chip=st.integers(0, 2))
    def hand_over(self, measurement, drop, doubt, chip):
        """To a machine with this chip or another. ``doubt``: an owner's trust policy that does not
        hold. Taken over, and not yet started."""
        if self.up:
            self.agree_all(measurement=measurement, but=doubt >> 3)
        self._command()
        if not tried(self.store.hold, self.chip):
            return
        rows = self.store.all("SELECT dataset, measurement FROM consents ORDER BY dataset")
        agreed = {d for i, (d, m) in enumerate(rows) if m == measurement and i != doubt % 8}
        request = "sha256:" + hexes(self._number(), 64)
        if not tried(handover.hand_over, self.store, measurement, request, agreed, drop=drop):
            return
        self._command()  # step 2 can be run again: the predecessor opens
        self.store.close()
        fresh, same = b"f" * 32, self.chip is self.chips[chip]
        handover.export(self.disk, self.key, fresh, same_anchor=same)
        data = load(self.disk, "handover/store.db")
        self.disk, self.key = SimDisk.of({"handover/store.db": data}), b"o" * 32
        rekey.copy(self.disk, fresh, self.key, rekey.NEXT, source="handover")
        rekey.install(self.disk, rekey.NEXT)
        self.chip, self.generation, self.due = self.chips[chip], 0, measurement
        self._open()

    # What must hold.

    @invariant()
    def is_sound(self):
        assert fsck.check(self.store.all).findings == []
        replay.replay(self.store.entries(0, 1 << 20))

    def teardown(self):
        assert fsck.check(self.store.all, recompute=True).findings == []
        self.store.close()

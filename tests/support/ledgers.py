"""A small world for tests of the ledger: people, datasets, quotes with true charges."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, ledger, log, quotes, recovery
from casemate.ledger.store import Link, Store
from casemate.seal import note
from casemate.seal.note import COSIGNATURE, Note, Verifier
from casemate.seams import Disk
from casemate.server import release
from casemate.server.keys import BootKeys, SignKey
from casemate.spec import codec
from casemate.spec.data import Budget, Column, DatasetKey, DatasetSchema, Policy, Registration
from casemate.spec.errors import CasemateError
from casemate.spec.evidence import Attestation, Binding, Evidence, ServerPolicy
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import (
    Charge,
    DatasetQuote,
    DatasetUse,
    Dp,
    DpEvent,
    Execution,
    InputBinding,
    JobRequest,
    Metric,
    NonPrivate,
    Plan,
    Quote,
    Sgd,
    Submission,
    TrainSpec,
)
from casemate.spec.receipt import LogEntry, ReceiptBundle

KEY = b"k" * 32
BUDGET = Budget(epsilon=4.0, delta=1e-5)
OPEN = Policy(scientists=("*",))


class CountingRng:
    """Different bytes each time, the same in each run."""

    def __init__(self, seed: int = 0) -> None:
        self.count = seed << 32

    def bytes(self, count: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(self.count.to_bytes(16, "big")).digest(count)


def hexes(text: str, count: int) -> str:
    return hashlib.shake_256(text.encode()).hexdigest(count // 2)


def boot(number: int) -> bytes:
    return hashlib.sha256(b"boot %d" % number).digest()[:16]


def person(name: str) -> PublicIdentity:
    keys = hashlib.shake_256(name.encode()).digest(32 + 1216)
    return PublicIdentity(name=name, sign_key=keys[:32], seal_key=keys[32:])


OWNER, OTHER, SCIENTIST = person("owner"), person("other owner"), person("scientist")
EVENT = DpEvent(rate=0.02, noise_multiplier=1.1, steps=200)
SCHEMA = DatasetSchema(
    name="table",
    columns=(Column(name="x", dtype="f32", low=0.0, high=1.0),),
    rows=1000,
    units=1000,
)


def open_store(disk: Disk, number: int = 1, key: bytes = KEY) -> Store:
    """Opened and started: boot ``number``."""
    store = Store.open(disk, key, boot(number), CountingRng(number))
    try:
        recovery.start(store, attestation(store), software="a test", measurement="00")
    except BaseException:
        store.close()
        raise
    return store


def attestation(store: Store) -> Attestation:
    """What a boot shows, without evidence."""
    binding = Binding(
        boot=store.boot,
        tls_spki=b"",
        hpke_key=b"",
        receipt_key=receipt_key(store.boot).public,
        log_key=log.key(store).public,
        server_policy="",
        nonce_root=b"",
    )
    evidence = Evidence(tee="simulated", simulated=True, files={})
    promises = ServerPolicy(software="", dev=True, filter="rdp/v1", release_owner="", sandbox=())
    return Attestation(
        binding=binding, policy=promises, index=0, count=1, path=(), evidence=evidence
    )


def receipt_key(boot: bytes) -> SignKey:
    """The key that signs a boot's receipts."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"receipt" + boot).digest())
    return SignKey(key.public_key().public_bytes_raw(), key.sign)


def receipt(store: Store, id: str, result_digest: str) -> str:
    """The envelope that the server would sign; nothing for a job that was never reserved."""
    found = ledger.job(store, id)
    if found.reserved is None:
        return ""
    keys = BootKeys(store.boot, None, None, receipt_key(store.boot), None)  # type: ignore[arg-type]
    stored = quotes.get(store, found.quote)
    units = {d.dataset: 1000 for d in stored.quote.datasets}
    return release.receipt(store, keys, True, stored, units=units, result_digest=result_digest)


def dataset_id(name: str) -> str:
    return "ds_" + hexes(name, 40)


def secret(name: str) -> DatasetKey:
    return DatasetKey(
        key=hashlib.sha256(b"key " + name.encode()).digest(),
        salt=hashlib.sha256(b"salt " + name.encode()).digest(),
    )


def register(
    store: Store,
    name: str = "a",
    owner: PublicIdentity = OWNER,
    policy: Policy = OPEN,
    budget: Budget = BUDGET,
    previous: str | None = None,
) -> str:
    """Enrol, upload, register: a dataset whose check is due."""
    catalog.enrol(store, owner)
    catalog.enrol(store, SCIENTIST)
    registration = Registration(
        dataset=dataset_id(name),
        owner=owner.id,
        schema=SCHEMA,
        policy=policy,
        budget=budget,
        previous=None if previous is None else dataset_id(previous),
        upload=catalog.add_upload(store, owner.id, 1000),
        sealed_key=b"sealed",
    )
    catalog.register(store, registration, secret(name))
    return registration.dataset


def push(store: Store, *given: Any, **named: Any) -> str:
    """As :func:`register`, and check: a dataset that is ready."""
    made = register(store, *given, **named)
    catalog.settle(store, made, None)
    return made


def make_quote(
    store: Store,
    job: str,
    datasets: tuple[str, ...],
    event: DpEvent = EVENT,
    scientist: PublicIdentity = SCIENTIST,
    words: str | None = None,
    delta: float = 1e-6,
    extra: float = 1e-9,
    metrics: tuple[Metric, ...] = (),
) -> tuple[Quote, Submission]:
    """What ``plan`` would make of a job with this event; not yet stored. words: without privacy.
    metrics: an evaluation."""
    found = [catalog.dataset(store, d) for d in datasets]
    private = words is None
    request = JobRequest(
        job="job_" + hexes(job, 32),
        scientist=scientist.id,
        datasets=tuple(
            DatasetUse(dataset=d.id, policy_digest=d.policy_digest, epoch=d.epoch) for d in found
        ),
        model_digest="sha256:" + hexes("model " + job, 64),
        inputs=(InputBinding(input="x", columns=("x",)),),
        train=TrainSpec(
            batch_size=20,
            steps=1 if metrics else event.steps,
            privacy=Dp(epsilon=4.0, delta=delta) if words is None else NonPrivate(words=words),
            optimizer=Sgd(lr=1.0 if metrics else 0.1),
        ),
        metrics=metrics,
    )
    plan = Plan(
        request_digest=codec.digest(request),
        model_digest=request.model_digest,
        private=private,
        units=1000,
        rate=event.rate,
        steps=event.steps,
        clip=1.0,
        normaliser=20.0,
        sensitivity=1.0,
        noise_multiplier=event.noise_multiplier if private else 0.0,
        sigma=event.noise_multiplier if private else 0.0,
        grid=1e-6,
        microbatch=8,
        microbatches=8,
        events=(event,) if private else (),
        delta_truncation=extra if private else 0.0,
        delta_sampler=extra if private else 0.0,
    )
    rdp = RdpFilter(BUDGET)
    charge = Charge(rdp_nano=(0,) * len(rdp.capacity), delta_femto=0, epsilon=0.0)
    if private:
        charge = rdp.charge(plan.events, 2 * extra, delta_shown=delta)
    quote = Quote(
        request=request,
        plan=plan,
        execution=Execution(),
        epsilon=charge.epsilon,
        delta=delta if private else 0.0,
        datasets=tuple(
            DatasetQuote(
                dataset=d.id,
                owner=d.owner,
                policy_digest=d.policy_digest,
                epoch=d.epoch,
                charge=charge,
                left_after=0.0,
                approval_needed=d.policy.approval == "each-quote",
            )
            for d in found
        ),
        seconds=1.0,
        bytes=1,
        ticks=10,
        parameters=2,
        path=("vmap",),
    )
    catalog.enrol(store, scientist)
    upload = catalog.add_upload(store, scientist.id, 500)
    return quote, Submission(request=request, upload=upload, sealed_key=b"sealed")


def ask(store: Store, job: str, datasets: tuple[str, ...], **more: object) -> str:
    """A stored quote: its digest."""
    quote, submission = make_quote(store, job, datasets, **more)  # type: ignore[arg-type]
    return quotes.add(store, quote, submission, b"m" * 32)


def queue(store: Store, job: str, datasets: tuple[str, ...], **more: object) -> str:
    """A queued job: its id."""
    return ledger.submit(store, ask(store, job, datasets, **more), SCIENTIST.id).id


def run(store: Store, id: str) -> ReceiptBundle:
    """Reserve, begin, commit and release a queued job."""
    ledger.reserve(store, id)
    ledger.begin(store, id)
    return finish(store, id)


def commit(store: Store, id: str) -> Link:
    """The commit of a running job, nothing visible yet."""
    digest = "sha256:" + hexes("result " + id, 64)
    return ledger.commit(
        store,
        id,
        result_digest=digest,
        blob=f"results/{id}",
        result_key=hashlib.sha256(id.encode()).digest(),
        envelope=receipt(store, id, digest),
    )


def finish(store: Store, id: str) -> ReceiptBundle:
    """Commit and release a running job."""
    commit(store, id)
    return ledger.release(store, id, log.sign(store), b"sealed key of " + id.encode())


def changed_policy(policy: Policy, **changes: object) -> Policy:
    return replace(policy, **changes)  # type: ignore[arg-type]


def entries(store: Store, start: int = 0) -> list[LogEntry]:
    """The log from sequence ``start`` on, decoded."""
    return [codec.decode(LogEntry, raw) for raw in store.entries(start)]


def taken(store: Store, dataset: str, scientist: str = catalog.EVERYONE) -> catalog.Account:
    """What was taken of a dataset's budget, by all or by one scientist."""
    return catalog.account(store, catalog.dataset(store, dataset).lineage, scientist)


class Witness:
    """A witness that cosigns whatever checkpoint it is shown."""

    def __init__(self, name: str = "witness.test/w") -> None:
        self.name = name
        self.key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
        self.verifier = Verifier(name, COSIGNATURE, self.key.public_key().public_bytes_raw())
        self.vkey = str(self.verifier)

    def sign(self, signed: Note) -> Note:
        """The checkpoint with this witness's line."""
        key = self.verifier.key
        return signed.add([note.cosign(signed.text, self.name, key, self.key.sign, 1)])

    def cosign(self, store: Store) -> None:
        """Cosign the store's newest checkpoint."""
        log.cosign(store, self.sign(log.sign(store)), [self.verifier])


def refused(
    code: str, store: Store, quote: str, scientist: PublicIdentity = SCIENTIST
) -> CasemateError:
    """That a quote is not taken, for this reason."""
    with pytest.raises(CasemateError) as e:
        ledger.submit(store, quote, scientist.id)
    assert e.value.code == code
    return e.value

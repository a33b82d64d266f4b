"""What owners and scientists do in a simulation, and what they take as acknowledged."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache
from typing import Any

from casemate.accounting import filters
from casemate.graph import pack
from casemate.seal import hpke, stream
from casemate.seal.identity import Identity
from casemate.spec import codec
from casemate.spec.data import Budget, DatasetInfo, DatasetKey, Policy, Registration
from casemate.spec.job import Charge, DatasetUse, JobStatus, Quote, Submission, TrainSpec
from casemate.spec.receipt import ReceiptBundle
from support.server import job_request, mlp, schema, table, train_spec
from support.simserver import CountingRng, charged, committed
from torture.model import ENDED, Violation, demand
from torture.real import RealWorld
from torture.world import Answer, World

ROWS = 16
DELTA = 1e-2
SPECS = (train_spec(2.0, 4, 8), train_spec(3.0, 6, 8))
OWNERS = ("owner", "other owner")
SCIENTISTS = ("scientist", "other scientist")


@cache
def person(name: str) -> Identity:
    return Identity.generate(name, CountingRng(int.from_bytes(name.encode()[:12], "big")))


@cache
def _model() -> pack.Packed:
    return mlp()


@cache
def _wire() -> bytes:
    return table(ROWS)


@cache
def tight(charges: tuple[tuple[Charge, int], ...], over: bool) -> Budget:
    """The budget of which these jobs (charge, how often) take all: to the last nano, or, ``over``,
    one step more than there is."""
    total = [0] * len(filters.RdpFilter.empty())
    for charge, count in charges:
        total = [t + count * c for t, c in zip(total, charge.rdp_nano, strict=True)]
    low, high = 1e-6, 100.0
    while (middle := (low + high) / 2) not in (low, high):
        if filters.fits(total, filters.capacities(middle, DELTA)):
            high = middle
        else:
            low = middle
    return Budget(epsilon=low if over else high, delta=DELTA)


class Client:
    """One identity; one request at a time, repeated with a new signature until it is answered or
    patience ends."""

    def __init__(self, world: World | RealWorld, name: str) -> None:
        self.world = world
        self.identity = person(name)
        self.model = world.model
        self.draw = world.draw

    @property
    def id(self) -> str:
        return self.identity.id

    async def ask(
        self, method: str, path: str, body: object = None, *, tries: int = 3, **headers: str
    ) -> Answer | None:
        for _ in range(tries):
            answer = await self.world.send(self.identity, method, path, body, **headers)
            if answer is not None:
                self._read(answer, method, path)
                if answer.status < 400 and self.draw.random() < self.world.careful:
                    await self.world.remember(self.identity)
                return answer
        return None

    def _read(self, answer: Answer, method: str, path: str) -> None:
        world = self.world
        world.seen[answer.code or "ok"] += 1
        if answer.status < 400:
            self.model.acknowledged += 1
        elif answer.status == 404:
            self._unknown(path)

    def _unknown(self, path: str) -> None:
        """Nothing that was acknowledged may be unknown."""
        kind, name = path.split("/")[2:4] if path.count("/") > 2 else ("", "")
        gone = {
            "datasets": name in self.model.datasets and self.model.datasets[name].owner == self.id,
            "quotes": name in self.model.quotes,
            "jobs": name in self.model.jobs,
        }
        demand(not gone.get(kind, False), f"lost: {path}")

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        assert self.world.seal_key is not None
        return hpke.seal(self.world.seal_key, plaintext, info=info)

    async def act(self) -> None:
        raise NotImplementedError

    async def live(self, actions: int) -> None:
        """Enrol, then do some things, with pauses."""
        while self.id not in self.model.enrolled:
            await self.enrol()
        for _ in range(actions):
            await self.world.pause()
            await self.act()

    async def enrol(self) -> None:
        answer = await self.ask("PUT", f"/v1/identities/{self.id}", self.identity.public)
        if answer is not None and answer.status < 400:
            self.model.enrolled.add(self.id)

    # Uploads.

    async def upload(self, sealed: bytes) -> str | None:
        """In one to three pieces; resumed at what the server has; its id, or ``None``."""
        begun = await self.ask("POST", "/v1/uploads", {"size": len(sealed)}, tries=1)
        if begun is None or begun.status >= 400:
            return None
        name = str(begun.json()["upload"])
        model = self.model
        model.offsets[name], model.owner_of[name] = 0, self.id
        piece = self.draw.choice((len(sealed), len(sealed) // 2 + 1, len(sealed) // 3 + 1))
        for _ in range(12):
            at = model.offsets[name]
            if at == len(sealed):
                return name
            part = sealed[at : at + piece]
            answer = await self.ask(
                "PATCH", f"/v1/uploads/{name}", part, tries=1, upload_offset=str(at)
            )
            if answer is None or answer.status >= 400:
                answer = await self.ask("HEAD", f"/v1/uploads/{name}")
            if answer is None:
                continue
            if answer.status >= 400:
                return None  # dropped for a newer one, or the server is failing
            now = int(answer.headers["upload-offset"])
            demand(at <= now <= len(sealed), f"{name} went from {at} to {now}")
            model.offsets[name] = now
        return None

    async def register(self, **changes: Any) -> str | None:
        """Push a dataset: its id once it is acknowledged."""
        draw, world = self.draw, self.world
        key, salt = world.token(32), world.token(32)
        digest = hashlib.sha256(b"casemate/dataset/v1\0" + salt + _wire()).hexdigest()
        name = f"ds_{digest[:40]}"
        of = schema("tiny", ROWS)
        upload = await self.upload(b"".join(stream.encrypt(key, [_wire()])))
        if upload is None or world.seal_key is None:
            return None
        policy = changes.pop("policy", None) or Policy(
            scientists=("*",), approval=draw.choice(("none", "none", "each-quote"))
        )
        policy = replace(policy, **world.policy)
        info = Registration.info(name, codec.digest(policy), codec.digest(of))
        made = Registration(
            dataset=name, owner=self.id, schema=of, policy=policy, upload=upload,
            sealed_key=self.seal(codec.encode(DatasetKey(key=key, salt=salt)), info), **changes,
        )  # fmt: skip
        self.model.used.add(upload)
        answer = await self.ask("POST", "/v1/datasets", made)
        if answer is None or answer.status >= 400:
            return None
        self.model.datasets[name] = made
        self.model.values[("policy", name)] = {codec.digest(policy)}
        self.model.epochs[name] = (0, 0)
        return name

    async def dataset(self, name: str) -> DatasetInfo | None:
        answer = await self.ask("GET", f"/v1/datasets/{name}")
        if answer is None or answer.status >= 400:
            return None
        info = codec.from_json(DatasetInfo, answer.json())
        self.saw(info)
        return info

    def saw(self, info: DatasetInfo) -> None:
        """What a listing may say, by what was acknowledged before."""
        model, name = self.model, info.dataset
        if name not in model.datasets or model.datasets[name].owner != self.id:
            return  # others may hold an older answer than the owner's newest word
        policies = model.values[("policy", name)]
        demand(info.policy_digest in policies, f"{name} has another policy than was last set")
        low, high = model.epochs[name]
        demand(low <= info.epoch <= high, f"{name} is in epoch {info.epoch}")
        if name in model.revoked:
            demand(info.state == "revoked", f"{name} was revoked and is {info.state}")
        if info.state == "revoked":
            demand(name in model.revoking, f"{name} is revoked by nobody")
        before = model.settled.get(name)
        if before == "ready" and info.state != "revoked":
            demand(info.state == "ready", f"{name} was ready and is {info.state}")
        if info.state != "checking":
            model.settled[name] = info.state


class Owner(Client):
    """``budgets``: those that new datasets get, in turn at random. As the SDK's, it remembers the
    head of the log after each of its changes that was acknowledged."""

    def __init__(self, world: World | RealWorld, name: str, budgets: tuple[Budget, ...]) -> None:
        super().__init__(world, name)
        self.budgets = budgets

    @property
    def mine(self) -> list[str]:
        return [n for n, r in self.model.datasets.items() if r.owner == self.id]

    async def live(self, actions: int) -> None:
        while self.id not in self.model.enrolled:
            await self.enrol()
        if not self.mine:
            await self.push()
        await super().live(actions)

    async def act(self) -> None:
        todo: tuple[tuple[int, Callable[[], Awaitable[object]]], ...] = (
            (2, self.push), (10, self.judge), (6, self.look), (2, self.change), (1, self.advance),
            (1, self.revoke),
        )  # fmt: skip
        (chosen,) = self.draw.choices([f for _, f in todo], [w for w, _ in todo])
        await chosen()

    async def push(self) -> None:
        previous = None
        budget = self.draw.choice(self.budgets)
        if self.mine and self.draw.random() < 0.5:
            previous = self.draw.choice(self.mine)
            budget = self.model.datasets[previous].budget
        name = await self.register(budget=budget, previous=previous)
        if name is not None:
            await self.sure(name)

    async def sure(self, name: str) -> None:
        """What was acknowledged of a dataset may no more be taken back unseen."""
        model = self.model
        told = (model.epochs[name][0], name in model.revoked)
        policies = frozenset(model.values[("policy", name)])
        if await self.world.remember(self.identity):
            model.sure[name] = (*told, policies)

    async def look(self) -> None:
        if self.mine:
            await self.dataset(self.draw.choice(self.mine))

    async def judge(self) -> None:
        answer = await self.ask("GET", "/v1/quotes")
        if answer is None or answer.status >= 400:
            return
        for shown in answer.json():
            quote = codec.from_json(Quote, shown)
            digest = codec.digest(quote)
            if not any(d.owner == self.id for d in quote.datasets):
                continue
            word = "reject" if self.draw.random() < 0.1 else "approve"
            said = self.model.say((self.id, digest), word)
            method = "POST" if word == "approve" else "DELETE"
            said(await self.ask(method, f"/v1/quotes/{digest}/approval", tries=1))

    async def change(self) -> None:
        """Another policy, which voids what was quoted."""
        if not self.mine:
            return
        name = self.draw.choice(self.mine)
        old = self.model.datasets[name].policy
        policy = replace(old, max_epsilon=50.0 + self.draw.random())
        said = self.model.say(("policy", name), codec.digest(policy))
        if name in self.model.sure:
            *told, policies = self.model.sure[name]
            self.model.sure[name] = (*told, policies | {codec.digest(policy)})
        answer = await self.ask("PUT", f"/v1/datasets/{name}/policy", policy, tries=1)
        said(answer)
        if answer is not None and answer.status < 400:
            await self.sure(name)

    async def advance(self) -> None:
        if not self.mine:
            return
        name = self.draw.choice(self.mine)
        low, high = self.model.epochs[name]
        wanted = high + 1
        self.model.epochs[name] = (low, wanted)
        answer = await self.ask("POST", f"/v1/datasets/{name}/epoch", {"epoch": wanted}, tries=1)
        if answer is not None and answer.status < 400:
            self.model.epochs[name] = (wanted, wanted)
            await self.sure(name)

    async def revoke(self) -> None:
        if len(self.mine) < 2:
            return
        name = self.draw.choice(self.mine)
        self.model.revoking.add(name)
        answer = await self.ask("DELETE", f"/v1/datasets/{name}")
        if answer is not None and answer.status < 400:
            self.model.revoked.add(name)
            await self.sure(name)


class Scientist(Client):
    """``hasty``: submits all that it has quotes for, at once and first of all."""

    def __init__(self, world: World | RealWorld, name: str, *, hasty: bool = False) -> None:
        super().__init__(world, name)
        self.hasty = hasty

    async def live(self, actions: int) -> None:
        if self.hasty and self.id in self.model.enrolled:
            waiting = self.own_quotes
            for digest in self.draw.sample(waiting, len(waiting)):
                await self.submit(digest)
            await self.watch()
        await super().live(actions)

    @property
    def own_quotes(self) -> list[str]:
        return [d for d, q in self.model.quotes.items() if q.request.scientist == self.id]

    @property
    def own_jobs(self) -> list[str]:
        quotes = self.model.quotes
        return [
            j for j in self.model.jobs
            if quotes[self.model.quote_of[j]].request.scientist == self.id
        ]  # fmt: skip

    async def act(self) -> None:
        todo: tuple[tuple[int, Callable[[], Awaitable[object]]], ...] = (
            (4, self.quote), (12, self.submit), (3, self.watch), (1, self.cancel), (3, self.fetch),
            (1, self.reuse),
        )  # fmt: skip
        (chosen,) = self.draw.choices([f for _, f in todo], [w for w, _ in todo])
        await chosen()

    async def ready(self) -> list[DatasetInfo]:
        answer = await self.ask("GET", "/v1/datasets")
        if answer is None or answer.status >= 400:
            return []
        infos = [codec.from_json(DatasetInfo, d) for d in answer.json()]
        for info in infos:
            self.saw(info)
        return [i for i in infos if i.state == "ready" and i.dataset in self.model.datasets]

    async def quote(
        self, train: TrainSpec | None = None, job: str | None = None, on: str | None = None
    ) -> str | None:
        """A new quote over one or two datasets: its digest."""
        found = [d for d in await self.ready() if on is None or d.dataset == on]
        if not found:
            return None
        chosen = self.draw.sample(found, min(len(found), self.draw.choice((1, 2))))
        job = job or "job_" + self.world.token(16).hex()
        request = job_request(self.id, chosen, _model(), train or self.draw.choice(SPECS), job)
        key = self.world.token(32)
        upload = await self.upload(b"".join(stream.encrypt(key, [_model().data])))
        if upload is None or self.world.seal_key is None:
            return None
        sealed = self.seal(key, Submission.info(codec.digest(request)))
        self.model.used.add(upload)
        made = Submission(request=request, upload=upload, sealed_key=sealed)
        answer = await self.ask("POST", "/v1/quotes", made, tries=1)
        if answer is None or answer.status >= 400:
            return None
        quote = codec.from_json(Quote, answer.json())
        digest = codec.digest(quote)
        self.model.quotes[digest] = quote
        self.model.request_of[codec.digest(quote.request)] = quote.request.job
        return digest

    async def submit(self, digest: str | None = None) -> None:
        if digest is None:
            if not self.own_quotes:
                return
            digest = self.draw.choice(self.own_quotes)
        quote = self.model.quotes[digest]
        job = quote.request.job
        known = self.model.quote_of.setdefault(job, digest)
        answer = await self.ask("POST", "/v1/jobs", {"quote": digest})
        if answer is None:
            return
        if answer.status < 400:
            same = self.model.quotes[known].request == quote.request
            demand(same, f"{job} was taken with two different requests")
            self.saw_status(answer)
        elif answer.code == "budget.exhausted" and job not in self.model.jobs:
            now = self.world.look(charged)
            fits = now is not None and self.model.might_fit(quote, now)
            demand(not fits, f"{job} fits and was refused")

    async def reuse(self) -> None:
        """The same job id with another request is refused."""
        if not self.own_jobs:
            return
        job = self.draw.choice(self.own_jobs)
        before = self.model.quotes[self.model.quote_of[job]]
        other = next(s for s in SPECS if s != before.request.train)
        digest = await self.quote(train=other, job=job)
        if digest is None:
            return
        answer = await self.ask("POST", "/v1/jobs", {"quote": digest})
        if answer is not None:
            demand(answer.status >= 400, f"{job} was taken with two different requests")

    def saw_status(self, answer: Answer) -> JobStatus:
        status = codec.from_json(JobStatus, answer.json())
        self.model.saw_state(status.job, status.state, status.error)
        return status

    async def watch(self) -> None:
        if self.own_jobs:
            job = self.draw.choice(self.own_jobs)
            answer = await self.ask("GET", f"/v1/jobs/{job}")
            if answer is not None and answer.status < 400:
                self.saw_status(answer)

    async def cancel(self) -> None:
        if self.own_jobs:
            answer = await self.ask("DELETE", f"/v1/jobs/{self.draw.choice(self.own_jobs)}")
            if answer is not None and answer.status < 400:
                status = self.saw_status(answer)
                # One that is committed waits for its release alone.
                fixed = self.world.look(committed, status.job) is not False
                demand(status.state in ENDED or fixed, "a cancelled job goes on")

    async def fetch(self) -> None:
        """Result and receipt of every job that is done; nothing of one that is not."""
        for job in self.own_jobs:
            result = await self.ask("GET", f"/v1/jobs/{job}/result")
            receipt = await self.ask("GET", f"/v1/jobs/{job}/receipt")
            for answer in (result, receipt):
                if answer is None or answer.status >= 400:
                    done = self.model.jobs[job] == "done"
                    code = "" if answer is None else answer.code
                    demand(not (done and code == "job.not-done"), f"the result of {job} is gone")
                    continue
                logged = self.world.look(committed, job)
                demand(logged is not False, f"{job} shows a result without a commit")
                self.world.check_witnessed(job, ("commit",))
            if result is not None and result.status < 400:
                self.model.saw_result(job, result.body)
            if receipt is not None and receipt.status < 400:
                self.model.saw_receipt(job, receipt.body)
                self._belongs(job)

    def _belongs(self, job: str) -> None:
        """The result opens with the scientist's key and is what the receipt names."""
        result, bundle = self.model.results.get(job), self.model.receipts[job]
        if result is None:
            return
        envelope = codec.decode(ReceiptBundle, bundle).envelope
        digest = receipt_digest(envelope)
        cut = 4 + int.from_bytes(result[:4], "big")
        info = f"casemate/result-key/v1|{job}|{digest}".encode()
        key = self.identity.open(result[4:cut], info=info)
        plain = b"".join(stream.decrypt(key, [result[cut:]]))
        demand("sha256:" + hashlib.sha256(plain).hexdigest() == digest, f"{job}: another result")


def receipt_digest(envelope: str) -> str:
    """The result's digest that a DSSE envelope names, its signature not looked at."""
    import base64
    import json

    payload = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return "sha256:" + str(payload["subject"][0]["digest"]["sha256"])


__all__ = ["Client", "DatasetUse", "Owner", "Scientist", "Violation", "person", "tight"]

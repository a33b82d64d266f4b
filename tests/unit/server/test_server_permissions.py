"""Every route of the table as every kind of caller, against the table of expected answers.

A route without a row here fails, so that nobody adds one without saying who may use it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import httpx
import pytest

from casemate.client import consents
from casemate.client.sales import sign
from casemate.ledger import catalog, ledger, log, quotes, sales
from casemate.seal import checkpoint, note, tiles
from casemate.seal.identity import Identity
from casemate.server.permissions import RULES, WITHOUT_RESOURCE
from casemate.server.routes import ROUTES
from casemate.spec import codec, merkle
from casemate.spec.data import Policy
from casemate.spec.job import Quote
from casemate.spec.receipt import LogEntry
from casemate.spec.sale import Sale
from casemate.spec.serving import ServePolicy
from support.desk import Desk, Person, call, deploy, deployment, run_async
from support.disk import SimDisk

CALLERS = ("unsigned", "outsider", "stranger", "scientist", "other-owner", "owner")


# Status by caller. outsider: has keys, never enrolled. stranger: enrolled, no part in anything.
# scientist: of the quote and job, admitted to the dataset. other-owner: owns another dataset.
# 200 stands for 2xx.
def _row(*statuses: int) -> dict[str, int]:
    return dict(zip(CALLERS, statuses, strict=True))


PUBLIC = _row(200, 200, 200, 200, 200, 200)
SIGNED = _row(401, 401, 200, 200, 200, 200)
OWNER = _row(401, 401, 404, 403, 404, 200)
PARTY = _row(401, 401, 404, 200, 404, 200)
SCIENTIST = _row(401, 401, 404, 200, 404, 403)
UPLOADER = _row(401, 401, 404, 404, 404, 200)

EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    ("GET", "/v1/health"): PUBLIC,
    ("GET", "/v1/attestation"): PUBLIC,
    ("GET", "/openapi.json"): PUBLIC,
    ("GET", "/metrics"): PUBLIC,
    # Each caller enrols the owner's identity, which only the owner can sign for.
    ("PUT", "/v1/identities/{id}"): _row(401, 401, 401, 401, 401, 200),
    ("POST", "/v1/uploads"): SIGNED,
    ("HEAD", "/v1/uploads/{id}"): UPLOADER,
    ("PATCH", "/v1/uploads/{id}"): UPLOADER,
    # A registration signed by its owner alone; theirs fails later: there is no such upload.
    ("POST", "/v1/datasets"): _row(401, 401, 403, 403, 403, 404),
    ("GET", "/v1/datasets"): SIGNED,
    ("GET", "/v1/datasets/{id}"): PARTY,
    ("GET", "/v1/datasets/{id}/leaderboard"): PARTY,
    ("PUT", "/v1/datasets/{id}/policy"): OWNER,
    ("POST", "/v1/datasets/{id}/epoch"): OWNER,
    ("POST", "/v1/datasets/{id}/consents"): OWNER,
    ("DELETE", "/v1/datasets/{id}"): OWNER,
    # A submission in the scientist's name; theirs fails later: its upload is gone.
    ("POST", "/v1/quotes"): _row(401, 401, 403, 404, 403, 403),
    ("GET", "/v1/quotes"): SIGNED,
    ("GET", "/v1/quotes/{digest}"): PARTY,
    ("POST", "/v1/quotes/{digest}/approval"): OWNER,
    ("DELETE", "/v1/quotes/{digest}/approval"): OWNER,
    ("POST", "/v1/jobs"): _row(401, 401, 404, 200, 404, 404),
    ("GET", "/v1/jobs"): SIGNED,
    ("GET", "/v1/jobs/{id}"): PARTY,
    ("DELETE", "/v1/jobs/{id}"): SCIENTIST,
    ("GET", "/v1/jobs/{id}/result"): SCIENTIST,
    ("GET", "/v1/jobs/{id}/receipt"): PARTY,
    # A deployment signed by its owner alone; theirs fails later: it is sealed to another boot.
    ("POST", "/v1/models"): _row(401, 401, 403, 403, 403, 400),
    ("GET", "/v1/models"): SIGNED,
    ("GET", "/v1/models/{id}"): PARTY,
    ("PUT", "/v1/models/{id}/policy"): OWNER,
    ("DELETE", "/v1/models/{id}"): OWNER,
    # The scientist may call, and seals to another boot too.
    ("POST", "/v1/models/{id}/predictions"): _row(401, 401, 404, 400, 404, 403),
    ("POST", "/v1/models/{id}/sales"): OWNER,
    ("GET", "/v1/sales"): SIGNED,
    # Sold by the owner to the scientist.
    ("GET", "/v1/sales/{id}/model"): SCIENTIST,
    ("GET", "/v1/sales/{id}/receipt"): PARTY,
    ("GET", "/log/checkpoint"): PUBLIC,
    ("GET", "/log/tile/{path}"): PUBLIC,
    ("GET", "/log/attestation/{hex}"): PUBLIC,
}


@dataclass
class World:
    desk: Desk
    people: dict[str, Person]
    ids: dict[str, str]
    bodies: dict[tuple[str, str], Any]

    def path(self, route: str) -> str:
        thing = route.split("/")[2] if route.startswith("/v1/") else ""
        filled = route.replace("{path}", "0/000.p/3").replace("{hex}", self.ids["attestation"])
        filled = filled.replace("{id}", self.ids.get(thing, "")).replace(
            "{digest}", self.ids["quotes"]
        )
        return filled + ("?nonce=" + "ab" * 32 if thing == "attestation" else "")


@cache
def _built() -> tuple[dict[str, bytes], dict[str, Identity], dict[str, str], dict[Any, Any]]:
    """A world made once: the disk that its server left, who is in it, and what."""

    async def build() -> tuple[dict[str, Identity], dict[str, str], dict[Any, Any]]:
        async with desk:
            people = {name: await desk.person(name) for name in CALLERS[2:]}
            owner, scientist = people["owner"], people["scientist"]
            other = people["other-owner"]
            await other.push(policy=Policy(scientists=(other.id,)))
            policy = Policy(scientists=(scientist.id,))
            info = await owner.push(policy=policy)
            registration = replace(await owner.registration(policy=policy), upload="up_" + "0" * 32)
            submission = await scientist.submission([info])
            quote = codec.from_json(Quote, await scientist.ask("POST", "/v1/quotes", submission))
            job = (await scientist.submit(quote)).job
            await scientist.finished(job)
            serve = ServePolicy(callers=(scientist.id,))
            deployed = await deploy(owner, serve)
            sale = Sale(
                origin=log.key(desk.service.store).origin, model=deployed.model,
                model_digest=deployed.model_digest, seller=owner.id, buyer=scientist.id,
            )  # fmt: skip
            offer = {"envelope": sign(sale, owner.identity)}
            await owner.ask("POST", f"/v1/models/{sale.model}/sales", offer)
            ids = {
                "models": deployed.model,
                "sales": sale.id,
                "identities": owner.id,
                "uploads": (await owner.ask("POST", "/v1/uploads", {"size": 100}))["upload"],
                "datasets": info.dataset,
                "quotes": codec.digest(quote),
                "jobs": job,
                "attestation": codec.digest(desk.service.boot_attestation)[7:],
            }
            bodies = {
                ("PUT", "/v1/identities/{id}"): owner.identity.public,
                ("POST", "/v1/uploads"): {"size": 10},
                ("PATCH", "/v1/uploads/{id}"): b"0123456789",
                ("POST", "/v1/datasets"): registration,
                ("PUT", "/v1/datasets/{id}/policy"): policy,
                ("POST", "/v1/datasets/{id}/epoch"): {"epoch": 0},
                ("POST", "/v1/datasets/{id}/consents"): {
                    "envelope": consents.to_software(
                        log.key(desk.service.store).origin,
                        info.dataset,
                        "ab" * 48,
                        "simulated",
                        owner.identity,
                    )
                },
                ("POST", "/v1/models"): await deployment(owner, serve, bytes(32)),
                ("PUT", "/v1/models/{id}/policy"): serve,
                ("POST", "/v1/models/{id}/predictions"): call(scientist, deployed.model).body,
                ("POST", "/v1/models/{id}/sales"): offer,
                ("POST", "/v1/quotes"): submission,
                ("POST", "/v1/jobs"): {"quote": ids["quotes"]},
            }
            identities = {name: person.identity for name, person in people.items()}
            return identities | {"outsider": Identity.generate("outsider")}, ids, bodies

    desk = Desk()
    identities, ids, bodies = run_async(build())
    return desk.disk.snapshot(), identities, ids, bodies


def _disk() -> SimDisk:
    return SimDisk.of(_built()[0])


def _world(desk: Desk) -> World:
    _, identities, ids, bodies = _built()
    people = {name: Person(desk, identity) for name, identity in identities.items()}
    return World(desk, people, ids, bodies)


async def _ask(world: World, caller: str, method: str, route: str, path: str) -> httpx.Response:
    body = world.bodies.get((method, route))
    headers = {"upload-offset": "0"} if method == "PATCH" else {}
    if caller == "unsigned":
        data = body if isinstance(body, bytes) else b"" if body is None else codec.encode(body)
        return await world.desk.http.request(method, path, content=data, headers=headers)
    return await world.people[caller].send(method, path, body, headers)


def test_every_route_has_a_row_and_a_known_permission() -> None:
    assert {(r.method, r.path) for r in ROUTES} == set(EXPECTED)
    assert {r.permission for r in ROUTES} <= set(RULES) | WITHOUT_RESOURCE
    assert len({r.name for r in ROUTES}) == len(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_every_route_as_every_caller(route: Any) -> None:
    """Each in a world of its own, from the least to the most entitled, so that a change that
    slipped through would show in what the next one sees."""

    _built()  # outside of the event loop

    async def work() -> None:
        async with Desk(_disk()) as desk:
            world = _world(desk)
            found = {}
            for caller in CALLERS:
                path = world.path(route.path)
                answer = await _ask(world, caller, route.method, route.path, path)
                found[caller] = 200 if answer.is_success else answer.status_code
            assert found == EXPECTED[(route.method, route.path)]

    run_async(work())


def test_a_strangers_answer_is_that_for_what_does_not_exist() -> None:
    """Byte for byte, but for the name that the caller sent."""

    _built()  # outside of the event loop

    async def work() -> None:
        async with Desk(_disk()) as desk:
            world = _world(desk)
            nothing = {
                "uploads": "up_" + "0" * 32,
                "datasets": "ds_" + "0" * 40,
                "quotes": "sha256:" + "0" * 64,
                "jobs": "job_" + "0" * 32,
                "models": "model_" + "0" * 32,
                "sales": "sale_" + "0" * 32,
            }
            for route in ROUTES:
                thing = route.path.split("/")[2] if route.path.startswith("/v1/") else ""
                if thing not in nothing or "{" not in route.path:
                    continue
                real = world.path(route.path)
                absent = real.replace(world.ids[thing], nothing[thing])
                for caller in ("stranger", "other-owner"):
                    one = await _ask(world, caller, route.method, route.path, real)
                    two = await _ask(world, caller, route.method, route.path, absent)
                    assert one.status_code == two.status_code == 404
                    assert one.text.replace(world.ids[thing], "X") == two.text.replace(
                        nothing[thing], "X"
                    )

    run_async(work())


def test_what_a_submission_and_a_job_name_does_not_leak_either() -> None:
    _built()  # outside of the event loop

    async def work() -> None:
        async with Desk(_disk()) as desk:
            world = _world(desk)
            stranger, owner = world.people["stranger"], world.people["owner"]
            info = await owner.dataset(world.ids["datasets"])
            absent = replace(info, dataset="ds_" + "0" * 40)
            texts = []
            for shown in (info, absent):
                made = await stranger.submission([shown])
                answer = await stranger.send("POST", "/v1/quotes", made)
                assert answer.status_code == 404
                texts.append(answer.text.replace(shown.dataset, "X"))
            for digest in (world.ids["quotes"], "sha256:" + "0" * 64):
                answer = await stranger.send("POST", "/v1/jobs", {"quote": digest})
                assert answer.status_code == 404
                texts.append(answer.text.replace(digest, "X"))
            assert texts[0] == texts[1] and texts[2] == texts[3]

    run_async(work())


def test_lists_hold_only_ones_own() -> None:
    _built()  # outside of the event loop

    async def work() -> None:
        async with Desk(_disk()) as desk:
            world = _world(desk)
            things = {"datasets": "dataset", "jobs": "job", "models": "model", "sales": "id"}
            for path, thing in things.items():
                counts = {
                    name: [x[thing] for x in await person.ask("GET", f"/v1/{path}")]
                    for name, person in world.people.items()
                    if name != "outsider"
                }
                assert counts["stranger"] == []
                assert world.ids[path] in counts["owner"]
                assert world.ids[path] in counts["scientist"]
                assert world.ids[path] not in counts["other-owner"]
            assert await world.people["stranger"].ask("GET", "/v1/quotes") == []

    run_async(work())


def test_the_log_is_whole_for_anyone_and_names_nobody() -> None:
    """No digest of a schema, policy, quote or result, and no name, stands in what all may read."""
    _built()  # outside of the event loop

    async def work() -> None:
        async with Desk(_disk()) as desk:
            world, store = _world(desk), desk.service.store
            text = (await desk.http.get("/log/checkpoint")).text
            head = checkpoint.read(note.parse(text).text)
            (bundle,) = (t for t in tiles.tiles(head.size) if t.level == tiles.ENTRIES)
            raw = (await desk.http.get(f"/log/{bundle.path}")).content
            leaves = tiles.unbundle(bundle, raw)
            assert merkle.root(len(leaves), merkle.tree(leaves)) == head.root
            kinds = {codec.decode(LogEntry, leaf).kind for leaf in leaves}
            assert kinds >= {"start", "identity", "register", "reserve", "commit", "grant"}
            job = ledger.job(store, world.ids["jobs"])
            stored = quotes.get(store, job.quote)
            dataset = catalog.dataset(store, world.ids["datasets"])
            digests = {
                codec.digest(thing)
                for thing in (
                    dataset.registration.schema, dataset.policy, dataset.registration,
                    stored.quote, stored.quote.plan, stored.quote.request,
                )
            }  # fmt: skip
            sale = sales.sold(store, world.ids["sales"]).sale
            digests |= {codec.digest(sale), sale.model_digest}
            digests |= {str(job.result_digest), stored.quote.request.model_digest}
            body = b"".join(codec.decode(LogEntry, leaf).body for leaf in leaves)
            for digest in digests:
                assert digest[7:].encode() not in body
            for name in (b"tiny", sale.model.encode(), sale.id.encode()):  # a dataset, a model
                assert name not in body
            for path in (
                "tile/0/001",
                "tile/0/000.p/255",
                "tile/1/000.p/1",
                "attestation/" + "0" * 64,
            ):
                assert (await desk.http.get(f"/log/{path}")).status_code == 404
            for path in ("tile/0/0", "tile/x", "tile/0/000.p/256", "tile/00/000"):
                assert (await desk.http.get(f"/log/{path}")).status_code == 400

    run_async(work())


def test_a_route_that_forgets_its_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded bug: the owner's rule admits scientists; the walk above must see it."""
    from casemate.server import permissions

    loose = permissions.Rule(permissions.dataset_roles, frozenset({"owner", "scientist"}))
    monkeypatch.setitem(permissions.RULES, "dataset-owner", loose)
    policy = next(r for r in ROUTES if r.path.endswith("/policy"))
    with pytest.raises(AssertionError):
        test_every_route_as_every_caller(policy)

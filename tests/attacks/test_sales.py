"""Attacks on sales: a buyer who wants another's model, a seller of what is another's, a sale used
again for another buyer, model or log, receipts and sealed bytes that were swapped or touched, a
model that is gone or frozen."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import casemate as cm
from casemate.attest.trust import Trust
from casemate.client import sales as client
from casemate.graph import pack
from casemate.ledger import log
from casemate.seal import dsse
from casemate.spec import codec
from casemate.spec.errors import CasemateError
from casemate.spec.receipt import ReceiptBundle
from casemate.spec.sale import SALE_TYPE, Sale, SaleInfo
from casemate.spec.serving import Deployment, ModelInfo, ServePolicy
from support.desk import Desk, Person, denied, deploy, run_async
from support.markers import Markers
from support.server import RunningServer, start

OPEN = ServePolicy(callers=())
WEIGHT = [[1.25, -2.5, 3.75], [0.5, 1e-3, 7.0]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start(tmp_path_factory.mktemp("sales") / "state", models=3) as server:
        yield server


def person(server: RunningServer, name: str) -> cm.Enclave:
    return cm.connect(
        server.url, trust=server.trust, identity=cm.Identity.generate(name), memory=None
    )


@pytest.fixture(scope="module")
def seller(running: RunningServer) -> cm.Enclave:
    return person(running, "seller")


@pytest.fixture(scope="module")
def buyer(running: RunningServer) -> cm.Enclave:
    return person(running, "buyer")


def module() -> nn.Module:
    made = nn.Linear(3, 2)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(WEIGHT))
    return made


@pytest.fixture(scope="module")
def model(seller: cm.Enclave) -> str:
    return seller.deploy(module(), cm.ServePolicy([]), example=torch.zeros(1, 3)).id


@pytest.fixture(scope="module")
def sale(seller: cm.Enclave, buyer: cm.Enclave, model: str) -> str:
    return seller.models.grant(model, buyer.identity.id, "10 crowns").id


def refused(work: Any, *given: Any) -> CasemateError:
    with pytest.raises(CasemateError) as error:
        work(*given)
    return error.value


def test_the_buyer_has_the_very_model(buyer: cm.Enclave, sale: str) -> None:
    graph, weights = pack.unpack(buyer.models.pull(sale).data)
    found = {name: bytes(view) for name, (_, view) in weights.items()}
    assert graph.outputs and np.float32(WEIGHT).tobytes() in found.values()


def test_nobody_else_pulls_it_or_learns_of_it(
    running: RunningServer, seller: cm.Enclave, buyer: cm.Enclave, model: str, sale: str
) -> None:
    thief = person(running, "thief")
    for work in (thief.models.pull, thief.models.receipt):
        error = refused(work, sale)
        assert (error.code, error.status) == ("model.unknown-sale", 404)
    assert not thief.models.sales()
    mine = seller.models.grant(model, thief.identity.id).id  # with a purchase of their own
    assert refused(thief.models.pull, sale).code == "model.unknown-sale"
    assert refused(buyer.models.pull, mine).code == "model.unknown-sale"
    error = refused(seller.models.pull, sale)
    assert (error.code, error.status) == ("auth.forbidden", 403)


def test_one_sells_ones_own_alone(
    running: RunningServer, buyer: cm.Enclave, seller: cm.Enclave, model: str
) -> None:
    """A caller, who may see the model, and a buyer, who has it, are no owners."""
    caller = person(running, "caller")
    policy = cm.ServePolicy([caller.identity.id])
    seller.models.set_policy(model, policy)
    error = refused(caller.models.grant, model, caller.identity.id)
    assert (error.code, error.status) == ("auth.forbidden", 403)
    seller.models.set_policy(model, cm.ServePolicy([]))
    assert refused(caller.models.grant, model, caller.identity.id).code == "model.unknown"
    body = {"envelope": client.sign(offer_of(buyer, seller, model), buyer.identity)}
    path = f"/v1/models/{model}/sales"
    assert refused(buyer._connection.request, "POST", path, body).code == "model.unknown"


def offer_of(buyer: cm.Enclave, seller: cm.Enclave, model: str, **changes: Any) -> Sale:
    info = seller.models.show(model).info
    (any_sale,) = [s.sale for s in seller.models.sales() if s.sale.model == model][:1]
    made = dataclasses.replace(any_sale, seller=info.owner, buyer=buyer.identity.id)
    return dataclasses.replace(made, **changes)


def changed(envelope: str, **fields: str) -> str:
    """The same signature over other words."""
    whole = json.loads(envelope)
    said = json.loads(base64.b64decode(whole["payload"])) | fields
    payload = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    whole["payload"] = base64.b64encode(payload).decode()
    return json.dumps(whole, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize("field", ["buyer", "terms", "model", "origin"])
def test_what_the_seller_signed_cannot_be_changed_on_the_way(
    running: RunningServer, seller: cm.Enclave, buyer: cm.Enclave, model: str, sale: str, field: str
) -> None:
    thief = person(running, "thief")
    other = {
        "buyer": thief.identity.id,
        "terms": "1 crown",
        "model": "model_" + "0" * 32,
        "origin": "casemate.dev/log/" + "0" * 32,
    }[field]
    signed = client.sign(offer_of(buyer, seller, model), seller.identity)
    body = {"envelope": changed(signed, **{field: other})}
    path = f"/v1/models/{model}/sales"
    before = list(seller.models.sales())
    assert refused(seller._connection.request, "POST", path, body).code == "policy.sale"
    assert list(seller.models.sales()) == before and not thief.models.sales()


def test_a_sale_serves_for_no_other_model(
    seller: cm.Enclave, buyer: cm.Enclave, model: str
) -> None:
    other = seller.deploy(module(), cm.ServePolicy([]), example=torch.zeros(1, 3)).id
    signed = client.sign(offer_of(buyer, seller, model), seller.identity)
    path = f"/v1/models/{other}/sales"
    error = refused(seller._connection.request, "POST", path, {"envelope": signed})
    assert (error.code, error.where) == ("policy.sale", "model")
    seller.models.undeploy(other)


def test_a_receipt_of_another_sale_does_not_pass_for_this_one(
    seller: cm.Enclave, buyer: cm.Enclave, model: str, sale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server that swaps what it answers, and by a party that joins halves of two receipts."""
    other = seller.models.grant(model, buyer.identity.id, "1 crown").id
    mine, theirs = (buyer.models.receipt(s).bundle for s in (sale, other))
    trust = buyer._trust
    for part in ("envelope", "entry", "salt", "proof"):
        mixed = dataclasses.replace(mine, **{part: getattr(theirs, part)})
        assert refused(lambda b=mixed: client.verify_sale(b, trust=trust)).family == "receipt"
    real = buyer._connection.request

    def swapped(method: str, path: str, *given: Any, **more: Any) -> Any:
        return real(method, path.replace(sale, other), *given, **more)

    monkeypatch.setattr(buyer._connection, "request", swapped)
    assert refused(buyer.models.receipt, sale).code == "receipt.sale"
    assert refused(buyer.models.pull, sale).code == "receipt.sale"


def test_the_key_of_one_sale_opens_no_other(
    seller: cm.Enclave, buyer: cm.Enclave, model: str, sale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = seller.models.grant(model, buyer.identity.id, "2 crowns").id
    real = buyer._connection.download

    def swapped(path: str, *given: Any, **more: Any) -> Any:
        return real(path.replace(sale, other), *given, **more)

    monkeypatch.setattr(buyer._connection, "download", swapped)
    assert refused(buyer.models.pull, sale).code == "format.sealed"


def test_a_model_that_is_gone_is_neither_sold_nor_pulled(
    seller: cm.Enclave, buyer: cm.Enclave
) -> None:
    mine = seller.deploy(module(), cm.ServePolicy([]), example=torch.zeros(1, 3)).id
    made = seller.models.grant(mine, buyer.identity.id)
    seller.models.undeploy(mine)
    assert refused(seller.models.grant, mine, buyer.identity.id).code == "model.unknown"
    path, body = f"/v1/models/{mine}/sales", client.sign(made.info.sale, seller.identity)
    error = refused(seller._connection.request, "POST", path, {"envelope": body})
    assert error.code == "model.unknown"
    assert refused(buyer.models.pull, made.id).code == "model.sale-ended"
    assert buyer.models.receipt(made.id).receipt.sale == made.info.sale


def places(server: RunningServer) -> dict[str, bytes]:
    found = {str(p): p.read_bytes() for p in server.state.rglob("*") if p.is_file()}
    return found | {"log": server.log.read_bytes()}


def test_touched_bytes_are_not_taken_and_nothing_lies_open(tmp_path: Path) -> None:
    markers = Markers()
    weight = [float(x) for x in np.random.default_rng(7).normal(size=24).astype(np.float32)]
    made = nn.Linear(12, 2)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight).reshape(2, 12))
    markers.add_floats("a weight", weight)
    with start(tmp_path / "state") as server:
        seller, buyer = person(server, "seller"), person(server, "buyer")
        model = seller.deploy(made, cm.ServePolicy([]), example=torch.zeros(1, 12)).id
        sale = seller.models.grant(model, buyer.identity.id, "very private terms").id
        packed = buyer.models.pull(sale).data
        assert markers.found({"a leak": packed})  # the search would see it
        assert markers.found(places(server)) == []
        for place in places(server).values():
            assert b"very private terms" not in place and sale.encode() not in place
        (blob,) = [
            p for p in (server.state / "uploads").iterdir() if not p.name.endswith(".offset")
        ]
        data = bytearray(blob.read_bytes())
        for at in (0, len(data) // 2, len(data) - 1):
            data[at] ^= 1
            blob.write_bytes(data)
            assert refused(buyer.models.pull, sale).code.startswith("format.stream")
            data[at] ^= 1
        blob.write_bytes(data[:-40])
        assert refused(buyer.models.pull, sale).family in ("format", "net")
        blob.write_bytes(data)
        assert buyer.models.pull(sale).data == packed


# Two servers with the same model, and one whose software has changed.


def offer(seller: Person, info: ModelInfo, buyer: str) -> Sale:
    return Sale(
        origin=log.key(seller.desk.service.store).origin, model=info.model,
        model_digest=info.model_digest, seller=seller.id, buyer=buyer,
    )  # fmt: skip


async def grant(seller: Person, model: str, envelope: str) -> SaleInfo:
    answer = await seller.ask("POST", f"/v1/models/{model}/sales", {"envelope": envelope})
    return codec.from_json(SaleInfo, answer)


def test_a_sale_serves_for_no_other_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same people have the same model, by its very id, in two enclaves."""

    async def work() -> None:
        name = "model_" + os.urandom(16).hex()
        monkeypatch.setattr(Deployment, "id", staticmethod(lambda *_: name))
        async with Desk() as here, Desk() as there:
            one, two = await here.person("seller"), await here.person("buyer")
            sellers = [Person(desk, one.identity) for desk in (here, there)]
            await sellers[1].enrol()
            await Person(there, two.identity).enrol()
            info, other = [await deploy(s, OPEN) for s in sellers]
            assert (info.model, info.model_digest) == (other.model, other.model_digest)
            signed = client.sign(offer(sellers[0], info, two.id), one.identity)
            assert (await grant(sellers[0], name, signed)).state == "open"
            assert await denied(grant(sellers[1], name, signed)) == "policy.sale"

    run_async(work())


def test_a_frozen_model_is_not_sold() -> None:
    """Whoever starts other software on the state cannot have it hand out keys, though the owner's
    signature on the sale is from before."""

    async def work() -> None:
        async with Desk() as desk:
            seller, buyer = await desk.person("seller"), await desk.person("buyer")
            info = await deploy(seller, OPEN)
            signed = client.sign(offer(seller, info, buyer.id), seller.identity)
            desk.service.store.run("UPDATE models SET accepted = 'other software'")
            assert await denied(grant(seller, info.model, signed)) == "policy.frozen"
            assert await buyer.ask("GET", "/v1/sales") == []

    run_async(work())


def test_the_id_of_a_sold_model_is_not_used_again() -> None:
    """Else the sale would stand beside a model that it is not of, and the next start, which holds
    the tables against each other, would refuse the state of everybody."""

    async def work() -> None:
        async with Desk() as desk:
            seller, buyer = await desk.person("seller"), await desk.person("buyer")
            info = await deploy(seller, OPEN)
            signed = client.sign(offer(seller, info, buyer.id), seller.identity)
            await grant(seller, info.model, signed)
            await seller.send("DELETE", f"/v1/models/{info.model}")
            for who in (seller, await desk.person("stranger")):
                again = deploy(who, OPEN, model=info.model)
                assert await denied(again) == "format.field"
        async with Desk(disk=desk.disk) as later:
            assert len(await Person(later, buyer.identity).ask("GET", "/v1/sales")) == 1

    run_async(work())


def test_a_receipt_cannot_be_made_without_the_seller() -> None:
    """A server whose own key signs what no seller did: its receipts do not verify."""

    async def work() -> None:
        async with Desk() as desk:
            seller, buyer = await desk.person("seller"), await desk.person("buyer")
            info = await deploy(seller, OPEN)
            sale = offer(seller, info, buyer.id)
            from casemate.ledger import sales
            from casemate.server.sales import sign_receipt

            service = desk.service
            lies = (
                dsse.sign(SALE_TYPE, codec.encode(sale), buyer.identity.sign, seller.id),
                client.sign(dataclasses.replace(sale, buyer=seller.id), seller.identity),
            )
            for signed in lies:
                made = dataclasses.replace(sale, terms=signed[-40:])
                text = sign_receipt(service.keys, True, made, signed, seller.identity.public)
                sales.grant(service.store, made, b"sealed", text)
                bundle: ReceiptBundle = sales.bundle(service.store, made.id)
                with pytest.raises(CasemateError) as error:
                    client.verify_sale(bundle, trust=Trust.simulated())
                assert error.value.code in ("receipt.signature", "receipt.sale")

    run_async(work())

"""Sales at the server: who sells what to whom, what its buyer gets, what either party may fetch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from casemate.attest.trust import Trust
from casemate.client.sales import sign, verify_sale
from casemate.ledger import log
from casemate.seal import stream
from casemate.server.config import Config
from casemate.spec import codec
from casemate.spec.errors import CasemateError
from casemate.spec.receipt import ReceiptBundle
from casemate.spec.sale import Sale, SaleInfo
from casemate.spec.serving import ModelInfo, ServePolicy
from support.desk import Desk, Person, Refused, deploy, run_async

OPEN = ServePolicy(callers=())


async def refused(work: Any) -> str:
    with pytest.raises(Refused) as error:
        await work
    return error.value.code


def offer(seller: Person, info: ModelInfo, buyer: str, **changes: Any) -> Sale:
    made = Sale(
        origin=log.key(seller.desk.service.store).origin, model=info.model,
        model_digest=info.model_digest, seller=seller.id, buyer=buyer,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


async def grant(seller: Person, sale: Sale, envelope: str = "") -> SaleInfo:
    body = {"envelope": envelope or sign(sale, seller.identity)}
    answer = await seller.ask("POST", f"/v1/models/{sale.model}/sales", body)
    return codec.from_json(SaleInfo, answer)


async def pull(buyer: Person, sale: Sale) -> bytes:
    """What the buyer opens: the model's bytes as they were uploaded."""
    answer = await buyer.send("GET", f"/v1/sales/{sale.id}/model")
    if answer.status_code >= 400:
        raise Refused(answer)
    data = answer.content
    assert answer.headers["content-length"] == str(len(data))
    cut = 4 + int.from_bytes(data[:4], "big")
    key = buyer.identity.open(data[4:cut], info=sale.info)
    return b"".join(stream.decrypt(key, [data[cut:]]))


async def bundle(party: Person, sale: Sale) -> ReceiptBundle:
    answer = await party.ask("GET", f"/v1/sales/{sale.id}/receipt")
    return codec.from_json(ReceiptBundle, answer)


async def market(desk: Desk) -> tuple[Person, Person, Person, ModelInfo]:
    people = [await desk.person(name) for name in ("seller", "buyer", "other")]
    return people[0], people[1], people[2], await deploy(people[0], OPEN, key=bytes(32))


def test_a_sale_from_end_to_end() -> None:
    async def work() -> None:
        async with Desk() as desk:
            seller, buyer, other, info = await market(desk)
            sale = offer(seller, info, buyer.id, terms="10 crowns")
            made = await grant(seller, sale)
            assert made == SaleInfo(id=sale.id, sale=sale, state="open")
            assert await grant(seller, sale) == made
            size = desk.service.store.size()
            assert await pull(buyer, sale) == await pull(buyer, sale) == b"a packed model"
            for party in (seller, buyer):
                assert await party.ask("GET", "/v1/sales") == [codec.to_json(made)]
                verified = verify_sale(await bundle(party, sale), trust=Trust.simulated())
                assert verified.receipt.sale == sale and verified.simulated == ("tee",)
            assert await other.ask("GET", "/v1/sales") == []
            assert desk.service.store.size() == size
            assert '"state":"sold"' in desk.log_text()
            for word in (sale.id, buyer.id, "crowns"):
                assert word not in desk.log_text()

    run_async(work())


def test_only_the_buyer_pulls_and_only_parties_see() -> None:
    async def work() -> None:
        async with Desk() as desk:
            seller, buyer, other, info = await market(desk)
            sale = offer(seller, info, buyer.id)
            await grant(seller, sale)
            assert await refused(pull(seller, sale)) == "auth.forbidden"
            assert await refused(pull(other, sale)) == "model.unknown-sale"
            assert await refused(bundle(other, sale)) == "model.unknown-sale"
            # To oneself: what one had anyway.
            mine = offer(seller, info, seller.id)
            await grant(seller, mine)
            assert await pull(seller, mine) == b"a packed model"

    run_async(work())


def test_what_is_frozen_is_not_sold_and_what_was_sold_is_pulled() -> None:
    async def work() -> None:
        async with Desk() as desk:
            seller, buyer, _, info = await market(desk)
            sale = offer(seller, info, buyer.id)
            await grant(seller, sale)
            desk.service.store.run("UPDATE models SET accepted = 'aa'")
            again = offer(seller, info, buyer.id, terms="again")
            assert await refused(grant(seller, again)) == "policy.frozen"
            assert (await grant(seller, sale)).state == "open"
            assert await pull(buyer, sale) == b"a packed model"
            await seller.ask("PUT", f"/v1/models/{info.model}/policy", OPEN)
            assert (await grant(seller, again)).sale == again

    run_async(work())


def test_undeploying_ends_what_can_be_pulled() -> None:
    async def work() -> None:
        async with Desk() as desk:
            seller, buyer, _, info = await market(desk)
            sale = offer(seller, info, buyer.id)
            before = await grant(seller, sale)
            await seller.ask("DELETE", f"/v1/models/{info.model}")
            assert await refused(pull(buyer, sale)) == "model.sale-ended"
            assert await refused(grant(seller, sale)) == "model.unknown"
            (shown,) = await buyer.ask("GET", "/v1/sales")
            assert shown == codec.to_json(dataclasses.replace(before, state="ended"))
            for party in (seller, buyer):
                verify_sale(await bundle(party, sale), trust=Trust.simulated())

    run_async(work())


def test_sales_last_over_a_start_and_their_receipts_are_of_the_boot_that_made_them() -> None:
    async def work() -> None:
        async with Desk() as desk:
            seller, buyer, _, info = await market(desk)
            sale = offer(seller, info, buyer.id)
            await grant(seller, sale)
            boot = desk.service.keys.boot
        async with Desk(desk.disk) as later:
            buyer = Person(later, buyer.identity)
            assert await pull(buyer, sale) == b"a packed model"
            verified = verify_sale(await bundle(buyer, sale), trust=Trust.simulated())
            assert verified.receipt.boot == boot != later.service.keys.boot

    run_async(work())


def test_sales_have_a_limit() -> None:
    async def work() -> None:
        async with Desk(sales=2) as desk:
            seller, buyer, _, info = await market(desk)
            for terms in ("one", "two"):
                await grant(seller, offer(seller, info, buyer.id, terms=terms))
            third = offer(seller, info, buyer.id, terms="three")
            assert await refused(grant(seller, third)) == "limit.sales"
            await grant(seller, offer(seller, info, buyer.id, terms="one"))
            assert Config(state=desk.service.config.state).limits.sales == 1000

    run_async(work())


def test_a_model_that_is_not_what_the_sale_says_does_not_verify() -> None:
    async def work() -> None:
        async with Desk() as desk:
            seller, buyer, _, info = await market(desk)
            sale = offer(seller, info, buyer.id)
            await grant(seller, sale)
            found = await bundle(buyer, sale)
            with pytest.raises(CasemateError) as error:
                verify_sale(found, trust=Trust.simulated(), model=b"another model")
            assert error.value.code == "receipt.weights"

    run_async(work())

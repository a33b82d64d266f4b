"""Sales at the client: a sale's receipt holds, or the check that fails is named; what is asked of
an enclave, and held against its answers."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from casemate.attest.trust import Trust, Unchecked
from casemate.client import anchors, contract, receipts
from casemate.client.connection import Connection
from casemate.client.memory import Memory
from casemate.client.receipts import Witnesses, verify_receipt
from casemate.client.sales import SaleView, sign, verify_sale
from casemate.client.served import Models
from casemate.graph.model import Packed
from casemate.seal import checkpoint, dsse, hpke, stream
from casemate.seal.identity import Identity
from casemate.server.attestation import attest_now, boot_nonce
from casemate.spec import canonical, codec
from casemate.spec.consent import CONSENT_TYPE
from casemate.spec.errors import (
    CasemateError,
    EvidenceError,
    ModelError,
    NetError,
    ReceiptError,
    UsageError,
)
from casemate.spec.log import Granted, commitment
from casemate.spec.receipt import PAYLOAD_TYPE, PREDICATE_TYPE, ReceiptBundle
from casemate.spec.sale import SALE_PREDICATE, SALE_TYPE, Sale, SaleInfo, SaleReceipt, statement
from casemate.spec.serving import ModelInfo, ServePolicy
from support.evidence import PROMISES
from support.passing import owner
from support.publog import Witness
from support.receipts import SALT, maker, receipt

PACKED = b"a packed model"
DIGEST = "sha256:" + hashlib.sha256(PACKED).hexdigest()
MODEL = "model_" + "1" * 32


@pytest.fixture
def seller(someone) -> Identity:
    return someone


@pytest.fixture
def buyer() -> Identity:
    return owner("buyer")


@pytest.fixture
def sale(seller, buyer, public) -> Sale:
    return Sale(
        origin=public.origin, model=MODEL, model_digest=DIGEST, seller=seller.id, buyer=buyer.id,
        terms="10 crowns",
    )  # fmt: skip


@pytest.fixture
def claim(sale, seller, keys) -> SaleReceipt:
    """What an enclave says of a sale."""
    return SaleReceipt(
        sale=sale, signed=sign(sale, seller), sign_key=seller.public.sign_key,
        seal_key=seller.public.seal_key, boot=keys.boot, simulated=("tee",), software="a test",
    )  # fmt: skip


@pytest.fixture
def make(keys, tee, public):
    """Bundles of a claim, signed by the boot's own key and logged."""
    attestation = attest_now(tee, keys, PROMISES, [boot_nonce(keys.boot)])[0]

    def made(claim, *, said=None, what="grant", on=None, boot=keys.boot, witnesses=(), **more):
        said_of = statement(claim) | more
        text = dsse.sign(
            PAYLOAD_TYPE, canonical.encode(said_of), keys.receipt.sign, keys.receipt.public.hex()
        )
        body = Granted(
            sale=commitment(SALT, codec.digest(claim.sale)),
            receipt=commitment(SALT, "sha256:" + hashlib.sha256(text.encode()).hexdigest()),
        )
        body = dataclasses.replace(body, **(said or {}))
        public.pad(2)
        place = public.append(what, on or body.sale, body, boot)
        public.pad(3)
        return ReceiptBundle(
            envelope=text, attestation=attestation, entry=public.leaves[place], salt=SALT,
            proof=str(public.prove(place, public.sign(witnesses=witnesses))),
        )  # fmt: skip

    return made


def refused(code: str, bundle: ReceiptBundle, trust: Trust, **more) -> ReceiptError:
    with pytest.raises(ReceiptError) as error:
        verify_sale(bundle, trust=trust, **more)
    assert error.value.code == code
    return error.value


def test_a_true_receipt_passes_every_check(make, claim, trust) -> None:
    done = verify_sale(make(claim), trust=trust, model=PACKED)
    assert {c.name: c.state for c in done.checks} == {
        "evidence": "simulated",
        "signature": "ok",
        "statement": "ok",
        "consistency": "ok",
        "seller": "ok",
        "log": "ok",
        "witnesses": "unchecked",
        "seen before": "unchecked",
        "model": "ok",
    }
    assert done.receipt == claim and done.simulated == ("tee",)
    assert done.claim.endswith("on these terms: 10 crowns")
    for shown in (str(done), done._repr_html_()):
        assert "SIMULATED" in shown and claim.sale.id in shown
    assert receipts.as_json(done)["receipt"] == codec.to_json(claim)
    unsaid = dataclasses.replace(claim.sale, terms="")
    assert (
        "terms"
        not in verify_sale(
            make(dataclasses.replace(claim, sale=unsaid, signed=sign(unsaid, owner_of(claim)))),
            trust=trust,
        ).claim
    )


def owner_of(claim: SaleReceipt) -> Identity:
    """Whoever it is that sells in these tests."""
    return SELLERS[claim.sale.seller]


SELLERS: dict[str, Identity] = {}


@pytest.fixture(autouse=True)
def sellers(seller) -> None:
    SELLERS[seller.id] = seller


def test_simulation_must_be_asked_for_by_name(make, claim) -> None:
    hardware = Trust.sev_snp(measurements=Unchecked("any, in this test"))
    with pytest.raises(EvidenceError) as caught:
        verify_sale(make(claim), trust=hardware)
    assert caught.value.code == "evidence.simulated-not-asked"


def resold(claim: SaleReceipt, **changes) -> SaleReceipt:
    """Another sale than the one that was signed."""
    return dataclasses.replace(claim, sale=dataclasses.replace(claim.sale, **changes))


LIES = {
    "another buyer": (lambda c: resold(c, buyer="id_" + "2" * 40), "receipt.sale"),
    "other terms": (lambda c: resold(c, terms="1 crown"), "receipt.sale"),
    "another model": (lambda c: resold(c, model="model_" + "2" * 32), "receipt.sale"),
    "another seller": (lambda c: resold(c, seller="id_" + "2" * 40), "receipt.signer"),
    "signed by the buyer": (
        lambda c: dataclasses.replace(c, signed=sign(c.sale, owner("buyer"))), "receipt.signer",
    ),
    "by the buyer's key under the seller's name": (
        lambda c: dataclasses.replace(
            c, sign_key=owner("buyer").public.sign_key,
            signed=dsse.sign(SALE_TYPE, codec.encode(c.sale), owner("buyer").sign, c.sale.seller),
        ), "receipt.sale",
    ),
    "signed as something else": (
        lambda c: dataclasses.replace(c, signed=dsse.sign(
            CONSENT_TYPE, codec.encode(c.sale), owner_of(c).sign, c.sale.seller,
        )), "receipt.sale",
    ),
    "no envelope": (lambda c: dataclasses.replace(c, signed="{}"), "receipt.envelope"),
    "another boot": (lambda c: dataclasses.replace(c, boot=bytes(16)), "receipt.contradiction"),
    "not said to be simulated": (
        lambda c: dataclasses.replace(c, simulated=()), "receipt.contradiction",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_that_the_boot_signed_is_found(name, make, claim, trust) -> None:
    lie, code = LIES[name]
    refused(code, make(lie(claim)), trust)


ENTRIES = {
    "another sale's": {"said": {"sale": commitment(SALT, DIGEST)}},
    "another receipt's": {"said": {"receipt": commitment(SALT, DIGEST)}},
    "of another boot": {"boot": bytes(16)},
    "on another subject": {"on": "job_1"},
    "of another kind": {"what": "commit"},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_about_something_else_is_refused(name, make, claim, trust) -> None:
    refused("receipt.log-entry", make(claim, **ENTRIES[name]), trust)


OTHER_SUBJECT = [{"name": "m", "digest": {"sha256": "0" * 64}}]
STATEMENTS = {
    "of a job": {"predicateType": PREDICATE_TYPE},
    "of no in-toto": {"_type": "x"},
    "on another file": {"subject": OTHER_SUBJECT},
    "with more in it": {"more": 1},
    "of another form": {"predicate": {}},
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_statement_is_strict(name, make, claim, trust) -> None:
    refused("receipt.statement", make(claim, **STATEMENTS[name]), trust)


def test_receipts_of_jobs_and_sales_do_not_pass_for_each_other(
    make, claim, keys, tee, public, trust
) -> None:
    job, sold = maker(keys, tee, public)(receipt(keys)), make(claim)
    refused("receipt.statement", job, trust)
    with pytest.raises(ReceiptError) as error:
        verify_receipt(sold, trust=trust)
    assert error.value.code == "receipt.statement"
    assert receipts.predicate_type(job) == PREDICATE_TYPE
    assert receipts.predicate_type(sold) == SALE_PREDICATE


def test_a_sale_is_anchored_as_a_job_is(make, claim, keys, tee, public, trust) -> None:
    bundle = make(claim)
    proof = anchors.prove(bundle, trust=trust)
    states = {c.name: c.state for c in anchors.check(proof, bundle=bundle, trust=trust)}
    assert (states["receipt"], states["log"], states["bundle"]) == ("ok", "ok", "simulated")
    # The chain is asked for the entry's bytes alone.
    place = checkpoint.read_proof(proof.proof)
    size = checkpoint.read(place.signed.text).size
    call = contract.verify_entry(proof.entry, place.place, size, place.path)
    assert contract.of_proof(proof) == call
    other = dataclasses.replace(claim, sale=dataclasses.replace(claim.sale, terms="free"))
    lies = (
        dataclasses.replace(proof, receipt=DIGEST),
        dataclasses.replace(proof, salt=bytes(32)),
        dataclasses.replace(proof, entry=make(claim, what="commit").entry),
    )
    for lie in lies:
        with pytest.raises(CasemateError):
            anchors.check(lie)
    for others in (make(other), maker(keys, tee, public)(receipt(keys))):
        with pytest.raises(ReceiptError):
            anchors.check(proof, bundle=others, trust=trust)


def test_another_model_and_none_at_all(make, claim, trust, tmp_path) -> None:
    bundle = make(claim)
    refused("receipt.weights", bundle, trust, model=b"another")
    (tmp_path / "m.cmm").write_bytes(PACKED)
    assert verify_sale(bundle, trust=trust, model=tmp_path / "m.cmm").checks[-1].state == "ok"
    assert verify_sale(bundle, trust=trust).checks[-1].state == "unchecked"
    with pytest.raises(UsageError, match="file of the model"):
        verify_sale(bundle, trust=trust, model=tmp_path / "absent")


def test_witnesses_are_counted_and_the_log_is_the_one_seen_before(
    make, claim, trust, public, tmp_path
) -> None:
    witness = Witness("witness.test/w")
    asked = Witnesses((witness.verifier,), 1)
    refused("receipt.witnesses", make(claim), trust, witnesses=asked)
    bundle = make(claim, witnesses=(witness,))
    memory = Memory(tmp_path)
    checks = {
        c.name: c.found
        for c in verify_sale(bundle, trust=trust, witnesses=asked, memory=memory).checks
    }
    assert checks["witnesses"].startswith("1 of 1 cosigned")
    assert checks["seen before"].startswith("this client has seen nothing of it")


def test_an_entry_that_is_not_in_the_log_is_refused(make, claim, trust, public) -> None:
    bundle = make(claim)
    other = dataclasses.replace(bundle, proof=make(claim).proof)
    refused("receipt.inclusion", other, trust)
    elsewhere = resold(claim, origin="casemate.dev/log/" + "0" * 32)
    elsewhere = dataclasses.replace(elsewhere, signed=sign(elsewhere.sale, owner_of(claim)))
    refused("receipt.note-unsigned", make(elsewhere), trust)


# Asking an enclave.


def info(sale: Sale) -> ModelInfo:
    policy = ServePolicy(callers=())
    return ModelInfo(
        model=MODEL, owner=sale.seller, name="m", policy=policy, state="ready", inputs=(),
        policy_digest=codec.digest(policy), model_digest=DIGEST, outputs=(), parameters=1, slots=1,
        left=None,
    )  # fmt: skip


@pytest.fixture
def asked(fakes, keys, trust, seller, public, sale):
    """A fake enclave with the seller's model, and the seller's side of it."""
    fake = fakes(keys)
    fake.answers["GET", f"/v1/models/{MODEL}"] = (200, {}, codec.encode(info(sale)))
    return fake, Models(Connection(fake.url, trust=trust, identity=seller), trust)


def answer(fake, made: SaleInfo) -> None:
    fake.answers["POST", f"/v1/models/{MODEL}/sales"] = (201, {}, codec.encode(made))


def test_a_seller_signs_what_the_answer_must_be(asked, sale, buyer, seller) -> None:
    fake, models = asked
    told = SaleInfo(id=sale.id, sale=sale, state="open")
    answer(fake, told)
    view = models.grant(MODEL, buyer.id, "10 crowns")
    assert (view.id, view.info.sale) == (sale.id, sale)
    sent = canonical.decode(fake.seen[-1].body)
    assert sent == {"envelope": sign(sale, seller)}
    other = dataclasses.replace(sale, buyer=seller.id)
    for wrong in ({"sale": other}, {"id": other.id}):
        answer(fake, dataclasses.replace(told, **wrong))
        with pytest.raises(NetError, match="another sale"):
            models.grant(MODEL, buyer.id, "10 crowns")
    with pytest.raises(UsageError, match="terms have at most"):
        models.grant(MODEL, buyer.id, "\x1b[2J")
    with pytest.raises(UsageError, match="identity ids"):
        models.grant(MODEL, "anybody")


def test_sales_are_shown(asked, sale) -> None:
    fake, models = asked
    made = SaleInfo(id=sale.id, sale=sale, state="ended")
    fake.answers["GET", "/v1/sales"] = (200, {}, codec.encode([made]))
    found = models.sales()
    assert list(found) == [made]
    for shown in (str(found), str(SaleView(made)), SaleView(made)._repr_html_()):
        assert sale.id in shown and "ended" in shown and "10 crowns" in shown


def sealed(buyer: Identity, sale: Sale, data: bytes = PACKED) -> bytes:
    key = bytes(range(32))
    message = hpke.seal(buyer.public.seal_key, key, info=sale.info)
    return len(message).to_bytes(4, "big") + message + b"".join(stream.encrypt(key, [data]))


@pytest.fixture
def bought(fakes, keys, trust, buyer, make, claim, sale):
    """A fake enclave with a sale, and the buyer's side of it."""
    fake = fakes(keys)
    fake.answers["GET", f"/v1/sales/{sale.id}/receipt"] = (200, {}, codec.encode(make(claim)))
    fake.answers["GET", f"/v1/sales/{sale.id}/model"] = (200, {}, sealed(buyer, sale))
    return fake, Models(Connection(fake.url, trust=trust, identity=buyer), trust)


def test_a_buyer_pulls_what_the_receipt_is_about(bought, sale, claim) -> None:
    _, models = bought
    packed = models.pull(sale.id)
    assert packed == Packed(PACKED)
    verified = models.receipt(SaleView(SaleInfo(id=sale.id, sale=sale, state="open")), packed)
    assert verified.receipt == claim and verified.checks[-1].state == "ok"
    assert verify_sale(verified.bundle, trust=Trust.simulated())


def test_another_model_than_that_of_the_receipt_is_not_taken(bought, sale, buyer) -> None:
    fake, models = bought
    path = "GET", f"/v1/sales/{sale.id}/model"
    fake.answers[path] = (200, {}, sealed(buyer, sale, b"another model"))
    with pytest.raises(ReceiptError, match=r"receipt\.weights"):
        models.pull(sale.id)
    gone = ModelError("model.sale-ended", "Gone.", mend="Ask.", status=409)
    fake.answers[path] = (409, {}, canonical.encode(gone.to_wire()))
    with pytest.raises(ModelError, match=r"model\.sale-ended"):
        models.pull(sale.id)


def test_the_receipt_of_another_sale_is_not_taken(bought, sale, seller, make, claim) -> None:
    fake, models = bought
    other = dataclasses.replace(sale, terms="1 crown")
    swapped = make(dataclasses.replace(claim, sale=other, signed=sign(other, seller)))
    fake.answers["GET", f"/v1/sales/{sale.id}/receipt"] = (200, {}, codec.encode(swapped))
    for work in (models.receipt, models.pull):
        with pytest.raises(ReceiptError, match=r"receipt\.sale"):
            work(sale.id)

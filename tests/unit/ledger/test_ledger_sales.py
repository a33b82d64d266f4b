"""Sales in the store: whose word counts, what a sale keeps, when it ends, what ``fsck`` finds."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from casemate.ledger import (
    catalog,
    consent,
    fsck,
    fsck_folder,
    fsck_receipts,
    handover,
    log,
    models,
    recovery,
    sales,
)
from casemate.ledger.fsck_replay import Replay
from casemate.ledger.store import Store
from casemate.seal import checkpoint, note
from casemate.spec import codec
from casemate.spec.consent import CONSENT_TYPE
from casemate.spec.errors import CasemateError
from casemate.spec.log import Granted, commitment
from casemate.spec.receipt import LogEntry, ReceiptBundle
from support import sales as made
from support.disk import SimDisk
from support.ledgers import KEY, OTHER, Witness, entries, open_store, push
from support.passing import owner, to_recovery, to_software
from support.sales import MODEL, buyer, deploy, receipt, sell, seller, signed, terms


@pytest.fixture
def disk() -> SimDisk:
    return SimDisk()


@pytest.fixture
def store(disk: SimDisk) -> Store:
    found = open_store(disk)
    deploy(found)
    return found


def refused(work: Any, *given: object) -> CasemateError:
    with pytest.raises(CasemateError) as error:
        work(*given)
    return error.value


def audit(disk: SimDisk) -> Replay:
    """All that an audit looks at but files, which there are none of here."""
    with fsck_folder.opened(disk, KEY) as rows:
        replay = fsck.check(rows, recompute=True)
        fsck_receipts.check(replay, rows, disk)
        return replay


def test_a_sale_lasts_over_a_start_and_opens_to_its_buyer_alone(disk, store) -> None:
    sold = sell(store)
    assert sold.sale == terms(store)
    assert buyer().open(sold.sealed_key, info=sold.sale.info) == made.KEY
    for by, info in ((seller(), sold.sale.info), (buyer(), terms(store, terms="").info)):
        assert refused(lambda by=by, info=info: by.open(sold.sealed_key, info=info)).code == (
            "format.sealed"
        )
    store.close()
    again = open_store(disk, 2)
    assert sales.sales(again, buyer().id) == sales.sales(again, seller().id) == [sold]
    assert sales.sales(again, OTHER.id) == []
    again.close()
    found = audit(disk)
    assert (found.findings, found.receipts) == ([], 1)


def test_the_log_commits_to_a_sale_and_names_nobody(store: Store) -> None:
    before = store.size()
    sold = sell(store)
    (entry,) = entries(store, before)
    digest = "sha256:" + hashlib.sha256(sold.receipt.encode()).hexdigest()
    body = codec.decode(Granted, entry.body)
    assert (entry.kind, entry.subject, entry.sequence) == ("grant", body.sale, sold.entry)
    assert body == Granted(
        sale=commitment(sold.salt, codec.digest(sold.sale)), receipt=commitment(sold.salt, digest)
    )
    raw = codec.encode(entry)
    for said in (MODEL, seller().id, buyer().id, sold.sale.id, made.DIGEST, "crowns"):
        assert said.encode() not in raw


def test_the_same_sale_again_is_the_same_and_any_other_word_is_another(store: Store) -> None:
    sold, size = sell(store), store.size()
    assert sell(store) == sold and store.size() == size
    ids = {sold.sale.id, sell(store, terms="11 crowns").sale.id}
    catalog.enrol(store, owner("another").public)
    ids.add(sell(store, buyer=owner("another").id).sale.id)
    assert len(ids) == 3 and store.size() == size + 3  # with an enrolment
    assert [s.entry for s in sales.sales(store, seller().id)] == [size - 1, size, size + 2]


WRONG = {
    "another model": ({"model": "model_" + "1" * 32}, "policy.sale", "model"),
    "another digest": ({"model_digest": "sha256:" + "1" * 64}, "policy.sale", "model_digest"),
    "another log": ({"origin": "casemate.dev/log/" + "1" * 32}, "policy.sale", "origin"),
    "another seller": ({"seller": "id_" + "1" * 40}, "policy.sale", "seller"),
    "a buyer who never enrolled": ({"buyer": "id_" + "1" * 40}, "auth.unknown-identity", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_word_on_something_else_counts_for_nothing(case: str, store: Store) -> None:
    changes, code, where = WRONG[case]
    error = refused(sales.read, store, signed(terms(store, **changes)), seller().id, MODEL)
    assert (error.code, error.where) == (code, where)


def test_a_word_by_another_or_on_another_kind_of_thing(store: Store) -> None:
    sale = terms(store)
    buyers = signed(sale, buyer())
    for envelope in (buyers, signed(sale, kind=CONSENT_TYPE), "{}", signed(sale)[:-1]):
        error = refused(sales.read, store, envelope, seller().id, MODEL)
        assert (error.code, error.where) == ("policy.sale", MODEL)
    # The buyer signs that they are the seller of what is not theirs.
    mine = replace(sale, seller=buyer().id)
    error = refused(sales.read, store, signed(mine, buyer()), buyer().id, MODEL)
    assert (error.code, error.where) == ("policy.sale", "owner")
    error = refused(sales.read, store, signed(sale), seller().id, "model_" + "0" * 32)
    assert error.code == "model.unknown"


def test_undeploying_ends_a_sale_and_leaves_its_receipt(disk: SimDisk, store: Store) -> None:
    sold = sell(store)
    deployment = models.undeploy(store, MODEL).deployment
    catalog.drop_upload(store, deployment.upload)
    ended = sales.sold(store, sold.sale.id)
    assert ended == replace(sold, sealed_key=None)
    assert refused(sell, store).code == "model.unknown"
    assert refused(sales.grant, store, terms(store, terms=""), b"k", "r").code == "model.unknown"
    assert sales.bundle(store, sold.sale.id).envelope == sold.receipt
    assert refused(deploy, store).code == "policy.model-taken", "its sales are of no other"
    store.close()
    assert sold.sealed_key not in b"".join(disk.snapshot().values())
    assert audit(disk).findings == []


def test_a_hand_over_ends_sales_too(disk: SimDisk, store: Store) -> None:
    sold, dataset = sell(store), push(store, "a", owner().public)
    consent.give(store, to_software(store, dataset, "11" * 48), owner().id)
    handover.hand_over(store, "11" * 48, "sha256:" + "0" * 64, [dataset], drop=False)
    assert sales.sold(store, sold.sale.id).sealed_key is None
    store.close()
    assert audit(disk).findings == []


def proved(bundle: ReceiptBundle, origin: str, key: bytes) -> checkpoint.Checkpoint:
    proof = checkpoint.read_proof(bundle.proof)
    assert proof.place == codec.decode(LogEntry, bundle.entry).sequence
    return checkpoint.verify_proof(proof, bundle.entry, checkpoint.log_key(origin, key))


def test_a_receipt_is_proved_under_the_head_that_most_witnesses_cosigned(store: Store) -> None:
    sold, key = sell(store), log.key(store)
    bundle = sales.bundle(store, sold.sale.id)
    assert proved(bundle, key.origin, key.public).size == store.size()
    assert len(checkpoint.read_proof(bundle.proof).signed.lines) == 1
    one, two, three = (Witness(f"witness.test/{n}") for n in "123")
    sizes = {}
    for name, witnesses in (("few", (one,)), ("most", (two, three))):
        catalog.enrol(store, owner(name).public)
        sizes[name] = store.size()
        for witness in witnesses:
            witness.cosign(store)
    catalog.enrol(store, owner("later").public)
    bundle = sales.bundle(store, sold.sale.id)
    assert proved(bundle, key.origin, key.public).size == sizes["most"]
    lines = checkpoint.read_proof(bundle.proof).signed
    by = note.verify(lines, [key.verifier, two.verifier, three.verifier])
    assert {two.verifier, three.verifier} <= set(by)
    later = sell(store, terms="later")  # which none of them has seen
    proof = proved(sales.bundle(store, later.sale.id), key.origin, key.public)
    assert proof.size == store.size()


def test_a_receipt_from_before_a_recovery_is_proved_in_the_log_that_it_names(
    disk: SimDisk, store: Store
) -> None:
    sold, before = sell(store), log.key(store)
    dataset = push(store, "a", owner().public)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, dataset)])
    bundle = sales.bundle(store, sold.sale.id)
    assert proved(bundle, before.origin, before.public).size == asked.head.size
    # The model waits for its owner, and so does the next sale; the words of the old log are void.
    assert models.model(store, MODEL).accepted == ""
    old = signed(replace(terms(store), origin=before.origin))
    assert refused(sales.read, store, old, seller().id, MODEL).where == "origin"
    assert sell(store).sale.id != sold.sale.id
    store.close()
    found = audit(disk)
    assert (found.findings, found.receipts) == ([], 2)


BREAKS = {
    "terms": "UPDATE sales SET sale = :sale",
    "a salt": "UPDATE sales SET salt = zeroblob(32)",
    "a place": "UPDATE sales SET entry = entry - 1",
    "a buyer": "UPDATE sales SET buyer = seller",
    "a seller": "UPDATE sales SET seller = buyer",
    "a model": "UPDATE sales SET model = 'model_x'",
    "an id": "UPDATE sales SET id = 'sale_x'",
    "a receipt": "UPDATE sales SET receipt = receipt || ' '",
    "a key that is gone": "UPDATE sales SET sealed_key = NULL",
    "a sale": "DELETE FROM sales",
}


@pytest.mark.parametrize("case", BREAKS)
def test_fsck_finds_what_was_changed(case: str, disk: SimDisk, store: Store) -> None:
    sell(store)
    other = codec.encode(terms(store, terms="for nothing"))
    with store.transaction():
        store.run(BREAKS[case].replace(":sale", f"x'{other.hex()}'"))
    store.close()
    assert [f for f in fsck.verify(disk, KEY).findings if "sale" in f]
    assert refused(open_store, disk, 2).code == "ledger.inconsistent"


def test_fsck_finds_a_key_that_outlived_its_model(disk: SimDisk, store: Store) -> None:
    sold = sell(store)
    catalog.drop_upload(store, models.undeploy(store, MODEL).deployment.upload)
    with store.transaction():
        store.run("UPDATE sales SET sealed_key = ?", sold.sealed_key)
    store.close()
    (found,) = fsck.verify(disk, KEY).findings
    assert found == f"sale {sold.sale.id} does not agree with its model"


def test_fsck_finds_a_grant_without_a_sale_and_one_made_twice(disk: SimDisk, store: Store) -> None:
    sell(store)
    body = codec.decode(Granted, entries(store)[-1].body)
    with store.transaction():
        store.append("grant", body.sale, body)
        store.append("grant", "another", replace(body, sale="x"))
    store.close()
    found = fsck.verify(disk, KEY).findings
    assert any("the sale was made before" in f for f in found)
    assert any("is on another thing" in f for f in found)
    assert any("sales are missing" in f for f in found)


def forged(store: Store, receipt: str) -> None:
    """Another receipt of the one sale, to which the log commits too."""
    sold = sell(store)
    digest = "sha256:" + hashlib.sha256(receipt.encode()).hexdigest()
    with store.transaction():
        salt = bytes(32)
        body = Granted(
            sale=commitment(salt, codec.digest(sold.sale)), receipt=commitment(salt, digest)
        )
        store.run("DELETE FROM sales")
        place = store.append("grant", body.sale, body).sequence
        store.run(
            "INSERT INTO sales VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            sold.sale.id, MODEL, seller().id, buyer().id, codec.encode(sold.sale), salt, place,
            receipt, sold.sealed_key,
        )  # fmt: skip


def changed(envelope: str, **fields: Any) -> str:
    """An envelope whose statement was changed without a new signature."""
    whole = json.loads(envelope)
    statement = json.loads(base64.b64decode(whole["payload"])) | fields
    raw = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    whole["payload"] = base64.b64encode(raw.encode()).decode()
    return json.dumps(whole, sort_keys=True, separators=(",", ":"))


FORGERIES = {
    "of other terms": lambda s: receipt(s, terms(s, terms="more"), signed(terms(s, terms="more"))),
    "with a word on other terms": lambda s: receipt(s, terms(s), signed(terms(s, terms="more"))),
    "with another's word": lambda s: receipt(s, terms(s), signed(terms(s), buyer()), buyer()),
    "with a word by the buyer's key": lambda s: receipt(s, terms(s), signed(terms(s), buyer())),
    "not signed by the boot": lambda s: changed(
        receipt(s, terms(s), signed(terms(s))), predicateType="x"
    ),
    "of no form": lambda s: "{}",
}


@pytest.mark.parametrize("case", FORGERIES)
def test_an_audit_reads_what_the_seller_signed(case: str, disk: SimDisk, store: Store) -> None:
    forged(store, FORGERIES[case](store))
    store.close()
    found = [f for f in audit(disk).findings if "sales are missing" not in f]
    assert len(found) == 1 and "the receipt of sale_" in found[0]


def test_a_forgery_that_is_none_is_not_found(disk: SimDisk, store: Store) -> None:
    """What the cases above differ in is what is found."""
    forged(store, receipt(store, terms(store), signed(terms(store))))
    store.close()
    assert audit(disk).findings == ["sales are missing"]

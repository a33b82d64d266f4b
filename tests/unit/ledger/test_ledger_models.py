"""Deployed models in the store: counts, policies, what stops and what ``fsck`` finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from casemate.ledger import catalog, fsck, fsck_folder, handover, models
from casemate.ledger.schema import VERSION
from casemate.ledger.store import Store
from casemate.spec import codec
from casemate.spec.errors import CasemateError
from casemate.spec.messages import Serving
from casemate.spec.serving import Deployment, ServePolicy, TensorSpec
from support.disk import SimDisk
from support.ledgers import KEY, OTHER, OWNER, SCIENTIST, hexes, open_store, push

POLICY = ServePolicy(callers=(SCIENTIST.id,), calls=100)
X = TensorSpec(name="x", dtype="f32", shape=(3,))
DIGEST = "sha256:" + hexes("a model", 64)
SERVING = Serving(model_digest=DIGEST, inputs=(X,), outputs=(X,), parameters=3, slots=1)
MODEL = "model_" + hexes("model", 32)


def deployment(store: Store, policy: ServePolicy = POLICY, **changes: str) -> Deployment:
    made = Deployment(
        model=MODEL, owner=OWNER.id, name="a", policy=policy, model_digest=DIGEST,
        upload=catalog.add_upload(store, OWNER.id, 1000), sealed_key=b"sealed",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def disk() -> SimDisk:
    return SimDisk()


@pytest.fixture
def store(disk: SimDisk) -> Store:
    made = open_store(disk)
    for person in (OWNER, OTHER, SCIENTIST):
        catalog.enrol(made, person)
    return made


@pytest.fixture
def model(store: Store) -> models.Model:
    return models.deploy(store, deployment(store), b"m" * 32, SERVING, "00")


def refused(work: Callable[..., object], *given: object) -> str:
    with pytest.raises(CasemateError) as error:
        work(*given)
    return error.value.code


def test_a_model_lasts_over_a_start(disk: SimDisk, store: Store, model: models.Model) -> None:
    assert (model.key, model.accepted, model.serving) == (b"m" * 32, "00", SERVING)
    models.count(store, MODEL, SCIENTIST.id)
    store.close()
    again = open_store(disk, 2)
    assert models.models(again) == [model]
    assert models.used(again, MODEL, SCIENTIST.id) == 1
    again.close()
    assert fsck.verify(disk, KEY).findings == []


def test_the_same_again_changes_nothing_and_another_is_refused(
    store: Store, model: models.Model
) -> None:
    assert models.deploy(store, model.deployment, b"n" * 32, SERVING, "01") == model
    other = dataclasses.replace(model.deployment, name="b")
    assert refused(models.deploy, store, other, b"m" * 32, SERVING, "00") == "policy.model-taken"
    mine = dataclasses.replace(model.deployment, model="model_" + "0" * 32)
    assert refused(models.deploy, store, mine, b"m" * 32, SERVING, "00") == "data.upload-used"
    assert models.same(store, mine) is None


def test_counts_come_in_blocks_and_end_at_the_policys_number(
    store: Store, model: models.Model
) -> None:
    taken = 0
    while True:
        try:
            taken += models.count(store, MODEL, SCIENTIST.id)
        except CasemateError as e:
            assert e.code == "policy.calls"
            break
        assert taken == models.used(store, MODEL, SCIENTIST.id) <= 100
    assert taken == 100 and models.used(store, MODEL, OTHER.id) == 0


@pytest.mark.parametrize(
    ("calls", "block"), [(1, 1), (63, 1), (128, 2), (6400, 100), (2**40, 1024)]
)
def test_a_block_is_a_small_part(store: Store, calls: int, block: int) -> None:
    policy = ServePolicy(callers=("*",), calls=calls)
    models.deploy(store, deployment(store, policy), b"m" * 32, SERVING, "00")
    assert models.count(store, MODEL, OTHER.id) == block


def test_the_last_block_is_what_is_left(store: Store) -> None:
    policy = ServePolicy(callers=("*",), calls=129)  # blocks of 2
    models.deploy(store, deployment(store, policy), b"m" * 32, SERVING, "00")
    blocks = [models.count(store, MODEL, OTHER.id) for _ in range(65)]
    assert blocks == [2] * 64 + [1]


def test_calls_change_with_the_epoch_alone(store: Store, model: models.Model) -> None:
    models.count(store, MODEL, SCIENTIST.id)
    for calls, code in ((99, "policy.calls-fixed"), (None, "policy.calls-fixed")):
        other = dataclasses.replace(POLICY, calls=calls)
        assert refused(models.set_policy, store, MODEL, other, SERVING, "00") == code
    wider = dataclasses.replace(POLICY, callers=("*",))
    changed = models.set_policy(store, MODEL, wider, SERVING, "01")
    assert (changed.policy, changed.accepted) == (wider, "01")
    assert changed.policy_digest == codec.digest(wider)
    assert models.used(store, MODEL, SCIENTIST.id) == 1  # not given back
    later = dataclasses.replace(POLICY, calls=None, epoch=3)
    models.set_policy(store, MODEL, later, SERVING, "01")
    assert models.used(store, MODEL, SCIENTIST.id) == 0
    back = dataclasses.replace(POLICY, epoch=2)
    assert refused(models.set_policy, store, MODEL, back, SERVING, "01") == "policy.epoch-back"
    counted = dataclasses.replace(POLICY, epoch=3)
    assert refused(models.set_policy, store, MODEL, counted, SERVING, "01") == "policy.calls-fixed"


def test_undeploying_leaves_no_key_on_the_disk(
    disk: SimDisk, store: Store, model: models.Model
) -> None:
    models.count(store, MODEL, SCIENTIST.id)
    assert models.undeploy(store, MODEL) == model
    for work in (models.model, models.undeploy):
        assert refused(work, store, MODEL) == "model.unknown"
    catalog.drop_upload(store, model.deployment.upload)
    store.close()
    assert fsck.verify(disk, KEY).findings == []


def test_a_hand_over_takes_no_model_along(store: Store, model: models.Model) -> None:
    dataset = push(store)
    models.count(store, MODEL, SCIENTIST.id)
    handover.hand_over(store, "11" * 48, "sha256:" + "0" * 64, [dataset], drop=False)
    assert models.models(store) == [] and not store.all("SELECT * FROM model_calls")
    assert [u.used_by for u in catalog.uploads(store)] == [dataset]


def test_freezing_waits_for_the_owner(store: Store, model: models.Model) -> None:
    with store.transaction():
        models.freeze(store)
    assert models.model(store, MODEL).accepted == ""


def test_a_state_from_before_there_were_models_is_taken_up(disk: SimDisk, store: Store) -> None:
    with store.transaction():
        store.run("DROP TABLE sales")
        store.run("DROP TABLE model_calls")
        store.run("DROP TABLE models")
        store.run("PRAGMA user_version = 2")
    store.close()
    assert fsck.verify(disk, KEY).findings == []
    again = open_store(disk, 2)
    assert again.one("PRAGMA user_version") == (VERSION,) and models.models(again) == []
    models.deploy(again, deployment(again), b"m" * 32, SERVING, "00")
    again.close()
    assert fsck.verify(disk, KEY).findings == []


BREAKS = {
    "a policy": ("UPDATE models SET policy = ?", codec.encode(ServePolicy(callers=("*",)))),
    "its digest": ("UPDATE models SET policy_digest = ?", "sha256:" + "0" * 64),
    "an owner": ("UPDATE models SET owner = ?", OTHER.id),
    "a key": ("UPDATE models SET model_key = ?", b"short"),
    "what it serves": (
        "UPDATE models SET serving = ?",
        codec.encode(dataclasses.replace(SERVING, model_digest="sha256:" + "0" * 64)),
    ),
    "an upload's user": ("UPDATE uploads SET used_by = ? WHERE used_by LIKE 'model_%'", "ds_x"),
    "too many calls": ("UPDATE model_calls SET calls = ?", 101),
}


@pytest.mark.parametrize("case", BREAKS)
def test_fsck_finds_what_was_changed(
    case: str, disk: SimDisk, store: Store, model: models.Model
) -> None:
    models.count(store, MODEL, SCIENTIST.id)
    with store.transaction():
        store.run(*BREAKS[case])
    store.close()
    assert [f for f in fsck.verify(disk, KEY).findings if "model" in f]
    assert refused(open_store, disk, 2) == "ledger.inconsistent"


def test_fsck_finds_an_epoch_that_went_back(disk: SimDisk, store: Store) -> None:
    made = deployment(store, dataclasses.replace(POLICY, epoch=2))
    models.deploy(store, made, b"m" * 32, SERVING, "00")
    back = dataclasses.replace(POLICY, epoch=1)
    with store.transaction():
        store.run("UPDATE models SET policy = ?, policy_digest = ?", codec.encode(back),
                  codec.digest(back))  # fmt: skip
    store.close()
    assert "does not agree" in fsck.verify(disk, KEY).findings[0]


def test_fsck_finds_counts_of_what_is_not_counted(disk: SimDisk, store: Store) -> None:
    free = ServePolicy(callers=("*",))
    models.deploy(store, deployment(store, free), b"m" * 32, SERVING, "00")
    with store.transaction():
        store.run("INSERT INTO model_calls VALUES (?, ?, 1)", MODEL, OWNER.id)
    store.close()
    assert "not within its calls" in fsck.verify(disk, KEY).findings[0]


def test_fsck_reads_a_state_that_has_no_models_table(disk: SimDisk, store: Store) -> None:
    store.close()
    with fsck_folder.opened(disk, KEY) as rows:
        assert rows("SELECT count(*) FROM models") == [(0,)]

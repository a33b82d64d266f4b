"""Who stands in which role to a dataset, in each of its states; whose rules admit whom."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from casemate.ledger import catalog
from casemate.server import permissions
from casemate.spec.errors import AuthError, DataError, JobError, ModelError, PlanError
from support.disk import SimDisk
from support.ledgers import OPEN, OTHER, OWNER, SCIENTIST, ask, open_store, push, queue
from support.sales import deploy, sell


@pytest.fixture
def service() -> Any:
    store = open_store(SimDisk())
    yield SimpleNamespace(store=store)
    store.close()


@pytest.mark.parametrize(
    ("state", "seen"),
    [("ready", True), ("frozen", True), ("revoked", True), ("checking", False), ("refused", False)],
)
def test_an_admitted_scientist_sees_what_serves_or_served(service, state, seen) -> None:
    dataset = push(service.store, policy=replace(OPEN, scientists=(SCIENTIST.id, OWNER.id)))
    if state == "frozen":
        service.store.run("INSERT INTO frozen VALUES (?, 'recovery')", dataset)
    elif state == "revoked":
        catalog.revoke(service.store, dataset, OWNER.id)
    else:
        service.store.run("UPDATE datasets SET state = ?", state)
    mine = permissions.dataset_roles(service, OWNER.id, dataset)
    assert mine == ({"owner", "scientist"} if seen else {"owner"})
    if seen:
        assert permissions.dataset_roles(service, SCIENTIST.id, dataset) == {"scientist"}
    for caller in (OTHER.id, *(() if seen else (SCIENTIST.id,))):
        with pytest.raises(DataError, match=r"data\.unknown-dataset"):
            permissions.dataset_roles(service, caller, dataset)


def test_roles_to_quotes_and_jobs(service) -> None:
    store = service.store
    datasets = push(store, "a"), push(store, "b", OTHER)
    quote, job = ask(store, "1", datasets), queue(store, "2", datasets[:1])
    for caller, role in ((SCIENTIST, "scientist"), (OWNER, "owner"), (OTHER, "owner")):
        assert permissions.quote_roles(service, caller.id, quote) == {role}
    assert permissions.job_roles(service, SCIENTIST.id, job) == {"scientist"}
    assert permissions.job_roles(service, OWNER.id, job) == {"owner"}
    with pytest.raises(JobError, match=r"job\.unknown"):
        permissions.job_roles(service, OTHER.id, job)
    with pytest.raises(PlanError, match=r"plan\.unknown-quote"):
        permissions.quote_roles(service, "id_x", quote)


def test_roles_to_sales(service) -> None:
    deploy(service.store)
    sale = sell(service.store).sale
    assert permissions.sale_roles(service, sale.seller, sale.id) == {"seller"}
    assert permissions.sale_roles(service, sale.buyer, sale.id) == {"buyer"}
    for caller, name in ((OTHER.id, sale.id), (sale.buyer, "sale_" + "0" * 32)):
        with pytest.raises(ModelError, match=r"model\.unknown-sale"):
            permissions.sale_roles(service, caller, name)
    mine = sell(service.store, buyer=sale.seller).sale
    assert permissions.sale_roles(service, sale.seller, mine.id) == {"seller", "buyer"}


def test_whom_each_rule_admits() -> None:
    admits = {name: set(rule.admits) for name, rule in permissions.RULES.items()}
    both = {"owner", "scientist"}
    assert admits == {
        "upload-owner": {"owner"}, "dataset-owner": {"owner"}, "dataset-party": both,
        "quote-owner": {"owner"}, "quote-party": both, "job-scientist": {"scientist"},
        "job-party": both, "model-owner": {"owner"}, "model-caller": {"caller"},
        "model-party": {"owner", "caller"}, "sale-buyer": {"buyer"},
        "sale-party": {"seller", "buyer"},
    }  # fmt: skip
    roles = permissions.dataset_roles
    made = permissions._rule(roles, "owner", "scientist")
    assert (made.roles, made.admits) == (roles, both)


def test_a_rule_that_does_not_admit_says_whom_it_does(service) -> None:
    dataset = push(service.store)
    for permission in permissions.WITHOUT_RESOURCE:
        permissions.check(service, permission, "id_x", "")
    permissions.check(service, "dataset-party", SCIENTIST.id, dataset)
    permissions.check(service, "dataset-owner", OWNER.id, dataset)
    with pytest.raises(AuthError) as e:
        permissions.check(service, "dataset-owner", SCIENTIST.id, dataset)
    assert (e.value.code, e.value.status) == ("auth.forbidden", 403)
    assert e.value.message == "Only the owner may do this."

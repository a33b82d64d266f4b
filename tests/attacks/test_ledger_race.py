"""Many clients, one budget: exactly what fits is granted, and the boundary is an integer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from casemate.accounting import filters
from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, fsck, ledger
from casemate.ledger.catalog import EVERYONE, Account
from casemate.ledger.store import Store
from casemate.spec.data import Budget
from casemate.spec.errors import BudgetError
from casemate.spec.job import Charge
from support.disk import SimDisk
from support.ledgers import (
    BUDGET,
    EVENT,
    OPEN,
    OTHER,
    SCIENTIST,
    ask,
    open_store,
    person,
    push,
    queue,
)

CHARGE = RdpFilter(BUDGET).charge((EVENT,), 2e-9, delta_shown=1e-6)
CLIENTS = 64
CAP = Budget(epsilon=2.8, delta=1e-5)
CAPPED = replace(OPEN, scientist_budget=CAP)
SECOND = person("second scientist")


@pytest.fixture
def store() -> Iterator[Store]:
    made = open_store(SimDisk())
    yield made
    made.close()


def fitting(budget: Budget = BUDGET) -> int:
    """How many such jobs the budget holds, counted without the ledger."""
    rdp, count = RdpFilter(budget), 0
    while any((count + 1) * n <= c for n, c in zip(CHARGE.rdp_nano, rdp.capacity, strict=True)):
        count += 1
    return count


def race(actions: list[Callable[[], object]]) -> Counter[str]:
    """All at once, each in its own thread; how each ended."""
    barrier, ends = threading.Barrier(len(actions)), []

    def client(action: Callable[[], object]) -> None:
        barrier.wait()
        try:
            action()
            ends.append("granted")
        except BudgetError as e:
            ends.append(e.code)

    threads = [threading.Thread(target=client, args=(a,)) for a in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(ends)


def test_racing_for_the_queue_grants_exactly_what_fits(store: Store) -> None:
    datasets = push(store, "a"), push(store, "b", OTHER)
    wanted = [ask(store, str(i), datasets) for i in range(CLIENTS)]
    ends = race([lambda q=q: ledger.submit(store, q, SCIENTIST.id) for q in wanted])
    assert 1 < fitting() < CLIENTS
    assert ends == {"granted": fitting(), "budget.exhausted": CLIENTS - fitting()}


def test_racing_reservations_charge_each_job_once(store: Store) -> None:
    datasets = push(store, "a"), push(store, "b", OTHER)
    jobs = [queue(store, str(i), datasets) for i in range(fitting())]
    calls = [lambda j=j: ledger.reserve(store, j) for j in jobs for _ in range(8)]
    assert race(calls) == {"granted": 8 * fitting()}
    for dataset in datasets:
        spent = catalog.account(store, dataset)
        assert spent.jobs == fitting()
        assert spent.rdp_nano == tuple(fitting() * n for n in CHARGE.rdp_nano)
        assert spent.delta_femto == fitting() * CHARGE.delta_femto
    assert not fsck.check(store.all, recompute=True).findings


def test_reserving_checks_the_budget_again(store: Store) -> None:
    """Even if the queue had let in too many, the reservation is the gate."""
    dataset = push(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RdpFilter, "admits", lambda *_: True)
        jobs = [queue(store, str(i), (dataset,)) for i in range(fitting() + 5)]
    ends = race([lambda j=j: ledger.reserve(store, j) for j in jobs])
    assert ends == {"granted": fitting(), "budget.exhausted": 5}
    assert not fsck.check(store.all, recompute=True).findings


def test_a_debit_that_fails_on_the_second_dataset_undoes_the_first(store: Store) -> None:
    datasets = push(store, "a"), push(store, "b", OTHER)
    job = queue(store, "1", datasets)
    real, calls = catalog.set_account, []

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:  # each dataset has two accounts to write
            raise KeyboardInterrupt
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "set_account", failing)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(store, job)
    assert store.all("SELECT * FROM accounts") == []
    assert ledger.job(store, job).state == "queued"
    assert not fsck.check(store.all).findings


def leave(store: Store, dataset: str, scientist: str, left: int, budget: Budget = BUDGET) -> None:
    """Spend an account so that exactly ``left`` nano-RDP remain at one order, none at others."""
    capacity = RdpFilter(budget).capacity
    best = max(range(len(capacity)), key=lambda i: capacity[i] / CHARGE.rdp_nano[i])
    spent = [filters.SATURATED] * len(capacity)
    spent[best] = capacity[best] - CHARGE.rdp_nano[best] - left
    with store.transaction():
        catalog.set_account(store, dataset, scientist, Account(tuple(spent), 0, 1))


def boundary(store: Store, scientist: str = EVERYONE) -> None:
    dataset = push(store, policy=CAPPED)
    budget = BUDGET if scientist == EVERYONE else CAP
    leave(store, dataset, scientist, -1, budget)
    with pytest.raises(BudgetError) as e:
        queue(store, "one nano too many", (dataset,))
    assert e.value.code == ("budget.exhausted" if scientist == EVERYONE else "budget.scientist")
    leave(store, dataset, scientist, 0, budget)
    ledger.reserve(store, queue(store, "just fits", (dataset,)))
    with pytest.raises(BudgetError):
        queue(store, "nothing left", (dataset,))


@pytest.mark.parametrize("scientist", [EVERYONE, SCIENTIST.id])
def test_the_boundary_is_one_nano(store: Store, scientist: str) -> None:
    boundary(store, scientist)


@pytest.mark.parametrize("scientist", [EVERYONE, SCIENTIST.id])
def test_the_boundary_of_extra_delta_is_one_femto(store: Store, scientist: str) -> None:
    dataset = push(store, policy=CAPPED)
    capacity = RdpFilter(BUDGET if scientist == EVERYONE else CAP).delta_capacity
    for left, fits in ((-1, False), (0, True)):
        spent = capacity - CHARGE.delta_femto - left
        with store.transaction():
            catalog.set_account(store, dataset, scientist, Account(RdpFilter.empty(), spent, 1))
        if fits:
            ledger.reserve(store, queue(store, "just fits", (dataset,)))
        else:
            with pytest.raises(BudgetError):
                queue(store, "one femto too many", (dataset,))


def test_racing_for_one_scientists_budget_grants_exactly_what_fits(store: Store) -> None:
    dataset = push(store, policy=CAPPED)
    wanted = [ask(store, str(i), (dataset,)) for i in range(CLIENTS)]
    theirs = [ask(store, f"other {i}", (dataset,), scientist=SECOND) for i in range(2)]
    ends = race(
        [lambda q=q: ledger.submit(store, q, SCIENTIST.id) for q in wanted]
        + [lambda q=q: ledger.submit(store, q, SECOND.id) for q in theirs]
    )
    mine = fitting(CAP)
    assert 1 < mine < mine + 2 < fitting()
    assert ends == {"granted": mine + 2, "budget.scientist": CLIENTS - mine}
    while (job := ledger.next_queued(store)) is not None:
        ledger.reserve(store, job.id)
    spent = [catalog.account(store, dataset, s.id).jobs for s in (SCIENTIST, SECOND)]
    assert spent == [mine, 2]
    assert not fsck.check(store.all, recompute=True).findings


def float_admits(self: RdpFilter, spent: tuple[int, ...], delta: int, charge: object) -> bool:
    total = [(s + c) / 1e9 for s, c in zip(spent, charge.rdp_nano, strict=True)]
    return any(t <= c / 1e9 + 1e-8 for t, c in zip(total, self.capacity, strict=True))


def float_add(self: Account, charge: Charge) -> Account:
    pairs = zip(self.rdp_nano, charge.rdp_nano, strict=True)
    total = tuple(int((a / 1e9 + b / 1e9) * 1e9) for a, b in pairs)
    return Account(total, self.delta_femto + charge.delta_femto, self.jobs + 1)


def test_seeded_bug_comparing_floats_is_noticed(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RdpFilter, "admits", float_admits)
        with pytest.raises(pytest.fail.Exception):
            boundary(store)


def test_seeded_bug_adding_floats_is_noticed(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Account, "add", float_add)
        with pytest.raises(AssertionError):
            test_racing_reservations_charge_each_job_once(store)


def test_seeded_bug_holding_nothing_for_the_queue_is_noticed(store: Store) -> None:
    from casemate.ledger import admission

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "_with_held", lambda store, lineage, scientist, account: account)
        with pytest.raises(AssertionError):
            test_racing_for_the_queue_grants_exactly_what_fits(store)

"""What clients were told and what workers read, in plain values, and what must then hold.

Nothing here comes from the server's tables: an answer that reached a client is an acknowledgement,
a message that reached a worker is a read.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol

from casemate.accounting import filters
from casemate.spec.data import Registration
from casemate.spec.job import Charge, Quote

ENDED = frozenset({"done", "failed", "cancelled"})


class _Status(Protocol):
    @property
    def status(self) -> int: ...


Answered = _Status | None


class Violation(AssertionError):
    """Something that must never happen did."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def charge_of(quote: Quote) -> Charge:
    """What each dataset of a quote must be charged, from its plan's events."""
    plan = quote.plan
    extra = plan.delta_truncation + plan.delta_sampler
    return filters.RdpFilter.charge(plan.events, extra, delta_shown=quote.delta)


@dataclass
class Model:
    """See the module. Where a request's fate is unknown, all that it may have done is allowed."""

    enrolled: set[str] = field(default_factory=set)
    offsets: dict[str, int] = field(default_factory=dict)  # upload -> most acknowledged
    owner_of: dict[str, str] = field(default_factory=dict)  # upload -> identity
    used: set[str] = field(default_factory=set)  # uploads that may be part of something
    datasets: dict[str, Registration] = field(default_factory=dict)
    settled: dict[str, str] = field(default_factory=dict)
    epochs: dict[str, tuple[int, int]] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    revoking: set[str] = field(default_factory=set)
    quotes: dict[str, Quote] = field(default_factory=dict)
    # (policy, dataset) or (owner, quote) -> what it may be set to; said and not answered
    values: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    unheard: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    # dataset -> (least epoch, revoked, policies), below a head that its owner keeps
    sure: dict[str, tuple[int, bool, frozenset[str]]] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)  # acknowledged -> last state seen
    quote_of: dict[str, str] = field(default_factory=dict)  # job sent -> quote
    reads: Counter[str] = field(default_factory=Counter)  # request digest -> runs
    request_of: dict[str, str] = field(default_factory=dict)  # request digest -> job
    ran: set[str] = field(default_factory=set)  # jobs seen running or after
    charged: set[str] = field(default_factory=set)  # jobs that the log was seen to charge
    receipts: dict[str, bytes] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    acknowledged: int = 0

    def copy(self) -> Model:
        return Model(**{f.name: copy.copy(getattr(self, f.name)) for f in fields(self)})

    def say(self, what: tuple[str, str], value: str) -> Callable[[Answered], None]:
        """A value is about to be sent; call what is returned with the answer, or ``None``.

        A request without an answer may still arrive after later ones, until the next start."""
        before = set(self.values.get(what, {""}))  # nothing was said
        self.values[what] = before | {value}

        def answered(answer: Answered) -> None:
            if answer is None or answer.status >= 500:
                self.unheard.setdefault(what, set()).add(value)
            elif answer.status < 400:
                self.values[what] = {value} | self.unheard.get(what, set())
            else:
                self.values[what] = before

        return answered

    # What answers say.

    def saw_state(self, job: str, state: str, error: str | None) -> None:
        before = self.jobs.get(job, "queued")
        order = ("queued", "running")
        if before in ENDED:
            demand(state == before, f"{job} was {before} and is {state}")
        elif before in order and state in order:
            demand(
                order.index(state) >= order.index(before), f"{job} went from {before} to {state}"
            )
        self.jobs[job] = state
        if state in ("running", "done"):
            self.ran.add(job)

    def saw_receipt(self, job: str, data: bytes) -> None:
        demand(self.receipts.setdefault(job, data) == data, f"the receipt of {job} changed")

    def saw_result(self, job: str, data: bytes) -> None:
        demand(self.results.setdefault(job, data) == data, f"the result of {job} changed")

    # What must be spent.

    def expected(
        self, charged: Counter[str], lineage: set[str]
    ) -> tuple[tuple[int, ...], int, int]:
        """(nano-RDP at each order, delta in 1e-15, jobs) of the log's charged jobs that touch one
        of a lineage's datasets."""
        total, delta, count = list(filters.RdpFilter.empty()), 0, 0
        for job, times in charged.items():
            quote = self.quotes[self.quote_of[job]]
            touched = [u.dataset for u in quote.request.datasets if u.dataset in lineage]
            charge = charge_of(quote)
            for _ in range(times * len(touched)):
                total = [a + b for a, b in zip(total, charge.rdp_nano, strict=True)]
                delta += charge.delta_femto
                count += 1
        return tuple(total), delta, count

    def lineages(self) -> list[set[str]]:
        """Datasets that share one budget."""
        root: dict[str, str] = {}
        for name, registration in self.datasets.items():  # a version is registered after its first
            root[name] = root.get(registration.previous or "", name)
        return [{n for n, r in root.items() if r == first} for first in set(root.values())]

    def check_spent(
        self,
        charged: Counter[str],
        granted: Counter[str],
        spent: dict[str, tuple[tuple[int, ...], int, int]],
    ) -> None:
        """``charged``: how often the log charges each job; ``granted``: how often it lets a boot
        run one; ``spent``: by dataset."""
        demand(all(n == 1 for n in charged.values()), f"a job was charged twice: {charged}")
        unknown = set(charged) - set(self.quote_of)
        demand(not unknown, f"charged and never submitted: {unknown}")
        refunded = self.charged - set(charged)
        demand(not refunded, f"a charge is gone: {refunded}")
        self.charged |= set(charged)
        read = Counter({self.request_of[d]: count for d, count in self.reads.items()})
        free = set(read) - set(charged)
        demand(not free, f"read without a debit: {free}")
        demand(self.ran <= set(charged), f"ran without a debit: {self.ran - set(charged)}")
        demand(read <= granted, f"more runs than the log grants: {read - granted}")
        for lineage in self.lineages():
            first = sorted(lineage)[0]
            wanted = self.expected(charged, lineage)
            demand(
                spent[first] == wanted,
                f"{first} spent {spent[first][2]} jobs, {spent[first][0][:3]};"
                f" the model says {wanted[2]}, {wanted[0][:3]}",
            )
            budget = self.datasets[first].budget
            fits = any(
                total <= most
                for total, most in zip(
                    wanted[0], filters.capacities(budget.epsilon, budget.delta), strict=True
                )
            )
            within = wanted[1] <= filters.delta_capacity(budget.delta)
            demand(not wanted[2] or (fits and within), f"{first} is above its budget")

    def might_fit(self, quote: Quote, charged: Counter[str]) -> bool:
        """Whether the job fits even if all that was submitted and may live is charged."""
        alive = {j for j in self.quote_of if self.jobs.get(j, "queued") not in ENDED}
        for lineage in self.lineages():
            touched = [u.dataset for u in quote.request.datasets if u.dataset in lineage]
            if not touched:
                continue
            counted = Counter(set(charged) | alive - {quote.request.job})
            total, delta, _ = self.expected(counted, lineage)
            charge = charge_of(quote)
            total = tuple(a + b for a, b in zip(total, charge.rdp_nano, strict=True))
            budget = self.datasets[touched[0]].budget
            if delta + charge.delta_femto > filters.delta_capacity(budget.delta):
                return False
            if not filters.fits(total, filters.capacities(budget.epsilon, budget.delta)):
                return False
        return True

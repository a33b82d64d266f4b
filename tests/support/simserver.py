"""What the simulations need to know of the server's inside, in one place: cheap parts for a boot,
and questions to its ledger that HTTP does not answer to the last integer."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any
from unittest import mock

from casemate.accounting import filters
from casemate.ledger import catalog, fsck, quotes
from casemate.ledger.store import Store
from casemate.server import app, config, keys, machine, release, routes, serve, tls
from casemate.server.service import Service
from casemate.spec import codec
from casemate.spec.data import Budget
from casemate.spec.errors import CasemateError
from casemate.spec.evidence import Evidence
from casemate.spec.job import Charge, DpEvent
from casemate.spec.receipt import LogEntry

CALLER = "x-caller"
Head = tuple[int, bytes]


class CountingRng:
    """Different bytes each time, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed.to_bytes(16, "big")
        self._count = 0

    def bytes(self, count: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(self._seed + self._count.to_bytes(8, "big")).digest(count)


class PaperTee:
    """A TEE for simulations that verify no evidence: its own costs more than all the rest."""

    kind = "sev-snp"
    simulated = True
    sealing = "development-file"
    root = "00" * 32
    measurement = "11" * 48

    def attest(self, report_data: bytes) -> Evidence:
        return Evidence(tee=self.kind, simulated=True, files={"report.bin": report_data})

    def sealing_key(self, label: str) -> bytes:
        return hashlib.sha256(b"paper " + label.encode()).digest()


@cache
def _tls() -> tls.Tls:
    return tls.make(["localhost"])


@cache
def _software() -> str:
    return config.software()


async def _by_name(service: Service, route: object, request: object, body: bytes) -> str:
    """Who the request says it is from, in the place of the signature; boot and nonce as ever."""
    headers = request.headers  # type: ignore[attr-defined]
    caller = headers[CALLER]
    if headers["casemate-boot"] != service.keys.boot.hex():
        raise app.AuthError("auth.boot-stale", "Another start.", mend="Connect again.")
    service.nonces.use(caller, bytes.fromhex(headers["casemate-nonce"]))
    if route.permission != "self":  # type: ignore[attr-defined]
        catalog.identity(service.store, caller)
    return str(caller)


class _Memory:
    """What was decoded once is not decoded, nor encoded, again: values are frozen, forms strict.

    Half of a simulation's time would go there: it reads the same entries at each start.
    """

    def __init__(self) -> None:
        self._decode, self._encode, self._digest = codec.decode, codec.encode, codec.digest
        self._values: dict[tuple[type, bytes], object] = {}
        self._bytes: dict[int, bytes] = {}

    def decode(self, kind: type, data: bytes, **limit: int) -> object:
        found = self._values.get((kind, data))
        if found is None:
            found = self._decode(kind, data, **limit)
            if len(self._values) > 20_000:
                self._values.clear()
                self._bytes.clear()
            self._values[(kind, data)] = found
            self._bytes[id(found)] = data
        return found

    def encode(self, item: object) -> bytes:
        return self._bytes.get(id(item)) or self._encode(item)

    def digest(self, item: object) -> str:
        known = self._bytes.get(id(item))
        if known is None:
            return self._digest(item)
        return "sha256:" + hashlib.sha256(known).hexdigest()


@cache
def _memory() -> _Memory:
    return _Memory()


_charge = lru_cache(10_000)(filters.RdpFilter.charge)
_epsilon = lru_cache(100_000)(filters.epsilon)
_nano = lru_cache(10_000)(filters.nano)
_capacities = lru_cache(100_000)(filters.capacities.__wrapped__)
_left = filters.RdpFilter.left


@lru_cache(100_000)
def _left_of(budget: Budget, spent: tuple[int, ...], delta_femto: int) -> float:
    return _left(filters.RdpFilter(budget), spent, delta_femto)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Pure functions that remember their answers: decoding, charges, capacities."""
    memory = _memory()

    def charge(events: Sequence[DpEvent], extra: float, *, delta_shown: float) -> Charge:
        return _charge(tuple(events), extra, delta_shown=delta_shown)

    def left(self: filters.RdpFilter, spent: Sequence[int], delta_femto: int) -> float:
        return _left_of(self.budget, tuple(spent), delta_femto)

    parts: tuple[tuple[object, str, object], ...] = (
        (codec, "decode", memory.decode),
        (codec, "encode", memory.encode),
        (codec, "digest", memory.digest),
        (filters.RdpFilter, "charge", staticmethod(charge)),
        (filters.RdpFilter, "left", left),
        (filters, "capacities", _capacities),
        (filters, "epsilon", lambda total, delta: _epsilon(tuple(total), delta)),
        (filters, "nano", lambda events: _nano(tuple(events))),
    )
    with contextlib.ExitStack() as stack:
        for where, name, value in parts:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


@contextlib.contextmanager
def cheap(*, signed: bool) -> Iterator[None]:
    """Boots without RSA and TLS keys, :func:`remembered`; requests without signatures, unless
    ``signed``."""
    made = _tls()
    _software()
    with contextlib.ExitStack() as stack:

        def patch(where: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        stack.enter_context(remembered())
        patch(machine, "open_tee", lambda *_, **__: PaperTee())
        patch(keys.tls, "make", lambda _: made)
        for module in (config, serve, release, routes):
            patch(module, "software", _software)
        if not signed:
            patch(app, "_authenticate", _by_name)
        yield


@contextlib.contextmanager
def stores() -> Iterator[list[Store]]:
    """The stores that are opened meanwhile: a start that fails leaves its one to its process's
    end."""
    opened: list[Store] = []
    real = Store.open

    def open_(*given: Any, **named: Any) -> Store:
        opened.append(real(*given, **named))
        return opened[-1]

    with mock.patch.object(Store, "open", open_):
        yield opened


def entries(service: Service) -> list[LogEntry]:
    """The whole log."""
    rows = service.store.all("SELECT entry FROM entries ORDER BY sequence")
    return [codec.decode(LogEntry, raw) for (raw,) in rows]


def _root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle tree hash of RFC 6962, section 2.1, of leaf hashes."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\1" + _root(leaves[:split]) + _root(leaves[split:])).digest()


def leaf_hashes(service: Service) -> list[bytes]:
    rows = service.store.all("SELECT entry FROM entries ORDER BY sequence")
    return [hashlib.sha256(b"\0" + raw).digest() for (raw,) in rows]


def head(service: Service) -> Head:
    """Size and root of the log, as a client that reads it all would have them."""
    leaves = leaf_hashes(service)
    return len(leaves), _root(leaves)


def extends(service: Service, remembered: Head) -> bool:
    """Whether the log grew out of what somebody remembers of it."""
    leaves = leaf_hashes(service)
    size, root = remembered
    return size <= len(leaves) and _root(leaves[:size]) == root


def charged(service: Service, size: int | None = None) -> Counter[str]:
    """How often each job was charged, by the log, or its first ``size`` entries."""
    return Counter(e.subject for e in entries(service)[:size] if e.kind == "reserve")


def granted(service: Service) -> Counter[str]:
    """How often the log lets a boot run each job: its reservation and each takeover."""
    return Counter(e.subject for e in entries(service) if e.kind in ("reserve", "takeover"))


def committed(service: Service, job: str) -> bool:
    """Whether the log has a job's commit."""
    return any(e.kind == "commit" and e.subject == job for e in entries(service))


def spent(service: Service, dataset: str) -> tuple[tuple[int, ...], int, int]:
    """Nano-RDP at each order, delta in 1e-15, and jobs, of a dataset's lineage."""
    lineage = catalog.dataset(service.store, dataset).lineage
    account = catalog.account(service.store, lineage)
    return account.rdp_nano, account.delta_femto, account.jobs


def verdicts(service: Service, quote: str) -> tuple[bool, dict[str, str | None]]:
    """Whether a quote still counts, and its owners' words by dataset."""
    stored = quotes.get(service.store, quote)
    return stored.void is None, dict(stored.verdicts)


def findings(service: Service) -> list[str]:
    """What the independent checker says, charges recomputed."""
    return list(fsck.check(service.store.all, recompute=True).findings)


def refusal(error: BaseException) -> str:
    """The code with which a start was refused."""
    return error.code if isinstance(error, CasemateError) else type(error).__name__

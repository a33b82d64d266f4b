"""What an operator sets, and the limits on every size and number."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from casemate.spec.evidence import ServerPolicy

MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes, counts, seconds; past one of them a request gets ``limit.*``.

    ``worker_bytes`` caps one worker's resident memory. A run is ended after ``run_floor`` seconds
    plus ``run_factor`` times its predicted time: constants of the quote, so that the end of a run
    tells nothing of the rows; and after ``run_seconds``, since a worker has predicted it.
    ``compile_seconds`` after a worker began to prepare, or half of ``prepare_seconds`` if that is
    less, it compiles nothing more; 0: nothing at all. A run that is predicted to take less than
    ``state_seconds`` keeps no training states. ``models``: deployed by one identity;
    ``sales``: that it has made; ``model_calls``: to one model that wait or run; a pass over a
    call's records that takes longer than ``call_seconds`` ends its worker; ``answer_bytes``: of one
    call, of which each connection may hold one that nobody reads, and its TLS as much again.
    """

    json_bytes: int = 4 * MIB
    chunk_bytes: int = 8 * MIB
    upload_bytes: int = 64 * GIB
    identity_bytes: int = 128 * GIB
    open_uploads: int = 16
    identities: int = 10_000
    datasets: int = 1_000
    quotes: int = 10_000
    quotes_waiting: int = 16
    queued_jobs: int = 256
    queued_per_identity: int = 32
    result_bytes: int = 4 * GIB
    worker_bytes: int = 16 * GIB
    prepare_seconds: float = 300.0
    compile_seconds: float = 60.0
    check_seconds: float = 1_800.0
    run_factor: float = 20.0
    run_floor: float = 120.0
    run_seconds: float = 864_000.0
    state_seconds: float = 60.0
    body_seconds: float = 120.0
    connections: int = 256
    nonces: int = 1 << 21
    nonces_per_identity: int = 1 << 16
    attestations: int = 4_096
    models: int = 100
    sales: int = 1_000
    model_calls: int = 256
    call_seconds: float = 30.0
    answer_bytes: int = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A token bucket: ``burst`` requests at once, ``per_second`` in the long run."""

    per_second: float
    burst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """``public`` and ``enrol`` are per network address, the others per identity."""

    public: Rate = Rate(per_second=200.0, burst=400)
    enrol: Rate = Rate(per_second=10.0, burst=50)
    identity: Rate = Rate(per_second=100.0, burst=400)
    quote: Rate = Rate(per_second=1.0, burst=20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One server. ``state`` is its folder; ``port`` 0 takes a free one.

    ``workers``: jobs that run at once. ``models``: deployed models that are loaded at once, each in
    a worker of its own. ``spares``: workers that wait with their imports done.
    ``tee``: as :func:`casemate.tee.open` takes it; ``dev`` means a simulated one. ``threads``: of
    one worker. ``attest_window``: seconds in which nonces are gathered for one report.
    ``witnesses``: submission prefixes (URLs) of the witnesses that are asked to cosign the log.
    ``anchor``: the TPM's NV index (hex) that tells an older state, ``auto`` for the usual one where
    there is a TPM, ``none``; a state that was anchored once does not start without it.
    ``release_owner``: the Ed25519 key, in hex, of who releases the sealing key where no hardware
    holds one; "" for nobody. ``sandbox``: the layers that must hold around every worker, by name
    (:func:`casemate.server.pool.layers`). ``drain_seconds``: how long a server that is stopped
    waits for the jobs that it runs.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int = 8443
    tee: str = "auto"
    dev: bool = False
    workers: int = 1
    models: int = 2
    spares: int = 1
    threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    attest_window: float = 0.01
    release_owner: str = ""
    witnesses: tuple[str, ...] = ()
    anchor: str = "auto"
    sandbox: tuple[str, ...] = ()
    drain_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)
    rates: Rates = field(default_factory=Rates)

    @property
    def worker_memory(self) -> int:
        """Bytes that one worker may hold, for a job or a deployed model: the limit, or its share of
        three quarters of the machine's memory."""
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(self.limits.worker_bytes, machine * 3 // 4 // max(1, self.workers + self.models))


def software() -> str:
    """The name and version that receipts and the server's policy carry."""
    try:
        return f"casemate {version('casemate')}"
    except PackageNotFoundError:
        return "casemate (source)"


def server_policy(config: Config) -> ServerPolicy:
    """What a client is promised beyond the measurement; its digest is bound in evidence."""
    return ServerPolicy(
        software=software(),
        dev=config.dev,
        filter="rdp/v1",
        release_owner=config.release_owner,
        sandbox=config.sandbox,
    )

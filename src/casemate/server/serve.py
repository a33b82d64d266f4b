"""`casemate serve`: put the parts together, listen, and leave in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, Final

import uvicorn

from casemate.accounting import pld
from casemate.ledger import log as ledger_log
from casemate.ledger import recovery
from casemate.seams import Clock, Disk, HttpNet, Net, OsDisk, OsRng, Rng, SystemClock, files
from casemate.server import app, attestation, keeping, keys, machine, release, states
from casemate.server.config import Config, server_policy, software
from casemate.server.inference import Inference
from casemate.server.logs import Bridge, Log
from casemate.server.metrics import Metrics
from casemate.server.pool import Pool
from casemate.server.publish import Publisher
from casemate.server.queue import Queue
from casemate.server.service import Service
from casemate.server.throttle import Nonces, Throttle
from casemate.server.uploads import Uploads
from casemate.spec import canonical
from casemate.spec.errors import LedgerError, NetError
from casemate.spec.job import DpEvent

READY_FILE: Final = "server.json"
LOCK_FILE: Final = "lock"
LOCK_SECONDS: Final = 1.0
GRACE_SECONDS: Final = 10
KEEP_ALIVE_SECONDS: Final = 300  # a new connection needs new evidence


def forbid_unpickling() -> None:
    """From now on `pickle.find_class` raises in this process (PEP 578); it cannot be undone."""

    def hook(event: str, _: object) -> None:
        if event == "pickle.find_class":
            raise RuntimeError("unpickling is forbidden here")

    sys.addaudithook(hook)


def assemble(
    config: Config,
    *,
    disk: Disk,
    clock: Clock,
    rng: Rng,
    write_log: Callable[[str], None],
    net: Net | None = None,
) -> Service:
    """A service on its objects: opens the TEE and the store, makes this boot's keys.

    Raises ``usage.tee-*`` and ``LedgerError``.
    """
    log = Log(write_log, clock)
    tee = machine.open_tee(config, disk=disk, rng=rng, clock=clock)
    if tee.sealing == "owner-release":
        log.event("server", tee=tee.kind, state="waiting")  # for the owner, at the store's key
    instance = rng.bytes(keys.BOOT_BYTES)
    store = keeping.open_store(disk, tee, instance, rng)
    with contextlib.ExitStack() as refused:
        refused.callback(store.close)
        log_key = ledger_log.key(store)
        hosts = [config.host, "localhost", "127.0.0.1", "::1"]
        boot = keys.make(rng, hosts, instance, keys.SignKey(log_key.public, log_key.private.sign))
        policy = server_policy(config)
        nonces = [attestation.boot_nonce(instance)]
        attested = attestation.attest_now(tee, boot, policy, nonces)[0]
        machine.hold(config, tee, store)
        recovery.start(store, attested, software=software(), measurement=tee.measurement)
        refused.pop_all()
    metrics = Metrics()
    limits, rates = config.limits, config.rates
    for folder in (release.FOLDER, states.FOLDER):
        disk.make_folder(folder)
    service = Service(
        config=config,
        clock=clock,
        rng=rng,
        disk=disk,
        tee=tee,
        keys=boot,
        store=store,
        log=log,
        metrics=metrics,
        attester=attestation.Attester(
            tee, boot, policy, clock, metrics,
            window=config.attest_window, limit=limits.attestations,
        ),
        boot_attestation=attested,
        uploads=Uploads(disk, store, limits),
        pool=Pool(config),
        publisher=Publisher(store, net or HttpNet(), clock, log, metrics, config.witnesses),
        nonces=Nonces(limits.nonces_per_identity, limits.nonces),
        throttles={
            name: Throttle(getattr(rates, name), clock)
            for name in ("public", "enrol", "identity", "quote")
        },
    )  # fmt: skip
    service.publisher.failed = service.watch
    service.queue = Queue(service)
    service.inference = Inference(service)
    return service


@contextmanager
def alone(config: Config) -> Iterator[None]:
    """Hold the state folder for this process; ``ledger.in-use`` when another one does."""
    fd = os.open(config.state / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _lock(fd):
            raise LedgerError(
                "ledger.in-use",
                f"Another server uses the state folder {config.state}.",
                mend="Stop it, or name another folder with --state.",
                where=str(config.state),
            )
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Whether nobody else has it, now or in a moment: a worker that a killed server was starting
    holds the server's descriptors until it runs its own program."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        time.sleep(0.01)


def _listen(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With its protocol named, or asyncio leaves Nagle's algorithm on: 40 ms for each answer.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as e:
        sock.close()
        raise NetError(
            "net.listen",
            f"Cannot listen on {config.host} port {config.port}: {e.strerror}.",
            mend="Choose another --port, or 0 for a free one.",
        ) from None
    return sock


def _url(config: Config, port: int) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"https://{host}:{port}"


def facts(service: Service, port: int) -> dict[str, Any]:
    """What stands in ``server.json``: how to reach this boot and what to trust."""
    return {
        "boot": service.keys.boot.hex(),
        "measurement": service.tee.measurement,
        "pid": os.getpid(),
        "root": service.tee.root,
        "simulated": service.tee.simulated,
        "tee": service.tee.kind,
        "url": _url(service.config, port),
    }


def banner(known: dict[str, Any]) -> str:
    """The words at start; a simulated TEE is said loudly."""
    lines = [
        f"casemate serves at {known['url']}",
        f"  boot         {known['boot']}",
        f"  TEE          {known['tee']}{' (SIMULATED)' if known['simulated'] else ''}",
        f"  measurement  {known['measurement']}",
        f"  root         {known['root']}",
    ]
    if known["simulated"]:
        rule = "!" * 78
        lines = [
            rule,
            "!!  SIMULATED TEE: nothing here is protected from who runs this machine.     !!",
            "!!  For development only; clients must ask for simulation by name.           !!",
            rule,
            *lines,
        ]
    return "\n".join(lines)


def _announce(service: Service, port: int, say: Callable[[str], None]) -> None:
    known = facts(service, port)
    files.store(service.disk, READY_FILE, canonical.encode(known) + b"\n")
    service.log.event("ready", boot=service.keys.boot.hex(), tee=service.tee.kind, port=port)
    say(banner(known))


class _Server(uvicorn.Server):
    """uvicorn's server; says when it listens, and takes signals without raising them again."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], hurry: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._hurry = ready, hurry

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # a second signal: jobs are waited for no longer
            self._hurry()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # An idle peer need not answer TLS's close_notify; only answers under way are waited for.
        for connection in list(self.server_state.connections):
            cycle: Any = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _warm() -> None:
    """Import the tight accountant before the first quote asks for it."""
    pld.epsilon((DpEvent(rate=0.1, noise_multiplier=1.0, steps=1),), 1e-5)


def server(service: Service, ready: Callable[[], None]) -> uvicorn.Server:
    """The HTTP server of a service."""

    def context(_: uvicorn.Config, __: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        return service.keys.tls.context

    @asynccontextmanager
    async def background() -> AsyncIterator[None]:
        service.pool.top_up()
        warm = asyncio.create_task(asyncio.to_thread(_warm))
        try:
            async with service.queue.serve():
                yield
                if service.broken is None:
                    await service.queue.drain(service.config.drain_seconds)
        finally:
            await service.inference.close()
            await service.pool.close()
            await warm

    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [Bridge(service.log)]
        logger.propagate = False
    return _Server(
        uvicorn.Config(
            app.build(service, background),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=service.config.limits.connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
            ssl_context_factory=context,
        ),
        ready,
        service.queue.hurry,
    )


def _forbid_core_files() -> None:
    """A core file would hold keys. A limit of 1 byte: with 0 the kernel would still pipe one to the
    program of core(5)'s core_pattern (Linux, fs/coredump.c)."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    limit = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def serve(config: Config, *, say: Callable[[str], None] | None = None) -> None:
    """Run a server until SIGINT or SIGTERM.

    ``say`` gets the words at start (standard output when ``None``); logs go to standard error, one
    JSON object a line. When it listens, ``server.json`` stands in the state folder; it is removed
    at the end. Raises ``usage.tee-*``, ``LedgerError``, ``net.listen``, and ``ledger.stopped`` when
    the store stopped under it, since only a new start sees what the disk really holds.
    """
    forbid_unpickling()
    _forbid_core_files()
    config = machine.sandboxed(config)
    disk = OsDisk(config.state)

    def write_log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def say_it(text: str) -> None:
        print(text, flush=True)

    with alone(config), contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            disk.remove(READY_FILE)
        sock = stack.enter_context(_listen(config))
        service = assemble(config, disk=disk, clock=SystemClock(), rng=OsRng(), write_log=write_log)
        stack.callback(service.store.close)
        port = sock.getsockname()[1]
        http = server(service, lambda: _announce(service, port, say or say_it))
        service.stop = lambda: setattr(http, "should_exit", True)
        try:
            asyncio.run(http.serve(sockets=[sock]))
        finally:
            with contextlib.suppress(FileNotFoundError):
                disk.remove(READY_FILE)
            service.log.event("stop")
        if service.broken is not None:
            if service.broken.code == "ledger.rolled-back":
                keeping.found_older(disk)
            raise service.broken

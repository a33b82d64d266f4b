"""TLS, evidence, the import rules, and the start of a process."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from casemate.attest import binding
from casemate.attest.trust import Trust
from casemate.attest.verify import verify_attestation
from casemate.server import serve, tls
from casemate.server.attestation import boot_nonce
from casemate.server.config import Config
from casemate.server.throttle import Busy
from casemate.spec import codec
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Attestation
from support.desk import AutoClock, Desk, HandClock, run_async


def _handshake(made: tls.Tls, client: ssl.SSLContext) -> ssl.SSLObject:
    """A handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    two = made.context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        done = 0
        for side in (one, two):
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
        if done == 2:
            return one
    raise AssertionError("the handshake does not end")


def _client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_tls_13_only_with_the_bound_key() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    made = tls.make(["127.0.0.1", "localhost", "::1"])
    side = _handshake(made, _client())
    assert side.version() == "TLSv1.3"
    shown = x509.load_der_x509_certificate(side.getpeercert(True) or b"")
    spki = shown.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert hashlib.sha256(spki).digest() == made.spki
    old = _client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        _handshake(made, old)
    assert tls.make(["localhost"]).spki != made.spki


def test_the_tls_key_never_has_a_name_on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that is opened for writing while a key is made is in memory and closed after."""
    events: list[str] = []
    on = [True]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if on[0] and event == "open" and isinstance(args[2], int) and args[2] & 3:
            events.append(str(args[0]))

    sys.addaudithook(hook)
    before = set(os.listdir("/proc/self/fd"))
    tls.make(["localhost"])
    on[0] = False
    assert events == []
    assert set(os.listdir("/proc/self/fd")) <= before


def test_nonces_that_wait_share_one_report() -> None:
    async def work() -> None:
        clock = HandClock()
        async with Desk(clock=clock) as desk:
            service = desk.service
            reports: list[bytes] = []
            attest = service.tee.attest

            def counted(report_data: bytes) -> object:
                reports.append(report_data)
                return attest(report_data)

            service.tee.attest = counted  # type: ignore[method-assign,assignment]
            nonces = [hashlib.sha256(bytes([i])).digest() for i in range(5)]
            asked = [
                asyncio.create_task(desk.http.get(f"/v1/attestation?nonce={n.hex()}"))
                for n in nonces
            ]
            await desk.until(lambda: len(service.attester._waiting) == 5)
            await asyncio.sleep(0.01)
            await clock.advance(1.0)
            answers = [codec.decode(Attestation, (await a).content) for a in asked]
            assert len(reports) == 1
            trust = Trust.simulated(service.tee.root)
            for nonce, answer in zip(nonces, answers, strict=True):
                verdict = verify_attestation(answer, nonce, trust, now=service.clock.wall())
                assert verdict.simulated
                assert answer.binding == service.keys.binding(
                    answer.binding.server_policy, binding.nonce_root(nonces)
                )
            with pytest.raises(EvidenceError):
                verify_attestation(answers[0], nonces[1], trust, now=service.clock.wall())

    run_async(work())


def test_too_many_nonces_wait() -> None:
    async def work() -> None:
        async with Desk(clock=HandClock(), attestations=2) as desk:
            tasks = [asyncio.create_task(desk.service.attester.attest(bytes(32))) for _ in range(2)]
            await asyncio.sleep(0.01)
            with pytest.raises(Busy) as busy:
                await desk.service.attester.attest(bytes(32))
            assert busy.value.code == "limit.attestations"
            for task in tasks:
                task.cancel()

    run_async(work())


def test_a_tee_that_fails_fails_those_who_wait_and_no_more() -> None:
    async def work() -> None:
        async with Desk(clock=AutoClock()) as desk:
            tee, attest = desk.service.tee, desk.service.tee.attest

            def broken(report_data: bytes) -> object:
                tee.attest = attest  # type: ignore[method-assign]
                raise OSError("configfs")

            tee.attest = broken  # type: ignore[method-assign,assignment]
            path = "/v1/attestation?nonce=" + "0" * 64
            assert (await desk.http.get(path)).status_code == 500
            assert (await desk.http.get(path)).status_code == 200

    run_async(work())


def test_receipts_go_with_the_boots_own_attestation() -> None:
    desk = Desk()
    made = desk.service.boot_attestation
    nonce = boot_nonce(desk.service.keys.boot)
    assert nonce == hashlib.sha256(desk.service.keys.boot).digest()
    trust = Trust.simulated(desk.service.tee.root)
    verify_attestation(made, nonce, trust, now=desk.clock.wall())
    desk.service.store.close()


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_server_needs_no_torch() -> None:
    done = _python(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch' or name.startswith('casemate.engine'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import casemate.server.serve\n"
    )
    assert done.returncode == 0, done.stderr


def test_unpickling_is_forbidden_from_the_start() -> None:
    done = _python(
        "import pickle, sys\n"
        "from casemate.server.serve import forbid_unpickling\n"
        "data = pickle.dumps(print)\n"
        "pickle.loads(data)\n"
        "forbid_unpickling()\n"
        "pickle.loads(pickle.dumps([1, 2]))\n"
        "try:\n    pickle.loads(data)\nexcept RuntimeError as e:\n    sys.exit(str(e))\n"
    )
    assert done.stderr.strip() == "unpickling is forbidden here"


def test_the_listening_socket_names_its_protocol(tmp_path: Path) -> None:
    """asyncio turns Nagle's algorithm off for sockets that say they are TCP: else each answer
    waits for the peer's delayed acknowledgement, 40 ms."""
    with serve._listen(Config(state=tmp_path, port=0, dev=True)) as sock:
        assert sock.proto == socket.IPPROTO_TCP

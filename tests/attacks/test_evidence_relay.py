"""Relay and diversion: an operator who passes a genuine enclave's evidence through to an endpoint
of their own, or moves the connection elsewhere once it was seen (CVE-2026-33697's kind).

Each attack runs over real TLS 1.3 against the client as it is, is refused with the code stated, and
the attacker has received no request. Then the check that refused it is taken away, and the same
attack gets the secret: so that check is what stops it. The TEEs are simulated; their verifier is
hardware's.
"""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from casemate.attest import binding, verify
from casemate.attest.trust import Trust
from casemate.client import connection as client
from casemate.client.connection import Connection
from casemate.seal import hpke
from casemate.seal.identity import Identity
from casemate.seams import OsRng
from casemate.server import keys as boot_keys
from casemate.server.attestation import attest_now
from casemate.spec import codec
from casemate.spec.errors import EvidenceError, FormatError
from casemate.tee import simulated
from support.evidence import NOW, PROMISES, tee
from support.fake_enclave import FakeEnclave

SECRET = {"secret": "model"}
nothing = lambda *_, **__: None  # noqa: E731


def boot() -> boot_keys.BootKeys:
    rng = OsRng()
    return boot_keys.make(rng, ["127.0.0.1"], rng.bytes(16), boot_keys.sign_key(rng))


def evidence(keys, of=None) -> Callable:
    """What an enclave with these keys answers to a nonce."""
    return lambda nonce: attest_now(of or tee(), keys, PROMISES, [nonce])[0]


@dataclass
class Lab:
    """Endpoints of the genuine enclave and of the attacker; all are stopped at the end."""

    trust: Trust = field(default_factory=lambda: Trust.simulated(tee().root))
    someone: Identity = field(default_factory=lambda: Identity.generate("someone"))
    made: list[FakeEnclave] = field(default_factory=list)

    def serve(self, keys, attest, **settings) -> FakeEnclave:
        self.made.append(FakeEnclave(attest=attest, context=keys.tls.context, **settings).start())
        return self.made[-1]

    def connect(self, to: FakeEnclave, trust: Trust | None = None) -> Connection:
        return Connection(
            to.url, trust=trust or self.trust, identity=self.someone, now=lambda: NOW,
            pause=lambda _: None,
        )  # fmt: skip

    def send(self, to: FakeEnclave, trust: Trust | None = None) -> None:
        self.connect(to, trust).request("POST", "/v1/quotes", SECRET)


@pytest.fixture
def lab() -> Iterator[Lab]:
    found = Lab()
    yield found
    for one in found.made:
        one.stop()


# Attacks. Each gives the attacker's endpoint and what the client does there.


def relay(lab: Lab):
    """The client's nonce goes to the genuine enclave, its answer comes back word for word."""
    attacker = lab.serve(boot(), evidence(boot()))
    return attacker, lambda: lab.send(attacker)


def relay_that_shows_its_own_tls_key(lab: Lab):
    """As before, with the binding rewritten so that the connection's key fits it."""
    own, genuine = boot(), boot()

    def answer(nonce):
        true = evidence(genuine)(nonce)
        return replace(true, binding=replace(true.binding, tls_spki=own.tls.spki))

    attacker = lab.serve(own, answer)
    return attacker, lambda: lab.send(attacker)


def diversion_after_a_reconnect(lab: Lab):
    """Attested at the genuine enclave; then another machine takes over its address."""
    genuine = boot()
    true = lab.serve(genuine, evidence(genuine), last=2)
    connection = lab.connect(true)
    connection.request("GET", "/v1/jobs")
    true.stop()
    attacker = lab.serve(boot(), evidence(genuine), port=true.port)
    return attacker, lambda: connection.request("POST", "/v1/quotes", SECRET)


def replay_of_an_old_answer(lab: Lab):
    """The keys of an earlier boot leaked, from a snapshot say, with an answer given then."""
    leaked = boot()
    old = evidence(leaked)(bytes(32))
    attacker = lab.serve(leaked, lambda _: old)
    return attacker, lambda: lab.send(attacker)


def old_keys_under_evidence_of_the_present_boot(lab: Lab):
    """Leaked keys again, and the present boot is asked for fresh evidence."""
    leaked, present = boot(), boot()

    def answer(nonce):
        true = evidence(present)(nonce)
        policy = codec.digest(PROMISES)
        return replace(true, binding=leaked.binding(policy, true.binding.nonce_root))

    attacker = lab.serve(leaked, answer)
    return attacker, lambda: lab.send(attacker)


def attest_once(monkeypatch):
    """The client takes its first verdict for every later connection."""
    first: list[client.Line] = []
    honest = Connection._attest

    def lazy(self, http, carrier, stream):
        if not first:
            first.append(honest(self, http, carrier, stream))
        return replace(first[0], http=http, stream=carrier)

    monkeypatch.setattr(Connection, "_attest", lazy)


def without(module, name):
    return lambda monkeypatch: monkeypatch.setattr(module, name, nothing)


ATTACKS = [
    (relay, "binding-tls", without(verify, "_tls")),
    (relay_that_shows_its_own_tls_key, "binding-mismatch", without(verify, "_binding")),
    (diversion_after_a_reconnect, "binding-tls", attest_once),
    (replay_of_an_old_answer, "freshness-path", without(binding, "check_nonce")),
    (old_keys_under_evidence_of_the_present_boot, "binding-mismatch",
     without(verify, "_binding")),
]  # fmt: skip
NAMES = [attack.__name__ for attack, _, _ in ATTACKS]


@pytest.mark.parametrize(("attack", "code", "bug"), ATTACKS, ids=NAMES)
def test_the_attacker_gets_nothing(lab, attack, code, bug):
    attacker, act = attack(lab)
    with pytest.raises(EvidenceError) as caught:
        act()
    assert caught.value.code == f"evidence.{code}"
    assert attacker.seen
    assert attacker.requests == []


@pytest.mark.parametrize(("attack", "code", "bug"), ATTACKS, ids=NAMES)
def test_without_the_check_the_attacker_gets_the_secret(lab, attack, code, bug, monkeypatch):
    bug(monkeypatch)
    attacker, act = attack(lab)
    act()
    assert b"model" in attacker.requests[-1].body


# A compromised machine that runs the very same software.


def another_chip() -> simulated.SimulatedTee:
    """Genuine evidence, the same root and measurement, of a chip that the attacker holds."""
    made = copy.copy(tee())
    made._chip = b"\5" * 64
    start = datetime.fromtimestamp(NOW, UTC)
    vcek = simulated._vcek(
        made._chain, made._key.public_key(), start, simulated._tcb_bytes(), made._chip
    )
    made._vcek = vcek.public_bytes(Encoding.DER)
    return made


def listing_chips(trust: Trust, *chips: str) -> Trust:
    policy = replace(trust.policies["sev-snp"], chip_ids=chips)
    return replace(trust, policies={"sev-snp": policy}, operator_physical_access=True)


def test_a_compromised_machine_with_the_same_software_is_told_by_its_chip_alone(lab):
    """Its evidence is genuine, so only a list of instances keeps it out: without one it gets in,
    which is why a policy that admits physical access is not loaded without a list."""
    keys = boot()
    attacker = lab.serve(keys, evidence(keys, another_chip()))
    listed = listing_chips(lab.trust, tee()._chip.hex())
    with pytest.raises(EvidenceError) as caught:
        lab.send(attacker, listed)
    assert caught.value.code == "evidence.appraise-chip"
    assert attacker.requests == []
    lab.send(attacker)
    assert len(attacker.requests) == 1


# Keys swapped, and what a relay with the true TLS key still does not get.


def swapped_key(part: str):
    own, genuine = boot(), boot()

    def answer(nonce):
        true = evidence(genuine)(nonce)
        mine = getattr(own.binding(codec.digest(PROMISES), bytes(32)), part)
        return replace(true, binding=replace(true.binding, **{part: mine}))

    return own, genuine, answer


@pytest.mark.parametrize("part", ["boot", "hpke_key", "receipt_key", "log_key"])
def test_a_swapped_key_is_refused_because_it_is_hashed(lab, part, monkeypatch):
    _, genuine, answer = swapped_key(part)
    relay_with_the_tls_key = lab.serve(genuine, answer)
    with pytest.raises(EvidenceError) as caught:
        lab.send(relay_with_the_tls_key)
    assert caught.value.code == "evidence.binding-mismatch"
    assert relay_with_the_tls_key.requests == []
    whole = binding.report_data

    def forgetful(of):
        return whole(replace(of, **{part: bytes(len(getattr(of, part)))}))

    monkeypatch.setattr(binding, "report_data", forgetful)
    lab.send(relay_with_the_tls_key)
    assert len(relay_with_the_tls_key.requests) == 1


def test_a_relay_that_has_the_tls_key_holds_only_ciphertext(lab):
    """Where even the TLS key leaked the client cannot tell; uploads are sealed to another key."""
    genuine, own = boot(), boot()
    attacker = lab.serve(genuine, evidence(genuine))
    connection = lab.connect(attacker)
    to = connection.line().attestation.binding.hpke_key
    connection.request("POST", "/v1/uploads", hpke.seal(to, b"a patient's row", info=b"upload"))
    held = attacker.requests[-1].body
    assert b"patient" not in held
    with pytest.raises(FormatError):
        own.hpke.open(held, info=b"upload")
    assert genuine.hpke.open(held, info=b"upload") == b"a patient's row"


def test_with_the_sealing_key_swapped_that_would_be_lost(lab, monkeypatch):
    """Seeded bug: the sealing key is not among what is hashed."""
    own, genuine, answer = swapped_key("hpke_key")
    attacker = lab.serve(genuine, answer)
    whole = binding.report_data
    monkeypatch.setattr(
        binding, "report_data", lambda of: whole(replace(of, hpke_key=bytes(len(of.hpke_key))))
    )
    connection = lab.connect(attacker)
    to = connection.line().attestation.binding.hpke_key
    connection.request("POST", "/v1/uploads", hpke.seal(to, b"a patient's row", info=b"upload"))
    assert own.hpke.open(attacker.requests[-1].body, info=b"upload") == b"a patient's row"


# Below TLS a relay is only a network.


class Wire:
    """Passes bytes of one TCP connection on and keeps them."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.kept = bytearray()
        self._port = port
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        with suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._port))
            back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
            back.start()
            self._pass(near, far)

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                self.kept += data
                other.sendall(data)

    def close(self) -> None:
        self._listener.close()


def test_a_relay_below_tls_sees_no_request(lab):
    genuine = boot()
    true = lab.serve(genuine, evidence(genuine))
    wire = Wire(true.port)
    connection = Connection(
        wire.url, trust=lab.trust, identity=lab.someone, now=lambda: NOW, pause=lambda _: None
    )
    connection.request("POST", "/v1/quotes", SECRET)
    connection.close()
    wire.close()
    assert b"model" in true.requests[-1].body
    assert wire.kept
    assert b"/v1/" not in wire.kept
    assert b"model" not in wire.kept

"""Fake enclaves with true evidence (``support.fake_enclave``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from casemate.attest.trust import Trust
from casemate.seal.identity import Identity
from casemate.seams import OsDisk, OsRng, SystemClock
from casemate.server import keys as boot_keys
from casemate.server.attestation import attest_now
from casemate.tee.simulated import SimulatedTee
from support.evidence import PROMISES
from support.fake_enclave import FakeEnclave
from support.publog import PublicLog, keys_of


@pytest.fixture(scope="session")
def tee(tmp_path_factory: pytest.TempPathFactory) -> SimulatedTee:
    return SimulatedTee(OsDisk(tmp_path_factory.mktemp("tee")), OsRng(), SystemClock())


@pytest.fixture
def public() -> PublicLog:
    """A log whose key the fakes' evidence binds."""
    return PublicLog()


@pytest.fixture
def keys(public: PublicLog) -> boot_keys.BootKeys:
    return keys_of(public)


@pytest.fixture
def fakes(tee: SimulatedTee) -> Iterator[Callable[..., FakeEnclave]]:
    """Start fake enclaves with these boot keys; all stopped at the end."""
    made: list[FakeEnclave] = []

    def start(keys: boot_keys.BootKeys, port: int = 0, **settings: Any) -> FakeEnclave:
        settings.setdefault("attest", lambda nonce: attest_now(tee, keys, PROMISES, [nonce])[0])
        settings.setdefault("context", keys.tls.context)
        made.append(FakeEnclave(port=port, **settings).start())
        return made[-1]

    yield start
    for fake in made:
        fake.stop()


@pytest.fixture
def trust() -> Trust:
    return Trust.simulated()


@pytest.fixture(scope="session")
def someone() -> Identity:
    return Identity.generate("someone")

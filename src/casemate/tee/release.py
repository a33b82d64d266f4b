"""A sealing secret that a data owner holds and gives an enclave, at each start, for its evidence.

Procedure:

 1. The enclave makes an HPKE key for this start alone and shows evidence over

        SHA-512( item("casemate/release/v1") item(owner's Ed25519 key) item(HPKE key) )

    as a :class:`ReleaseRequest` (:func:`request`). item(x): its length in 4 bytes, big endian, x.
 2. The owner's tool verifies the evidence against the owner's trust policy, seals the secret to the
    HPKE key with the request's digest in ``info``, and signs both (:func:`grant`).
 3. The enclave checks the owner's signature and opens the secret (:func:`accept`).

The files of 1 and 2 go by whatever way, the state folder say: a host that copies them learns
nothing, since only the enclave that made the request has the private key, for as long as it runs.
An old request is of no use to anyone for the same reason, so it needs no nonce. The owner's key is
told to the enclave by its operator: it is in the evidence, and must be in what clients are shown.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from casemate.attest.binding import carried
from casemate.attest.trust import Trust
from casemate.attest.verdict import Checks, refusal
from casemate.attest.verify import verify_claims
from casemate.seal import hpke
from casemate.seams import Clock, Disk, Rng
from casemate.seams.files import load, remove, store
from casemate.spec import codec
from casemate.spec.codec import value
from casemate.spec.errors import AuthError, FormatError, UsageError
from casemate.spec.evidence import Evidence
from casemate.spec.identity import SEAL_KEY_BYTES, SIGN_KEY_BYTES
from casemate.tee.sealing import SECRET_BYTES, Attest, Sealing

TAG: Final = b"casemate/release/v1"
REQUEST_FILE: Final = "tee/release-request.json"
GRANT_FILE: Final = "tee/release-grant.json"
WAIT_SECONDS: Final = 600.0
POLL_SECONDS: Final = 1.0


@value("release-request/v1")
class ReleaseRequest:
    """``owner``: who shall release, an Ed25519 key. ``hpke_key``: to seal to. ``evidence``: binds
    both."""

    owner: bytes
    hpke_key: bytes
    evidence: Evidence

    def __post_init__(self) -> None:
        if len(self.owner) != SIGN_KEY_BYTES or len(self.hpke_key) != SEAL_KEY_BYTES:
            raise ValueError("a key has the wrong length")


@value("release-grant/v1")
class ReleaseGrant:
    """``sealed``: the secret under HPKE. ``signature``: the owner's, over both messages."""

    sealed: bytes
    signature: bytes


def _item(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def report_data(owner: bytes, hpke_key: bytes) -> bytes:
    """The 64 bytes that a request's evidence is over."""
    return hashlib.sha512(_item(TAG) + _item(owner) + _item(hpke_key)).digest()


def _info(request_bytes: bytes) -> bytes:
    return TAG + b"|" + hashlib.sha256(request_bytes).digest()


def _signed(request_bytes: bytes, sealed: bytes) -> bytes:
    return _item(TAG + b"/grant") + _item(hashlib.sha256(request_bytes).digest()) + _item(sealed)


def request(attest: Attest, owner: bytes, rng: Rng) -> tuple[bytes, hpke.SealKey]:
    """Step 1: a request's canonical bytes, and the key that only this process has."""
    key = hpke.generate(rng)
    evidence = attest(report_data(owner, key.public))
    made = ReleaseRequest(owner=owner, hpke_key=key.public, evidence=evidence)
    return codec.encode(made), key


def grant(
    request_bytes: bytes,
    secret: bytes,
    trust: Trust,
    owner: bytes,
    sign: Callable[[bytes], bytes],
    *,
    now: float,
) -> bytes:
    """Step 2, on the owner's machine: a grant's bytes.

    secret: 32 bytes, the same at every start. owner, sign: the owner's Ed25519 key and what signs
    with it. now: Unix seconds to verify at. Raises FormatError; AuthError ``auth.release-owner``
    where another's release is asked; EvidenceError as verification does, and ``binding-mismatch``.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a sealing secret has {len(secret)} bytes, not {SECRET_BYTES}")
    asked = codec.decode(ReleaseRequest, request_bytes)
    if asked.owner != owner:
        raise AuthError(
            "auth.release-owner",
            "The request asks for the release by another owner.",
            mend="Use the identity that the server was started for.",
            where="owner",
        )
    checks = Checks()
    claims = verify_claims(asked.evidence, trust, now=now, checks=checks)
    with checks.step("binding") as step:
        wanted = carried(asked.evidence.tee, report_data(asked.owner, asked.hpke_key))
        if claims.bound != wanted:
            raise refusal(
                "binding-mismatch",
                "The evidence binds other keys than the request shows.",
                "release",
                "Release nothing: something stands between you and the enclave.",
            )
        step.detail = "release"
    sealed = hpke.seal(asked.hpke_key, secret, info=_info(request_bytes))
    signature = sign(_signed(request_bytes, sealed))
    return codec.encode(ReleaseGrant(sealed=sealed, signature=signature))


def accept(request_bytes: bytes, grant_bytes: bytes, key: hpke.SealKey, owner: bytes) -> bytes:
    """Step 3: the secret. Raises FormatError, AuthError ``auth.release-owner``."""
    given = codec.decode(ReleaseGrant, grant_bytes)
    try:
        Ed25519PublicKey.from_public_bytes(owner).verify(
            given.signature, _signed(request_bytes, given.sealed)
        )
    except (InvalidSignature, ValueError):
        raise AuthError(
            "auth.release-owner",
            "The grant is not signed by the owner that the server was started for.",
            mend="Have that owner answer the present request.",
            where="release",
        ) from None
    secret = key.open(given.sealed, info=_info(request_bytes))
    if len(secret) != SECRET_BYTES:
        raise FormatError(
            "format.release",
            f"The released secret has {len(secret)} bytes, not {SECRET_BYTES}.",
            mend="Have the owner release the secret again.",
            where="release",
        )
    return secret


def _obtain(
    attest: Attest,
    owner: bytes,
    disk: Disk,
    rng: Rng,
    clock: Clock,
    pause: Callable[[float], None],
) -> bytes:
    """Write a request, wait for its grant. An answer that does not open is an error at once."""
    remove(disk, GRANT_FILE)
    asked, key = request(attest, owner, rng)
    store(disk, REQUEST_FILE, asked)
    end = clock.monotonic() + WAIT_SECONDS
    while (answer := load(disk, GRANT_FILE)) is None:
        if clock.monotonic() >= end:
            raise UsageError(
                "usage.tee-release",
                f"No owner released the sealing key within {WAIT_SECONDS:.0f} seconds.",
                mend=f"Give {REQUEST_FILE} of the state folder to the owner, and put the answer"
                f" beside it as {GRANT_FILE.rpartition('/')[2]} while the server waits.",
                where="release",
            )
        pause(POLL_SECONDS)
    secret = accept(asked, answer, key, owner)
    remove(disk, REQUEST_FILE)
    remove(disk, GRANT_FILE)
    return secret


def owner_release(
    owner: bytes,
    disk: Disk,
    rng: Rng,
    clock: Clock,
    *,
    pause: Callable[[float], None] = time.sleep,
) -> Sealing:
    """The sealing kind. ``owner``: Ed25519 key, 32 bytes. Raises ``usage.tee-release`` after
    :data:`WAIT_SECONDS`."""
    if len(owner) != SIGN_KEY_BYTES:
        raise ValueError(f"an owner's key has {len(owner)} bytes, not {SIGN_KEY_BYTES}")
    return Sealing("owner-release", lambda attest: _obtain(attest, owner, disk, rng, clock, pause))

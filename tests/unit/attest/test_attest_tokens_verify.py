"""Signatures, chains, key sets and times of tokens. Keys and authorities are made here."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from casemate.attest import jws
from casemate.attest.tokens import abi, collateral, verify
from casemate.attest.x509 import parse as certificate_of
from support import tokens as made
from support.tokens import NOW, code, judge

TEES = sorted(made.CLAIMS)


@pytest.mark.parametrize("tee", TEES)
def test_every_service_is_accepted_under_its_pinned_key(tee):
    found = judge(made.files(tee), made.pinned(tee))
    assert (found.tee, found.crypto, found.code) == (tee, "valid", "")
    assert found.decision == "accept"


@pytest.mark.parametrize("tee", TEES)
def test_a_supplied_key_set_is_reported_and_never_leads_to_accept(tee):
    found = judge(made.files(tee))
    assert (found.crypto, found.decision) == ("valid", "reject")
    assert found.code == "evidence.root-key-unpinned"
    (key,) = [c for c in found.checks if c.name == "key"]
    assert "supplied with the evidence" in key.detail
    assert code(made.files(tee), made.pinned(tee, keys=(made.pin(made.rsa_key(1)),))) == (
        "root-key-unpinned"
    )


@pytest.mark.parametrize("tee", TEES)
def test_without_keys_there_is_no_answer(tee):
    files = made.files(tee)
    del files["jwks.json"]
    found = judge(files, made.pinned(tee))
    assert (found.crypto, found.decision, found.code) == (
        "unknown", "reject", "evidence.collateral-keys",
    )  # fmt: skip
    strangers = files | {"jwks.json": made.key_set(made.jwk(made.rsa_key(), "k2"))}
    assert code(strangers, made.pinned(tee)) == "collateral-keys"


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize("alg", ["none", "HS256", "RS512", "ES256", "PS512"])
def test_each_service_has_its_own_algorithms(tee, alg):
    if alg in verify.ALGORITHMS[tee]:
        return
    key = made.key_for("ES256") if alg == "ES256" else made.rsa_key()
    files = {"token.jwt": made.token(made.CLAIMS[tee], alg, key).encode()}
    for beside in ({}, {"jwks.json": made.key_set(key)}):
        found = judge(files | beside, made.pinned(tee))
        assert (found.crypto, found.code) == ("invalid", "evidence.signature-algorithm")


def test_the_public_key_is_no_hmac_secret():
    """The old confusion: HS256 with the issuer's public key for a secret."""
    import hmac

    claims = made.token(made.GOOGLE, alg="HS256").rpartition(".")[0]
    secret = made.key_set(made.rsa_key())
    tag = jws.url_encode(hmac.digest(secret, claims.encode(), "sha256"))
    files = {"token.jwt": f"{claims}.{tag}".encode(), "jwks.json": secret}
    assert code(files, made.pinned(abi.GOOGLE)) == "signature-algorithm"


def test_the_key_is_the_one_that_the_header_names():
    tee, key = abi.MAA, made.rsa_key()
    two = made.key_set(made.jwk(made.rsa_key(1), "k1"), made.jwk(key, "k2"))
    assert code(made.files(tee) | {"jwks.json": two}, made.pinned(tee)) == "signature-token"
    turned = made.key_set(made.jwk(key, "k1"), made.jwk(made.rsa_key(1), "k2"))
    assert code(made.files(tee) | {"jwks.json": turned}, made.pinned(tee)) == ""
    unnamed = {"token.jwt": made.token(made.MAA, kid=None).encode()}
    assert code(unnamed | {"jwks.json": turned}, made.pinned(tee)) == "collateral-keys"
    assert code(unnamed | {"jwks.json": made.key_set(key)}, made.pinned(tee)) == ""


@pytest.mark.parametrize(
    "members",
    [{"use": "enc"}, {"key_ops": ["sign"]}, {"key_ops": "verify"}, {"alg": "RS512"},
     {"alg": "HS256"}],
)  # fmt: skip
def test_keys_for_other_ends_are_refused(members):
    files = made.files(abi.MAA)
    files["jwks.json"] = made.key_set(made.jwk(made.rsa_key(), **members))
    assert code(files, made.pinned(abi.MAA)) == "signature-key"


def test_keys_that_say_what_they_are_for():
    files = made.files(abi.MAA)
    members = {"use": "sig", "key_ops": ["verify"], "alg": "RS256"}
    files["jwks.json"] = made.key_set(made.jwk(made.rsa_key(), **members))
    assert code(files, made.pinned(abi.MAA)) == ""


def test_a_key_that_comes_as_a_certificate_alone():
    leaf = {"kty": "RSA", "kid": "k1", "x5c": made.x5c(made.chain())}
    files = made.files(abi.MAA) | {"jwks.json": made.key_set(leaf)}
    assert code(files, made.pinned(abi.MAA)) == ""
    assert code(files) == "root-key-unpinned"
    bad = leaf | {"x5c": ["AAAA"]}
    files["jwks.json"] = made.key_set(bad)
    assert code(files, made.pinned(abi.MAA)) == "parse-certificate"


def test_keys_in_the_header_are_never_followed():
    tee, stranger = abi.MAA, made.rsa_key(1)
    own = {"jku": "https://evil.test/keys", "x5u": "https://evil.test/chain"}
    token = made.token(made.MAA, key=stranger, **own)
    files = made.files(tee) | {"token.jwt": token.encode()}
    assert code(files, made.pinned(tee)) == "signature-token"
    files["token.jwt"] = made.token(made.MAA, key=stranger, jwk=made.jwk(stranger)).encode()
    assert code(files, made.pinned(tee)) == "parse-header"
    files["token.jwt"] = made.token(made.MAA, x5c=made.x5c(made.chain()), **own).encode()
    found = judge(files, made.pinned(tee))
    (algorithm,) = [c for c in found.checks if c.name == "algorithm"]
    assert found.decision == "accept"
    assert algorithm.detail.endswith("not acted upon: jku, x5c, x5u")


# --- certificates -------------------------------------------------------------------------------


def test_a_chain_to_a_pinned_root():
    found = judge(made.pki(), made.under_root())
    assert (found.decision, found.crypto) == ("accept", "valid")
    assert found.claims.root == made.root_pin()


def test_a_chain_to_any_other_root_is_refused():
    found = judge(made.pki())  # Google's own root is what the default pins
    assert (found.crypto, found.code) == ("invalid", "evidence.root-unknown")
    pem = (
        "-----BEGIN CERTIFICATE-----\n" + made.x5c(made.chain())[2] + "\n-----END CERTIFICATE-----"
    )
    found = judge(made.pki() | {"root.pem": pem.encode()})
    assert found.code == "evidence.root-unknown"
    assert code(made.pki(), made.under_root(1)) == "root-unknown"


def test_a_supplied_root_is_reported():
    own, other = (
        f"-----BEGIN CERTIFICATE-----\n{made.x5c(made.chain(n))[2]}\n-----END CERTIFICATE-----\n"
        for n in (0, 1)
    )
    for pem, words in ((own, "is that root"), (other, "is another")):
        found = judge(made.pki() | {"root.pem": pem.encode()}, made.under_root())
        (root,) = [c for c in found.checks if c.name == "root"]
        assert found.decision == "accept" and words in root.detail
    assert code(made.pki() | {"root.pem": b"x"}, made.under_root()) == "parse-certificate"


def test_a_root_that_the_header_leaves_out():
    pem = f"-----BEGIN CERTIFICATE-----\n{made.x5c(made.chain())[2]}\n-----END CERTIFICATE-----\n"
    short = made.pki(made.chain()[:2])
    assert code(short | {"root.pem": pem.encode()}, made.under_root()) == ""
    assert code(short, made.under_root()) == "chain-issuer"
    assert collateral.google_root().fingerprint in collateral.GOOGLE_ROOTS


def test_broken_chains():
    leaf, middle, root = made.chain()
    _, foreign, foreign_root = made.chain(1)
    policy = made.under_root()
    cases = {
        "chain-issuer": [(leaf, foreign, root), (leaf, root), (middle, leaf, root),
                         (leaf, middle, foreign_root)],
        "chain-length": [(root,)],
        "chain-authority": [(leaf, leaf, root)],
    }  # fmt: skip
    for wanted, paths in cases.items():
        for path in paths:
            found = judge(made.pki(path), policy)
            assert found.crypto == "invalid" and found.stage == "signature"
            if wanted != "chain-authority":
                assert found.code == f"evidence.{wanted}"
    forged = made.certificate("leaf", made.rsa_key(), "middle 0", made.rsa_key(5), False)
    assert code(made.pki((forged, middle, root)), policy) == "chain-signature"
    assert code(made.pki((leaf + b"\0", middle, root)), policy) == "parse-certificate"
    assert code(made.pki((leaf, middle, root), key=made.rsa_key(5)), policy) == "signature-token"


def test_an_authority_signs_no_tokens():
    _, middle, root = made.chain()
    files = made.pki((middle, root), key=made.rsa_key(20))
    assert code(files, made.under_root()) == "chain-leaf"
    weak = made.certificate("leaf", made.rsa_key(7, 1024), "middle 0", made.rsa_key(20), False)
    files = made.pki((weak, middle, root), key=made.rsa_key(7, 1024))
    assert code(files, made.under_root()) == "signature-key"
    plain = made.certificate(
        "leaf", made.rsa_key(), "middle 0", made.rsa_key(20), False, usage=False
    )
    assert code(made.pki((plain, middle, root)), made.under_root()) == ""


@pytest.mark.parametrize("start", [NOW - 30, NOW - 3 * 86400])
def test_certificates_have_times_of_their_own(start):
    _, middle, root = made.chain()
    leaf = made.certificate(
        "leaf", made.rsa_key(), "middle 0", made.rsa_key(20), False, start=start, days=2
    )
    found = certificate_of(leaf, "leaf")
    files = made.pki((leaf, middle, root))
    for now in (NOW - 60, NOW, NOW + 3540):
        wanted = ("validity-not-yet" if now < found.not_before else
                  "validity-expired" if now > found.not_after else "")  # fmt: skip
        assert code(files, made.under_root(), now) == wanted
        assert judge(files, made.under_root(), now).crypto == "valid"


# --- certificates of keys in a set ---------------------------------------------------------------


def certified(path=None, key=None, **members):
    key = made.rsa_key() if key is None else key
    certificates = made.chain()[:2] if path is None else path
    found = made.jwk(key, x5c=made.x5c(certificates), **members)
    return made.files(abi.MAA) | {"jwks.json": made.key_set(found)}


def middle_pin(number=0):
    return verify.spki(made.rsa_key(20 + number).public_key())


def test_a_key_under_a_pinned_authority():
    policy = made.pinned(abi.MAA, keys=(), roots=(middle_pin(),))
    found = judge(certified(), policy)
    assert found.decision == "accept" and found.claims.root == middle_pin()
    assert code(certified(), made.pinned(abi.MAA, keys=(), roots=(middle_pin(1),))) == (
        "root-key-unpinned"
    )
    assert code(made.files(abi.MAA), policy) == "root-key-unpinned"
    rooted = made.pinned(abi.MAA, keys=(), roots=(made.root_pin(),))
    assert code(certified(), rooted) == "root-key-unpinned"
    assert code(certified(made.chain()), rooted) == ""
    pem = f"-----BEGIN CERTIFICATE-----\n{made.x5c(made.chain())[2]}\n-----END CERTIFICATE-----\n"
    assert code(certified() | {"root.pem": pem.encode()}, rooted) == ""


def test_certificates_of_a_key_that_do_not_hold():
    policy = made.pinned(abi.MAA, keys=(), roots=(middle_pin(),))
    forged = made.certificate("leaf", made.rsa_key(), "middle 0", made.rsa_key(5), False)
    middle = made.chain()[1]
    assert code(certified((forged, middle)), policy) == "chain-signature"
    other = made.certificate("leaf", made.rsa_key(9), "middle 0", made.rsa_key(20), False)
    assert code(certified((other, middle)), policy) == "chain-key"
    old = made.certificate(
        "leaf", made.rsa_key(), "middle 0", made.rsa_key(20), False, NOW - 9 * 86400, 2
    )
    assert code(certified((old, middle)), policy) == "validity-expired"
    ca = made.certificate("leaf", made.rsa_key(), "middle 0", made.rsa_key(20), True)
    assert code(certified((ca, middle)), policy) == "chain-leaf"
    for x5c in ("x", [1], ["AA"], ["AAAA"] * 9):
        files = made.files(abi.MAA)
        files["jwks.json"] = made.key_set(made.jwk(made.rsa_key(), x5c=x5c))
        assert code(files, policy).startswith("parse-")


# --- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", TEES)
def test_times_are_those_of_the_token(tee):
    claims = made.CLAIMS[tee]
    files, policy = made.files(tee), made.pinned(tee)
    for now, wanted in (
        (claims["iat"] - 1, "validity-not-yet"),
        (claims["iat"], ""),
        (claims["exp"], ""),
        (claims["exp"] + 1, "validity-expired"),
        (float("nan"), "validity-not-yet"),
    ):
        found = judge(files, policy, now)
        assert found.code.removeprefix("evidence.") == wanted
        assert found.crypto == "valid"
    late = made.files(tee, nbf=NOW + 5)
    assert code(late, policy) == "validity-not-yet"
    future = made.files(tee, iat=NOW + 5)
    assert code(future, policy) == "validity-not-yet"


# --- detached bundles ---------------------------------------------------------------------------


def test_a_bundle_of_devices():
    devices = {"GPU-0": made.device(), "GPU-1": made.device(), "SWITCH-0": made.device("switch")}
    found = judge(made.detached(devices), made.pinned(abi.NRAS))
    assert (found.tee, found.decision) == (abi.NRAS, "accept")


def bundle(files):
    return json.loads(files["detached_eat.json"])


def packed(files, value):
    return files | {"detached_eat.json": json.dumps(value).encode()}


def test_devices_that_the_overall_token_does_not_name():
    policy = made.pinned(abi.NRAS)
    files = made.detached()
    other = bundle(made.detached({"GPU-0": made.device(measres="fail")}))
    value = bundle(files)
    for devices, words in (
        ({"GPU-0": other[1]["GPU-0"]}, "another digest"),
        ({"GPU-1": value[1]["GPU-0"]}, "names no GPU-1"),
        (value[1] | {"GPU-1": other[1]["GPU-0"]}, "names no GPU-1"),
    ):
        found = judge(packed(files, [value[0], devices]), policy)
        assert (found.crypto, found.code) == ("invalid", "evidence.endorsement-submods")
        assert words in found.message
        without = packed(files, [value[0], devices])
        del without["jwks.json"]  # what needs no key is looked at before keys
        assert judge(without, policy).crypto == "invalid"


def test_a_device_whose_token_is_left_out():
    files = made.detached()
    left = packed(files, [bundle(files)[0], {}])
    found = judge(left, made.pinned(abi.NRAS))
    assert (found.crypto, found.decision) == ("valid", "needs-collateral")
    assert found.code == "evidence.needs-device-tokens"


def test_the_overall_token_alone():
    files = made.detached()
    alone = {"token.jwt": bundle(files)[0][1].encode(), "jwks.json": files["jwks.json"]}
    found = judge(alone, made.pinned(abi.NRAS))
    assert (found.tee, found.code) == (abi.NRAS, "evidence.needs-device-tokens")


def test_every_token_of_a_bundle_is_verified():
    stranger = made.ec_key(9)
    mixed = made.detached({"GPU-0": made.device()}, stranger)
    files = made.detached()
    value, other = bundle(files), bundle(mixed)
    submods = jws.strict_object(jws.parse(other[0][1], "x").payload, "x")["submods"]
    good = made.detached(submods=submods)
    found = judge(packed(good, [bundle(good)[0], other[1]]), made.pinned(abi.NRAS))
    assert found.code == "evidence.signature-token"
    assert value[0] != other[0]
    hs = json.loads(files["detached_eat.json"])
    hs[0][1] = made.token(made.device(), "HS256", made.rsa_key())
    found = judge(packed(files, hs), made.pinned(abi.NRAS))
    assert found.code == "evidence.signature-algorithm"


def test_devices_have_times_of_their_own():
    late = made.detached({"GPU-0": made.device(exp=NOW - 1)})
    assert code(late, made.pinned(abi.NRAS)) == "validity-expired"


def test_the_twin_of_a_signature_gets_the_same_answer():
    order = jws.CURVES["P-384"][2]
    files = made.detached()
    value = bundle(files)

    def twin(token):
        found = jws.parse(token, "x")
        s = order - int.from_bytes(found.signature[48:], "big")
        signature = found.signature[:48] + s.to_bytes(48, "big")
        return f"{found.signed.decode()}.{jws.url_encode(signature)}"

    policy = made.pinned(abi.NRAS)
    turned = packed(files, [["JWT", twin(value[0][1])], value[1]])
    ours, theirs = judge(files, policy), judge(turned, policy)
    assert ours.checks == theirs.checks and ours.claims == theirs.claims
    # The overall token hashes a device's whole token, signature included.
    device = packed(files, [value[0], {"GPU-0": twin(value[1]["GPU-0"])}])
    assert code(device, policy) == "endorsement-submods"


def test_keys_on_other_curves():
    key = made.ec_key(3, ec.SECP256R1)
    files = {"token.jwt": made.token(made.OTHER, "ES384", key).encode()}
    files["jwks.json"] = made.key_set(key)
    assert code(files, made.pinned(abi.OTHER)) == "signature-key"

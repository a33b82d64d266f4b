"""Compact JWS, strict JSON and JWK sets."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from casemate.attest import jws
from casemate.attest.verdict import Refused
from support import tokens as made

N = (
    "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPeb"
    "WKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368Q"
    "QMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2"
    "NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
)


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(Refused) as e:
        call(*args, **kwargs)
    return e.value.code.removeprefix("evidence.")


@pytest.mark.parametrize("text", ["QQ==", "QR", "Q", "QUI\n", "QU+I", "QU I", "QÄ"])
def test_other_spellings_of_base64url_are_refused(text):
    assert jws.url_decode("QQ", "x") == b"A"
    assert refused(jws.url_decode, text, "x") == "parse-base64"


@pytest.mark.parametrize("text", ["QR==", "QQ", "QQ==\n", "QU_I", "="])
def test_other_spellings_of_base64_are_refused(text):
    assert jws.b64_decode("QQ==", "x") == b"A"
    assert refused(jws.b64_decode, text, "x") == "parse-base64"


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', '{"a": NaN}', '{"a": Infinity}',
        '{"a": 1e999}', '{"a": 9007199254740992}', '{"a": 1} x', "\ufeff{}", '{"a": "\\ud800"}',
        "{'a': 1}", '{"a": 01}', "", "[" * 25 + "]" * 25, '{"a":' * 2000 + "1" + "}" * 2000,
        '{"a": "\x01"}', '{"\\ud800": 1}',
    ],
)  # fmt: skip
def test_json_that_readers_disagree_on_is_refused(text):
    assert refused(jws.strict_json, text.encode("utf-8"), "x") == "parse-json"


def test_json_as_it_should_be():
    deep = '[[["]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]", 1.5, "\\u00e9"]]]'
    assert jws.strict_json(deep.encode(), "x")[0][0][2] == "é"
    assert refused(jws.strict_json, b'{"a": "\xff"}', "x") == "parse-json"
    assert refused(jws.strict_json, b"[1, 2, 3]", "x", limit=8) == "parse-too-large"
    assert refused(jws.strict_object, b"[1]", "x") == "parse-json"


def test_a_token_is_taken_apart():
    text = made.token({"a": 1}, jku="https://elsewhere.test", x5u="https://elsewhere.test")
    found = jws.parse(text, "x")
    assert (found.alg, found.typ, found.kid) == ("RS256", "JWT", "k1")
    assert found.payload == b'{"a": 1}' and found.ignored == ("jku", "x5u")
    assert found.signed.decode() + "." + jws.url_encode(found.signature) == text


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"]}, {"b64": False}, {"zip": "DEF"}, {"enc": "A256GCM"},
        {"jwk": {"kty": "oct", "k": "AA"}}, {"typ": "JWE"}, {"typ": 5}, {"alg": None}, {"alg": 1},
        {"kid": ""}, {"kid": ["k1"]}, {"x5c": []}, {"x5c": "MIIB"}, {"x5c": [1]},
        {"x5c": ["AA=="] * 9},
    ],
)  # fmt: skip
def test_headers_that_change_the_rules_are_refused(header):
    assert refused(jws.parse, made.token({}, **header), "x") == "parse-header"


@pytest.mark.parametrize("typ", [None, "JWT", "jwt", "eat+jwt", "application/eat+jwt"])
def test_types_of_tokens(typ):
    assert jws.parse(made.token({}, typ=typ), "x").typ == (typ or "")


def test_other_forms_of_tokens_are_refused():
    good = made.token({"a": 1})
    head, body, sign = good.split(".")
    for text in (f"{head}.{body}", f"{good}.{sign}", f"{good}.."):
        assert refused(jws.parse, text, "x") == "parse-token"
    for text in (f"{head}.{body}.{sign}=", f" {good}", f"{good}\n", f"{head}.{body}é.{sign}"):
        assert refused(jws.parse, text, "x") == "parse-base64"
    assert refused(jws.parse, f"{jws.url_encode(b'{')}.{body}.{sign}", "x") == "parse-json"
    assert refused(jws.parse, "a" * (jws.MAX_BYTES + 1), "x") == "parse-too-large"


@pytest.mark.parametrize("alg", sorted(jws.ALGORITHMS))
def test_every_algorithm_holds_and_bites(alg):
    key = made.key_for(alg)
    token = jws.parse(made.token({"a": 1}, alg), "x")
    jws.check_signature(token, key.public_key(), {alg}, "x")
    stranger = made.key_for(alg, 1).public_key()
    assert refused(jws.check_signature, token, stranger, {alg}, "x") == "signature-token"
    other = set(jws.ALGORITHMS) - {alg}
    code = refused(jws.check_signature, token, key.public_key(), other, "x")
    assert code == "signature-algorithm"
    wrong = made.ec_key() if not alg.startswith("ES") else made.rsa_key()
    code = refused(jws.check_signature, token, wrong.public_key(), {alg}, "x")
    assert code == "signature-key"
    for signature in (b"", token.signature[:-1], token.signature + b"\0"):
        cut = signed_with(token, signature)
        code = refused(jws.check_signature, cut, key.public_key(), {alg}, "x")
        assert code == "signature-token"


def test_curves_do_not_stand_for_each_other():
    token = jws.parse(made.token({}, "ES256"), "x")
    key = made.ec_key().public_key()
    assert refused(jws.check_signature, token, key, {"ES256"}, "x") == "signature-key"


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "HS384", "RS1", "ES512", "EdDSA"])
def test_none_and_hmac_are_no_algorithms(alg):
    token = jws.parse(made.token({}, alg, made.rsa_key()), "x")
    admitted = set(jws.ALGORITHMS)
    assert refused(jws.check_algorithm, token, admitted, "x") == "signature-algorithm"


def signed_with(token: jws.Jws, signature: bytes) -> jws.Jws:
    head = token.raw.rpartition(".")[0]
    return jws.parse(f"{head}.{jws.url_encode(signature)}", "x")


def test_the_numbers_of_an_ecdsa_signature():
    token = jws.parse(made.token({}, "ES384"), "x")
    key, order = made.ec_key().public_key(), jws.CURVES["P-384"][2]
    r, s = token.signature[:48], int.from_bytes(token.signature[48:], "big")
    twin = r + (order - s).to_bytes(48, "big")
    jws.check_signature(signed_with(token, twin), key, {"ES384"}, "x")
    bad = [
        b"\0" * 96,
        r + b"\0" * 48,
        b"\0" * 48 + token.signature[48:],
        token.signature + b"\0",
        token.signature[:-1],
        b"",
        r + order.to_bytes(48, "big"),
        b"\0" + token.signature[:95],
    ]
    for signature in bad:
        found = signed_with(token, signature)
        assert refused(jws.check_signature, found, key, {"ES384"}, "x") == "signature-token"


def test_weak_keys_are_refused():
    for key in (made.rsa_key(0, 1024), made.ec_key(0, ec.SECP521R1), object()):
        public = key.public_key() if hasattr(key, "public_key") else key
        assert refused(jws.usable, public, "x") == "signature-key"
    weak = made.jwk(made.rsa_key(0, 1024))
    (found,) = jws.key_set(made.key_set(weak), "x")
    assert refused(jws.jwk_key, found, "x") == "signature-key"


def test_the_thumbprint_of_the_rfc():
    (key,) = jws.key_set(json.dumps({"keys": [{"kty": "RSA", "n": N, "e": "AQAB"}]}).encode(), "x")
    pin = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"  # RFC 7638 section 3.1
    assert jws.thumbprint(jws.jwk_key(key, "x")) == pin


@pytest.mark.parametrize("key", [made.rsa_key(), made.ec_key(), made.ec_key(0, ec.SECP256R1)])
def test_keys_survive_the_way_through_a_set(key):
    (found,) = jws.key_set(made.key_set(key), "x")
    assert jws.jwk_key(found, "x").public_numbers() == key.public_key().public_numbers()


@pytest.mark.parametrize(
    "data",
    [
        b"{}", b'{"keys": []}', b'{"keys": 1}', b'{"keys": [1]}', b"[]",
        b'{"keys": [{"kty": "oct", "k": "AA"}]}', b'{"keys": [{"kty": "RSA", "d": "AA"}]}',
        b'{"keys": [{"kty": "EC", "kid": "a"}, {"kty": "EC", "kid": "a"}]}',
        b'{"keys": [{"kty": "EC", "kid": 1}]}', b'{"keys": [{"kty": []}]}',
        json.dumps({"keys": [{"kty": "EC", "kid": str(n)} for n in range(65)]}).encode(),
    ],
)  # fmt: skip
def test_sets_that_nobody_publishes_are_refused(data):
    assert refused(jws.key_set, data, "x") in ("parse-jwks", "parse-json")


EC = made.jwk(made.ec_key())
RSA = made.jwk(made.rsa_key())


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "RSA"}, RSA | {"e": "Aw=="}, RSA | {"e": "AQ"}, RSA | {"e": "AAEAAQ"},
        RSA | {"n": "AA" + RSA["n"]}, RSA | {"n": 5}, RSA | {"e": "AQAAAAAB"},
        RSA | {"n": jws.url_encode(b"\xff" * 2000)}, EC | {"crv": "P-521"}, EC | {"x": EC["y"]},
        EC | {"x": "AA"}, EC | {"y": None}, {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
        EC | {"x": base64.b64encode(b"\xff" * 48).decode()},
    ],
)  # fmt: skip
def test_keys_that_are_none_are_refused(key):
    (found,) = jws.key_set(made.key_set(key), "x")
    assert refused(jws.jwk_key, found, "x") in ("parse-jwk", "parse-base64")

"""Signed requests: one form, this request, this boot."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from http_message_signatures import HTTPMessageSigner, InvalidSignature, algorithms
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import requests
from casemate.seal.identity import Identity
from casemate.spec.errors import AuthError, UsageError

ANNA, OTTO = Identity.generate("Anna"), Identity.generate("Otto")
BOOT, NONCE = bytes(range(16)), bytes(16)
URL = "https://enclave.example:8443/v1/jobs?from=1"
BODY = b'{"quote":"sha256:00"}'
BOOK = {ANNA.id: ANNA.public, OTTO.id: OTTO.public}


def signed(identity=ANNA, method="POST", url=URL, body=BODY, boot=BOOT, nonce=NONCE):
    headers = {"Content-Type": "application/json"}
    return requests.sign(identity, method, url, headers, body, boot=boot, nonce=nonce)


def verify(headers, method="POST", url=URL, body=BODY, boot=BOOT, lookup=BOOK.get):
    return requests.verify(method, url, headers, body, boot=boot, lookup=lookup)


def code(headers, **changes):
    with pytest.raises(AuthError) as e:
        verify(headers, **changes)
    return e.value.code


def test_a_signed_request_names_its_identity():
    assert verify(signed()) == ANNA.id
    assert verify(list(signed(OTTO).items())) == OTTO.id
    assert verify({k.title(): v for k, v in signed().items()}) == ANNA.id


def test_an_empty_body_is_signed_too():
    headers = signed(method="GET", body=b"")
    assert verify(headers, method="GET", body=b"") == ANNA.id
    assert code(headers, method="GET", body=b"x") == "auth.content-digest"


def test_the_signature_base_is_that_of_rfc_9421():
    """Section 2.5, written by hand."""
    headers = signed()
    params = headers["signature-input"].removeprefix("casemate=")
    base = (
        '"@method": POST\n'
        f'"@target-uri": {URL}\n'
        f'"content-digest": {headers["content-digest"]}\n'
        f'"casemate-boot": {BOOT.hex()}\n'
        f'"casemate-nonce": {NONCE.hex()}\n'
        f'"@signature-params": {params}'
    )
    signature = base64.b64decode(headers["signature"].removeprefix("casemate=:").removesuffix(":"))
    Ed25519PublicKey.from_public_bytes(ANNA.public.sign_key).verify(signature, base.encode())
    digest = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    assert headers["content-digest"] == f"sha-256=:{digest}:"


def test_the_example_of_rfc_9421_b_2_6_verifies():
    key = load_pem_public_key(
        b"-----BEGIN PUBLIC KEY-----\n"
        b"MCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=\n"
        b"-----END PUBLIC KEY-----\n"
    )
    headers = {
        "Date": "Tue, 20 Apr 2021 02:07:55 GMT",
        "Content-Type": "application/json",
        "Content-Length": "18",
        "Signature-Input": 'sig-b26=("date" "@method" "@path" "@authority" "content-type"'
        ' "content-length");created=1618884473;keyid="test-key-ed25519"',
        "Signature": "sig-b26=:wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0"
        "w6vuQv5lIp5WPpBKRCw==:",
    }
    verifier = requests._Verifier(
        signature_algorithm=algorithms.ED25519, key_resolver=requests._Keys(key)
    )
    url = "https://example.com/foo?param=Value&Pet=dog"
    (result,) = verifier.verify(requests._Message("POST", url, headers), max_age=None)
    assert result.parameters["keyid"] == "test-key-ed25519"
    with pytest.raises(InvalidSignature):
        verifier.verify(requests._Message("PUT", url, headers), max_age=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "GET"},
        {"url": URL + "2"},
        {"url": URL.replace("https", "http")},
        {"url": URL.replace("8443", "8444")},
        {"url": URL.split("?")[0]},
        {"url": "no url at all"},
        {"method": "post "},
    ],
)
def test_another_request_is_refused(changes):
    assert code(signed(), **changes) == "auth.signature"


def test_another_body_is_refused():
    assert code(signed(), body=BODY + b" ") == "auth.content-digest"
    swapped = signed() | {"content-digest": signed(body=b"other")["content-digest"]}
    assert code(swapped, body=b"other") == "auth.signature"


def test_another_start_of_the_server_is_refused():
    assert code(signed(boot=bytes(16))) == "auth.boot-stale"
    assert code(signed(boot=bytes(16)) | {"casemate-boot": BOOT.hex()}) == "auth.signature"


def test_a_changed_nonce_is_refused():
    assert code(signed() | {"casemate-nonce": "11" * 16}) == "auth.signature"
    for nonce in ("", "00" * 15, "00" * 17, "AA" * 16, "zz" * 16, "00" * 16 + "\n"):
        assert code(signed() | {"casemate-nonce": nonce}) == "auth.nonce"


def test_strangers_and_impostors_are_refused():
    stranger = Identity.generate("stranger")
    assert code(signed(stranger)) == "auth.unknown-identity"
    as_anna = signed(OTTO)["signature-input"].replace(OTTO.id, ANNA.id)
    assert code(signed(OTTO) | {"signature-input": as_anna}) == "auth.signature"
    assert code(signed(), lookup=lambda _: OTTO.public) == "auth.unknown-identity"


def test_an_unsigned_request_is_refused():
    assert code({}) == "auth.signature-missing"
    for name in ("signature", "signature-input"):
        assert code({k: v for k, v in signed().items() if k != name}) == "auth.signature-missing"
    for name in ("content-digest", "casemate-boot", "casemate-nonce"):
        assert code({k: v for k, v in signed().items() if k != name}) == "auth.signature-form"


@pytest.mark.parametrize("name", requests._SIGNED)
def test_a_repeated_header_is_refused(name):
    headers = signed()
    pairs = [*headers.items(), (name.title(), headers[name])]
    assert code(pairs) == "auth.signature-form"


COVERED = '("@method" "@target-uri" "content-digest" "casemate-boot" "casemate-nonce")'


@pytest.mark.parametrize(
    "changed",
    [
        lambda s: s.replace(' "content-digest"', ""),
        lambda s: s.replace('"@method" "@target-uri"', '"@target-uri" "@method"'),
        lambda s: s.replace('"@target-uri"', '"@path"'),
        lambda s: s.replace('"casemate-nonce"', '"casemate-nonce" "date"'),
        lambda s: s.replace("casemate=(", "other=("),
        lambda s: s + ', b=("@method");created=1;keyid="x";alg="ed25519"',
        lambda s: s + ";expires=1",
        lambda s: s + ';tag="x"',
        lambda s: s.replace(';alg="ed25519"', ""),
        lambda s: s.replace("ed25519", "hmac-sha256"),
        lambda s: s.replace('"content-digest"', '"content-digest";sf'),
        lambda s: s + " ",
        lambda s: s + "\n",
        lambda s: "x" * 2000,
        lambda s: "",
    ],
)
def test_other_forms_of_the_signature_input_are_refused(changed):
    headers = signed()
    assert COVERED in headers["signature-input"]
    headers["signature-input"] = changed(headers["signature-input"])
    assert code(headers) == "auth.signature-form"


def test_fewer_covered_components_are_refused_though_well_signed():
    """A correct signature over the method alone must not count for the body."""
    headers = {"casemate-boot": BOOT.hex(), "casemate-nonce": NONCE.hex()}
    headers["content-digest"] = signed()["content-digest"]
    message = requests._Message("POST", URL, headers)
    signer = HTTPMessageSigner(signature_algorithm=algorithms.ED25519)
    prepared = signer.prepare(
        message,
        key_id=ANNA.id,
        label="casemate",
        covered_component_ids=("@method",),
        use_existing_digest=True,
    )
    signer.apply(message, prepared, ANNA.sign(prepared.signature_base))
    assert code(headers) == "auth.signature-form"


@pytest.mark.parametrize("name", ["signature", "content-digest"])
def test_every_changed_character_is_refused(name):
    """Also in the unused bits of base64: nothing has two spellings."""
    headers = signed()
    for at, char in enumerate(headers[name]):
        for other in "AB+=:":
            text = headers[name][:at] + other + headers[name][at + 1 :]
            if other != char:
                assert code(headers | {name: text}).startswith("auth.")


def test_all_spellings_of_base64_bytes_but_one_are_refused():
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for length, pattern in ((64, requests._SIGNATURE), (32, requests._DIGEST)):
        start = "casemate" if length == 64 else "sha-256"
        for last in range(256):
            text = base64.b64encode(bytes(length - 1) + bytes([last])).decode()
            assert pattern.fullmatch(f"{start}=:{text}:")
            at = len(text.rstrip("=")) - 1
            twin = alphabet[alphabet.index(text[at]) + 1]
            twin = text[:at] + twin + text[at + 1 :]
            assert base64.b64decode(twin) == base64.b64decode(text)
            assert not pattern.fullmatch(f"{start}=:{twin}:")


@pytest.mark.parametrize("created", ["0", "99999999999", "1"])
def test_no_clock_decides(created):
    """The date is signed, but neither old nor future dates are refused for themselves."""
    headers = {"casemate-boot": BOOT.hex(), "casemate-nonce": NONCE.hex()}
    headers["content-digest"] = signed()["content-digest"]
    params = f'{COVERED};created={created};keyid="{ANNA.id}";alg="ed25519"'
    base = "".join(
        f'"{name}": {text}\n'
        for name, text in (
            ("@method", "POST"),
            ("@target-uri", URL),
            ("content-digest", headers["content-digest"]),
            ("casemate-boot", BOOT.hex()),
            ("casemate-nonce", NONCE.hex()),
        )
    )
    signature = base64.b64encode(ANNA.sign((base + f'"@signature-params": {params}').encode()))
    headers["signature-input"] = "casemate=" + params
    headers["signature"] = f"casemate=:{signature.decode()}:"
    assert verify(headers) == ANNA.id


def test_signing_replaces_old_signatures_and_takes_a_fresh_nonce():
    first = requests.sign(ANNA, "post", URL, {}, BODY, boot=BOOT)
    second = requests.sign(ANNA, "post", URL, first, BODY, boot=BOOT)
    assert verify(second) == ANNA.id
    assert first["casemate-nonce"] != second["casemate-nonce"]


def test_bad_arguments_of_the_signer():
    with pytest.raises(UsageError) as e:
        requests.sign(ANNA, "GET", "/relative", {}, b"", boot=BOOT)
    assert e.value.code == "usage.url"
    with pytest.raises(ValueError):
        requests.sign(ANNA, "GET", URL, {}, b"", boot=BOOT, nonce=b"short")


def test_a_verifier_that_skips_the_body_would_be_caught(monkeypatch):
    """Seeded bug: the digest of the body is not compared."""
    monkeypatch.setattr(requests.ContentDigest, "verify", lambda *a, **k: None)
    assert verify(signed(), body=b"swapped") == ANNA.id  # what test_another_body must refuse


@given(st.text(max_size=20), st.text(max_size=40), st.sampled_from(requests._SIGNED), st.text())
def test_no_foreign_exception_leaks(method, url, name, text):
    headers = signed()
    for changed in ({"method": method}, {"url": url}, {"url": f"https://{url}"}):
        assert code(headers, **changed) == "auth.signature"
    assert code(headers | {name: text}).startswith("auth.")

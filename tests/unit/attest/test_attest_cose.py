"""COSE_Sign1: examples of the COSE working group, messages made here, and what is refused."""

import hashlib

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from casemate.attest import cose
from casemate.attest.verdict import Refused
from support import nitro
from support.mutation import COUNT, fuzz

CONTENT = b"This is the content."
# cose-wg/Examples: sign1-tests/sign-pass-02 and -03 (one key), ecdsa-examples/ecdsa-sig-03.
P256 = (
    "bac5b11cad8f99f9c72b05cf4b9e26d244dc189f745228255a219a86d6a09eff",
    "20138bf82dc1b6d562be0fa54ab7804a3a64b6d72ccfed6b6fb6ed28bbfc117e",
)
P521 = (
    "0072992cb3ac08ecf3e5c63dedec0d51a8c1f79ef2f82f94f3c737bf5de7986671eac625fe8257bbd0394644caaa3aaf"
    "8f27a4585fbbcad0f2457620085e5c8f42ad",
    "01dca6947bce88bc5790485ac97427342bc35f887d86d65a089377e247e60baa55e4e8501e2ada5724ac51d6909008033e"
    "bc10ac999b9d7f5cc2519f3fe1ea1d9475",
)
EXAMPLES = {
    "sign-pass-02": (
        "D28443A10126A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5B"
        "A5B8DCA25DAB3C2E56A551CE5705B793914348E155388B10C4F1B59A6733EAB416870A945111A4B2FBDBEF33A772"
        "34B1DEFF2F9B",
        P256, ec.SECP256R1, -7, "ES256", "11aa22bb33cc44dd55006699",
    ),
    "sign-pass-03": (
        "8443A10126A10442313154546869732069732074686520636F6E74656E742E5840EAE868ECC176883766C5DC5BA5"
        "B8DCA25DAB3C2E56A551CE5705B793914348E19F43D6C6BA654472DA301B645B293C9BA939295B97C4BDB847782B"
        "FF384C5794",
        P256, ec.SECP256R1, -7, "ES256", "",
    ),
    "ecdsa-sig-03": (
        "D28444A1013823A104581E62696C626F2E62616767696E7340686F626269746F6E2E6578616D706C655454686973"
        "2069732074686520636F6E74656E742E5884000F348009BADC7DA478150AA7FA06DFD812CDF826344F17C7330563"
        "573D8F97F7A966924C3D88B108907235476E3F6BEA9F3890027792B0F94E905C217227CF064E00A6BC6A5187D0DF"
        "9B1DB7675AECFC678CE4692A8121EB8170F3592A859D518FD3B823091AAB22E6C41EB97ED92127CE8C46DCC715A2"
        "47CB78921FAD1E19133AFC30",
        P521, ec.SECP521R1, -36, "ES512", "",
    ),
}  # fmt: skip

RSA = rsa.generate_private_key(65537, 2048)
HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
NUMBERS = {name: number for number, (name, _) in cose.ALGORITHMS.items()}
CURVES = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
# Half of a signature in bytes, and the curve's order (FIPS 186-5, SP 800-186).
SIZES = {"ES256": 32, "ES384": 48, "ES512": 66}
ORDERS = {
    "ES256": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "ES384": nitro.P384_ORDER,
    "ES512": 2**521
    - 0x5AE79787C40D069948033FEB708F65A2FC44A36477663B851449048E16EC79BF7,
}  # fmt: skip


def key_for(name):
    return nitro.key(name, CURVES[name]) if name in CURVES else RSA


def signature(name, signed):
    digest, signer = HASHES[name[2:]], key_for(name)
    if name in CURVES:
        r, s = utils.decode_dss_signature(signer.sign(signed, ec.ECDSA(digest)))
        return r.to_bytes(SIZES[name], "big") + s.to_bytes(SIZES[name], "big")
    scheme = (
        padding.PSS(padding.MGF1(digest), digest.digest_size)
        if name.startswith("PS")
        else padding.PKCS1v15()
    )
    return signer.sign(signed, scheme, digest)


def message(name="ES384", *, protected=None, unprotected=None, payload=CONTENT):
    header = cbor2.dumps({1: NUMBERS[name]} | (protected or {}))
    signed = cbor2.dumps(["Signature1", header, b"", payload])
    return [header, unprotected or {}, payload, signature(name, signed)]


def parse(parts):
    return cose.parse(parts if isinstance(parts, bytes) else cbor2.dumps(parts), "the message")


def verify(parts, name="ES384", key=None, **more):
    public = (key or key_for(name)).public_key()
    return cose.verify(parse(parts), public, "the message", (NUMBERS[name],), **more)


def refused(call, *args, **more):
    with pytest.raises(Refused) as e:
        call(*args, **more)
    return e.value.code.removeprefix("evidence.")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_working_group(name):
    data, (x, y), curve, number, algorithm, external = EXAMPLES[name]
    key = ec.EllipticCurvePublicNumbers(int(x, 16), int(y, 16), curve()).public_key()
    found = parse(bytes.fromhex(data))
    assert found.payload == CONTENT
    assert found.tagged == data.startswith("D2")
    assert list(found.unprotected) == [cose.KID]
    aad = bytes.fromhex(external)
    assert cose.verify(found, key, name, (number,), external_aad=aad) == algorithm
    code = refused(cose.verify, found, key, name, (number,), external_aad=aad + b"x")
    assert code == "signature-cose"


@pytest.mark.parametrize("name", NUMBERS)
def test_every_algorithm(name):
    parts = message(name)
    assert verify(parts, name) == name
    assert verify(cbor2.CBORTag(18, parts), name) == name
    changed = [*parts[:2], CONTENT + b"!", parts[3]]
    assert refused(verify, changed, name) == "signature-cose"
    assert refused(verify, changed, name, code="endorsement-x") == "endorsement-x"
    for other in NUMBERS:
        if other != name:
            assert refused(verify, parts, other) == "signature-algorithm"
            # The right header over another algorithm's signature.
            forged = [cbor2.dumps({1: NUMBERS[name]}), {}, CONTENT, message(other)[3]]
            code = refused(verify, forged, name, key_for(name))
            assert code in ("signature-cose", "parse-signature")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_key_of_another_kind(name):
    for other in NUMBERS:
        if key_for(other) is not key_for(name):
            assert refused(verify, message(name), name, key_for(other)) == "signature-key"


def test_small_rsa_keys_are_refused():
    small = rsa.generate_private_key(65537, 1024)
    assert refused(verify, message("PS256"), "PS256", small) == "signature-key"


@pytest.mark.parametrize("name", CURVES)
def test_r_and_s_are_of_the_curves_size_and_range(name):
    *start, good = message(name)
    size, order = SIZES[name], ORDERS[name]
    r, s = good[:size], good[size:]
    # The curve's equation says nothing on these; only the twin has the same answer.
    assert verify([*start, r + (order - int.from_bytes(s, "big")).to_bytes(size, "big")], name)
    for bad in (b"", r, good[:-1], good + b"\0", b"\0" + good, b"\0" + r + b"\0" + s):
        assert refused(verify, [*start, bad], name) == "parse-signature"
    top = (1 << 8 * size) - 1
    for value in (0, order, order + 1, top):
        written = value.to_bytes(size, "big")
        assert refused(verify, [*start, written + s], name) == "parse-signature"
        assert refused(verify, [*start, r + written], name) == "parse-signature"
    for value in (1, order - 1):
        written = value.to_bytes(size, "big")
        assert refused(verify, [*start, written + s], name) == "signature-cose"


def test_pss_has_the_salt_of_the_algorithm():
    header = cbor2.dumps({1: NUMBERS["PS384"]})
    signed = cbor2.dumps(["Signature1", header, b"", CONTENT])
    digest = hashes.SHA384()
    for salt, good in ((48, True), (0, False), (32, False)):
        made = RSA.sign(signed, padding.PSS(padding.MGF1(digest), salt), digest)
        parts = [header, {}, CONTENT, made]
        if good:
            verify(parts, "PS384")
        else:
            assert refused(verify, parts, "PS384") == "signature-cose"


GOOD = message()


@pytest.mark.parametrize(
    "parts",
    [
        b"", b"\xd2", cbor2.dumps(GOOD) + b"\0", cbor2.dumps(GOOD)[:-1], [], GOOD[:3],
        [*GOOD, b""], {0: GOOD}, cbor2.CBORTag(98, GOOD),
        cbor2.CBORTag(18, cbor2.CBORTag(18, GOOD)),
        b"\x98\x04" + cbor2.dumps(GOOD)[1:], b"\x9f" + cbor2.dumps(GOOD)[1:] + b"\xff",
        b"\xd8\x12" + cbor2.dumps(GOOD),
        [{1: -35}, *GOOD[1:]], [GOOD[0], None, *GOOD[2:]], [GOOD[0], b"", *GOOD[2:]],
        [*GOOD[:2], None, GOOD[3]], [*GOOD[:2], "text", GOOD[3]], [*GOOD[:3], None],
        [b"", *GOOD[1:]], [b"\xa0", *GOOD[1:]], [b"\x80", *GOOD[1:]], [b"\xa1", *GOOD[1:]],
        [GOOD[0] + b"\0", *GOOD[1:]], [b"\xbf\x01\x38\x22\xff", *GOOD[1:]],
        [b"\xa1\x01\x39\x00\x22", *GOOD[1:]], [b"\xa2\x01\x38\x22\x01\x38\x22", *GOOD[1:]],
        [b"\xa1\x01\xf5", *GOOD[1:]], [cbor2.dumps({1: "ES384"}), *GOOD[1:]],
        [b"", {1: -35}, *GOOD[2:]], [GOOD[0], {1: -35}, *GOOD[2:]],
        [GOOD[0], {2: [1]}, *GOOD[2:]],
        [cbor2.dumps({1: -35, 4: b"a"}), {4: b"b"}, *GOOD[2:]],
        b"\x84" + cbor2.dumps(GOOD[0]) + b"\xa2\x04\x41a\x04\x41b" + cbor2.dumps(GOOD[2])
        + cbor2.dumps(GOOD[3]),
        cbor2.dumps(GOOD) + bytes(cose.MAX_BYTES), [*GOOD[:2], bytes(cose.MAX_BYTES), GOOD[3]],
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(parts):
    parse(GOOD)
    assert refused(parse, parts) == "parse-cose"


def test_critical_parameters():
    def with_crit(critical, **more):
        return [cbor2.dumps({1: -35, 2: critical} | more), *GOOD[1:]]

    chain = {33: b"x"}
    assert parse([cbor2.dumps({1: -35, 2: [1, 33]} | chain), *GOOD[1:]]).protected[33] == b"x"
    for bad in ([], 1, None, [1, 33], [[1]], [None], [True], ["iss"], [b"x"]):
        assert refused(parse, with_crit(bad)) == "parse-cose"
    unknown = with_crit(["iss"], iss="somebody")
    assert refused(parse, unknown) == "parse-cose"
    data = cbor2.dumps(unknown)
    assert cose.parse(data, "it", understood={"iss"}).protected["iss"] == "somebody"


def test_the_unprotected_header_is_given_to_the_caller_and_signs_nothing():
    parts = message(unprotected={4: b"kid", "timestamp": b"tst"})
    assert parse(parts).unprotected == {4: b"kid", "timestamp": b"tst"}
    verify(parts)
    verify([parts[0], {}, *parts[2:]])


CERTIFICATES = [nitro.der(one.make()) for one in nitro.chain().values()][::-1]


def chained(x5chain, **more):
    parts = message(protected={33: x5chain} | more.get("x5t", {}))
    return cose.certificates(parse(parts), "the message")


def test_the_chain_in_the_header():
    assert [c.raw for c in chained(CERTIFICATES[0])] == CERTIFICATES[:1]
    assert [c.raw for c in chained(CERTIFICATES)] == CERTIFICATES
    pem = b"-----BEGIN CERTIFICATE-----\n"
    for bad in ([], CERTIFICATES[:1], None, "text", [1, 2], CERTIFICATES * 2, pem, [pem, pem]):
        assert refused(chained, bad) == "parse-cose"
    assert refused(chained, b"x") == "parse-certificate"
    bare = parse(message(unprotected={33: CERTIFICATES[0]}))
    assert refused(cose.certificates, bare, "the message") == "parse-cose"


def test_the_leafs_hash_in_the_header():
    def hashed(number, name):
        return {34: [number, hashlib.new(name, CERTIFICATES[0]).digest()]}

    for number, name in ((-16, "sha256"), (-43, "sha384"), (-44, "sha512")):
        chained(CERTIFICATES, x5t=hashed(number, name))
    other = [-16, hashlib.sha256(CERTIFICATES[1]).digest()]
    sha1 = hashed(-14, "sha1")[34]
    for bad in (other, sha1, [], None, [-16], hashed(-16, "sha384")[34], [True, b""], [-16, "x"]):
        assert refused(chained, CERTIFICATES, x5t={34: bad}) == "parse-cose"


def test_fuzzed_messages():
    seeds = [
        cbor2.dumps(message(protected={33: CERTIFICATES, 34: [-16, bytes(32)]})),
        cbor2.dumps(cbor2.CBORTag(18, message(unprotected={"timestamp": b"x"}))),
    ]

    def whole(data):
        found = parse(data)
        cose.certificates(found, "it")

    taken = fuzz(parse, seeds, seed=2)
    assert 0 < taken < COUNT
    fuzz(whole, seeds, COUNT // 4, seed=3)

"""Signatures and chain, on documents made up under a test root of AWS's form; lists and TLS
certificates are made up too, since none were captured."""

import hashlib
from datetime import timedelta

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from casemate.attest import folder
from casemate.attest.nitro import collateral
from casemate.attest.verdict import Unchecked
from support import nitro

ROOTS = nitro.policy().roots
GOOD = nitro.document()
MINUTE = timedelta(minutes=1)


def judge(data=GOOD, files=None, now=nitro.NOW, **changed):
    policy = nitro.policy(**changed)
    found = {"document.cose": data} | (files or {})
    return folder.judge(found, now=now.timestamp(), policies={"nitro": policy})


def code(*args, **more):
    judged = judge(*args, **more)
    assert judged.decision == "accept" if not judged.code else judged.decision != "accept"
    return judged.code.removeprefix("evidence.")


def outcome(judged, name):
    return next((c.outcome, c.detail) for c in judged.checks if c.name == name)


def of(**changed):
    return nitro.document(nitro.chain(**changed))


def test_a_good_document():
    judged = judge()
    assert (judged.decision, judged.crypto, judged.code) == ("accept", "valid", "")
    assert judged.claims.root == ROOTS[0]
    assert [c.name for c in judged.checks][:8] == [
        "kind", "parse", "chain", "root", "signature", "unused", "validity", "revocation",
    ]  # fmt: skip
    assert code(nitro.sign(cbor2.dumps(nitro.fields()), tagged=True)) == ""


def test_the_carried_root_is_the_pinned_one():
    root = collateral.root()
    assert (root.fingerprint,) == collateral.AWS
    assert root.name() == "aws.nitro-enclaves"
    # AWS states this digest of the certificate in its user guide.
    assert hashlib.sha256(root.raw).hexdigest() == (
        "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
    )


def test_another_root():
    assert code(roots=("ab" * 32,)) == "root-unknown"
    judged = judge(roots=collateral.AWS)
    assert (judged.crypto, judged.code) == ("invalid", "evidence.root-unknown")
    # The same names, another root's key: what a folder claims about itself is worth nothing.
    own = nitro.key("own root")
    forged = nitro.chain(root={"key": own, "signer": own}, region={"signer": own})
    pem = forged["root"].make().public_bytes(serialization.Encoding.PEM)
    data = nitro.document(forged)
    assert code(data, {"root.pem": pem}) == "root-unknown"


@pytest.mark.parametrize("name", ["root", "region", "zone", "instance", "leaf"])
def test_a_certificate_that_another_signed(name):
    assert code(of(**{name: {"signer": nitro.key("stranger")}})) == "chain-signature"


@pytest.mark.parametrize("name", ["region", "zone", "instance", "leaf"])
def test_a_certificate_of_another_issuer(name):
    issuer = nitro.chain()[name].issuer
    changed = {name: {"issuer": "stranger", "signer": nitro.key(issuer)}}
    assert code(of(**changed)) == "chain-issuer"


@pytest.mark.parametrize("name", ["root", "region", "zone", "instance"])
@pytest.mark.parametrize("change", [{"path": -1}, {"usage": ("digital_signature",)}])
def test_an_issuer_that_is_no_authority(name, change):
    assert code(of(**{name: change})) == "chain-authority"


@pytest.mark.parametrize(("name", "path"), [("root", 2), ("region", 1), ("zone", 0)])
def test_a_chain_longer_than_its_path_length(name, path):
    assert code(of(**{name: {"path": path + 1}})) == ""
    assert code(of(**{name: {"path": path}})) == "chain-authority"


@pytest.mark.parametrize(
    "change", [{"path": 0}, {"path": None}, {"usage": ("key_agreement",)}, {"usage": ("crl_sign",)}]
)
def test_the_signing_certificate_is_for_signatures_and_no_authority(change):
    assert code(of(leaf=change)) == "chain-leaf"


def test_other_algorithms_and_curves():
    for digest in (hashes.SHA256(), hashes.SHA512()):
        assert code(of(instance={"digest": digest})) == "chain-algorithm"
    other = nitro.key("other curve", ec.SECP256R1)
    assert code(of(instance={"key": other}, leaf={"signer": other})) == "chain-key"
    assert code(of(leaf={"key": other})) == "chain-key"


def test_the_bundle_is_in_order():
    fields = nitro.fields()
    for bundle in (
        fields["cabundle"][::-1], fields["cabundle"][1:], fields["cabundle"][:-1],
        fields["cabundle"] + fields["cabundle"][-1:], [fields["cabundle"][0]],
    ):  # fmt: skip
        data = nitro.sign(cbor2.dumps(fields | {"cabundle": bundle}))
        assert code(data).split("-")[0] in ("chain", "root")


def test_certificates_are_in_der():
    fields = nitro.fields()
    pem = nitro.chain()["leaf"].make().public_bytes(serialization.Encoding.PEM)
    for bad in (pem, b"x", fields["certificate"] + b"\0"):
        data = nitro.sign(cbor2.dumps(fields | {"certificate": bad}))
        assert code(data) == "parse-certificate"


def test_signatures():
    payload = cbor2.dumps(nitro.fields())
    assert code(nitro.sign(payload, nitro.key("stranger"))) == "signature-document"
    data = nitro.sign(payload)
    assert code(nitro.twin(data)) == code(data) == ""
    assert judge(nitro.twin(data)) == judge(data)
    assert code(data[:-96] + bytes(96)) == "parse-signature"
    es256 = nitro.sign(payload, protected=b"\xa1\x01\x26")
    assert code(es256) == "signature-algorithm"


def test_validity_of_each_certificate():
    for name, one in nitro.chain().items():
        shorter = of(**{name: {"lives": timedelta(minutes=9)}})
        assert code(shorter, now=nitro.NOW + 9 * MINUTE) == ""
        late = judge(shorter, now=nitro.NOW + 10 * MINUTE)
        assert (late.code, late.crypto) == ("evidence.validity-expired", "valid"), one
    assert code(now=nitro.NOW - MINUTE) == ""
    assert code(now=nitro.NOW - 2 * MINUTE) == "validity-not-yet"


REGION = nitro.chain(region={"serial": 77}, zone={"serial": 78})
LISTED = nitro.document(REGION)


def test_revocation_lists():
    clean = {"a.crl": nitro.revocations("root", 5), "b.crl": nitro.revocations("region", 6)}
    assert outcome(judge(), "revocation")[0] == "unchecked"
    judged = judge(LISTED, clean)
    found = outcome(judged, "revocation")
    assert found == ("passed", "cabundle[2] by b.crl, cabundle[1] by a.crl")
    revoked = judge(LISTED, clean | {"a.crl": nitro.revocations("root", 5, 77)})
    assert (revoked.code, revoked.crypto) == ("evidence.revocation-revoked", "valid")
    revoked = judge(LISTED, clean | {"b.crl": nitro.revocations("region", 78)})
    assert revoked.code == "evidence.revocation-revoked"
    # A number is its issuer's: the other authority's list says nothing of it.
    assert code(LISTED, {"b.crl": nitro.revocations("region", 77)}) == ""


def test_lists_that_are_demanded():
    both = {"a.crl": nitro.revocations("root"), "b.crl": nitro.revocations("region")}
    assert code(LISTED, both, crl=True) == ""
    for missing in both:
        left = {name: data for name, data in both.items() if name != missing}
        judged = judge(LISTED, left, crl=True)
        assert (judged.code, judged.decision) == ("evidence.needs-crl", "needs-collateral")
    assert outcome(judge(LISTED, crl=Unchecked("so it is")), "revocation") == (
        "unchecked", "no revocation list came with the document: so it is",
    )  # fmt: skip


def test_lists_that_are_wrong():
    good = nitro.revocations("root")
    assert code(LISTED, {"a.crl": b"x"}) == "parse-crl"
    assert code(LISTED, {"a.crl": nitro.revocations("stranger")}) == "chain-issuer"
    forged = good[:-1] + bytes([good[-1] ^ 1])
    assert code(LISTED, {"a.crl": forged}) == "chain-signature"
    # The instance's authority may sign certificates, but no lists.
    unfit = nitro.document(nitro.chain(zone={"usage": ("key_cert_sign",)}))
    assert code(unfit, {"a.crl": nitro.revocations("zone")}) == "chain-authority"
    stale = nitro.revocations("root", lives=timedelta(minutes=5))
    judged = judge(LISTED, {"a.crl": stale}, now=nitro.NOW + 6 * MINUTE)
    assert (judged.code, judged.crypto) == ("evidence.validity-expired", "valid")
    many = {f"{n}.crl": good for n in range(9)}
    assert code(LISTED, many) == "parse-too-large"


TLS = nitro.tls()


@pytest.mark.parametrize("field", ["user_data", "public_key"])
def test_a_tls_certificate_that_is_bound(field):
    key, data = nitro.spki(), [nitro.spki(), TLS]
    forms = [
        key,
        *(hashlib.new(n, d).digest() for d in data for n in ("sha256", "sha384", "sha512")),
    ]
    for form in forms:
        judged = judge(nitro.document(**{field: form}), {"tls_cert.der": TLS})
        result, detail = outcome(judged, "tls-certificate")
        assert (judged.code, result) == ("", "passed")
        assert f"tls_cert.der: {field} is " in detail


def test_a_tls_certificate_that_is_not_bound():
    bound = nitro.document(user_data=nitro.spki())
    other = nitro.tls("another")
    judged = judge(bound, {"tls_cert.der": other})
    assert (judged.code, judged.crypto) == ("evidence.binding-tls-certificate", "invalid")
    # Whoever asks chooses the nonce: it binds nothing.
    for value in (nitro.spki(), hashlib.sha256(nitro.spki()).digest()):
        data = nitro.document(nonce=value)
        assert code(data, {"tls_cert.der": TLS}) == "binding-tls-certificate"
    unset = nitro.document(user_data=None)
    assert code(unset, {"tls_cert.der": TLS}) == "binding-tls-certificate"
    assert code(bound, {"tls_cert.der": b"x"}) == "parse-certificate"
    pem = nitro.Issued("tls", "tls").make().public_bytes(serialization.Encoding.PEM)
    assert code(bound, {"tls_cert.pem": pem}) == ""
    assert code(bound, {"tls_cert.pem": pem, "tls_cert.der": TLS}) == "parse-too-large"


def test_files_that_play_no_part_are_listed():
    judged = judge(GOOD, {"root.pem": b"anything", "more\x1b": b""})
    assert judged.code == ""
    assert outcome(judged, "unused") == ("passed", r"'more\x1b', 'root.pem'")
    assert outcome(judge(), "unused") == ("passed", "every file is used")

"""Endorsements of a utility VM, made up under a test root in both of Microsoft's forms; a captured
one is in tests/attacks/test_evidence_snp.py."""

import hashlib
import json
from datetime import UTC, datetime

import pytest

from casemate.attest import roots
from casemate.attest.snp import uvm
from casemate.attest.verdict import Checks, Refused, Unchecked
from casemate.spec.errors import UsageError
from support import snp

VALID = ("valid", "accept", "")
FORMS = [snp.endorsement, snp.cwt]


def judged(data, now=snp.NOW, **changed):
    given = {"uvm_issuers": (snp.issuer(),)} | changed
    return snp.judge(snp.evidence(files={uvm.FILE: data}), now=now, **given)


def refused(data, **changed) -> str:
    found = judged(data, **changed)
    assert found.decision == "reject"
    return found.code.removeprefix("evidence.")


@pytest.mark.parametrize("form", FORMS)
def test_a_good_one(form):
    found = judged(form(), uvm_feeds=(snp.FEED,), uvm_svn=103)
    assert snp.outcome(found) == VALID
    said = found.claims.other["uvm"]
    assert (said["issuer"], said["feed"]) == (snp.issuer(), snp.FEED)
    assert said["svn"] in (103, 104)
    assert said["measurement"] == snp.MEASURED.hex()
    assert said["signed_at"] == snp.NOW


def test_the_root_may_be_left_out_where_it_is_microsofts():
    """Only then: casemate carries no other."""
    short = snp.endorsement(chain=snp.uvm_chain()[:2])
    assert refused(short) == "chain-issuer"


def test_the_carried_root_is_the_one_that_issuers_name():
    for issuer in roots.UVM_ISSUERS:
        fingerprint = snp.did(roots.uvm().raw, issuer.rpartition(":")[2])
        assert issuer == fingerprint
    assert len(set(roots.UVM_ISSUERS)) == len(roots.UVM_ISSUERS) == 2


@pytest.mark.parametrize("form", FORMS)
def test_an_issuer_that_nobody_admitted(form):
    found = judged(form(), uvm_issuers=roots.UVM_ISSUERS)
    assert snp.outcome(found) == ("invalid", "reject", "root-uvm-issuer")
    found = judged(form(), uvm_issuers=Unchecked("a test"))
    assert found.code == ""
    issuer = next(c for c in found.checks if c.name == "uvm-issuer")
    assert issuer.outcome == "unchecked"
    assert snp.issuer() in issuer.detail


def test_an_issuer_that_is_not_the_chains():
    leaf, between, root = snp.uvm_chain()
    for authority, eku in ((leaf, snp.EKU), (b"other", snp.EKU), (root, "1.2.3")):
        issuer = snp.did(authority, eku)
        data = snp.endorsement(iss=issuer)
        assert refused(data, uvm_issuers=(issuer,)) == "endorsement-uvm-issuer"
    issuer = snp.did(between)  # any authority of the chain may be the one that is named
    assert judged(snp.endorsement(iss=issuer), uvm_issuers=(issuer,)).code == ""
    other = snp.endorsement(chain=snp.uvm_chain("1.2.3"))
    assert refused(other) == "endorsement-uvm-issuer"


def test_a_leaf_that_may_not_sign():
    chain = snp.uvm_chain(signs=False)
    issuer = snp.did(chain[2])
    data = snp.endorsement(chain=chain, iss=issuer)
    assert refused(data, uvm_issuers=(issuer,)) == "chain-authority"


@pytest.mark.parametrize("form", FORMS)
def test_another_utility_vm(form):
    other = {"measurement": bytes(48)} if form is snp.endorsement else {"payload": bytes(48)}
    found = judged(form(**other))
    assert snp.outcome(found) == ("invalid", "reject", "endorsement-uvm-measurement")


def test_another_key_signs():
    assert refused(snp.endorsement(signer="uvm between")) == "signature-uvm"
    data = snp.endorsement()
    assert refused(data[:-1] + bytes([data[-1] ^ 1])) == "signature-uvm"


def test_what_a_policy_may_ask():
    data = snp.endorsement()
    for changed, code in (
        ({"uvm_feeds": ("another", snp.FEED)}, ""),
        ({"uvm_feeds": ("another",)}, "appraise-uvm-feed"),
        ({"uvm_svn": 103}, ""),
        ({"uvm_svn": 104}, "appraise-uvm-svn"),
    ):
        found = judged(data, **changed)
        assert (found.crypto, found.code.removeprefix("evidence.")) == ("valid", code)


@pytest.mark.parametrize("changed", [{"uvm_feeds": (snp.FEED,)}, {"uvm_svn": 0}])
def test_an_endorsement_that_is_demanded_and_not_there(changed):
    found = snp.judge(snp.evidence(), **changed)
    assert snp.outcome(found) == ("valid", "needs-collateral", "needs-uvm-endorsement")


@pytest.mark.parametrize("changed", [{"uvm_feeds": (snp.FEED,)}, {"uvm_svn": 0}])
def test_a_policy_that_asks_for_somebodys_word_says_whose(changed):
    with pytest.raises(UsageError):
        snp.policy(uvm_issuers=Unchecked("a test"), **changed)


def test_its_certificates_outlive_nothing_unless_that_is_asked():
    late, end = snp.END.timestamp() + 1, datetime(2040, 1, 1, tzinfo=UTC).timestamp()
    files = snp.evidence(files={uvm.FILE: snp.endorsement()})
    found = uvm.parse(files[uvm.FILE])
    for demanded, now, code in (
        (Unchecked("a test"), late, ""), (False, end, ""), (True, snp.NOW, ""),
        (True, late, "evidence.validity-expired"),
        (True, snp.START.timestamp() - 1, "evidence.validity-not-yet"),
    ):  # fmt: skip
        checks = Checks()
        try:
            uvm.standing(found, demanded, checks, now=now)
            assert code == ""
        except Refused as e:
            assert e.code == code
        outcome = checks.done[-1].outcome
        assert outcome == ("failed" if code else "passed" if demanded is True else "unchecked")


def test_it_was_signed_while_its_certificates_were_valid():
    for at, code in (
        (snp.START.timestamp(), ""), (snp.END.timestamp(), ""), (None, ""),
        (snp.START.timestamp() - 1, "validity-not-yet"),
        (snp.END.timestamp() + 1, "validity-expired"),
    ):  # fmt: skip
        found = judged(snp.endorsement(signed_at=at))
        assert (found.crypto, found.code.removeprefix("evidence.")) == ("valid", code)


def test_what_nothing_signs_is_listed():
    found = judged(snp.endorsement(unprotected={"timestamp": b"t" * 100, 394: [b"r"]}))
    assert found.code == ""
    signature = next(c for c in found.checks if c.name == "uvm-signature")
    assert signature.detail.endswith("not signed and not looked at: timestamp, 394")


PAYLOADS = [
    b"", b"{}", b"[]", b"null", b"\xff", b"[" * 40_000,
    b'{"x-ms-sevsnpvm-launchmeasurement": "00", "x-ms-sevsnpvm-guestsvn": "1"}',
    json.dumps({"x-ms-sevsnpvm-launchmeasurement": snp.MEASURED.hex()}).encode(),
    json.dumps({"x-ms-sevsnpvm-launchmeasurement": snp.MEASURED.hex().upper(),
                "x-ms-sevsnpvm-guestsvn": "1"}).encode(),
    b'{"x-ms-sevsnpvm-guestsvn": "1", "x-ms-sevsnpvm-guestsvn": "200",'
    b' "x-ms-sevsnpvm-launchmeasurement": "' + snp.MEASURED.hex().encode() + b'"}',
    b'{"x-ms-sevsnpvm-guestsvn": NaN, "x-ms-sevsnpvm-launchmeasurement": "'
    + snp.MEASURED.hex().encode() + b'"}',
]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS[1:])
def test_payloads_that_are_none(payload):
    assert refused(snp.endorsement(payload=payload)) == "parse-uvm-payload"


@pytest.mark.parametrize(
    "svn", ["", "-1", "1.0", " 1", "1" * 10, -1, 1.5, True, None, [1], 1 << 32]
)
def test_versions_that_are_none(svn):
    assert refused(snp.endorsement(svn=svn)) == "parse-uvm-payload"
    if type(svn) is not float:
        assert refused(snp.cwt(claims={"svn": svn})) == "parse-uvm-payload"


@pytest.mark.parametrize("svn", [0, 7, "0", "7"])
def test_versions_as_text_and_as_numbers(svn):
    assert uvm.parse(snp.endorsement(svn=svn)).svn == int(svn)


@pytest.mark.parametrize(("changed", "code"), [
    ({"iss": ""}, "parse-uvm-header"), ({"feed": ""}, "parse-uvm-header"),
    ({"iss": 3}, "parse-uvm-header"), ({"iss": "did:web:example.org"}, "parse-uvm-issuer"),
    ({"iss": "did:x509:0:sha256:" + "A" * 42 + "B::eku:1.2.3"}, "parse-uvm-issuer"),
    ({"iss": "did:x509:1:sha256:" + "A" * 43 + "::eku:1.2.3"}, "parse-uvm-issuer"),
    ({"iss": "did:x509:0:sha256:" + "A" * 43 + "::subject:CN:x"}, "parse-uvm-issuer"),
    ({"content": "application/cbor"}, "parse-uvm-payload"), ({"content": ""}, "parse-uvm-payload"),
    ({"chain": ()}, "parse-cose"), ({"chain": (b"", b"")}, "parse-certificate"),
])  # fmt: skip
def test_headers_that_are_none(changed, code):
    assert refused(snp.endorsement(**changed)) == code


@pytest.mark.parametrize("changed", [
    {"payload": snp.MEASURED[:-1]}, {"payload": snp.MEASURED + b"\0"}, {"header": {258: -16}},
])  # fmt: skip
def test_claims_over_another_payload(changed):
    assert refused(snp.cwt(**changed)) == "parse-uvm-payload"


@pytest.mark.parametrize("claims", [{1: 3}, {1: ""}, {2: None}, {2: "x" * 513}])
def test_claims_that_are_none(claims):
    assert refused(snp.cwt(claims=claims)) == "parse-uvm-header"


def test_other_algorithms_are_not_admitted():
    import cbor2

    header = {1: -258, 15: {1: snp.issuer(), 2: snp.FEED, "svn": 1}, 33: list(snp.uvm_chain())}
    assert refused(snp.cose(header, snp.MEASURED)) == "signature-algorithm"
    raw = cbor2.loads(snp.cwt()).value
    assert refused(cbor2.dumps(raw[:3])) == "parse-cose"
    assert refused(b"\0" * (uvm.MAX_BYTES + 1)) == "parse-cose"


def test_a_chain_alone_still_shows_what_is_endorsed():
    files = snp.evidence(files={uvm.FILE: snp.endorsement(), "report.bin": None})
    found = snp.judge(files, uvm_issuers=(snp.issuer(),))
    assert snp.outcome(found) == ("valid", "not-applicable", "absent-report")


def test_the_digest_in_a_did():
    digest = hashlib.sha256(snp.uvm_chain()[2]).digest()
    assert uvm.parse(snp.endorsement()).fingerprint == digest
    assert uvm.parse(snp.endorsement()).eku == snp.EKU

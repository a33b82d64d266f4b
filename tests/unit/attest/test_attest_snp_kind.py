"""The row of SEV-SNP: what is recognised, shown and bound, and files beside the report."""

import base64
import hashlib
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization

from casemate.attest import folder
from casemate.attest.kinds import recognise
from casemate.attest.snp import beside
from casemate.attest.snp.kind import KIND, fresh
from casemate.attest.snp.policy import DEFAULT
from casemate.attest.verdict import Refused, Unchecked
from casemate.spec.errors import UsageError
from support import snp

VALID = ("valid", "accept", "")


def test_recognised_by_content():
    files = snp.evidence()
    for kept in (files, {"report.bin": files["report.bin"]}, {"vcek.der": files["vcek.der"]}):
        assert recognise(kept) is KIND
    for raw in (b"", files["report.bin"][:-1], b"\x07" + files["report.bin"][1:]):
        assert not KIND.recognises({"report.bin": raw})
    assert not KIND.recognises({**files, "hcl_report.bin": b""})
    with pytest.raises(Refused):
        recognise({"report.bin": files["report.bin"][:-1]})


def test_every_field_is_shown_and_has_a_json_form():
    for product in snp.CPUID:
        files = snp.evidence(product, files={"uvm_endorsements.cose": snp.endorsement()})
        shown = KIND.fields(files)
        assert json.loads(json.dumps(shown)) == shown
        report = shown["report"]
        assert report["measurement"] == snp.MEASURED.hex()
        assert report["policy"]["smt"] is True
        assert report["platform_info"]["ecc_en"] is True
        assert report["current_version"] == "1.55.30"
        assert shown["chain"]["product"] == product
        assert report["reported_tcb"] == shown["chain"]["tcb"]
        assert shown["uvm"]["feed"] == snp.FEED
    alone = KIND.fields({"report.bin": snp.report()})
    assert alone["report"]["reported_tcb"] == snp.TCB["Genoa"].hex()
    assert set(KIND.fields(snp.evidence(files={"report.bin": None}))) == {"chain"}


def test_claims_hold_no_byte_of_the_signature():
    files = snp.evidence()
    twin = snp.evidence()
    assert files["report.bin"] != twin["report.bin"]  # ECDSA draws anew
    assert snp.judge(files) == snp.judge(twin)


@pytest.mark.parametrize(("data", "nonces"), [
    (b"n" * 64, {b"n" * 64}),
    (b"n" * 32, {b"n" * 64, b"n" * 32}),
    (b"n" * 31 + b"\0", {b"n" * 31, b"n" * 31 + b"\0"}),
    (b"", {bytes(64)}),
])  # fmt: skip
def test_what_a_challenge_may_have_been(data, nonces):
    whole = data.ljust(64, b"\0")
    found = fresh(whole)
    assert b"" not in found
    assert {n for n in nonces if len(n) != 64} | {whole} <= set(found)
    assert all(whole.startswith(n) and not any(whole[len(n) :]) for n in found)
    files = snp.evidence(report_data=whole)
    for nonce in found:
        judged = folder.judge(files, now=snp.NOW, policies={"sev-snp": snp.policy()}, nonce=nonce)
        assert judged.code == ""
    for nonce in (b"x" * 32, b"n" * 30, b""):
        judged = folder.judge(files, now=snp.NOW, policies={"sev-snp": snp.policy()}, nonce=nonce)
        assert judged.stage == "freshness"


REGO = b"package policy\n\nallow := true\n"
KEY = snp.ec_key("shown").public_key()
TEXT = KEY.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
DER = KEY.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("text", [REGO, base64.b64encode(REGO), base64.b64encode(REGO) + b"\n"])
def test_a_containers_policy(text):
    files = {beside.POLICY: text}
    good = snp.evidence(files=files, host_data=hashlib.sha256(REGO).digest())
    assert snp.outcome(snp.judge(good)) == VALID
    found = snp.judge(snp.evidence(files=files, host_data=b"\1" * 32))
    assert snp.outcome(found) == ("invalid", "reject", "endorsement-host-data")


@pytest.mark.parametrize("bound", [
    hashlib.sha256(TEXT).digest(), hashlib.sha256(DER).digest(), hashlib.sha512(TEXT).digest(),
    hashlib.sha512(DER).digest(), hashlib.sha256(DER).digest() + b"n" * 32,
], ids=["PEM 256", "DER 256", "PEM 512", "DER 512", "DER 256 and a nonce"])  # fmt: skip
def test_a_key_that_the_report_binds(bound):
    files = {beside.PUBLIC_KEY: TEXT}
    assert snp.outcome(snp.judge(snp.evidence(files=files, report_data=bound))) == VALID
    other = bytes([bound[0] ^ 1]) + bound[1:]
    found = snp.judge(snp.evidence(files=files, report_data=other))
    assert snp.outcome(found) == ("invalid", "reject", "endorsement-public-key")


def test_other_files_are_listed():
    found = snp.judge(snp.evidence(files={"readme.txt": b"trust me", "ask2.pem": b""}))
    assert snp.outcome(found) == VALID
    others = next(c for c in found.checks if c.name == "other-files")
    assert (others.outcome, others.detail) == ("unchecked", "not read: ask2.pem, readme.txt")


@pytest.mark.parametrize(("field", "value"), [
    ("roots", {}), ("roots", {"Genoa": ()}), ("roots", {"Genoa": ("0" * 63,)}),
    ("signing_keys", ()), ("signing_keys", ("XCEK",)), ("signing_keys", Unchecked("no")),
    ("crl", 1), ("measurements", ()), ("measurements", ("AB" * 48,)), ("host_data", ("00",)),
    ("id_keys", ("00" * 47,)), ("author_keys", "00" * 48), ("family_ids", ("00" * 15,)),
    ("image_ids", ("00" * 17,)), ("guest_svn", -1), ("guest_svn", True), ("vmpl", (4,)),
    ("vmpl", 0), ("guest_policy", {"debug": False}), ("guest_policy", {}),
    ("guest_policy", {"debug": False, "migrate_ma": 0}), ("uvm_issuers", ()),
    ("uvm_issuers", (3,)), ("uvm_feeds", ("",)), ("uvm_svn", "103"), ("uvm_validity", "yes"),
    ("chip_ids", ("00" * 8,)), ("extractable", ("Rome",)), ("extractable", ()), ("csp_ids", ()),
    ("report_versions", (1,)), ("firmware", (1, 55)), ("firmware", (1, 55, 256)),
    ("reported_tcb", {}), ("reported_tcb", {"Rome": {}}), ("reported_tcb", {"Genoa": {"snp": 1}}),
    ("reported_tcb", {"Turin": {"bootloader": 1, "tee": 1, "snp": 1, "microcode": 1}}),
    ("committed_tcb", 3),
    ("launch_tcb", {"Genoa": {"bootloader": 1, "tee": 1, "snp": 256, "microcode": 1}}),
    ("provisional", 0), ("platform_info", {"smt": True}), ("platform_info", {"smt_en": 1}),
    ("launch_mitigations", 1 << 64), ("current_mitigations", -1),
])  # fmt: skip
def test_malformed_policies(field, value):
    with pytest.raises(UsageError) as e:
        replace(DEFAULT, **{field: value})
    assert (e.value.code, e.value.where) == ("usage.trust", field)

"""Quotes of a made-up TPM under a test root: each check of the procedure has something to refuse,
and each field of the policy something to refuse and something to accept."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest import fields, folder, kinds
from casemate.attest.tpm import policy as policies
from casemate.attest.tpm import verify
from casemate.attest.tpm.policy import DEFAULT, TpmPolicy
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError
from support import tpm

VALID = ("valid", "accept", "")
BANKS = tpm.banks("sha256")
AK = tpm.key("ak")


def refused(files, code, crypto="invalid", **policy):
    assert tpm.outcome(tpm.judge(files, **policy)) == (crypto, "reject", code)


@pytest.mark.parametrize("kind", ["rsa", "p256", "p384"])
@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_a_genuine_quote(kind, digest):
    for scheme in ("rsassa", "rsapss") if kind == "rsa" else ("",):
        judged = tpm.judge(tpm.evidence(kind=kind, digest=digest, scheme=scheme))
        assert tpm.outcome(judged) == VALID
        claims = judged.claims
        assert claims.bound == tpm.NONCE
        assert claims.fresh == (tpm.NONCE,)
        assert claims.root == tpm.root()
        assert claims.other["pcrs"] == {
            "sha256": {str(n): value.hex() for n, value in BANKS["sha256"].items()}
        }
        assert tpm.check(judged, "signer") == (
            "passed", "a primary key of the endorsement hierarchy",
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["rsa", "p256"])
def test_a_bare_signature(kind):
    files = tpm.evidence({"quote.tpmt_signature": None}, kind=kind)
    ak = tpm.key("ak", kind)
    good = {**files, "quote.sig": tpm.bare(ak, files["quote.msg"])}
    assert tpm.outcome(tpm.judge(good)) == VALID
    stranger = tpm.key("stranger", kind)
    bad = {**files, "quote.sig": tpm.bare(stranger, files["quote.msg"])}
    refused(bad, "signature-quote")
    noise = {**files, "quote.sig": b"noise"}
    refused(noise, "signature-quote" if kind == "rsa" else "parse-tpm")


def test_signatures_of_another_key_or_scheme():
    refused(tpm.evidence(by=tpm.key("stranger")), "signature-quote")
    refused(tpm.evidence(by=tpm.key("ak", "p256")), "signature-scheme")
    quote = tpm.attest(BANKS, extra=b"another")
    refused(tpm.evidence({"quote.msg": quote}), "signature-quote")


def test_the_twin_signature_gets_the_same_answer():
    files = tpm.evidence(kind="p256")
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    ak = tpm.key("ak", "p256")
    r, s = utils.decode_dss_signature(ak.sign(files["quote.msg"], ec.ECDSA(tpm.HASHES["sha256"])))
    both = [tpm.judge({**files, "quote.tpmt_signature": tpm.ecdsa(r, x)}) for x in (s, order - s)]
    assert tpm.outcome(both[0]) == VALID
    assert both[0] == both[1]
    for bad in ((0, s), (r, 0), (order, s), (r, order), (r, s + order)):
        refused({**files, "quote.tpmt_signature": tpm.ecdsa(*bad)}, "signature-quote")


def test_pcr_values_that_were_not_signed():
    other = {"sha256": {**BANKS["sha256"], 7: bytes(32)}}
    refused(tpm.evidence({"pcrs.json": tpm.shown(other)}), "signature-pcr-digest")
    part = {"sha256": {n: v for n, v in BANKS["sha256"].items() if n != 7}}
    judged = tpm.judge(tpm.evidence({"pcrs.json": tpm.shown(part)}))
    assert tpm.outcome(judged) == ("unknown", "needs-collateral", "needs-pcrs")
    assert tpm.outcome(tpm.judge(tpm.evidence({"pcrs.json": None})))[1] == "needs-collateral"


def test_values_that_no_quote_covers_are_told():
    judged = tpm.judge(tpm.evidence(select={"sha256": (0, 4)}, values=tpm.banks("sha256", "sha1")))
    assert tpm.outcome(judged) == VALID
    outcome, detail = tpm.check(judged, "pcr-digest")
    assert (outcome, detail.partition(". ")[0]) == ("passed", "PCRs: sha256 0, 4")
    assert "No quote covers sha256 1, 2, 3, 5" in detail
    assert "sha1 0, 1" in detail
    assert judged.claims.other["pcrs"].keys() == {"sha256"}
    assert judged.claims.other["pcrs"]["sha256"].keys() == {"0", "4"}


@pytest.mark.parametrize(
    "text",
    [
        b"[]", b"{}", b'{"24": "00"}', b'{"01": "00"}', b'{"0": 5}', b'{"0": "0"}',
        b'{"0": "zz"}', b'{"sha256": {}}', b'{"sha256": {"0": "00"}}', b'{"crc": {"0": "00"}}',
        b'{"0": "' + b"00" * 32 + b'", "0": "' + b"00" * 32 + b'"}', b'{"0": NaN}',
        b'{"0": "' + b"00" * 32 + b'"} x', b'{"0": "' + b"00" * 32 + b'", "1": "00"}',
        b"[" * 5000, b"\xff",
    ],
)  # fmt: skip
def test_pcr_values_that_are_none(text):
    crypto, decision, code = tpm.outcome(tpm.judge(tpm.evidence({"pcrs.json": text})))
    assert (crypto, decision) == ("invalid", "reject")
    assert code in ("parse-tpm", "parse-json")


def test_a_bank_that_stands_twice():
    flat = json.dumps({str(n): v.hex() for n, v in BANKS["sha256"].items()}).encode()
    assert tpm.outcome(tpm.judge(tpm.evidence({"pcrs.json": flat}))) == VALID
    renamed = {"pcrs.json": None, "pcrs_sha256.json": flat}
    assert tpm.outcome(tpm.judge(tpm.evidence(renamed))) == VALID
    refused(tpm.evidence({"pcrs_sha256.json": flat}), "parse-tpm")
    refused(tpm.evidence({"pcrs.json": None, "pcrs_sha384.json": flat}), "parse-tpm")


# Certificates and keys.


def leaf(**changed):
    return tpm.der(tpm.certificate("", "between", AK, **changed))


def test_the_root_in_the_folder_is_not_trusted_for_standing_there():
    files = tpm.evidence()
    code = ("invalid", "reject", "root-unknown")
    assert tpm.outcome(folder.judge(files, now=tpm.NOW)) == code
    refused(files, "root-unknown", roots=("ab" * 32,))


def test_a_key_that_nobody_vouches_for():
    alone = tpm.evidence({"ak_cert.der": None})
    refused(alone, "root-ak-unvouched", crypto="valid")
    refused(
        tpm.evidence({"between.crt": None, "root.crt": None}), "root-ak-unvouched", crypto="unknown"
    )
    refused(tpm.evidence({"root.crt": None}), "root-ak-unvouched", crypto="unknown")
    nobody = tpm.evidence({"ak_cert.der": None, "ak_public.tpmt": None})
    refused(nobody, "root-ak-unvouched", crypto="unknown")
    refused({"quote.msg": alone["quote.msg"]}, "signature-missing", crypto="not-applicable")


def test_a_pinned_key_needs_no_certificate():
    pin = verify.fingerprint(AK.public_key())
    alone = tpm.evidence({"ak_cert.der": None})
    judged = tpm.judge(alone, aks=("ab" * 32, pin))
    assert tpm.outcome(judged) == VALID
    assert (judged.claims.root, judged.claims.chip_id) == ("", pin)
    refused(alone, "root-ak-unvouched", crypto="valid", aks=("ab" * 32,))
    # With a certificate the pin is one more condition.
    assert tpm.judge(tpm.evidence(), aks=(pin,)).claims.root == tpm.root()
    refused(tpm.evidence(), "appraise-ak-pin", crypto="valid", aks=("ab" * 32,))


def test_keys_that_are_not_one():
    stranger = tpm.key("stranger")
    other = tpm.der(tpm.certificate("", "between", stranger))
    refused(tpm.evidence({"ak_cert.der": other}), "endorsement-ak")
    refused(tpm.evidence({"ak_public.tpmt": tpm.public(stranger)}), "endorsement-ak")
    pem = stranger.public_key().public_bytes(
        tpm.serialization.Encoding.PEM, tpm.serialization.PublicFormat.SubjectPublicKeyInfo
    )
    refused(tpm.evidence({"ak_public.pem": pem}), "endorsement-ak")
    # Swapped together, the quote is not theirs.
    both = {"ak_cert.der": other, "ak_public.tpmt": tpm.public(stranger)}
    refused(tpm.evidence(both), "signature-quote")


@pytest.mark.parametrize("attributes", [0x40072, 0x50070, 0x10072, 0x70072, 0x30072])
def test_a_key_that_might_sign_anything(attributes):
    area = tpm.public(AK, attributes)
    refused(tpm.evidence({"ak_public.tpmt": area}), "endorsement-ak-attributes")


@pytest.mark.parametrize(
    ("certificate", "code"),
    [
        (leaf(usage="1.3.6.1.5.5.7.3.1"), "chain-usage"),
        (leaf(path=None), "chain-usage"),
        (leaf(signs=False), "chain-usage"),
        (leaf(signer=tpm.key("stranger")), "chain-signature"),
        (tpm.der(tpm.certificate("", "root", AK, signer=tpm.key("between"))), "chain-signature"),
        (leaf(usage="2.23.133.8.1"), ""),
        (leaf(usage=None), ""),
    ],
)
def test_certificates_of_the_key(certificate, code):
    judged = tpm.judge(tpm.evidence({"ak_cert.der": certificate}))
    assert tpm.outcome(judged) == (("invalid", "reject", code) if code else VALID)


def test_a_leaf_issues_nothing():
    forged = tpm.certificate("forged", "leaf", tpm.key("forger"), signer=AK)
    false = tpm.der(tpm.certificate("leaf", "between", AK))
    swapped = {
        "ak_cert.der": tpm.der(forged), "leaf.crt": false,
        "ak_public.tpmt": tpm.public(tpm.key("forger")),
    }  # fmt: skip
    refused(tpm.evidence(swapped, by=tpm.key("forger")), "chain-authority")


def test_a_chain_without_end():
    """Two authorities that issue each other."""
    files = tpm.evidence({
        "ak_cert.der": tpm.der(tpm.certificate("", "a", AK)),
        "a.crt": tpm.der(tpm.certificate("a", "b", tpm.key("a"), path=None)),
        "b.crt": tpm.der(tpm.certificate("b", "a", tpm.key("b"), path=None)),
    })  # fmt: skip
    refused(files, "chain-length")


def test_of_two_issuers_of_one_name_the_right_one_is_found():
    imposter = tpm.certificate("between", "root", tpm.key("imposter"), path=0,
                               signer=tpm.key("imposter"))  # fmt: skip
    files = tpm.evidence({"a.crt": tpm.der(imposter)})
    judged = tpm.judge(files)
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "chain") == (
        "passed", "ak_cert.der, between.crt, root.crt. Of no use: a.crt",
    )  # fmt: skip
    refused(tpm.evidence({"a.crt": tpm.der(imposter), "between.crt": None}), "chain-signature")


def test_validity():
    files = tpm.evidence()
    start, end = tpm.START.timestamp(), tpm.END.timestamp()
    for now in (start, end):
        assert tpm.outcome(tpm.judge(files, now=now)) == VALID
    assert tpm.outcome(tpm.judge(files, now=start - 1))[2] == "validity-not-yet"
    assert tpm.outcome(tpm.judge(files, now=end + 1)) == ("valid", "reject", "validity-expired")


def test_revocation():
    lists = {"between.crl": tpm.crl("between"), "root.crl": tpm.crl("root")}
    judged = tpm.judge(tpm.evidence(lists), revocation=True)
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "revocation")[0] == "passed"
    assert tpm.check(tpm.judge(tpm.evidence()), "revocation")[0] == "unchecked"
    missing = tpm.outcome(tpm.judge(tpm.evidence(), revocation=True))
    assert missing == ("valid", "needs-collateral", "needs-crl")
    for name, serial in (("between", 1), ("root", 101)):
        revoked = {f"{name}.crl": tpm.crl(name, (serial,))}
        refused(tpm.evidence(revoked), "revocation-revoked", crypto="valid")
    forged = {"between.crl": tpm.crl("between", signer=tpm.key("stranger"))}
    refused(tpm.evidence(forged), "chain-signature")
    refused(tpm.evidence({"x.crl": tpm.crl("stranger")}), "chain-issuer")
    old = {"between.crl": tpm.crl(lives=(tpm.START, tpm.START + timedelta(days=1)))}
    refused(tpm.evidence(old), "validity-expired", crypto="valid")


# Several quotes, several boots.


def second(**fields):
    values = tpm.banks("sha384")
    quote = tpm.attest(values, signer=tpm.qualified(tpm.public(AK)), **fields)
    return {
        "other.msg": quote,
        "other.tpmt_signature": tpm.signature(AK, quote),
        "pcrs_sha384.json": tpm.shown(values),
    }


def test_quotes_of_one_boot():
    judged = tpm.judge(tpm.evidence(second(clock=2000)))
    assert tpm.outcome(judged) == VALID
    assert judged.claims.other["pcrs"].keys() == {"sha256", "sha384"}


@pytest.mark.parametrize(
    "changed",
    [{"extra": b"older"}, {"resets": 4}, {"restarts": 0}, {"firmware": 9}, {"signer": tpm.SIGNER}],
)
def test_quotes_of_different_boots_or_challenges(changed):
    values = tpm.banks("sha384")
    fields = {"signer": tpm.qualified(tpm.public(AK))} | changed
    quote = tpm.attest(values, **fields)
    files = second() | {"other.msg": quote, "other.tpmt_signature": tpm.signature(AK, quote)}
    refused(tpm.evidence(files), "freshness-mixed", crypto="valid")


def test_one_unsigned_quote_among_others():
    refused(tpm.evidence(second() | {"other.tpmt_signature": None}), "signature-missing")


def test_too_much():
    quote = tpm.evidence()["quote.msg"]
    refused(tpm.evidence({f"q{n}.msg": quote for n in range(9)}), "parse-tpm")
    refused(tpm.evidence({"quote.sig": b"x"}), "parse-tpm")
    refused(tpm.evidence({"aik_cert.der": leaf()}), "parse-tpm")
    many = {f"c{n}.crt": tpm.der(tpm.authorities()[1]) for n in range(17)}
    refused(tpm.evidence(many), "parse-tpm")


def test_what_is_not_read_is_told():
    judged = tpm.judge(tpm.evidence({"alone.sig": b"x", "notes.txt": b"y"}))
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "parse")[1] == "1 quotes; not read: alone.sig, notes.txt"


def test_other_names_of_the_key():
    files = tpm.evidence({"ak_cert.der": None, "ak_public.tpmt": None})
    pem = AK.public_key().public_bytes(
        tpm.serialization.Encoding.PEM, tpm.serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for name in ("aik_cert.der", "ak_cert.crt", "aik.cer"):
        assert tpm.outcome(tpm.judge({**files, name: leaf(), "ak_pub.pem": pem})) == VALID
    # An authority's name may begin with other letters only.
    refused({**files, "cert.der": leaf()}, "root-ak-unvouched", crypto="unknown")
    for twice in ({"a.tpmt": tpm.public(AK), "b.tpmt": tpm.public(AK)},
                  {"a.pem": pem, "b.pem": pem}):  # fmt: skip
        refused({**files, **twice}, "parse-tpm")


def test_nonces():
    files = tpm.evidence()
    assert tpm.outcome(tpm.judge(files, nonce=tpm.NONCE)) == VALID
    for other in (b"another", tpm.NONCE[:-1], tpm.NONCE + b"\0"):
        assert tpm.outcome(tpm.judge(files, nonce=other))[2] == "freshness-mismatch"
    assert tpm.outcome(tpm.judge(files, nonce=b""))[2] == "freshness-nonce"
    empty = tpm.evidence(extra=b"")
    refused(empty, "freshness-empty", crypto="valid")
    assert tpm.outcome(tpm.judge(empty, nonce=b""))[2] == "freshness-empty"


# Event logs.


def test_an_event_log_that_replays():
    judged = tpm.judge(tpm.evidence(log=tpm.boot()), event_log=True, secure_boot=True)
    assert tpm.outcome(judged) == VALID
    outcome, detail = tpm.check(judged, "event-log")
    assert outcome == "passed"
    assert "nothing vouches for the header, the types of events, the data of events 10" in detail
    refused(
        tpm.evidence(log=tpm.boot(secure=False)), "appraise-secure-boot", "valid", secure_boot=True
    )
    off = tpm.judge(tpm.evidence(log=tpm.boot(secure=False)), secure_boot=False)
    assert tpm.outcome(off) == VALID


def test_event_logs_of_another_boot():
    log, other = tpm.boot(), tpm.boot(secure=False)
    values = tpm.replayed(log, "sha256")
    refused(tpm.evidence({"event_log.bin": other}, values=values), "signature-event-log")
    one = tpm.event(4, 5, b"one more")
    refused(tpm.evidence({"event_log.bin": log + one}, values=values), "signature-event-log")
    refused(tpm.evidence({"event_log.bin": log[:-1]}, values=values), "parse-event-log")


def test_an_event_log_must_be_there_where_it_is_asked_for():
    refused(tpm.evidence(), "appraise-log-required", crypto="valid", event_log=True)
    refused(tpm.evidence(), "appraise-secure-boot", crypto="valid", secure_boot=True)
    # Of SHA-1 alone it counts for nothing, and of PCRs that are not quoted neither.
    log = tpm.boot(("sha1",))
    weak = tpm.evidence(values=tpm.banks("sha256") | tpm.replayed(log, "sha1"))
    judged = tpm.judge({**weak, "event_log.bin": log}, event_log=True)
    assert tpm.outcome(judged) == ("valid", "reject", "appraise-log-required")
    part = tpm.evidence(log=tpm.boot(), select={"sha256": (0, 4)})
    assert tpm.outcome(tpm.judge(part, event_log=True)) == VALID
    refused(part, "appraise-secure-boot", crypto="valid", secure_boot=True)
    none = tpm.evidence(log=tpm.boot(), select={"sha256": (23,)})
    refused(none, "appraise-log-required", crypto="valid", event_log=True)


def test_an_event_log_of_other_banks_is_told():
    log = tpm.boot(("sha384",))
    judged = tpm.judge(tpm.evidence({"event_log.bin": log}))
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "event-log")[0] == "unchecked"


def test_an_event_log_alone():
    log = tpm.boot()
    good = {"event_log.bin": log, "pcrs.json": tpm.shown(tpm.replayed(log, "sha256"))}
    wanted = ("not-applicable", "needs-collateral", "needs-quote")
    assert tpm.outcome(tpm.judge(good)) == wanted
    assert tpm.outcome(tpm.judge({"event_log.bin": log})) == wanted
    refused({**good, "pcrs.json": tpm.shown(BANKS)}, "signature-event-log")
    refused({**good, "event_log.bin": log[:-1]}, "parse-event-log")


# The policy.


@pytest.mark.parametrize(
    ("given", "wrong", "code"),
    [
        ({"pcrs": {"7": (BANKS["sha256"][7].hex(),)}}, {"pcrs": {"7": ("ab" * 32,)}}, "pcr-7"),
        ({"firmware_versions": ("0000000020160511",)}, {"firmware_versions": ("00" * 8,)},
         "firmware-version"),
        ({"clock_safe": True}, {"clock_safe": False}, "clock-safe"),
        ({"reset_counts": (3, 4)}, {"reset_counts": (4,)}, "reset-count"),
        ({"restart_counts": (1,)}, {"restart_counts": (0,)}, "restart-count"),
        ({"hash_algorithms": ("sha256",)}, {"hash_algorithms": ("sha384",)}, "hash-algorithms"),
        ({"event_log": False}, {"event_log": True}, "log-required"),
    ],
)  # fmt: skip
def test_fields_of_the_policy(given, wrong, code):
    assert tpm.outcome(tpm.judge(tpm.evidence(), **given)) == VALID
    refused(tpm.evidence(), f"appraise-{code}", crypto="valid", **wrong)


def test_pins_of_pcrs_look_at_what_is_quoted():
    seven = BANKS["sha256"][7].hex()
    part = tpm.evidence(select={"sha256": (0, 4)})
    refused(part, "appraise-pcr-7", crypto="valid", pcrs={"7": (seven,)})
    both = tpm.evidence(second())
    strong = tpm.banks("sha384")["sha384"][7].hex()
    assert tpm.outcome(tpm.judge(both, pcrs={"7": (seven, strong)})) == VALID
    refused(both, "appraise-pcr-7", crypto="valid", pcrs={"7": (seven, "ab" * 48)})
    refused(both, "appraise-pcr-7", crypto="valid", pcrs={"7": ("ab" * 64,)})


def test_sha1_never_counts():
    files = tpm.evidence(values=tpm.banks("sha1"))
    refused(files, "appraise-hash-algorithms", crypto="valid")
    none = tpm.evidence(select={"sha256": ()})
    refused(none, "appraise-hash-algorithms", crypto="valid")


def test_all_fields_are_recorded_before_the_first_failure_is_raised():
    judged = tpm.judge(tpm.evidence(extra=b""), reset_counts=(9,), restart_counts=(9,))
    failed = [c.name for c in judged.checks if c.outcome == "failed"]
    assert failed == ["reset-count", "restart-count", "nonce"]
    assert judged.code == "evidence.appraise-reset-count"


@pytest.mark.parametrize(
    "wrong",
    [
        {"roots": ()}, {"roots": Unchecked("x")}, {"aks": ("AB" * 32,)}, {"hash_algorithms": ()},
        {"hash_algorithms": ("sha1",)}, {"hash_algorithms": Unchecked("x")}, {"pcrs": {}},
        {"pcrs": {"24": ("ab" * 32,)}}, {"pcrs": {"7": ("ab" * 20,)}}, {"pcrs": {"7": ()}},
        {"pcrs": {7: ("ab" * 32,)}}, {"pcrs": {"7": Unchecked("x")}}, {"pcrs": ("ab" * 32,)},
        {"event_log": 1}, {"secure_boot": "on"}, {"clock_safe": None}, {"revocation": 0},
        {"firmware_versions": ("1",)}, {"reset_counts": (-1,)}, {"restart_counts": (True,)},
    ],
)  # fmt: skip
def test_policies_that_are_none(wrong):
    with pytest.raises(UsageError):
        tpm.policy(**wrong)


def test_a_policy_in_toml():
    left = {"unchecked": "a test"}
    section = dict.fromkeys(TpmPolicy.__dataclass_fields__, left) | {
        "roots": [tpm.root()], "hash_algorithms": ["sha256"], "pcrs": {"7": ["ab" * 32]},
    }  # fmt: skip
    loaded = fields.load(TpmPolicy, section, "tpm")
    assert loaded.pcrs == {"7": ("ab" * 32,)}
    refusing = folder.judge(tpm.evidence(), now=tpm.NOW, policies={"tpm": loaded})
    assert refusing.code == "evidence.appraise-pcr-7"
    kind = kinds.KINDS["tpm"]
    assert (kind.default(), kind.policy) == (DEFAULT, TpmPolicy)
    assert len(kind.of(b"x" * 64)) == 32
    assert set(policies.PRODUCTS) == set(DEFAULT.roots)


def test_a_field_left_unchecked_is_told():
    for name in TpmPolicy.__dataclass_fields__:
        if name in ("roots", "hash_algorithms"):
            continue
        judged = tpm.judge(tpm.evidence(), **{name: Unchecked(f"left open: {name}")})
        if name != "revocation":
            assert f"left open: {name}" in [c.detail for c in judged.checks], name


def test_every_field_is_shown():
    shown = kinds.KINDS["tpm"].fields(tpm.evidence(log=tpm.boot()))
    assert shown["quote.msg"]["extraData"] == tpm.NONCE.hex()
    assert shown["quote.msg"]["signature"]["scheme"] == "rsassa"
    assert shown["ak_public"]["objectAttributes"] == "00050072"
    assert len(shown["event_log"]["events"]) == 11
    json.dumps(shown)


def test_what_is_wrong_comes_before_what_is_missing():
    empty = tpm.evidence(extra=b"")
    refused(empty, "freshness-empty", crypto="valid", revocation=True)

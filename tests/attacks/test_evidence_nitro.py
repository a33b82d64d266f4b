"""Nitro documents captured from AWS, and forged ones: the answers that each case states, its values
and its window, every kind of change refused, and each check missed when it is taken away.

What was never captured (revocation lists, other roots) is made up under a test root."""

from __future__ import annotations

import random
from datetime import timedelta

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import utils

from casemate.attest import crl, folder, kinds, x509
from casemate.attest.nitro import abi, appraise, verify
from casemate.attest.nitro.policy import DEFAULT, NitroPolicy
from casemate.attest.verdict import Unchecked
from support import nitro
from support.collection import Collection, at
from support.mutation import COUNT, flipped, flips, fuzz

CAPTURED = Collection("nitro")
NAMES, captured = CAPTURED.names, CAPTURED.needed
about, files, stated = CAPTURED.about, CAPTURED.files, CAPTURED.stated
FILE = "document.cose"
NOT_ASKED = Unchecked("evidence folder")


def judge(name, changed=None, now=None, nonce=NOT_ASKED, **policy):
    kept = {f.name: getattr(DEFAULT, f.name) for f in DEFAULT.__dataclass_fields__.values()}
    merged = {n: data for n, data in (files(name) | (changed or {})).items() if data is not None}
    return folder.judge(
        merged,
        now=at(about(name)["verify_at"]) if now is None else now,
        policies={"nitro": NitroPolicy(**(kept | policy))},
        nonce=nonce,
    )


def refused(judged):
    assert judged.decision == "reject"
    return judged.code.removeprefix("evidence.")


GENUINE = [n for n in NAMES if stated(n, "crypto") == "valid"]
GOOD = [n for n in NAMES if stated(n, "default_policy") == "accept"]
DISTINCT = list({files(n)[FILE]: n for n in reversed(GENUINE)}.values())


def outcome(judged, name):
    return next((c.outcome, c.detail) for c in judged.checks if c.name == name)


@captured
@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_the_stated_ones(name):
    judged = folder.judge(files(name), now=at(about(name)["verify_at"]))
    assert judged.tee == "nitro"
    assert judged.crypto == stated(name, "crypto")
    assert judged.decision == stated(name, "default_policy")
    assert judged == judge(name)


@captured
@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_stated_ones(name):
    values, shown = about(name)["values"], kinds.KINDS["nitro"].fields(files(name))
    for field in ("module_id", "digest", "pcrs", "public_key", "user_data", "nonce"):
        assert shown[field] == values[field]
    assert shown["timestamp"] == values["timestamp_ms"]
    if name in GOOD:
        claims = judge(name).claims
        assert claims.measurement == values["pcrs"]["0"]
        assert claims.bound.hex() == (values["user_data"] or "")
        assert values["module_id"].startswith(claims.other["instance"] + "-enc")


@captured
@pytest.mark.parametrize("name", GENUINE)
def test_outside_its_window_it_is_refused(name):
    """The edges are those of the certificates; debug mode is looked at after them."""
    valid = about(name)["valid"]
    start, end = at(valid["from"]), at(valid["to"])
    for now in (start, end):
        assert judge(name, now=now, debug=True).decision == "accept"
    assert refused(judge(name, now=start - 1)) == "validity-not-yet"
    assert refused(judge(name, now=end + 1)) == "validity-expired"
    assert {judge(name, now=now).crypto for now in (start - 1, end + 1)} == {"valid"}


@captured
@pytest.mark.parametrize("name", GOOD)
def test_pins(name):
    values = about(name)["values"]
    pins = {int(n): ("ab" * 48, value) for n, value in values["pcrs"].items()}
    module = values["module_id"]
    good = {"pcrs": pins, "module_ids": (module,), "instances": (module.split("-enc")[0],)}
    assert judge(name, **good).decision == "accept"
    for n in pins:
        other = pins | {n: ("ab" * 48,)}
        assert refused(judge(name, **good | {"pcrs": other})) == f"appraise-pcr-{n}"
    assert refused(judge(name, module_ids=("i-0",))) == "appraise-module-id"
    assert refused(judge(name, instances=(module,))) == "appraise-instance"
    made = values["timestamp_ms"] / 1000
    assert judge(name, now=made + 9, max_age=10).decision == "accept"
    assert refused(judge(name, now=made + 11, max_age=10)) == "appraise-age"


@captured
@pytest.mark.parametrize("name", GOOD)
def test_freshness(name):
    values = about(name)["values"]
    for nonce in filter(None, (values["nonce"], values["user_data"])):
        if any(bytes.fromhex(nonce)):
            assert judge(name, nonce=bytes.fromhex(nonce)).decision == "accept"
    for nonce in (b"another", b"\0" * 9):
        assert refused(judge(name, nonce=nonce)) == "freshness-mismatch"


@captured
@pytest.mark.parametrize("name", DISTINCT)
def test_sampled_flips_of_the_document_are_refused(name):
    """Nothing in it is unsigned: every flip makes the signatures wrong."""
    data = files(name)[FILE]
    draw = random.Random(name)
    for bit in draw.sample(range(8 * len(data)), 150) + list(range(40)):
        judged = judge(name, {FILE: flipped(data, bit)})
        assert (judged.decision, judged.crypto) == ("reject", "invalid"), bit


@captured
@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", DISTINCT)
def test_every_flip_of_the_document_is_refused(name, part):
    given, now = files(name), at(about(name)["verify_at"])
    size = len(given[FILE])
    for changed in flips(given[FILE], part * size // 8, (part + 1) * size // 8):
        judged = folder.judge({FILE: changed}, now=now)
        assert (judged.decision, judged.crypto) == ("reject", "invalid")


@captured
@pytest.mark.parametrize("name", [n for n in GOOD if "tls_cert.der" in files(n)])
def test_flips_of_a_bound_certificate_are_refused_or_listed(name):
    """Of its key they are refused; of the rest, which the verdict says is not checked, listed."""
    data = files(name)["tls_cert.der"]
    key = x509.parse(data, "it").spki
    start = data.index(key)
    draw = random.Random(name)
    inside = draw.sample(range(8 * start, 8 * (start + len(key))), 100)
    for bit in inside + draw.sample(range(8 * len(data)), 100):
        judged = judge(name, {"tls_cert.der": flipped(data, bit)})
        if start <= bit // 8 < start + len(key):
            assert (judged.decision, judged.crypto) == ("reject", "invalid"), bit
        elif judged.decision == "accept":
            assert "the rest of it is not checked" in outcome(judged, "tls-certificate")[1]


@captured
@pytest.mark.parametrize("name", GOOD)
def test_the_folders_root_is_not_looked_at(name):
    """With a root of the folder's own, or none: listed, and the answer stays."""
    for root in (None, b"anything", nitro.der(nitro.chain()["root"].make())):
        judged = judge(name, {"root.pem": root})
        assert judged.decision == "accept"
        assert judged.claims == judge(name).claims
        assert ("root.pem" in outcome(judged, "unused")[1]) == (root is not None)


@captured
@pytest.mark.parametrize("name", DISTINCT)
def test_the_twin_signature_gets_the_same_answer(name):
    data = files(name)[FILE]
    assert nitro.twin(data) != data
    twin, original = judge(name, {FILE: nitro.twin(data)}), judge(name)
    assert twin == original


@captured
@pytest.mark.parametrize("name", DISTINCT)
def test_cuts_and_additions_are_refused(name):
    data = files(name)[FILE]
    assert judge(name, debug=True).decision == "accept"
    for end in range(0, len(data), 7):
        assert refused(judge(name, {FILE: data[:end]}, debug=True)) == "parse-cose"
    for more in (b"\0", b"\xff", data):
        assert refused(judge(name, {FILE: data + more}, debug=True)) == "parse-cose"
        assert refused(judge(name, {FILE: more[:1] + data}, debug=True)) == "parse-cose"


def parts(name):
    return cbor2.loads(files(name)[FILE])


@captured
def test_parts_of_different_documents_do_not_mix():
    for name in DISTINCT:
        protected, unprotected, payload, signature = parts(name)
        fields = cbor2.loads(payload)
        assert judge(name, {FILE: cbor2.dumps(parts(name))}, debug=True).decision == "accept"
        for other in set(DISTINCT) - {name}:
            *_, others_payload, others_signature = parts(other)
            theirs = cbor2.loads(others_payload)
            swapped = {FILE: cbor2.dumps([protected, unprotected, payload, others_signature])}
            assert refused(judge(name, swapped, debug=True)) == "signature-document"
            swapped = {FILE: cbor2.dumps([protected, unprotected, others_payload, signature])}
            assert judge(name, swapped, debug=True).crypto == "invalid"
            for field in ("certificate", "cabundle", "pcrs", "user_data", "nonce", "timestamp"):
                if fields[field] == theirs[field]:
                    continue
                mixed = cbor2.dumps(fields | {field: theirs[field]})
                swapped = {FILE: cbor2.dumps([protected, unprotected, mixed, signature])}
                judged = judge(name, swapped, debug=True)
                stage = refused(judged).split("-")[0]
                assert (judged.crypto, stage in ("chain", "signature")) == ("invalid", True)


@captured
def test_a_tls_certificate_of_another_is_refused():
    """The relay: genuine evidence of an enclave, shown by who holds another key."""
    bound = [n for n in GENUINE if "tls_cert.der" in files(n)]
    for name in bound:
        for tls in (nitro.tls(), *(files(n)["tls_cert.der"] for n in set(bound) - {name})):
            judged = judge(name, {"tls_cert.der": tls}, debug=True)
            assert refused(judged) == "binding-tls-certificate"
    for name in set(GOOD) - set(bound):
        judged = judge(name, {"tls_cert.der": nitro.tls()})
        assert refused(judged) == "binding-tls-certificate"


@captured
@pytest.mark.parametrize("name", GOOD)
def test_a_forged_document_with_a_genuine_chain(name):
    """AWS's certificates around what someone else signed, and around what another leaf signed."""
    fields = cbor2.loads(parts(name)[2]) | {"user_data": b"forged"}
    payload = cbor2.dumps(fields)
    forged = {FILE: nitro.sign(payload, nitro.key("stranger"))}
    assert refused(judge(name, forged)) == "signature-document"
    # A leaf of one's own below the genuine authorities.
    made = nitro.Issued("leaf", "nobody", usage=("digital_signature",)).make()
    fields["certificate"] = nitro.der(made)
    forged = {FILE: nitro.sign(cbor2.dumps(fields))}
    assert refused(judge(name, forged)) == "chain-issuer"
    # A leaf of one's own below the genuine leaf, which is no authority.
    genuine = parts(name)
    bundle = [*cbor2.loads(genuine[2])["cabundle"], cbor2.loads(genuine[2])["certificate"]]
    subject = x509.parse(bundle[-1], "it").name()
    made = nitro.Issued("leaf", subject, usage=("digital_signature",)).make()
    fields |= {"cabundle": bundle, "certificate": nitro.der(made)}
    forged = {FILE: nitro.sign(cbor2.dumps(fields))}
    assert refused(judge(name, forged)).startswith("chain-")


# Made-up evidence from here on.


class _All(tuple):
    """A pin that admits every key: the root check taken away."""

    def __contains__(self, _):
        return True


def _nothing(*_args, **_more):
    return None


def _issued(**changed):
    return nitro.document(nitro.chain(**changed))


def _own_root():
    own = nitro.key("own root")
    return _issued(root={"key": own, "signer": own}, region={"signer": own})


TRUSTED = nitro.policy()
HOUR = timedelta(hours=1)
BOUND = {"tls_cert.der": nitro.tls()}
REVOKED = {"a.crl": nitro.revocations("root", 77)}
UNSIGNED = nitro.sign(cbor2.dumps(nitro.fields()), nitro.key("stranger"))
DEBUG = nitro.document(pcrs={n: bytes(48) for n in range(16)})

# An attack: evidence, further files, hours from now, the code; the check that stops it: what to
# replace and with what.
ATTACKS = {
    "signed by a stranger": (
        UNSIGNED, {}, 0, "signature-document", (verify.cose, "verify", lambda *_a, **_k: "")
    ),
    "issued by a stranger": (
        _issued(zone={"signer": nitro.key("stranger")}), {}, 0, "chain-signature",
        (x509, "check_signature", _nothing),
    ),
    "under a longer path": (
        _issued(region={"path": 1}), {}, 0, "chain-authority", (x509, "check_authority", _nothing)
    ),
    "with an authority's key": (
        _issued(leaf={"path": 0}), {}, 0, "chain-leaf", (verify, "_check_leaf", _nothing)
    ),
    "under a root of its own": (_own_root(), {}, 0, "root-unknown", None),
    "expired": (
        nitro.document(), {}, 4, "validity-expired", (x509, "check_validity", _nothing)
    ),
    "not yet valid": (
        nitro.document(), {}, -1, "validity-not-yet", (x509, "check_validity", _nothing)
    ),
    "revoked": (
        _issued(region={"serial": 77}), REVOKED, 0, "revocation-revoked",
        (crl, "check_revoked", _nothing),
    ),
    "with a list that a stranger signed": (
        _issued(region={"serial": 77}),
        {"a.crl": nitro.revocations("root")[:-1] + b"\0"}, 0, "chain-signature",
        (verify, "_lists", _nothing),
    ),
    "with a stale list": (
        _issued(region={"serial": 77}),
        {"a.crl": nitro.revocations("root", lives=HOUR)}, 2, "validity-expired",
        (crl, "check_validity", _nothing),
    ),
    "relayed": (
        nitro.document(), BOUND, 0, "binding-tls-certificate", (verify, "_tls", _nothing)
    ),
    "in debug mode": (
        DEBUG, {}, 0, "appraise-debug", (appraise, "is_debug", lambda _document: False)
    ),
}  # fmt: skip


def attacked(name, policy=TRUSTED):
    data, more, hours, code, _ = ATTACKS[name]
    now = (nitro.NOW + hours * HOUR).timestamp()
    judged = folder.judge({FILE: data, **more}, now=now, policies={"nitro": policy})
    return judged.code, f"evidence.{code}"


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_each_by_its_check(name):
    found, wanted = attacked(name)
    assert found == wanted


@pytest.mark.parametrize("name", ATTACKS)
def test_a_check_taken_away_is_missed(name, monkeypatch):
    """So the test above fails without it: no other check stands in by accident."""
    bug, policy = ATTACKS[name][-1], TRUSTED
    if bug is None:
        object.__setattr__(policy := nitro.policy(), "roots", _All())
    else:
        monkeypatch.setattr(*bug)
    assert attacked(name, policy)[0] == ""


def test_the_verdict_does_not_hang_on_the_signatures_bytes():
    """Signed again, with other random numbers, and each with its twin."""
    payload = cbor2.dumps(nitro.fields())
    documents = [nitro.sign(payload) for _ in range(3)]
    documents += [nitro.twin(data) for data in documents]
    assert len(set(documents)) == 6
    now = nitro.NOW.timestamp()
    found = [folder.judge({FILE: data}, now=now, policies={"nitro": TRUSTED}) for data in documents]
    assert {judged.decision for judged in found} == {"accept"}
    assert all(judged == found[0] for judged in found)


def test_a_twin_certificate_gets_the_same_answer():
    """A new document around the chain, one of whose signatures is replaced by its twin."""
    fields = nitro.fields()
    raw = fields["cabundle"][2]
    found = x509.parse(raw, "it")
    r, s = utils.decode_dss_signature(found.signature)
    other = utils.encode_dss_signature(r, nitro.P384_ORDER - s)
    body = found.tbs + raw[4 + len(found.tbs) : raw.index(found.signature) - 3]
    tail = b"\x03" + bytes([len(other) + 1]) + b"\0" + other
    twin = b"\x30\x82" + len(body + tail).to_bytes(2, "big") + body + tail
    assert x509.parse(twin, "it").signature != found.signature
    bundle = [*fields["cabundle"][:2], twin, *fields["cabundle"][3:]]
    data = nitro.sign(cbor2.dumps(fields | {"cabundle": bundle}))
    now = nitro.NOW.timestamp()
    assert folder.judge({FILE: data}, now=now, policies={"nitro": TRUSTED}).decision == "accept"


def test_fuzzed_evidence_is_refused():
    """Through the whole verifier, so that parsers of certificates and lists see it too."""
    data = nitro.document()
    listed = nitro.revocations("root", 1, 2)
    now = nitro.NOW.timestamp()

    def whole(changed):
        judged = folder.judge({FILE: changed}, now=now, policies={"nitro": TRUSTED})
        assert judged.decision == "reject" or changed in (data, nitro.twin(data))

    def beside(changed):
        more = {"a.crl": changed, "tls_cert.der": nitro.tls()}
        folder.judge({FILE: data, **more}, now=now, policies={"nitro": TRUSTED})

    fuzz(whole, [data], COUNT // 10, seed=6)
    fuzz(beside, [listed], COUNT // 40, seed=7)


def test_fuzzed_captured_documents():
    seeds = [files(n)[FILE] for n in DISTINCT] or [nitro.document()]
    taken = fuzz(abi.parse, seeds, seed=8)
    assert 0 < taken < COUNT

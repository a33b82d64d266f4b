"""Attestation tokens that services really issued, their answers, windows and values; every kind of
change refused; and seeded bugs that show what stops which forgery.

The collection has no keys of Azure's and NVIDIA's services, and no token of Intel's: what needs
their signatures is done with the captured claims signed again by keys made here.
"""

import functools
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from casemate.attest import folder, jws, kinds, x509
from casemate.attest.tokens import abi, appraise, collateral, verify
from casemate.attest.tokens import policy as policies
from casemate.attest.verdict import Unchecked
from support import tokens as made
from support.collection import Collection, at
from support.mutation import flipped, fuzz, mutated
from support.tokens import NOW, code, judge

CAPTURED = Collection("jwt")
NAMES, captured = CAPTURED.names, CAPTURED.needed
about, files = CAPTURED.about, CAPTURED.files
OPEN = Unchecked("a test")
PKI, OIDC, AZURE, NVIDIA = (
    "gcp-cs-pki-tdx", "gcp-cs-oidc-debug", "azure-maa-sevsnp-no-keys",
    "nvidia-nras-detached-eat-gpu",
)  # fmt: skip


@functools.cache
@functools.cache
def now_of(name):
    return at(about(name)["verify_at"])


def claims_of(name):
    return abi.parse(files(name), abi.service(files(name)))


@functools.cache
def lenient():
    """A policy under which the captured OIDC token of the debug image is accepted."""
    token = claims_of(OIDC).overall
    key = collateral.key_of(token.jws, collateral.parse(files(OIDC)))
    return replace(policies.GOOGLE_DEFAULT, keys=(jws.thumbprint(key),), dbgstats=OPEN)


# Captured tokens that can be accepted, with the policy that accepts them.
ACCEPTED = {PKI: lambda: policies.GOOGLE_DEFAULT, OIDC: lenient} if NAMES else {}


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_stated_one(name):
    found, expect = folder.judge(files(name), now=now_of(name)), about(name)["expect"]
    assert found.crypto == expect["crypto"].partition(":")[0]
    assert found.decision == expect["default_policy"].split()[0]
    if "tcb_status" in expect:
        assert found.tcb_status == expect["tcb_status"]
    if "advisory_ids" in expect:
        assert list(found.advisories) == expect["advisory_ids"]


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_outside_its_window_it_is_refused(name):
    window, policy = about(name)["valid"], ACCEPTED[name]()
    for now, wanted in (
        (at(window["from"]) - 1, "validity-not-yet"), (at(window["from"]), ""),
        (at(window["to"]), ""), (at(window["to"]) + 1, "validity-expired"),
    ):  # fmt: skip
        found = judge(files(name), policy, now)
        assert found.code.removeprefix("evidence.") == wanted and found.crypto == "valid"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gcp")])
def test_the_values_are_the_stated_ones(name):
    claims, values = claims_of(name).overall.claims, about(name)["values"]
    for field in ("iss", "hwmodel", "dbgstat", "swname"):
        assert getattr(claims, field) == values[field]
    assert claims.aud == (values["aud"],) and claims.secboot is values["secboot"]
    assert claims.eat_nonce == ((values["eat_nonce"],) if values["eat_nonce"] else ())
    assert claims.swversion == tuple(values["swversion"])
    assert claims.submods.container.image_digest == values["image_digest"]
    attributes = claims.submods.confidential_space.support_attributes
    assert attributes == tuple(values.get("support_attributes", ()))
    tdx = values.get("tdx", {})
    assert claims.tdx.gcp_attester_tcb_status == tdx.get("gcp_attester_tcb_status", "")


@pytest.mark.parametrize("name", [n for n in NAMES if n == AZURE])
def test_azures_values(name):
    claims, values = claims_of(name).overall.claims, about(name)["values"]
    for field, value in values.items():
        assert claims.claims[field] == value
        known = field.replace("-", "_")
        assert getattr(claims, known, value) == value
    assert claims.kind == "sevsnpvm"


@pytest.mark.parametrize("name", [n for n in NAMES if n == NVIDIA])
def test_nvidias_values(name):
    tokens, values = claims_of(name), about(name)["values"]
    assert tokens.overall.claims.submods == values["submods"]
    for field, value in values["overall"].items():
        assert tokens.overall.claims.claims[field] == value
    for device, claims in values["devices"].items():
        for field, value in claims.items():
            assert tokens.devices[device].claims.claims[field] == value


@captured
def test_the_captured_nonce_is_fresh():
    policy = {abi.GOOGLE: policies.GOOGLE_DEFAULT}
    nonce = about(PKI)["values"]["eat_nonce"]
    for one, decision in ((bytes.fromhex(nonce), "accept"), (nonce.encode(), "accept"),
                          (b"other", "reject"), (b"", "reject")):  # fmt: skip
        found = folder.judge(files(PKI), now=now_of(PKI), policies=policy, nonce=one)
        assert found.decision == decision


@captured
def test_the_root_is_ours_not_the_folders():
    only = {"token.jwt": files(PKI)["token.jwt"]}
    assert judge(only, policies.GOOGLE_DEFAULT, now_of(PKI)).decision == "accept"
    none = replace(policies.GOOGLE_DEFAULT, roots=())
    assert judge(files(PKI), none, now_of(PKI)).code == "evidence.root-unknown"
    assert files(PKI)["root.pem"].strip() == (
        Path(collateral.__file__).parents[1] / "roots" / "google-confidential-space.pem"
    ).read_bytes().strip()  # fmt: skip


# --- captured claims under keys of our own -------------------------------------------------------


@captured
def test_azures_claims_under_a_pinned_key():
    claims = claims_of(AZURE).overall.claims.claims
    again = made.files(abi.MAA, dict(claims))
    assert judge(again, made.pinned(abi.MAA), now_of(AZURE)).decision == "accept"
    debug = made.files(abi.MAA, dict(claims) | {"x-ms-sevsnpvm-is-debuggable": True})
    assert code(debug, made.pinned(abi.MAA), now_of(AZURE)) == "appraise-debug"


@captured
def test_nvidias_claims_under_a_pinned_key():
    tokens = claims_of(NVIDIA)
    devices = {name: dict(token.claims.claims) for name, token in tokens.devices.items()}
    overall = {k: v for k, v in tokens.overall.claims.claims.items() if k != "submods"}
    found = judge(made.detached(devices, **overall), made.pinned(abi.NRAS), now_of(NVIDIA))
    assert (found.decision, found.crypto) == ("accept", "valid")


# --- every change is refused --------------------------------------------------------------------


def token_bits(raw, tee, count):
    bits = range(8 * len(raw))
    return bits if count is None else random.Random(tee).sample(bits, count)


def refuse_flips(found, file, policy, now, count):
    base = judge(found, policy, now)
    assert base.decision == "accept"
    raw = found[file]
    for bit in token_bits(raw, file, count):
        flip = judge(found | {file: flipped(raw, bit)}, policy, now)
        assert flip.decision != "accept" and flip.code, bit


MADE = {
    "google": lambda: (made.files(abi.GOOGLE), "token.jwt", made.pinned(abi.GOOGLE)),
    "google-pki": lambda: (made.pki(), "token.jwt", made.under_root()),
    "azure": lambda: (made.files(abi.MAA), "token.jwt", made.pinned(abi.MAA)),
    "intel": lambda: (made.files(abi.ITA), "token.jwt", made.pinned(abi.ITA)),
    "nvidia": lambda: (made.detached(), "detached_eat.json", made.pinned(abi.NRAS)),
    "other": lambda: (made.files(abi.OTHER), "token.jwt", made.pinned(abi.OTHER)),
}


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_sampled_flips_of_captured_tokens_are_refused(name):
    refuse_flips(files(name), "token.jwt", ACCEPTED[name](), now_of(name), 400)


@pytest.mark.parametrize("name", sorted(MADE))
def test_sampled_flips_are_refused(name):
    found, file, policy = MADE[name]()
    refuse_flips(found, file, policy, NOW, 300)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_every_flip_of_captured_tokens_is_refused(name):
    refuse_flips(files(name), "token.jwt", ACCEPTED[name](), now_of(name), None)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(MADE))
def test_every_flip_is_refused(name):
    found, file, policy = MADE[name]()
    refuse_flips(found, file, policy, NOW, None)


@pytest.mark.parametrize(("name", "file"), [(PKI, "root.pem"), (OIDC, "jwks.json")])
def test_flips_of_what_nothing_signs_are_refused_or_listed(name, file):
    if not NAMES:
        pytest.skip("no captured evidence beside the project")
    raw, policy, now = files(name)[file], ACCEPTED[name](), now_of(name)
    for bit in token_bits(raw, name, 300):
        found = judge(files(name) | {file: flipped(raw, bit)}, policy, now)
        listed = any(file in c.detail and "came with" in c.detail.replace("supplied", "came")
                     for c in found.checks)  # fmt: skip
        assert found.decision == "reject" or listed


@pytest.mark.parametrize("name", sorted(MADE))
def test_cuts_and_additions_are_refused(name):
    found, file, policy = MADE[name]()
    raw = found[file]
    draw = random.Random(name)
    cuts = [raw[: draw.randrange(len(raw))] for _ in range(100)]
    for bad in [*cuts, raw + b"A", raw + b".", raw + b"\0", raw + raw, b""]:
        assert judge(found | {file: bad}, policy).decision != "accept"
    # White space that nothing signs: refused, or listed.
    for spaced in (b" " + raw, raw + b" ", raw + b"\n"):
        said = judge(found | {file: spaced}, policy)
        listed = any("not signed: " in c.detail for c in said.checks)
        assert said.decision != "accept" or listed


@captured
def test_parts_of_different_tokens_do_not_mix():
    tokens = [files(n)["token.jwt"].decode() for n in (PKI, OIDC)]
    ours = [made.files(abi.GOOGLE)["token.jwt"].decode(), made.pki()["token.jwt"].decode()]
    policy = replace(lenient(), keys=(*lenient().keys, made.pin(made.rsa_key())))
    parts = [text.split(".") for text in (*tokens, *ours)]
    for head in parts:
        for body in parts:
            for sign in parts:
                text = f"{head[0]}.{body[1]}.{sign[2]}"
                if text in (*tokens, *ours):
                    continue
                mixed = {"token.jwt": text.encode()}
                for beside in ({}, {"jwks.json": files(OIDC)["jwks.json"]},
                               {"jwks.json": made.key_set(made.rsa_key())}):  # fmt: skip
                    for now in (now_of(PKI), now_of(OIDC), NOW):
                        found = judge(mixed | beside, policy, now)
                        assert found.decision == "reject" and found.crypto != "valid"


@captured
def test_the_captured_chain_does_not_carry_our_token():
    """Google's certificates before claims that our key signed, and our leaf under Google's."""
    header = claims_of(PKI).overall.jws
    claims = dict(claims_of(PKI).overall.claims.claims)
    for path in (header.x5c, (made.chain()[0], *header.x5c[1:]), (*made.chain(), *header.x5c),
                 (*made.chain()[:2], header.x5c[2]), (made.chain()[0], header.x5c[2])):  # fmt: skip
        text = made.token(claims, key=made.rsa_key(), x5c=made.x5c(path))
        found = judge({"token.jwt": text.encode()}, policies.GOOGLE_DEFAULT, now_of(PKI))
        assert (found.crypto, found.stage) == ("invalid", "signature")


def test_an_issuer_that_lies():
    """A token under Google's name by the key that the policy pins for Azure."""
    lie = made.files(abi.MAA, iss=made.GOOGLE["iss"])
    trust = {abi.MAA: made.pinned(abi.MAA)}
    assert folder.judge(lie, now=NOW, policies=trust).code == "evidence.tee-not-trusted"
    trust[abi.GOOGLE] = policies.GOOGLE_DEFAULT
    assert folder.judge(lie, now=NOW, policies=trust).code == "evidence.root-key-unpinned"


@pytest.mark.parametrize("tee", sorted(made.DEFAULTS))
def test_what_a_token_says_does_not_steer_a_terminal(tee):
    evil = "\x1b[2J\n\r\x07"
    if tee == abi.NRAS:
        cases = [made.detached({"GPU-0": made.device(hwmodel=evil)}, iss="https://x.test" + evil),
                 made.detached({evil: made.device()})]  # fmt: skip
    else:
        claims = made.CLAIMS[tee] | {
            "sub": evil, "hwmodel": evil, "dbgstat": evil, "eat_nonce": evil, "tdx": None,
            "x-ms-isolation-tee": None, "x-ms-attestation-type": evil, "attester_type": evil,
        }  # fmt: skip
        key = made.key_for(made.ALG[tee])
        token = made.token(claims, made.ALG[tee], **{evil: 1, "kid": evil})
        cases = [{"token.jwt": token.encode(), "jwks.json": made.key_set(made.jwk(key, evil))},
                 {"token.jwt": token.encode()}]  # fmt: skip
    for found in cases:
        said = judge(found, made.pinned(tee))
        for text in (said.message, said.where, *(c.name + c.detail for c in said.checks)):
            assert text.isprintable()


# --- fuzz ---------------------------------------------------------------------------------------


def token_parser(tee, head=None, body=None):
    """A parser of header or payload bytes: what is base64 outside stays well-formed."""
    good = made.files(tee)["token.jwt"].decode().split(".")

    def parse(data):
        parts = list(good)
        parts[0 if head else 1] = jws.url_encode(data)
        return abi.parse({"token.jwt": ".".join(parts).encode()}, tee)

    return parse


def seeds(tee):
    return [json.dumps(made.CLAIMS[tee]).encode()]


PARSERS = {
    "token": lambda: (lambda data: abi.parse({"token.jwt": data}, abi.GOOGLE),
                      [made.files(abi.GOOGLE)["token.jwt"], made.pki()["token.jwt"]]),
    "header": lambda: (token_parser(abi.GOOGLE, head=True),
                       [b'{"alg":"RS256","kid":"k1","typ":"JWT","x5c":["AAAA"],"jku":"x"}']),
    "google": lambda: (token_parser(abi.GOOGLE), seeds(abi.GOOGLE)),
    "azure": lambda: (token_parser(abi.MAA), seeds(abi.MAA)),
    "intel": lambda: (token_parser(abi.ITA), [json.dumps(c).encode()
                                              for c in (made.ITA_1, made.ITA_2)]),
    "bundle": lambda: (lambda data: abi.parse({"detached_eat.json": data}, abi.NRAS),
                       [made.detached()["detached_eat.json"]]),
    "device": lambda: (lambda data: abi.claims_of(abi.Device, jws.strict_object(data, "x"),
                                                  claims={}),
                       [json.dumps(made.device()).encode()]),
    "keys": lambda: (lambda data: [jws.jwk_key(key, "x") for key in jws.key_set(data, "x")],
                     [made.key_set(made.rsa_key(), made.jwk(made.ec_key(), "k2"))]),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_a_fuzzed_parser_answers_or_refuses(name):
    parse, good = PARSERS[name]()
    for seed in good:
        parse(seed)
    count = int(os.environ.get("CASEMATE_FUZZ", "20000"))
    fuzz(parse, good, count)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_fuzzed_folder_is_judged_and_never_accepted(name):
    found, file, policy = MADE[name]()
    draw = random.Random(name)
    for _ in range(300):
        data = mutated(found[file], draw)
        answer = judge(found | {file: data}, policy)
        listed = any("not signed: " in c.detail for c in answer.checks)
        assert data == found[file] or answer.decision != "accept" or listed


# --- seeded bugs --------------------------------------------------------------------------------


def nothing(*args, **kwargs):
    return None


def forged_payload():
    head, _, sign = made.files(abi.GOOGLE)["token.jwt"].decode().split(".")
    body = jws.url_encode(json.dumps(made.GOOGLE | {"sub": "another"}).encode())
    return made.files(abi.GOOGLE) | {"token.jwt": f"{head}.{body}.{sign}".encode()}


def forged_leaf():
    leaf = made.certificate("leaf", made.rsa_key(), "middle 0", made.rsa_key(5), False)
    return made.pki((leaf, *made.chain()[1:]))


def leaf_that_is_an_authority():
    return made.pki(made.chain()[1:], key=made.rsa_key(20))


def another_device():
    ours, theirs = (json.loads(made.detached({"GPU-0": made.device(ueid=u)})["detached_eat.json"])
                    for u in ("1", "2"))  # fmt: skip
    value = json.dumps([ours[0], theirs[1]]).encode()
    return made.detached() | {"detached_eat.json": value}


def other_algorithm():
    return {"token.jwt": made.token(made.MAA, "PS256").encode(),
            "jwks.json": made.key_set(made.rsa_key())}  # fmt: skip


def weak_key():
    key = made.rsa_key(7, 1024)
    return {"token.jwt": made.token(made.OTHER, key=key).encode(), "jwks.json": made.key_set(key)}


GOOGLE = functools.partial(made.pinned, abi.GOOGLE)
# A check, how it is taken away, the forgery that only it stops, the policy and the code.
BUGS = {
    "no signature": (jws, "check_signature", nothing, forged_payload, GOOGLE, "signature-token"),
    "no chain": (x509, "check_chain", nothing, forged_leaf, made.under_root, "chain-signature"),
    "no leaf": (verify, "_leaf", nothing, leaf_that_is_an_authority, made.under_root,
                "chain-leaf"),
    "any root": (verify, "_chain", None, lambda: made.pki(made.chain(1)), made.under_root,
                 "root-unknown"),
    "no times": (verify, "check_times", nothing, lambda: made.files(abi.GOOGLE, exp=NOW - 1),
                 GOOGLE, "validity-expired"),
    "no digests": (verify, "_submods", lambda tokens: "", another_device,
                   lambda: made.pinned(abi.NRAS), "endorsement-submods"),
    "any algorithm": (verify, "ALGORITHMS", dict.fromkeys(made.DEFAULTS, frozenset(jws.ALGORITHMS)),
                      other_algorithm, lambda: made.pinned(abi.MAA), "signature-algorithm"),
    "any key size": (jws, "RSA_BITS", range(512, 8193), weak_key,
                     lambda: made.pinned(abi.OTHER, keys=(made.pin(made.rsa_key(7, 1024)),)),
                     "signature-key"),
    "no appraisal": (appraise, "appraise", nothing,
                     lambda: made.files(abi.GOOGLE, dbgstat="enabled"), GOOGLE,
                     "appraise-dbgstat"),
    "keys of the folder": (appraise, "appraise", nothing, lambda: made.files(abi.GOOGLE),
                           lambda: policies.GOOGLE_DEFAULT, "root-key-unpinned"),
    "duplicate keys": (jws, "_pairs", dict, lambda: {
        "token.jwt": made.token(json.dumps(made.OTHER)[:-1].encode() + b', "aud": "a", "aud": "b"}',
                                "ES256").encode(),
        "jwks.json": made.key_set(made.key_for("ES256"))},
        lambda: made.pinned(abi.OTHER), "parse-json"),
    "crit": (jws, "_FORBIDDEN", (), lambda: {
        "token.jwt": made.token(made.MAA, crit=["exp"]).encode(),
        "jwks.json": made.key_set(made.rsa_key())}, lambda: made.pinned(abi.MAA), "parse-header"),
}  # fmt: skip


def any_root(tokens, beside, roots, checks, real=verify._chain):
    class Every:
        def __contains__(self, root):
            return True

    return real(tokens, beside, Every(), checks)


@pytest.mark.parametrize("name", sorted(BUGS))
def test_what_stops_which_forgery(name, monkeypatch):
    module, attribute, without, forgery, policy, wanted = BUGS[name]
    assert code(forgery(), policy()) == wanted
    monkeypatch.setattr(module, attribute, any_root if without is None else without)
    assert judge(forgery(), policy()).decision == "accept"


def test_no_file_is_left_out_of_the_table():
    assert {k.tee for k in kinds.KINDS.values()} >= set(made.DEFAULTS)

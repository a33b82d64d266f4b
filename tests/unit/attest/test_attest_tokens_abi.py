"""Token files and the claims of each service. Tokens and keys are made here."""

import json

import pytest

from casemate.attest import jws
from casemate.attest.tokens import abi
from casemate.attest.verdict import Refused
from support import tokens as made


def refused(files, tee=abi.OTHER) -> str:
    with pytest.raises(Refused) as e:
        abi.parse(files, tee)
    return e.value.code.removeprefix("evidence.")


def of(claims) -> dict[str, bytes]:
    return {"token.jwt": made.token(claims).encode()}


@pytest.mark.parametrize(
    ("issuer", "tee"),
    [
        ("https://confidentialcomputing.googleapis.com", abi.GOOGLE),
        ("https://sharedweu.weu.attest.azure.net", abi.MAA),
        ("https://sharedweu.weu.test.attest.azure.net", abi.MAA),
        ("https://own.usgov.attest.azure.us", abi.MAA),
        ("https://portal.trustauthority.intel.com", abi.ITA),
        ("https://portal.eu.trustauthority.intel.com", abi.ITA),
        ("Intel Trust Authority", abi.ITA),
        ("https://nras.attestation.nvidia.com", abi.NRAS),
        ("https://nras.attestation.nvidia.com.evil.test", abi.OTHER),
        ("https://evil.test/.attest.azure.net", abi.OTHER),
        ("https://attest.azure.net", abi.OTHER),
        ("http://confidentialcomputing.googleapis.com", abi.OTHER),
        ("https://xtrustauthority.intel.com", abi.OTHER),
        (5, abi.OTHER),
    ],
)
def test_a_service_is_known_by_its_issuer(issuer, tee):
    assert abi.service(of({"iss": issuer})) == tee
    assert isinstance(issuer, int) or abi.issuer_of(tee, issuer)


def test_what_no_service_issued():
    assert abi.service({}) == "" and abi.service({"report.bin": b""}) == ""
    assert abi.service({"token.jwt": b"no token"}) == abi.OTHER
    assert abi.service({"token.jwt": b"\xff"}) == abi.OTHER
    assert abi.service(made.detached()) == abi.NRAS
    assert not abi.issuer_of(abi.GOOGLE, "https://evil.test")


def test_one_line_end_and_no_more():
    text = made.token(made.OTHER).encode()
    for end in (b"", b"\n", b"\r\n"):
        assert bool(abi.parse({"token.jwt": text + end}, abi.OTHER).unsigned) == bool(end)
    for bad in (text + b"\n\n", text + b" ", b"\n" + text, text + b"\r"):
        assert refused({"token.jwt": bad}) == "parse-base64"
    assert refused({"token.jwt": text + b"\xff"}) == "parse-token"


def test_googles_claims():
    claims = abi.parse(of(made.GOOGLE), abi.GOOGLE).overall.claims
    assert isinstance(claims, abi.Google)
    assert (claims.dbgstat, claims.swversion) == ("disabled-since-boot", ("250800",))
    assert claims.aud == ("https://example.test",) and claims.eat_nonce[0] == made.NONCE
    assert claims.submods.confidential_space.support_attributes == ("LATEST", "STABLE", "USABLE")
    assert claims.submods.container.image_digest == "sha256:" + "1" * 64
    assert claims.submods.container.cmd_override == ()
    assert claims.submods.gce.project_id == "project"
    assert claims.tdx.gcp_attester_tcb_status == ""


def test_azures_claims():
    claims = abi.parse(of(made.MAA), abi.MAA).overall.claims
    assert isinstance(claims, abi.Maa)
    assert claims.kind == "sevsnpvm" and claims.tee.x_ms_sevsnpvm_is_debuggable is False
    flat = made.MAA | made.MAA["x-ms-isolation-tee"]
    del flat["x-ms-isolation-tee"]
    claims = abi.parse(of(flat), abi.MAA).overall.claims
    assert claims.tee is claims and claims.kind == "sevsnpvm"


@pytest.mark.parametrize("claims", [made.ITA_1, made.ITA_2])
def test_intels_claims_in_both_versions(claims):
    found = abi.parse(of(claims), abi.ITA).overall.claims
    assert isinstance(found, abi.Ita)
    assert (found.kind, found.tee.tdx_mrtd) == ("TDX", "ab" * 48)
    assert found.policy_ids_matched == ("p1",) and found.policy_ids_unmatched == ()


def test_intels_names_of_tees():
    sev = made.changed(made.ITA_2, {"tdx": ..., "sevsnp": {"attester_type": "AMD SEV-SNP"}})
    assert abi.parse(of(sev), abi.ITA).overall.claims.kind == "SEVSNP"
    flat = made.changed(made.ITA_1, {"attester_type": "AMD SEV-SNP"})
    assert abi.parse(of(flat), abi.ITA).overall.claims.kind == "SEVSNP"
    two = made.changed(made.ITA_2, {"sgx": {"attester_type": "SGX"}})
    assert refused(of(two), abi.ITA) == "parse-claim"


def test_nvidias_bundle():
    devices = {"GPU-0": made.device(), "SWITCH-0": made.device("switch", ueid=12)}
    tokens = abi.parse(made.detached(devices), abi.NRAS)
    assert tokens.overall.claims.x_nvidia_overall_att_result is True
    assert list(tokens.devices) == ["GPU-0", "SWITCH-0"]
    assert set(tokens.overall.claims.submods) == set(tokens.devices)
    assert tokens.devices["SWITCH-0"].claims.ueid == "12"
    assert len(tokens.all) == 3


@pytest.mark.parametrize(
    ("tee", "path", "value"),
    [
        (abi.GOOGLE, "secboot", "true"), (abi.GOOGLE, "secboot", 1), (abi.GOOGLE, "dbgstat", 5),
        (abi.GOOGLE, "exp", "1"), (abi.GOOGLE, "exp", 1.5), (abi.GOOGLE, "exp", True),
        (abi.GOOGLE, "iat", -1), (abi.GOOGLE, "aud", [1]), (abi.GOOGLE, "aud", {}),
        (abi.GOOGLE, "eat_nonce", 7), (abi.GOOGLE, "submods", []),
        (abi.GOOGLE, "submods/container", "x"), (abi.GOOGLE, "submods/container/image_digest", 1),
        (abi.GOOGLE, "swversion", ["1"] * 257), (abi.GOOGLE, "sub", "x" * 8193),
        (abi.GOOGLE, "iss", ...), (abi.GOOGLE, "iat", ...), (abi.GOOGLE, "exp", ...),
        (abi.GOOGLE, "exp", None),
        (abi.MAA, "x-ms-isolation-tee/x-ms-sevsnpvm-is-debuggable", "false"),
        (abi.MAA, "x-ms-isolation-tee", False), (abi.MAA, "x-ms-runtime", "x"),
        (abi.ITA, "tdx/tdx_is_debuggable", 0), (abi.ITA, "policy_ids_matched", "p1"),
        (abi.ITA, "policy_ids_matched", [{"name": "p1"}]),
    ],
)  # fmt: skip
def test_claims_of_another_type_are_refused(tee, path, value):
    claims = made.changed(made.CLAIMS[tee], {path: value})
    if value is None:  # absent by being null
        claims["exp"] = None
        assert abi.parse(of(claims), tee).overall.claims.exp == -1
        return
    assert refused(of(claims), tee) == "parse-claim"


@pytest.mark.parametrize(
    "submods",
    [
        ["GPU-0"], {"GPU-0": "aa"}, {"GPU-0": ["DIGEST", ["SHA-1", "0" * 64]]},
        {"GPU-0": ["DIGEST", ["SHA-256", "0" * 63]]}, {"GPU-0": ["DIGEST", ["SHA-256", "A" * 64]]},
        {"GPU-0": ["DIGEST", ["SHA-256", "0" * 64], 1]}, {"GPU-0": {"measres": "success"}},
        {str(n): ["DIGEST", ["SHA-256", "0" * 64]] for n in range(65)},
    ],
)  # fmt: skip
def test_digests_of_devices_are_of_one_form(submods):
    assert refused(made.detached(submods=submods), abi.NRAS) == "parse-claim"


@pytest.mark.parametrize(
    "bundle",
    [
        {}, [], [["JWT", "a.b.c"]], [["JWT"], {}], ["JWT", {}], [["JWS", "a.b.c"], {}],
        [["JWT", 1], {}], [["JWT", "a.b.c"], []], [["JWT", "a.b.c"], {}, {}],
        [["JWT", "a.b.c"], {str(n): "a" for n in range(65)}],
    ],
)  # fmt: skip
def test_bundles_of_another_form_are_refused(bundle):
    assert refused({"detached_eat.json": json.dumps(bundle).encode()}) == "parse-token"


def test_a_device_without_a_token_is_refused():
    bundle = json.loads(made.detached()["detached_eat.json"])
    bundle[1]["GPU-0"] = None
    assert refused({"detached_eat.json": json.dumps(bundle).encode()}) == "parse-token"


def test_duplicate_claims_are_refused():
    payload = json.dumps(made.OTHER)[:-1] + ', "exp": 9999999999}'
    assert refused({"token.jwt": made.token(payload.encode()).encode()}) == "parse-json"
    head = '{"alg": "none", "alg": "RS256"}'
    text = f"{jws.url_encode(head.encode())}.{jws.url_encode(b'{}')}.AA"
    assert refused({"token.jwt": text.encode()}) == "parse-json"


@pytest.mark.parametrize("tee", sorted(made.DEFAULTS))
def test_one_token_and_of_the_service_that_is_asked_for(tee):
    """A server names the kind of its evidence itself, so any kind meets any files."""
    one, bundle = made.files(abi.GOOGLE), made.detached()
    for files in ({}, {"report.bin": b"x"}, one | bundle):
        assert refused(files, tee) == "parse-token"
    if tee != abi.NRAS:
        assert refused(bundle, tee) == "parse-token"


@pytest.mark.parametrize("tee", sorted(made.DEFAULTS))
@pytest.mark.parametrize("claims", sorted(made.CLAIMS))
def test_another_services_token_is_refused(tee, claims):
    from casemate.attest import kinds
    from casemate.attest.verdict import Checks

    if tee == claims:
        return
    keys = tuple(made.pin(made.key_for(alg)) for alg in ("RS256", "ES256", "ES384"))
    policy = made.pinned(tee, keys=keys)
    if tee == abi.OTHER:
        policy = made.pinned(tee, keys=keys, issuers=("https://verifier.test",))
    with pytest.raises(Refused) as e:
        kinds.KINDS[tee].check(made.files(claims), policy, made.NOW, Checks())
    assert e.value.code in (
        "evidence.signature-algorithm", "evidence.appraise-issuer", "evidence.parse-claim",
    )  # fmt: skip

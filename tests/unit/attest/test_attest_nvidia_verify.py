"""A GPU's evidence judged as a whole: chains, reference values, revocation, policy. All of it is
made up under test roots, since no hardware's evidence with all its parts is at hand."""

import base64
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes
from cryptography.x509 import ocsp as made_ocsp

from casemate.attest.nvidia import appraise, collateral, kind, ocsp, verify, xmldsig
from casemate.attest.nvidia.policy import DEFAULT
from casemate.attest.verdict import Checks, Refused, Unchecked, decision
from casemate.spec.errors import UsageError
from support import nvidia
from support.mutation import fuzz
from support.nvidia import AT, DRIVER, VALUES, VBIOS, golden, manifest, pem, sign_xml

DAY = 86400.0
REVOKED = made_ocsp.OCSPCertStatus.REVOKED
UNKNOWN = made_ocsp.OCSPCertStatus.UNKNOWN


def judge(files=None, now=AT, policy=None, **changed):
    checks = Checks()
    files = nvidia.files(**changed) if files is None else files
    claims = kind.check(files, policy or nvidia.policy(), now, checks)
    return claims, checks


def refused(files=None, now=AT, policy=None, **changed) -> tuple[str, str]:
    """The code, and what the signatures said."""
    checks = Checks()
    files = nvidia.files(**changed) if files is None else files
    with pytest.raises(Refused) as e:
        kind.check(files, policy or nvidia.policy(), now, checks)
    assert any(c.code == e.value.code for c in e.value.checks)
    return e.value.code.removeprefix("evidence."), checks.crypto


def chain(**options) -> bytes:
    return pem(*nvidia.device_chain(**options))


def test_genuine_evidence_is_accepted_with_its_claims():
    claims, checks = judge()
    assert checks.crypto == "valid"
    assert claims.bound == nvidia.NONCE
    assert claims.fresh == (nvidia.NONCE,)
    assert claims.product == "GH100"
    assert claims.root == nvidia.policy().roots[0]
    assert claims.chip_id == hashlib.sha256(nvidia.spki("device")).hexdigest()
    assert claims.other["device_id"] == "48b02d0123456789"
    assert claims.other["driver_version"] == DRIVER
    assert 3 in claims.other["without_reference"]
    assert 7 not in claims.other["without_reference"]
    unchecked = {c.name for c in checks.done if c.outcome == "unchecked"}
    assert {"revocation", "model", "instance"} <= unchecked


def test_the_binding_is_the_nonce():
    assert kind.KIND.of(b"r" * 64) == hashlib.sha256(b"r" * 64).digest()


def test_the_twin_signature_gets_the_same_answer():
    raw = nvidia.report()
    assert judge(report_bin=raw[:-96] + nvidia.twin(raw[-96:])) == judge(report_bin=raw)


def test_a_blackwell_device():
    rim = {
        "driver_rim_xml": sign_xml(manifest(DRIVER, golden(7), product="GB100")),
        "vbios_rim_xml": sign_xml(manifest(VBIOS, golden(1), product="GB100")),
    }
    claims, _ = judge(cert_chain_pem=chain(chip="GB100", blackwell=True), **rim)
    assert claims.product == "GB100"


SWITCH = nvidia.opaque([(6, b"96.10.55.00.01"), (22, b"\1" * 8)])


def switch(**changed):
    files = {
        "report.bin": nvidia.report(fields=SWITCH),
        "cert_chain.pem": chain(chip="LS_10"),
        "bios_rim.xml": sign_xml(manifest("96.10.55.00.01", golden(0, 35), product="LS10")),
    }
    return {n: d for n, d in (files | changed).items() if d is not None}


def test_a_switch_needs_its_bios_only():
    claims, checks = judge(switch())
    assert claims.product == "LS_10"
    assert [c.outcome for c in checks.done if c.name == "fwid"] == ["unchecked"]
    assert refused(switch(**{"bios_rim.xml": None})) == ("needs-vbios-rim", "valid")
    extra = sign_xml(manifest(DRIVER, golden(7), product="LS10"))
    assert refused(switch(**{"driver_rim.xml": extra})) == ("collateral-rim-version", "valid")


def test_the_root_may_be_left_out_only_if_it_is_carried():
    assert refused(cert_chain_pem=pem(*nvidia.device_chain()[:-1]))[0] == "chain-issuer"


STRANGER = [
    nvidia.certificate("identity", "stranger", issuer_common="device-root"),
    nvidia.certificate("stranger", "stranger", common="device-root", issuer_common="device-root"),
]


@pytest.mark.parametrize(
    ("certificates", "code"),
    [
        (nvidia.device_chain()[:3] + STRANGER, "root-unknown"),
        (nvidia.device_chain()[:3] + STRANGER[:1] + nvidia.device_chain()[4:], "chain-signature"),
        (nvidia.device_chain()[1:], "parse-device"),
        (nvidia.device_chain()[:1], "parse-device"),
        (nvidia.device_chain()[:1] + nvidia.device_chain()[2:], "parse-device"),
        (nvidia.device_chain()[:2] + nvidia.device_chain()[3:], "chain-issuer"),
        (nvidia.device_chain(leaf={"signs": False}), "chain-usage"),
        (nvidia.device_chain(leaf={"signer": "stranger"}), "chain-signature"),
        (nvidia.device_chain(device={"signer": "stranger"}), "chain-signature"),
        (nvidia.device_chain(device={"authority": False}), "chain-authority"),
        (nvidia.device_chain(chip="CX700"), "endorsement-product"),
        (nvidia.device_chain(name="NVIDIA:GB100:1"), "parse-device"),
        (nvidia.device_chain(name="NVIDIA:GH100"), "parse-device"),
        (nvidia.device_chain(leaf={"common": "GB100 A01 GSP FMC LF"}), "parse-device"),
        (nvidia.device_chain(fwid=b"\xf2" * 48), "endorsement-fwid"),
        (nvidia.device_chain(blackwell=True, fwid=b"\xf2" * 48), "endorsement-fwid"),
        (nvidia.device_chain(leaf={"extensions": []}), "endorsement-fwid"),
    ],
)
def test_other_chains(certificates, code):
    assert refused(cert_chain_pem=pem(*certificates)) == (code, "")


def test_a_device_does_not_speak_for_another_chip():
    """A switch's own key issues an authority that is named like a GPU's."""
    forged = [
        *nvidia.device_chain(leaf={"issuer_common": "GH100 A01 GSP BROM", "signer": "forger"})[:1],
        nvidia.certificate("forger", "device", common="GH100 A01 GSP BROM",
                           issuer_common="LS_10 A01 FSP BROM"),
        nvidia.certificate("device", "ica", common="LS_10 A01 FSP BROM",
                           issuer_common=nvidia.provisioner("LS_10")),
        nvidia.certificate("ica", "identity", common=nvidia.provisioner("LS_10")),
        *nvidia.device_chain()[3:],
    ]  # fmt: skip
    assert refused(cert_chain_pem=pem(*forged)) == ("endorsement-product", "")


@pytest.mark.parametrize(
    "value",
    [b"", b"\x30\x00", nvidia.composite(b"", b""), b"\x30\x03\x02\x01\x01"],
)
def test_a_fwid_that_cannot_be_read(value):
    extension = nvidia.unrecognized("2.23.133.5.4.1", value)
    certificates = nvidia.device_chain(leaf={"extensions": [extension]})
    assert refused(cert_chain_pem=pem(*certificates))[0] in ("parse-device", "endorsement-fwid")


def test_a_report_of_another_key():
    assert refused(report_bin=nvidia.report(signer="device")) == ("signature-report", "")


def test_a_report_without_a_chain():
    files = nvidia.files(cert_chain_pem=None)
    assert refused(files) == ("needs-cert-chain", "")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"driver_rim_xml": None}, "needs-driver-rim"),
        ({"vbios_rim_xml": None}, "needs-vbios-rim"),
        ({"driver_rim_xml": None, "vbios_rim_xml": None}, "needs-driver-rim"),
        ({"driver_rim_xml": None, "vbios_rim_xml": nvidia.driver_rim()}, "needs-vbios-rim"),
        ({"driver_rim_xml": b"x"}, "collateral-rim-parse"),
        ({"driver_rim_xml": nvidia.driver_rim(signer="stranger")}, "collateral-rim-signature"),
        ({"driver_rim_xml": nvidia.driver_rim(over=manifest("1.2", golden(1)))},
         "collateral-rim-signature"),
        ({"driver_rim_xml": nvidia.driver_rim(certificates=nvidia.rim_chain(signer="stranger"))},
         "collateral-rim-chain"),
        ({"driver_rim_xml": nvidia.driver_rim(certificates=nvidia.rim_chain(signs=False))},
         "collateral-rim-chain"),
        ({"driver_rim_xml": nvidia.driver_rim(certificates=[
            nvidia.certificate("rim-signer", "rim-signer", signs=True)])}, "collateral-rim-root"),
        ({"driver_rim_xml": nvidia.driver_rim(certificates=[
            nvidia.certificate("rim-signer", "device-root", signs=True),
            nvidia.device_chain()[-1]])}, "collateral-rim-root"),
        ({"driver_rim_xml": sign_xml(manifest("590.13", golden(7)))}, "collateral-rim-version"),
        ({"vbios_rim_xml": sign_xml(manifest("96.00.A5.00.02", golden(1)))},
         "collateral-rim-version"),
        ({"driver_rim_xml": sign_xml(manifest(DRIVER, golden(7), product="GB100"))},
         "collateral-rim-product"),
        ({"driver_rim_xml": sign_xml(manifest(DRIVER, golden(0, 7)))}, "collateral-rim-conflict"),
        ({"other_xml": nvidia.driver_rim()}, "collateral-rim-conflict"),
        ({"a_xml": b"x", "b_xml": b"x", "c_xml": b"x"}, "collateral-rim-conflict"),
        ({"driver_rim_xml": sign_xml(manifest(DRIVER, {7: [VALUES[9]]}))},
         "appraise-measurements"),
        ({"driver_rim_xml": sign_xml(manifest(DRIVER, {7: [VALUES[7]]}))},
         "appraise-measurements"),
        ({"vbios_rim_xml": sign_xml(manifest(VBIOS, {1: [b"\0" * 48]}))}, "appraise-measurements"),
        ({"report_bin": nvidia.report(values={n: VALUES[n] for n in range(1, 22)})},
         "appraise-measurements"),
        ({"report_bin": nvidia.report(values=VALUES | {8: VALUES[8][:47]})},
         "appraise-measurements"),
        ({"report_bin": nvidia.report(fields=nvidia.opaque(nvidia.with_field(3, None)))},
         "collateral-rim-version"),
    ],
)  # fmt: skip
def test_reference_values(changed, code):
    assert refused(**changed) == (code, "valid")
    needs = code.startswith("needs")
    assert decision(f"evidence.{code}", "") == ("needs-collateral" if needs else "reject")


def test_any_of_the_alternatives_will_do():
    judge(driver_rim_xml=sign_xml(manifest(DRIVER, {7: [b"\0" * 48, VALUES[8], b"\1" * 48]})))


def test_what_is_not_active_is_not_compared():
    inactive = nvidia.resource(9, [b"\1" * 48], active=False)
    judge(driver_rim_xml=sign_xml(manifest(DRIVER, golden(7), records=inactive)))


@pytest.mark.parametrize(("status", "accepted"), [(b"\x55", True), (b"\xaa", False), (None, False)])
def test_the_decoders_measurement_counts_unless_the_decoder_is_off(status, accepted):
    changed = {
        "report_bin": nvidia.report(fields=nvidia.opaque(nvidia.with_field(11, status))),
        "driver_rim_xml": sign_xml(manifest(DRIVER, golden(7) | {35: [b"\0" * 48]})),
    }
    if accepted:
        _, checks = judge(**changed)
        [check] = [c for c in checks.done if c.name == "measurements"]
        assert "35 is left out" in check.detail
    else:
        assert refused(**changed)[0] == "appraise-measurements"


def test_manifests_that_are_not_demanded_are_checked_if_they_come():
    lax = nvidia.policy(reference_values=Unchecked("a test"))
    judge(driver_rim_xml=None, vbios_rim_xml=None, policy=lax)
    wrong = sign_xml(manifest(DRIVER, {7: [VALUES[9]]}))
    assert refused(driver_rim_xml=wrong, vbios_rim_xml=None, policy=lax)[0] == (
        "appraise-measurements"
    )


@pytest.mark.parametrize(
    ("now", "code"),
    [
        (AT - 31 * DAY, "validity-not-yet"),
        (AT + 201 * DAY, "validity-expired"),
        (AT + 366 * DAY, "validity-expired"),
        (float("nan"), "validity-not-yet"),
    ],
)
def test_outside_of_their_validity(now, code):
    assert refused(now=now) == (code, "valid")
    judge(now=AT + 199 * DAY)


def test_a_manifest_whose_signer_has_expired():
    old = nvidia.driver_rim(certificates=nvidia.rim_chain(days=-1))
    assert refused(driver_rim_xml=old) == ("validity-expired", "valid")


IDENTITY = hashlib.sha256(nvidia.spki("device")).hexdigest()


@pytest.mark.parametrize(
    ("field", "good", "bad", "name"),
    [
        ("models", ("GB100", "GH100"), ("GB100",), "model"),
        ("driver_versions", (DRIVER,), ("590.13",), "driver-version"),
        ("vbios_versions", (VBIOS,), ("96.00.A5.00.02",), "vbios-version"),
        ("modes", ("ppcie",), ("spt", "mpt"), "mode"),
        ("protected_pcie", True, False, "protected-pcie"),
        ("instances", (IDENTITY,), ("00" * 32,), "instance"),
    ],
)
def test_policies(field, good, bad, name):
    _, checks = judge(policy=nvidia.policy(**{field: good}))
    assert [c.outcome for c in checks.done if c.name == name] == ["passed"]
    assert refused(policy=nvidia.policy(**{field: bad})) == (f"appraise-{name}", "valid")


def test_a_policy_fails_before_what_is_missing():
    policy = nvidia.policy(models=("GB100",), revocation=True)
    assert refused(driver_rim_xml=None, policy=policy)[0] == "appraise-model"


def test_protected_pcie_that_is_not_stated_is_neither_on_nor_off():
    raw = nvidia.report(fields=nvidia.opaque(nvidia.with_field(21, None)))
    for wanted in (True, False):
        code, _ = refused(report_bin=raw, policy=nvidia.policy(protected_pcie=wanted))
        assert code == "appraise-protected-pcie"


@pytest.mark.parametrize(
    "change",
    [
        {"roots": ()}, {"roots": ("ab",)}, {"rim_roots": "ab" * 32}, {"revoked": ("AB" * 32,)},
        {"revocation": False}, {"reference_values": False}, {"reference_values": 1},
        {"models": ()}, {"models": "GH100"}, {"modes": ("cc",)}, {"protected_pcie": "yes"},
        {"instances": ()}, {"driver_versions": (590,)},
    ],
)  # fmt: skip
def test_malformed_policies(change):
    with pytest.raises(UsageError):
        replace(DEFAULT, **change)


def test_roots_that_are_not_pinned_are_said_so():
    policy = nvidia.policy(roots=Unchecked("a test"), rim_roots=Unchecked("a test"))
    _, checks = judge(policy=policy)
    assert [c.outcome for c in checks.done if c.name in ("root", "rim")] == ["unchecked"] * 3


# Revocation.

CHAIN = nvidia.device_chain()
RIMS = nvidia.rim_chain()
LINKS = [(CHAIN[n], CHAIN[n + 1], k) for n, k in ((1, "ica"), (2, "identity"), (3, "device-root"))]
RIM_LINKS = [(RIMS[0], RIMS[1], "rim-ca"), (RIMS[1], RIMS[2], "rim-root")]


def answers(**changed):
    """An answer about each certificate, with files replaced."""
    found = {f"{n}_ocsp": nvidia.answer(*link) for n, link in enumerate(LINKS + RIM_LINKS)}
    return found | changed


def demanded(**changed):
    return nvidia.policy(revocation=True, **changed)


def test_answers_about_each_certificate():
    _, checks = judge(policy=demanded(), **answers())
    found = {c.name: c.outcome for c in checks.done if c.name.endswith("revocation")}
    assert found == dict.fromkeys(
        ("revocation", "driver-rim-revocation", "vbios-rim-revocation"), "passed"
    )
    assert set(checks.issued) == {f"{n}.ocsp" for n in range(5)}


@pytest.mark.parametrize("missing", range(5))
def test_an_answer_that_is_demanded_and_missing(missing):
    changed = {f"{missing}_ocsp": None}
    assert refused(policy=demanded(), **answers(**changed)) == ("needs-revocation", "valid")
    judge(**answers(**changed))


def test_lists_answer_too():
    lists = {
        "0_ocsp": None, "1_ocsp": None, "2_ocsp": None,
        "0_crl": nvidia.revocation_list("ica", 7, common=nvidia.provisioner()),
        "1_crl": nvidia.revocation_list("identity"),
        "2_crl": nvidia.revocation_list("device-root"),
    }  # fmt: skip
    judge(policy=demanded(), **answers(**lists))


def _serial(certificate: made.Certificate) -> int:
    return certificate.serial_number


RESPONDER = nvidia.responder("ica", issuer_common=nvidia.provisioner())
NAMESAKE = nvidia.certificate("stranger", "stranger", common=nvidia.provisioner(), signs=True)
DELEGATED = {"responder": RESPONDER, "responder_key": "responder"}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"0_ocsp": nvidia.answer(*LINKS[0], status=REVOKED)}, "revocation-revoked"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], status=REVOKED,
            reason=made.ReasonFlags.certificate_hold)}, "revocation-revoked"),
        ({"4_ocsp": nvidia.answer(*RIM_LINKS[1], status=REVOKED)}, "revocation-revoked"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], status=UNKNOWN)}, "revocation-unknown"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], days=-1, begins=-3)}, "validity-expired"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], begins=1)}, "validity-not-yet"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=NAMESAKE, responder_key="stranger")},
         "chain-signature"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=nvidia.responder("ica", purpose=False),
            responder_key="responder")}, "chain-responder"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=CHAIN[0], responder_key="leaf")},
         "chain-responder"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=nvidia.responder("identity"),
            responder_key="responder")}, "chain-issuer"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=nvidia.responder("ica",
            issuer_common=nvidia.provisioner(), signer="stranger"), responder_key="responder")},
         "chain-signature"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=nvidia.responder("ica",
            issuer_common=nvidia.provisioner(), days=-1), responder_key="responder")},
         "validity-expired"),
        ({"0_ocsp": nvidia.answer(*LINKS[0], responder=NAMESAKE, responder_key="stranger",
            by_key=True)}, "chain-responder"),
        ({"0_ocsp": b"\x30\x03\x0a\x01\x06"}, "parse-ocsp"),
        ({"0_ocsp": b""}, "parse-ocsp"),
        ({"0_crl": nvidia.revocation_list("ica", _serial(CHAIN[1]),
            common=nvidia.provisioner())}, "revocation-revoked"),
        ({"1_crl": nvidia.revocation_list("identity", _serial(CHAIN[2]))}, "revocation-revoked"),
        ({"1_crl": nvidia.revocation_list("identity", days=-1, begins=-3)}, "validity-expired"),
        ({"1_crl": nvidia.revocation_list("identity", signer="stranger")}, "chain-signature"),
        ({"1_crl": b"x"}, "parse-crl"),
    ],
)  # fmt: skip
def test_answers_that_do_not_help(changed, code):
    """Also where the policy demands none."""
    assert refused(**answers(**changed)) == (code, "valid")


@pytest.mark.parametrize(
    "options",
    [{}, {"by_key": True}, DELEGATED, DELEGATED | {"by_key": True},
     {"algorithm": hashes.SHA1()}, {"algorithm": hashes.SHA384()}],
)  # fmt: skip
def test_forms_of_answers(options):
    judge(policy=demanded(), **answers(**{"0_ocsp": nvidia.answer(*LINKS[0], **options)}))


def test_an_answer_about_another_certificate_is_none():
    other = nvidia.certificate("device", "ica", issuer_common=nvidia.provisioner(), serial=99)
    strange = nvidia.answer(other, *LINKS[0][1:])
    assert refused(policy=demanded(), **answers(**{"0_ocsp": strange}))[0] == "needs-revocation"


@pytest.mark.parametrize("link", [1, 2, 3, 4])
def test_keys_that_are_known_to_be_revoked(link):
    fingerprint = nvidia.parsed(CHAIN[link]).fingerprint
    policy = nvidia.policy(revoked=("00" * 32, fingerprint))
    assert refused(policy=policy) == ("revocation-listed", "valid")
    assert refused(policy=policy, **answers()) == ("revocation-listed", "valid")
    judge(policy=nvidia.policy(revoked=Unchecked("a test")))


def test_every_flip_of_an_answer_is_refused_or_says_nothing():
    """Only what is signed, or is its signature, makes an answer."""
    raw = nvidia.answer(*LINKS[0])
    subject, issuer = (nvidia.parsed(c) for c in LINKS[0][:2])
    for bit in range(0, len(raw) * 8, 5):
        bad = raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]
        try:
            response = ocsp.parse(bad, "a test")
        except Refused:
            continue
        answer = ocsp.find(response, subject, issuer)
        if answer is not None:
            with pytest.raises(Refused):
                ocsp.check(response, answer, issuer, "a test", AT, {"1.2.840.10045.4.3.3"})


def test_fuzzed_answers():
    seeds = [nvidia.answer(*LINKS[0], **o) for o in ({}, DELEGATED, {"status": REVOKED})]
    fuzz(lambda data: ocsp.parse(data, "a test"), seeds)


def test_fuzzed_leaf_certificates():
    """Their names and FWIDs are read before anything is known to be signed."""
    whole = chain()
    rest = whole[whole.index(b"-----BEGIN", 1) :]

    def parse(raw: bytes) -> collateral.Device:
        text = base64.b64encode(raw)
        begin, end = b"-----BEGIN CERTIFICATE-----\n", b"\n-----END CERTIFICATE-----\n"
        return collateral.device({"cert_chain.pem": begin + text + end + rest})

    leaves = [CHAIN[0], nvidia.device_chain(blackwell=True)[0]]
    assert fuzz(parse, [nvidia.der(leaf) for leaf in leaves])


# Manifests alone, recognition, fields.


def test_manifests_alone_are_a_statement_and_bind_nothing():
    files = {"rim.xml": nvidia.driver_rim(), "vbios.swidtag": nvidia.vbios_rim()}
    claims, checks = judge(files)
    assert checks.crypto == "valid"
    assert (claims.bound, claims.fresh, claims.chip_id) == (b"", (), "")
    assert DRIVER in claims.product
    assert refused(files, now=AT + 201 * DAY) == ("validity-expired", "valid")
    assert refused(files, policy=demanded()) == ("needs-revocation", "valid")
    judge(files | {"3.ocsp": nvidia.answer(*RIM_LINKS[0]), "4.ocsp": nvidia.answer(*RIM_LINKS[1])},
          policy=demanded())  # fmt: skip
    bad = {"rim.xml": nvidia.driver_rim(signer="stranger")}
    assert refused(bad) == ("signature-rim", "")
    foreign = nvidia.policy(rim_roots=nvidia.policy().roots)
    assert refused(files, policy=foreign) == ("root-unknown", "")


def test_recognition():
    assert kind.recognises(nvidia.files())
    assert kind.recognises({"report.bin": b"\x11\xe0"})
    assert kind.recognises({"report.bin": b"", "cert_chain.pem": b""})
    assert kind.recognises({"x.swidtag": nvidia.driver_rim()})
    assert not kind.recognises({"x.xml": b"<a/>"})
    assert not kind.recognises({"report.bin": b"\x03" + b"\0" * 1183})
    assert not kind.recognises({"report.bin": b"\x03", "vcek.der": b"", "cert_chain.pem": b""})
    assert not kind.recognises({})


def test_fields():
    found = kind.fields(nvidia.files())
    assert found["request_nonce"] == nvidia.NONCE.hex()
    assert found["measurements"]["8"] == {"type": 1, "value": VALUES[8].hex()}
    assert found["opaque"]["DRIVER_VERSION"] == DRIVER
    assert found["device"]["chip"] == "GH100"
    assert found["driver_rim.xml"]["golden"]["7"] == [VALUES[8].hex()]
    assert "device" not in kind.fields({"report.bin": nvidia.report()})


# Checks taken away: each lets in what a test above sees refused.

WRONG = sign_xml(manifest(DRIVER, {7: [VALUES[9]]}))
BUGS = {
    "the digest is not compared": (
        xmldsig, "hashlib", SimpleNamespace(sha384=lambda data: _stated(data)),
        {"driver_rim_xml": nvidia.driver_rim(over=manifest("1.2", golden(1)))},
    ),
    "a manifest's signature is not checked": (
        verify.xmldsig, "verify", lambda *a: None,
        {"driver_rim_xml": nvidia.driver_rim(signer="stranger")},
    ),
    "chains are not checked": (
        verify.x509, "check_chain", lambda *a: None,
        {"cert_chain_pem": chain(leaf={"signer": "stranger"})},
    ),
    "roots are not checked": (
        verify, "_root", lambda *a: None,
        {"cert_chain_pem": pem(*(nvidia.device_chain()[:3] + STRANGER))},
    ),
    "measurements are not compared": (
        appraise, "_measurements", lambda *a: None, {"driver_rim_xml": WRONG},
    ),
    "versions are not compared": (
        appraise, "_version", lambda *a: None,
        {"driver_rim_xml": sign_xml(manifest("590.13", golden(7)))},
    ),
    "products are not compared": (
        appraise, "_product", lambda *a: None,
        {"driver_rim_xml": sign_xml(manifest(DRIVER, golden(7), product="GB100"))},
    ),
    "manifests are not demanded": (
        appraise, "_needed", lambda *a: None, {"driver_rim_xml": None},
    ),
    "validity is not checked": (
        verify.x509, "check_validity", lambda *a: None,
        {"driver_rim_xml": nvidia.driver_rim(certificates=nvidia.rim_chain(days=-1))},
    ),
    "answers are not read": (
        verify, "_answered", lambda *a: True,
        {"0_ocsp": nvidia.answer(*LINKS[0], status=REVOKED)},
    ),
    "the FWID is not read": (
        collateral, "_fwid", lambda leaf: nvidia.FWID,
        {"cert_chain_pem": chain(fwid=b"\xf2" * 48)},
    ),
}  # fmt: skip


def _stated(data):
    """The digest that the forged driver's manifest states; the true one of any other."""
    return hashlib.sha384(
        nvidia.canonical(manifest("1.2", golden(1))) if DRIVER.encode() in data else data
    )


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_seen(bug, monkeypatch):
    where, name, wrong, changed = BUGS[bug]
    refused(**changed)
    monkeypatch.setattr(where, name, wrong)
    judge(**changed)

"""Each step of the procedure: what fails it, and with which code."""

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from casemate.attest import x509
from casemate.attest.roots import AMD
from casemate.attest.snp import abi, collateral
from casemate.attest.snp.verify import verify
from casemate.attest.trust import Trust
from casemate.attest.verdict import Checks, Unchecked
from casemate.attest.verify import verify_attestation
from casemate.spec.errors import EvidenceError
from casemate.tee import simulated
from support.evidence import NONCE, NOW, attestation, certificate, der, stranger, tee, with_files

ANY_TIME = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2045, 1, 1, tzinfo=UTC))


def judge(given, trust=None, now=NOW):
    return verify_attestation(given, NONCE, trust or Trust.simulated(tee().root), now=now)


def refused(given, trust=None, now=NOW) -> tuple[str, str]:
    """The code and the name of the failed check."""
    with pytest.raises(EvidenceError) as e:
        judge(given, trust, now)
    last = e.value.checks[-1]
    assert (last.outcome, last.code) == ("failed", e.value.code)
    return e.value.code.removeprefix("evidence."), last.name


def vcek(**changed):
    """A VCEK for the TEE's own key, signed by its ASK, with some parts changed."""
    of = tee()
    parts = {
        "subject": "SEV-VCEK", "issuer": "SEV-Genoa", "key": of._key.public_key(), "serial": 1,
        "validity": ANY_TIME, "signer": of._chain.ask_key,
        "extensions": simulated._vcek_extensions(simulated._tcb_bytes(), of._chip),
    } | changed  # fmt: skip
    return certificate(simulated._certificate(**parts))


def extensions(**changed: bytes | None):
    """AMD's extensions with some replaced (``_3_8`` for arc 3.8), or left out by None."""
    named = {f"{collateral.OID}{k.replace('_', '.')}": v for k, v in changed.items()}
    out = []
    for extension, critical in simulated._vcek_extensions(simulated._tcb_bytes(), tee()._chip):
        value = named.get(extension.oid.dotted_string, extension.value)
        if value is not None:
            out.append((type(extension)(extension.oid, value), critical))
    return out


def ask(**changed):
    """An ASK made by another key than the ARK's, which signed the good one and was forgotten."""
    parts = {
        "subject": "SEV-Genoa", "issuer": "ARK-Genoa", "serial": 2, "validity": ANY_TIME,
        "key": tee()._chain.ask_key.public_key(), "signer": stranger(),
        "extensions": simulated._authority(0, crl=False),
    } | changed  # fmt: skip
    return certificate(simulated._certificate(**parts))


def test_good_evidence_passes_every_step_by_name():
    verdict = judge(attestation())
    names = [c.name for c in verdict.checks]
    assert names[:11] == [
        "label", "kind", "parse", "chain", "root", "validity", "product", "signing-key",
        "chip-id", "tcb", "signature",
    ]  # fmt: skip
    assert all(c.outcome == "passed" for c in verdict.checks[:11])
    assert verdict.simulated
    assert verdict.product == "Genoa"
    assert verdict.root == tee().root
    assert verdict.measurement == tee().measurement
    assert verdict.chip_id == tee()._chip.hex()
    assert verdict.tcb == {"bootloader": 10, "tee": 0, "snp": 25, "microcode": 84}


def test_own_certificates_with_nothing_changed_are_accepted():
    """So that each refusal below is for the one thing changed."""
    judge(with_files(attestation(), vcek_der=vcek(extensions=extensions())))


def test_a_root_that_nobody_pinned():
    assert refused(attestation(tee(1))) == ("root-unknown", "root")
    assert refused(attestation(), Trust.simulated("0" * 64)) == ("root-unknown", "root")


def test_without_a_carried_root_our_own_is_the_end_of_the_chain():
    assert refused(with_files(attestation(), ark_pem=None)) == ("chain-issuer", "chain")


def test_an_unpinned_simulation_says_so_loudly():
    verdict = judge(attestation(tee(1)), Trust.simulated())
    root = next(c for c in verdict.checks if c.name == "root")
    assert root.outcome == "unchecked"
    assert tee(1).root in root.detail
    assert root in verdict.unchecked


def test_issuers_and_signatures():
    good, other = attestation(), attestation(tee(1)).evidence.files
    for name in ("ask_pem", "ark_pem", "vcek_der"):
        mixed = with_files(good, **{name: other[name.replace("_", ".")]})
        assert refused(mixed) == ("chain-signature", "chain")
    assert refused(with_files(good, vcek_der=vcek(issuer="SEV-Milan"))) == ("chain-issuer", "chain")
    assert refused(with_files(good, ask_pem=ask())) == ("chain-signature", "chain")
    assert refused(with_files(good, ask_pem=ask(issuer="ARK-Milan"))) == ("chain-issuer", "chain")


def test_the_leaf_may_not_stand_for_an_authority():
    """A VCEK in the ASK's place: its key is no RSA, and it may not sign."""
    bad = with_files(attestation(), ask_pem=vcek(subject="SEV-Genoa"))
    assert refused(bad)[0] in ("chain-issuer", "chain-authority")


@pytest.mark.parametrize(
    "authority",
    [
        [],
        simulated._authority(0, crl=False)[:1],
        simulated._authority(0, crl=False)[1:],
    ],
)
def test_only_authorities_sign(authority):
    key = stranger()
    root = certificate(
        simulated._certificate(
            "ARK-Genoa", "ARK-Genoa", key.public_key(), 1, ANY_TIME, authority, key
        )
    )
    with pytest.raises(EvidenceError) as e:
        x509.check_authority(x509.parse(root, "root"), "root", 1)
    assert e.value.code == "evidence.chain-authority"


def test_depth_of_authorities():
    made = x509.parse(der(attestation().evidence.files["ask.pem"]), "ask.pem")
    x509.check_authority(made, "ask.pem", 0)
    with pytest.raises(EvidenceError):
        x509.check_authority(made, "ask.pem", 1)


def test_keys_of_other_kinds():
    weak = ec.generate_private_key(ec.SECP256R1()).public_key()
    bad = with_files(attestation(), vcek_der=vcek(key=weak))
    assert refused(bad) == ("chain-key", "chain")
    small = rsa.generate_private_key(65537, 2048)
    short = certificate(
        simulated._certificate("a", "a", small.public_key(), 1, ANY_TIME, [], small)
    )
    with pytest.raises(EvidenceError) as e:
        x509.check_chain([(x509.parse(short, "short"), "short")], {x509.PSS_SHA384})
    assert e.value.code == "evidence.chain-key"


def test_other_signature_algorithms():
    of = tee()
    from cryptography import x509 as peer

    for digest, padding in ((hashes.SHA256(), simulated._PSS), (hashes.SHA384(), None)):
        builder = (
            peer.CertificateBuilder().subject_name(simulated._name("SEV-VCEK"))
            .issuer_name(simulated._name("SEV-Genoa")).public_key(of._key.public_key())
            .serial_number(1).not_valid_before(ANY_TIME[0]).not_valid_after(ANY_TIME[1])
        )  # fmt: skip
        for extension, critical in extensions():
            builder = builder.add_extension(extension, critical)
        made = builder.sign(of._chain.ask_key, digest, rsa_padding=padding)
        bad = with_files(attestation(), vcek_der=certificate(made))
        assert refused(bad) == ("chain-algorithm", "chain")


def test_every_window_at_the_one_time_given():
    day = 86400.0
    start, end = (t.timestamp() for t in ANY_TIME)
    good = attestation()
    judge(good, now=NOW - day)
    judge(good, now=NOW + 7 * 365 * day)
    assert refused(good, now=NOW - day - 1) == ("validity-not-yet", "validity")
    assert refused(good, now=NOW + 7 * 365 * day + 1) == ("validity-expired", "validity")
    assert refused(good, now=start - 1) == ("validity-not-yet", "validity")
    assert refused(good, now=end + 1) == ("validity-expired", "validity")
    assert refused(good, now=float("nan"))[1] == "validity"


def test_the_window_of_every_certificate_counts():
    wide = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC))
    good = with_files(attestation(), vcek_der=vcek(validity=wide))
    start, end = (t.timestamp() for t in ANY_TIME)
    judge(good, now=start)
    judge(good, now=end)
    assert refused(good, now=start - 1) == ("validity-not-yet", "validity")
    assert refused(good, now=end + 1) == ("validity-expired", "validity")


def test_a_leaf_of_a_line_that_its_issuer_does_not_name():
    leaf = vcek(extensions=extensions(_2=b"\x16\x08Milan-B0"))
    report = attestation(cpuid_mod_id=0x01).evidence.files["report.bin"]
    bad = with_files(attestation(), vcek_der=leaf, report_bin=report)
    assert refused(bad) == ("endorsement-product", "product")


def test_product_lines():
    assert refused(attestation(cpuid_mod_id=0x01)) == ("endorsement-product", "product")
    assert refused(attestation(cpuid_fam_id=0x1A)) == ("endorsement-product", "product")
    judge(attestation(cpuid_mod_id=0xA0))  # Bergamo is endorsed as Genoa
    other = with_files(attestation(), vcek_der=vcek(extensions=extensions(_2=b"\x16\x08Milan-B0")))
    milan = Trust.simulated(tee().root)
    assert refused(other, milan) == ("endorsement-product", "product")
    unknown = with_files(attestation(), vcek_der=vcek(extensions=extensions(_2=b"\x16\x05Roma1")))
    assert refused(unknown) == ("collateral-product", "parse")


def test_a_report_without_cpuid_says_so():
    verdict = judge(attestation(version=2, cpuid_fam_id=0, cpuid_mod_id=0, cpuid_step=0))
    product = next(c for c in verdict.checks if c.name == "product")
    assert "no CPUID" in product.detail


def test_endorsements():
    good = attestation()
    assert refused(attestation(flags=1 << 2)) == ("endorsement-key", "signing-key")
    assert refused(attestation(chip_id=b"\1" * 64)) == ("endorsement-chip-id", "chip-id")
    assert refused(attestation(chip_id=bytes(64))) == ("endorsement-chip-id", "chip-id")
    tcb = bytearray(simulated._tcb_bytes())
    for at in range(8):
        other = bytes(tcb[:at] + bytes([tcb[at] ^ 1]) + tcb[at + 1 :])
        assert refused(attestation(reported_tcb=other)) == ("endorsement-tcb", "tcb")
    judge(attestation(current_tcb=b"\xff" * 8))  # only the reported one is endorsed
    for arc in (1, 2, 3, 4, 5, 6, 7, 8):
        changed = extensions(**{f"_3_{arc}": b"\x02\x01\x63"})
        bad = with_files(good, vcek_der=vcek(extensions=changed))
        assert refused(bad) == ("endorsement-tcb", "tcb")


@pytest.mark.parametrize("arc", ["_1", "_2", "_4", *(f"_3_{i}" for i in range(1, 9))])
@pytest.mark.parametrize("value", [None, b"", b"\x02\x01", b"\x02\x02\x01\x00", b"\x04\x01\x00"])
def test_amd_extensions_are_all_there_and_well_formed(arc, value):
    bad = with_files(attestation(), vcek_der=vcek(extensions=extensions(**{arc: value})))
    assert refused(bad) == ("collateral-extension", "parse")


def test_which_files_belong_together():
    good = attestation()
    leaf = good.evidence.files["vcek.der"]
    for files, code in (
        ({"vcek_der": None}, "collateral-missing"),
        ({"ask_pem": None}, "collateral-missing"),
        ({"report_bin": None}, "parse-report-missing"),
        ({"vlek_der": leaf}, "collateral-both"),
        ({"vlek_der": leaf, "vcek_der": None}, "collateral-missing"),
    ):
        assert refused(with_files(good, **files)) == (code, "parse")


def test_the_signature_is_over_the_signed_bytes_by_the_leaf_key():
    raw = attestation().evidence.files["report.bin"]
    bad = raw[:0x90] + bytes([raw[0x90] ^ 1]) + raw[0x91:]
    assert refused(with_files(attestation(), report_bin=bad)) == ("signature-report", "signature")
    other = vcek(key=ec.generate_private_key(ec.SECP384R1()).public_key())
    assert refused(with_files(attestation(), vcek_der=other)) == ("signature-report", "signature")


def test_a_product_line_that_is_not_pinned_is_refused():
    files = attestation().evidence.files
    report, chain = abi.parse(files["report.bin"]), collateral.parse(files)
    for roots in ({}, {"Turin": (tee().root,)}, {"Genoa": AMD["Genoa"]}):
        with pytest.raises(EvidenceError) as e:
            verify(report, chain, roots, now=NOW, checks=Checks())
        assert e.value.code == "evidence.root-unknown"
    checks = Checks()
    verify(report, chain, Unchecked("a test"), now=NOW, checks=checks)
    assert ("root", "unchecked") in {(c.name, c.outcome) for c in checks.done}

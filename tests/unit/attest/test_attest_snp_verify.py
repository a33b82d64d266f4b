"""Each step of the procedure: what fails it, and with which code. All evidence is made up under a
test root; AMD's own is in tests/attacks/test_evidence_snp.py."""

from datetime import UTC, datetime

import pytest
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from casemate.attest import roots, x509
from casemate.attest.snp import abi, collateral
from casemate.attest.snp.verify import signatures
from casemate.attest.verdict import Checks, Refused, Unchecked
from casemate.tee import simulated
from support import snp

WIDE = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC))
VALID = ("valid", "accept", "")


def refused(files, now=snp.NOW, **changed) -> tuple[str, str]:
    """The code and the name of the failed check."""
    found = snp.judge(files, now=now, **changed)
    last = found.checks[-1]
    assert (last.outcome, last.code) == ("failed", found.code)
    return found.code.removeprefix("evidence."), last.name


def vcek(**changed) -> bytes:
    """A Genoa VCEK for the right key, signed by its ASK, with some parts changed."""
    parts = {
        "subject": "SEV-VCEK", "issuer": "SEV-Genoa", "serial": 1,
        "key": snp.ec_key("Genoa VCEK").public_key(), "validity": (snp.START, snp.END),
        "signer": snp.rsa_key("ask"),
        "extensions": snp._leaf_extensions("Genoa", "VCEK", snp.TCB["Genoa"], 0),
    } | changed  # fmt: skip
    return snp.der(simulated._certificate(**parts))


def extensions(product="Genoa", kind="VCEK", **changed: bytes | None):
    """AMD's extensions with some replaced (``_3_8`` for arc 3.8), or left out by None."""
    named = {f"{collateral.OID}{k.replace('_', '.')}": v for k, v in changed.items()}
    out = []
    for extension, critical in snp._leaf_extensions(product, kind, snp.TCB[product], 0):
        value = named.get(extension.oid.dotted_string, extension.value)
        if value is not None:
            out.append((type(extension)(extension.oid, value), critical))
    return out


def ask(**changed) -> bytes:
    parts = {
        "subject": "SEV-Genoa", "issuer": "ARK-Genoa", "serial": 2, "validity": snp.AUTHORITY,
        "key": snp.rsa_key("ask").public_key(), "signer": snp.rsa_key("ark"),
        "extensions": simulated._authority(0, crl=False),
    } | changed  # fmt: skip
    return snp.der(simulated._certificate(**parts))


def with_leaf(data: bytes) -> dict[str, bytes]:
    return snp.evidence(files={"vcek.der": data})


@pytest.mark.parametrize("kind", ["VCEK", "VLEK"])
@pytest.mark.parametrize("product", list(snp.CPUID))
def test_good_evidence_passes_every_step_by_name(product, kind):
    found = snp.judge(snp.evidence(product, kind))
    assert snp.outcome(found) == VALID
    assert [c.name for c in found.checks[:10]] == [
        "kind", "parse", "chain", "root", "product", "signing-key", "chip-id", "tcb", "signature",
        "validity",
    ]  # fmt: skip
    opened = {c.name for c in found.checks if c.outcome == "unchecked"}
    assert ("chip-id" in opened) == (kind == "VLEK")
    assert "revocation" in opened
    claims = found.claims
    assert (claims.product, claims.root) == (product, snp.root(product))
    assert claims.measurement == snp.MEASURED.hex()
    assert claims.chip_id == (snp.hwid(product).hex() if kind == "VCEK" else "")
    assert claims.tcb == collateral.tcb_components(product, snp.TCB[product])
    assert claims.other["csp_id"] == (snp.CSP if kind == "VLEK" else "")


def test_a_serial_number_of_zero_is_a_number_like_others():
    for serial in (0, 5):
        made_anew = snp.leaf("Genoa", serial=serial)
        assert x509.parse(made_anew, "vcek.der").serial == serial
        assert snp.outcome(snp.judge(with_leaf(made_anew))) == VALID


def test_the_chain_is_the_issuers():
    for signer, key in (("stranger", "ask"), ("ark", "stranger")):
        bad = ask(signer=snp.rsa_key(signer), key=snp.rsa_key(key).public_key())
        found = refused(snp.evidence(files={"ask.pem": bad}))
        assert found == ("chain-signature", "chain")
    named = snp.evidence(files={"ask.pem": ask(subject="SEV-Milan")})
    assert refused(named) == ("chain-issuer", "chain")
    named = snp.evidence(files={"ask.pem": ask(issuer="ARK-Milan")})
    assert refused(named) == ("chain-issuer", "chain")
    assert refused(with_leaf(vcek(signer=snp.rsa_key("stranger")))) == ("chain-signature", "chain")


def test_the_leaf_may_not_stand_for_an_authority():
    """A VCEK in the ASK's place: its key is no RSA, and it may not sign."""
    bad = snp.evidence(files={"ask.pem": vcek(subject="SEV-Genoa")})
    assert refused(bad)[0] in ("chain-issuer", "chain-authority")


@pytest.mark.parametrize("extensions", [
    [], simulated._authority(0, crl=False)[:1], simulated._authority(0, crl=False)[1:],
])  # fmt: skip
def test_only_authorities_sign(extensions):
    bad = snp.evidence(files={"ask.pem": ask(extensions=extensions)})
    assert refused(bad) == ("chain-authority", "chain")


def test_depth_of_authorities():
    between = x509.parse(snp.der(snp.authorities("Genoa")[1]), "ask.pem")
    x509.check_authority(between, "ask.pem", 0)
    with pytest.raises(Refused):
        x509.check_authority(between, "ask.pem", 1)


def test_keys_of_other_kinds():
    weak = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert refused(with_leaf(vcek(key=weak))) == ("chain-key", "chain")
    small = rsa.generate_private_key(65537, 2048)
    short = simulated._certificate(
        "a", "a", small.public_key(), 1, snp.AUTHORITY, simulated._authority(0, crl=False), small
    )
    with pytest.raises(Refused) as e:
        x509.check_chain([(x509.parse(snp.der(short), "short"), "short")], {x509.PSS_SHA384})
    assert e.value.code == "evidence.chain-key"


def test_other_signature_algorithms():
    for digest, padding in ((hashes.SHA256(), simulated._PSS), (hashes.SHA384(), None)):
        builder = (
            made.CertificateBuilder().subject_name(simulated._name("SEV-VCEK"))
            .issuer_name(simulated._name("SEV-Genoa"))
            .public_key(snp.ec_key("Genoa VCEK").public_key())
            .serial_number(1).not_valid_before(snp.START).not_valid_after(snp.END)
        )  # fmt: skip
        for extension, critical in extensions():
            builder = builder.add_extension(extension, critical)
        leaf = builder.sign(snp.rsa_key("ask"), digest, rsa_padding=padding)
        assert refused(with_leaf(snp.der(leaf))) == ("chain-algorithm", "chain")


def test_every_window_at_the_one_time_given():
    files = snp.evidence()
    start, end = snp.START.timestamp(), snp.END.timestamp()
    for now, code in (
        (start, ""), (end, ""), (start - 1, "validity-not-yet"), (end + 1, "validity-expired"),
        (float("nan"), "validity-not-yet"),
    ):  # fmt: skip
        found = snp.judge(files, now=now)
        assert (found.crypto, found.code.removeprefix("evidence.")) == ("valid", code)


def test_the_window_of_every_certificate_counts():
    files = with_leaf(vcek(validity=WIDE))
    start, end = (t.timestamp() for t in snp.AUTHORITY)
    assert snp.outcome(snp.judge(files, now=start)) == VALID
    assert snp.outcome(snp.judge(files, now=end)) == VALID
    assert refused(files, now=start - 1) == ("validity-not-yet", "validity")
    assert refused(files, now=end + 1) == ("validity-expired", "validity")
    files = snp.evidence(files={"vcek.der": vcek(validity=WIDE), "ask.pem": ask(validity=WIDE)})
    assert refused(files, now=end + 1) == ("validity-expired", "validity")


def test_a_leaf_of_a_line_that_its_issuer_does_not_name():
    leaf = vcek(extensions=extensions(_2=b"\x16\x08Milan-B0"))
    bad = snp.evidence(files={"vcek.der": leaf}, cpuid_mod_id=0x01)
    assert refused(bad) == ("endorsement-product", "product")


MODELS = (0x00, 0x01, 0x02, 0x0F, 0x10, 0x11, 0x12, 0x1F, 0x20, 0x31, 0x9F, 0xA0, 0xA1, 0xAF, 0xB0)
LINES = {
    ("Milan", 0x19): {0x00, 0x01, 0x02, 0x0F},
    ("Genoa", 0x19): {0x10, 0x11, 0x12, 0x1F, 0xA0, 0xA1, 0xAF},
    ("Turin", 0x1A): {0x00, 0x01, 0x02, 0x0F, 0x10, 0x11},
}


@pytest.mark.parametrize("product", list(snp.CPUID))
def test_product_lines(product):
    for family in (0x17, 0x19, 0x1A):
        for model in MODELS:
            found = snp.judge(snp.evidence(product, cpuid_fam_id=family, cpuid_mod_id=model))
            right = model in LINES.get((product, family), ())
            code = "" if right else "evidence.endorsement-product"
            assert found.code == code, (hex(family), hex(model))


@pytest.mark.parametrize("name", ["Bergamo", "Siena", "Genoa-B1", "Siena-B0"])
def test_bergamo_and_siena_are_endorsed_as_genoa(name):
    spelled = bytes([0x16, len(name)]) + name.encode()
    files = snp.evidence(
        files={"vcek.der": vcek(extensions=extensions(_2=spelled))}, cpuid_mod_id=0xA0
    )
    found = snp.judge(files)
    assert (found.code, found.claims.product) == ("", "Genoa")


def test_an_unknown_product_has_no_root():
    for name in (b"\x16\x05Roma1", b"\x16\x06Venice", b"\x16\x00"):
        bad = with_leaf(vcek(extensions=extensions(_2=name)))
        assert refused(bad) == ("root-product", "parse")


def test_a_report_without_cpuid_says_so():
    files = snp.evidence(version=2, cpuid_fam_id=0, cpuid_mod_id=0, cpuid_step=0)
    product = next(c for c in snp.judge(files).checks if c.name == "product")
    assert "no CPUID" in product.detail


def test_endorsements():
    assert refused(snp.evidence(flags=1 << 2)) == ("endorsement-key", "signing-key")
    assert refused(snp.evidence(chip_id=b"\1" * 64)) == ("endorsement-chip-id", "chip-id")
    assert refused(snp.evidence(chip_id=bytes(64))) == ("endorsement-chip-id", "chip-id")
    turin = snp.hwid("Turin").ljust(63, b"\0") + b"\1"
    assert refused(snp.evidence("Turin", chip_id=turin)) == ("endorsement-chip-id", "chip-id")
    assert refused(snp.evidence("Milan", "VLEK", flags=0)) == ("endorsement-key", "signing-key")
    assert snp.judge(snp.evidence(current_tcb=b"\xff" * 8)).code == ""  # only the reported one is


@pytest.mark.parametrize("product", list(snp.CPUID))
def test_the_tcb_is_endorsed_byte_for_byte(product):
    tcb = snp.TCB[product]
    for at in range(8):
        other = tcb[:at] + bytes([tcb[at] ^ 1]) + tcb[at + 1 :]
        bad = snp.evidence(product, reported_tcb=other)
        assert refused(bad) == ("endorsement-tcb", "tcb")
        bad = snp.evidence(product, files={"vcek.der": snp.leaf(product, tcb=other)})
        assert refused(bad) == ("endorsement-tcb", "tcb")
    for arc in (1, 2, 3, 4, 5, 6, 7, 8) if product == "Genoa" else ():
        changed = extensions(**{f"_3_{arc}": b"\x02\x01\x63"})
        assert refused(with_leaf(vcek(extensions=changed))) == ("endorsement-tcb", "tcb")


@pytest.mark.parametrize("arc", ["_1", "_2", "_4", *(f"_3_{i}" for i in range(1, 9))])
@pytest.mark.parametrize("value", [None, b"", b"\x02\x01", b"\x02\x02\x01\x00", b"\x04\x01\x00"])
def test_amd_extensions_are_all_there_and_well_formed(arc, value):
    bad = with_leaf(vcek(extensions=extensions(**{arc: value})))
    assert refused(bad) == ("parse-extension", "parse")


def test_a_line_has_its_own_extensions():
    """Genoa's in a Turin certificate: without the FMC, and with a chip of 64 bytes."""
    name = b"\x16\x05Turin"
    bad = snp.evidence("Turin", files={"vcek.der": vcek(extensions=extensions(_2=name))})
    assert refused(bad) == ("parse-extension", "parse")


def test_which_files_belong_together():
    files = snp.evidence()
    leaf = files["vcek.der"]
    for changed, outcome in (
        ({"vcek.der": None}, ("unknown", "needs-collateral", "needs-vcek")),
        ({"ask.pem": None}, ("unknown", "needs-collateral", "needs-ask")),
        ({"vlek.der": leaf}, ("invalid", "reject", "parse-leaves")),
        ({"vlek.der": leaf, "vcek.der": None}, ("unknown", "needs-collateral", "needs-asvk")),
        ({"report.bin": None}, ("valid", "not-applicable", "absent-report")),
        ({"ark.pem": None}, ("invalid", "reject", "chain-issuer")),  # AMD's own stands for it
    ):
        assert snp.outcome(snp.judge(snp.evidence(files=changed))) == outcome


def test_a_chain_without_a_report_is_verified_all_the_same():
    chain = {"report.bin": None}
    assert refused(snp.evidence(files=chain)) == ("absent-report", "report")
    bad = snp.evidence(files={**chain, "vcek.der": vcek(signer=snp.rsa_key("stranger"))})
    assert refused(bad) == ("chain-signature", "chain")
    late = snp.END.timestamp() + 1
    assert refused(snp.evidence(files=chain), now=late) == ("validity-expired", "validity")
    assert refused(snp.evidence(files=chain), roots=roots.AMD) == ("root-unknown", "root")


def test_the_signature_is_over_the_signed_bytes_by_the_leaf_key():
    raw = snp.report()
    bad = raw[:0x90] + bytes([raw[0x90] ^ 1]) + raw[0x91:]
    found = refused(snp.evidence(files={"report.bin": bad}))
    assert found == ("signature-report", "signature")
    other = vcek(key=ec.generate_private_key(ec.SECP384R1()).public_key())
    assert refused(with_leaf(other)) == ("signature-report", "signature")


def test_a_product_line_that_is_not_pinned_is_refused():
    files = snp.evidence()
    report, chain = abi.parse(files["report.bin"]), collateral.parse(files)
    for pins in ({}, {"Turin": (snp.root(),)}, {"Genoa": roots.AMD["Genoa"]}):
        with pytest.raises(Refused) as e:
            signatures(report, chain, pins, Checks())
        assert e.value.code == "evidence.root-unknown"
    checks = Checks()
    signatures(report, chain, Unchecked("a test"), checks)
    assert ("root", "unchecked") in {(c.name, c.outcome) for c in checks.done}

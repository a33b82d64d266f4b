"""SEV-SNP evidence captured from AMD hardware, with AMD's and Microsoft's own roots, judged as a
folder: the answers that each case states, its values, its window of time, and every kind of change
refused. Attacks that need a key of the vendor's are made under a test root, and say so."""

import ast
import base64
import json
import random
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import cbor2
import pytest

import casemate.attest
from casemate.attest import crl, folder, roots, x509
from casemate.attest.kinds import recognise
from casemate.attest.snp import abi, beside, collateral, kind, uvm, verify
from casemate.attest.snp.policy import DEFAULT
from support import mutation, snp
from support.evidence import CAPTURED

captured = pytest.mark.skipif(
    not CAPTURED.is_dir(), reason="no captured evidence beside the project"
)
NAMES = sorted(p.name for p in CAPTURED.glob("*")) if CAPTURED.is_dir() else []
ACI = "milan-v3-aci-uvm-endorsed"
VLEK = "milan-v3-vlek-aws"
DEBUG = "milan-v2-debug-allowed"
CHAIN_ONLY = "turin-vcek-chain-only"
VALID = ("valid", "accept", "")


def about(name: str) -> dict:
    return json.loads((CAPTURED / name / "about.json").read_text())


def files(name: str) -> dict[str, bytes]:
    return folder.read(CAPTURED / name)


def product(name: str) -> str:
    return about(name)["product"].split()[0]


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def judge(name: str, changed=None, now=None, **policy):
    merged = files(name) | (changed or {})
    kept = {n: data for n, data in merged.items() if data is not None}
    now = at(about(name)["verify_at"]) if now is None else now
    return folder.judge(kept, now=now, policies={"sev-snp": replace(DEFAULT, **policy)})


def outcome(*args, **kwargs) -> tuple[str, str, str]:
    return snp.outcome(judge(*args, **kwargs))


GOOD = [n for n in NAMES if about(n)["expect"]["default_policy"] == "accept"]


@captured
@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_stated_one(name):
    expect, found = about(name)["expect"], judge(name)
    assert found.crypto == expect["crypto"].split()[0]
    assert found.decision == expect["default_policy"].split()[0]
    assert (found.tcb_status, found.advisories) == ("", ())


@captured
@pytest.mark.parametrize("name", GOOD)
def test_the_values_are_the_stated_ones(name):
    found, values = judge(name), about(name)["values"]
    assert found.claims.measurement == values["measurement"]
    assert found.claims.bound.hex() == values["report_data"]
    assert found.claims.product == product(name)
    report = recognise(files(name)).fields(files(name))["report"]
    assert report == found.claims.other["report"]
    for field in ("version", "vmpl", "signing_key", "host_data", "id_key_digest",
                  "author_key_digest", "chip_id"):  # fmt: skip
        assert report[field] == values[field]
    assert report["platform_info"]["value"] == values["platform_info"]
    for field in ("reported_tcb", "current_tcb", "committed_tcb", "launch_tcb"):
        raw = bytes.fromhex(values[field])
        assert report[field] == collateral.tcb_components(product(name), raw)
    bits = values["policy_bits"]
    assert [report["policy"][bit] for bit in ("smt", "debug", "migrate_ma", "abi_major")] == [
        bits[bit] for bit in ("smt_allowed", "debug_allowed", "migrate_ma", "abi_major")
    ]


@captured
@pytest.mark.parametrize("name", GOOD)
def test_pins(name):
    values = about(name)["values"]
    masked = not any(bytes.fromhex(values["chip_id"]))
    for field, value, code in (
        ("measurements", values["measurement"], "measurement"),
        ("host_data", values["host_data"], "host-data"),
        ("id_keys", values["id_key_digest"], "id-key"),
        ("chip_ids", values["chip_id"], "chip"),
    ):
        other = "ab" * (len(value) // 2)
        assert outcome(name, **{field: (other,)}) == ("valid", "reject", f"appraise-{code}")
        hidden = field == "chip_ids" and masked
        assert (outcome(name, **{field: (other, value)}) == VALID) == (not hidden)
    assert (outcome(name, vmpl=(0,)) == VALID) == (values["vmpl"] == 0)
    floor = dict(judge(name).claims.tcb)
    assert outcome(name, reported_tcb={product(name): floor}) == VALID
    for component in floor:
        higher = {product(name): floor | {component: floor[component] + 1}}
        assert outcome(name, reported_tcb=higher)[2] == "appraise-reported-tcb"


@captured
@pytest.mark.parametrize("name", [*GOOD, CHAIN_ONLY])
def test_outside_its_window_it_is_refused(name):
    valid, stated = about(name)["valid"], judge(name)
    for now in (at(valid["from"]), at(valid["to"])):
        assert snp.outcome(judge(name, now=now)) == snp.outcome(stated)
    early, late = at(valid["from"]) - 1, at(valid["to"]) + 1
    assert outcome(name, now=early) == ("valid", "reject", "validity-not-yet")
    assert outcome(name, now=late) == ("valid", "reject", "validity-expired")


@captured
@pytest.mark.parametrize("name", [*GOOD, CHAIN_ONLY])
def test_the_root_is_ours_not_the_folders(name):
    stated = outcome(name)
    assert outcome(name, {"ark.pem": None}) == stated
    foreign = next(n for n in GOOD if product(n) != product(name))
    mixed = outcome(name, {"ark.pem": files(foreign)["ark.pem"]})
    assert mixed == ("invalid", "reject", "chain-issuer")
    others = {line: pins for line, pins in roots.AMD.items() if line != product(name)}
    assert outcome(name, roots=others) == ("invalid", "reject", "root-unknown")


@captured
@pytest.mark.parametrize("name", GOOD)
def test_what_is_missing_is_named(name):
    leaf, between = ("vlek", "asvk") if name == VLEK else ("vcek", "ask")
    needs = ("unknown", "needs-collateral")
    assert outcome(name, {f"{leaf}.der": None}) == (*needs, "needs-vcek")
    assert outcome(name, {f"{between}.pem": None}) == (*needs, f"needs-{between}")
    assert outcome(name, {"report.bin": None}) == ("valid", "not-applicable", "absent-report")
    assert outcome(name, crl=True) == ("valid", "needs-collateral", "needs-crl")


def unsigned(file: str, data: bytes) -> range:
    """The bytes that nothing signs and that are only listed: a COSE message's unprotected
    header."""
    if file != uvm.FILE:
        return range(0)
    header = cbor2.loads(data).value[1]
    raw = cbor2.dumps(dict(header))
    start = data.index(raw)
    return range(start, start + len(raw))


def flips_are_refused(name: str, file: str, count: int | None) -> None:
    """``count`` of the single-bit flips, or all of them but for what is only listed."""
    data = files(name)[file]
    data = x509.from_pem(data) if file.endswith(("ask.pem", "ark.pem", "asvk.pem")) else data
    assert outcome(name, {file: data}) == VALID
    listed, bits = unsigned(file, data), range(8 * len(data))
    chosen = random.Random(name + file).sample(bits, count or 500)
    if count is None:
        chosen += [bit for bit in bits if bit // 8 not in listed]
    for bit in chosen:
        found = judge(name, {file: mutation.flipped(data, bit)})
        if bit // 8 in listed:
            assert found.code == "" or found.stage == "parse"
        else:
            assert found.decision == "reject", f"bit {bit} of {file}"
        if file == "report.bin" and bit < 8 * abi.SIGNED_BYTES:
            assert found.crypto == "invalid"


FLIPPED = [(n, f) for n in GOOD for f in files(n)]
# One of each version, product line and kind of key; what several share is flipped once.
WHOLE = {
    files(n)[f]: (n, f)
    for n in ("milan-v2-virtee", "milan-v3-dstack", VLEK, "genoa-v5-bergamo", "turin-v5-azure-aci",
              ACI)
    if n in NAMES
    for f in files(n)
}  # fmt: skip


@captured
@pytest.mark.parametrize(("name", "file"), FLIPPED)
def test_sampled_flips_are_refused(name, file):
    flips_are_refused(name, file, 24)


@captured
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "file"), list(WHOLE.values()))
def test_every_flip_is_refused(name, file):
    flips_are_refused(name, file, None)


@captured
@pytest.mark.parametrize("name", [ACI, VLEK, "turin-v5-azure-aci", "genoa-v5-bergamo"])
def test_truncated_and_extended_files(name):
    for file, data in files(name).items():
        for bad in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"x", data + data):
            found = judge(name, {file: bad})
            if file.endswith(".pem") and bad == data[:-1]:
                continue  # the line's end
            assert (found.crypto, found.decision) == ("invalid", "reject"), (file, len(bad))
            assert found.stage == ("signature" if file in (beside.POLICY, beside.PUBLIC_KEY)
                                   else "parse")  # fmt: skip


@captured
@pytest.mark.parametrize("name", GOOD)
def test_unsigned_bytes_are_refused_when_signatures_have_been_judged(name):
    raw = files(name)["report.bin"]
    bad = {"report.bin": raw[:-1] + b"\1"}
    assert outcome(name, bad) == ("valid", "reject", "appraise-unsigned-bytes")
    bad["report.bin"] = bytes([raw[0x90] ^ 1]).join((raw[:0x90], raw[0x91:-1] + b"\1"))
    assert outcome(name, bad) == ("invalid", "reject", "signature-report")


@captured
@pytest.mark.parametrize("name", GOOD)
def test_the_twin_signature_gets_the_same_answer(name):
    raw = files(name)["report.bin"]
    twin = (abi.P384_ORDER - abi.parse(raw).s).to_bytes(72, "little")
    found = judge(name, {"report.bin": raw[:0x2E8] + twin + raw[0x330:]})
    assert found == judge(name)


@captured
def test_parts_of_different_cases_do_not_mix():
    for name in GOOD:
        for other in GOOD:
            same = about(name)["values"]["chip_id"] == about(other)["values"]["chip_id"]
            for file in ("report.bin", "vcek.der"):
                if same or file not in files(other) or file not in files(name):
                    continue
                found = judge(name, {file: files(other)[file]})
                assert (found.crypto, found.decision) == ("invalid", "reject")


@captured
def test_a_vcek_of_another_tcb():
    """A report that names the TCB from before an update, beside the newer one's certificate."""
    raw = files(ACI)["report.bin"]
    older = raw[:0x180] + bytes([raw[0x180] - 1]) + raw[0x181:]
    assert outcome(ACI, {"report.bin": older})[2] == "endorsement-tcb"


# Azure's container instances.


@captured
def test_a_container_groups_bindings():
    stated, found = about(ACI)["bindings"], judge(ACI)
    said = found.claims.other["uvm"]
    assert (said["issuer"], said["feed"]) == (stated["uvm_issuer"], stated["uvm_feed"])
    assert said["measurement"] == about(ACI)["values"]["measurement"]
    passed = {c.name for c in found.checks if c.outcome == "passed"}
    assert {"uvm-chain", "uvm-issuer", "uvm-signature", "uvm-measurement", "container-policy",
            "public-key"} <= passed  # fmt: skip
    leaf = [at(text) for text in stated["uvm_leaf_valid"]]
    assert outcome(ACI, uvm_validity=True, now=leaf[1]) == VALID
    assert outcome(ACI, uvm_validity=True, now=leaf[1] + 1)[2] == "validity-expired"
    assert outcome(ACI, uvm_validity=True, now=leaf[0] - 1)[2] == "validity-not-yet"


@captured
def test_pins_of_a_container_group():
    stated = about(ACI)["bindings"]
    good = {"uvm_issuers": (stated["uvm_issuer"],), "uvm_feeds": (stated["uvm_feed"],)}
    assert outcome(ACI, **good, uvm_svn=103) == VALID
    assert outcome(ACI, **good, uvm_svn=104)[2] == "appraise-uvm-svn"
    assert outcome(ACI, **good | {"uvm_feeds": ("ConfAKS-AMD-UVM",)})[2] == "appraise-uvm-feed"
    other = (roots.UVM_ISSUERS[1],)
    assert outcome(ACI, uvm_issuers=other) == ("invalid", "reject", "root-uvm-issuer")
    bare = dict.fromkeys((uvm.FILE, beside.POLICY, beside.PUBLIC_KEY))
    assert outcome(ACI, bare) == VALID
    assert outcome(ACI, bare, **good) == ("valid", "needs-collateral", "needs-uvm-endorsement")


@captured
def test_parts_of_a_container_group_do_not_go_with_another_report():
    theirs = files(ACI)
    for name in GOOD:
        if name == ACI:
            continue
        for file, code in (
            (uvm.FILE, "endorsement-uvm-measurement"), (beside.POLICY, "endorsement-host-data"),
            (beside.PUBLIC_KEY, "endorsement-public-key"),
        ):  # fmt: skip
            assert outcome(name, {file: theirs[file]}) == ("invalid", "reject", code)


@captured
def test_the_endorsements_root_may_be_left_out():
    """Not from this message, whose header is signed; from the chain that is read out of it."""
    found = uvm.parse(files(ACI)[uvm.FILE])
    short = replace(found, chain=found.chain[:2])
    assert [one.raw for one, _ in uvm._path(short)] == [one.raw for one in found.chain]
    assert roots.uvm().raw == found.chain[2].raw


# No vendor's key signs these: they stand under a test root.


def another_root():
    return snp.judge(snp.evidence(), roots=roots.AMD)


def revoked_intermediate():
    return snp.judge(snp.evidence(files={"crl.der": snp.crl(revoked=(0x10001,))}))


def forged_list():
    forged = snp.crl(signer="stranger")
    return snp.judge(snp.evidence(files={"crl.der": forged}), crl=True)


def expired():
    return snp.judge(snp.evidence(), now=snp.END.timestamp() + 1)


def another_chip():
    return snp.judge(snp.evidence(chip_id=b"\5" * 64))


def another_line():
    return snp.judge(snp.evidence(cpuid_mod_id=0x01))


def measurement_rewritten():
    raw = snp.report()
    return snp.judge(snp.evidence(files={"report.bin": raw[:0x90] + bytes(48) + raw[0xC0:]}))


def bytes_that_nothing_signs():
    return snp.judge(snp.evidence(files={"report.bin": snp.report()[:-1] + b"\1"}))


def debug_guest():
    return snp.judge(snp.evidence(policy=1 << 17 | 1 << 19))


def certificate_of_another_authority():
    leaf = snp.leaf("Genoa", tcb=snp.TCB["Genoa"])
    broken = leaf[:-1] + bytes([leaf[-1] ^ 1])
    return snp.judge(snp.evidence(files={"vcek.der": broken}))


def endorsement_of_another_utility_vm():
    data = snp.endorsement(measurement=bytes(48))
    return snp.judge(snp.evidence(files={uvm.FILE: data}), uvm_issuers=(snp.issuer(),))


def endorsement_by_another():
    return snp.judge(snp.evidence(files={uvm.FILE: snp.endorsement()}))


def policy_of_another_group():
    return snp.judge(snp.evidence(files={beside.POLICY: b"allow"}))


class AnySignature:
    def verify(self, *_):
        """A check that takes a bad signature for success."""


def nothing(*_, **__):
    return None


ATTACKS = [
    (another_root, "root-unknown", (verify, "_root", nothing)),
    (revoked_intermediate, "revocation-revoked", (crl, "check_revoked", nothing)),
    (forged_list, "chain-signature", (crl, "check_issued", nothing)),
    (expired, "validity-expired", (x509, "check_validity", nothing)),
    (another_chip, "endorsement-chip-id", (verify, "_chip", nothing)),
    (another_line, "endorsement-product", (verify, "_product", nothing)),
    (measurement_rewritten, "signature-report", (x509, "p384", lambda *_: AnySignature())),
    (bytes_that_nothing_signs, "appraise-unsigned-bytes",
     (abi, "UNSIGNED_AT", abi.REPORT_BYTES)),
    (debug_guest, "appraise-guest-policy-debug", (kind, "appraise", nothing)),
    (certificate_of_another_authority, "chain-signature", (x509, "check_signature", nothing)),
    (endorsement_of_another_utility_vm, "endorsement-uvm-measurement", (uvm, "verify", nothing)),
    (endorsement_by_another, "root-uvm-issuer", (uvm, "verify", nothing)),
    (policy_of_another_group, "endorsement-host-data", (beside, "verify", nothing)),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "code", "bug"), ATTACKS, ids=[a[0].__name__ for a in ATTACKS])
def test_attack_is_refused_and_the_check_is_what_refuses_it(attack, code, bug, monkeypatch):
    found = attack()
    assert (found.decision, found.code) == ("reject", f"evidence.{code}")
    monkeypatch.setattr(*bug)
    assert attack().code == ""


# Parsers.


@pytest.mark.timeout(3600)
def test_fuzzed_reports():
    seeds = [snp.report(p, k) for p in snp.CPUID for k in snp.NAMES]
    mutation.fuzz(abi.parse, seeds)


@pytest.mark.timeout(3600)
def test_fuzzed_leaves():
    fixed = snp.evidence()

    def parse(data: bytes) -> object:
        return collateral.parse({**fixed, "vcek.der": data})

    mutation.fuzz(parse, [snp.leaf(p) for p in snp.CPUID])


@pytest.mark.timeout(3600)
def test_fuzzed_lists():
    seeds = [snp.crl(), snp.crl(revoked=(1, 2, 3))]
    mutation.fuzz(lambda data: collateral.revocation_lists({"crl.der": data}), seeds)


@pytest.mark.timeout(3600)
def test_fuzzed_endorsements():
    seeds = [snp.endorsement(), snp.cwt()]
    mutation.fuzz(uvm.parse, seeds)


@pytest.mark.timeout(3600)
def test_fuzzed_payloads_of_endorsements():
    seeds = [cbor2.loads(snp.endorsement()).value[2]]
    mutation.fuzz(lambda data: uvm._json(data), seeds)


# A serial number of 0, as AMD's VCEKs have it.


def test_no_other_certificate_reader_is_used():
    """``cryptography.x509`` announces to refuse AMD's serial number 0: nothing here uses it."""
    for path in Path(casemate.attest.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            assert not [n for n in names if n.startswith("cryptography.x509")], path


@captured
@pytest.mark.parametrize("name", GOOD)
def test_amds_certificates_are_read_without_a_warning(name):
    leaf = "vlek.der" if name == VLEK else "vcek.der"
    certificate = x509.parse(files(name)[leaf], leaf)
    assert certificate.serial == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcome(name) == VALID


@captured
def test_base64_of_a_policy_is_the_policy():
    text = base64.b64encode(files(ACI)[beside.POLICY])
    assert outcome(ACI, {beside.POLICY: text}) == VALID

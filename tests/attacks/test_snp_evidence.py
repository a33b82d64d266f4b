"""Attacks on evidence, each refused by its own check, and each check shown to be what refuses it:
with a bug seeded there the attack goes through.

The evidence is a simulated TEE's; the verifier is the one for hardware (see test_captured_evidence
for AMD's own).
"""

import random
from dataclasses import replace

import pytest

from casemate.attest import binding, verify, x509
from casemate.attest.kinds import KINDS
from casemate.attest.roots import AMD
from casemate.attest.snp import abi, kind
from casemate.attest.snp import verify as snp
from casemate.attest.trust import Trust, Unchecked
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Evidence
from support.evidence import NONCE, NONCES, NOW, attestation, bound, der, tee, with_files


def trusted() -> Trust:
    return Trust.simulated(tee().root)


def accepted(given, nonce=NONCE, trust=None, now=NOW, spki=b"t" * 32):
    return verify.verify_attestation(given, nonce, trust or trusted(), now=now, tls_spki=spki)


def another_nonce():
    accepted(attestation(), NONCES[2])


def evidence_of_another_boot():
    stolen = attestation(what=bound(boot=b"B" * 16)).evidence
    accepted(replace(attestation(), evidence=stolen))


def evidence_of_another_enclave():
    accepted(replace(attestation(tee(1)), binding=bound(boot=b"B" * 16)), trust=Trust.simulated())


def key_swapped_on_the_way():
    good = attestation()
    accepted(replace(good, binding=replace(good.binding, hpke_key=b"H" * 1216)))


def relay_with_a_key_of_its_own():
    accepted(attestation(), spki=b"T" * 32)


def root_found_beside_the_evidence():
    accepted(attestation(tee(1)))


def certificates_of_another_chain():
    mine = attestation().evidence.files
    accepted(with_files(attestation(tee(1)), ask_pem=mine["ask.pem"], ark_pem=mine["ark.pem"]))


def expired_certificate():
    accepted(attestation(), now=NOW + 8 * 365 * 86400)


def another_chip():
    accepted(attestation(chip_id=b"\5" * 64))


def measurement_rewritten():
    raw = attestation().evidence.files["report.bin"]
    accepted(with_files(attestation(), report_bin=raw[:0x90] + bytes(48) + raw[0xC0:]))


def bytes_that_nothing_signs():
    raw = attestation().evidence.files["report.bin"]
    accepted(with_files(attestation(), report_bin=raw[:-1] + b"\1"))


def debug_guest():
    accepted(attestation(policy=1 << 17 | 1 << 19))


class AnySignature:
    def verify(self, *_):
        """A check that takes a bad signature for success."""


def hash_without_hpke(b):
    return real_report_data(replace(b, hpke_key=bytes(1216)))


real_report_data = binding.report_data
nothing = lambda *_, **__: None  # noqa: E731

ATTACKS = [
    (another_nonce, "freshness-path", (binding, "check_nonce", nothing)),
    (evidence_of_another_boot, "binding-mismatch", (verify, "_binding", nothing)),
    (evidence_of_another_enclave, "binding-mismatch", (verify, "_binding", nothing)),
    (key_swapped_on_the_way, "binding-mismatch", (binding, "report_data", hash_without_hpke)),
    (relay_with_a_key_of_its_own, "binding-tls", (verify, "_tls", nothing)),
    (root_found_beside_the_evidence, "root-unknown", (snp, "_root", nothing)),
    (certificates_of_another_chain, "chain-signature", (x509, "check_signature", nothing)),
    (expired_certificate, "validity-expired", (x509, "check_validity", nothing)),
    (another_chip, "endorsement-chip-id", (snp, "_chip", nothing)),
    (measurement_rewritten, "signature-report", (x509, "p384", lambda *_: AnySignature())),
    (bytes_that_nothing_signs, "appraise-unsigned-bytes", (kind, "appraise", nothing)),
    (debug_guest, "appraise-guest-policy-debug", (kind, "appraise", nothing)),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "code", "bug"), ATTACKS, ids=[a[0].__name__ for a in ATTACKS])
def test_attack_is_refused_and_the_check_is_what_refuses_it(attack, code, bug, monkeypatch):
    with pytest.raises(EvidenceError) as e:
        attack()
    assert e.value.code == f"evidence.{code}"
    monkeypatch.setattr(*bug)
    attack()


def relabelled(given, **changed):
    parts = {"tee": given.evidence.tee, "simulated": given.evidence.simulated} | changed
    return replace(given, evidence=Evidence(files=given.evidence.files, **parts))


def refused(call) -> str:
    with pytest.raises(EvidenceError) as e:
        call()
    assert e.value.checks[-1].outcome == "failed"
    return e.value.code.removeprefix("evidence.")


def test_simulation_must_be_asked_for_by_name():
    hardware = Trust.sev_snp(measurements=Unchecked("a test"))
    good = attestation()
    assert refused(lambda: accepted(good, trust=hardware)) == "simulated-not-asked"
    lie = relabelled(good, simulated=False)
    assert refused(lambda: accepted(lie, trust=hardware)) == "root-unknown"
    assert refused(lambda: accepted(lie)) == "simulated-expected"
    assert refused(lambda: accepted(lie, trust=Trust.simulated())) == "simulated-expected"


def test_a_vendors_root_does_not_make_simulation(monkeypatch):
    """Hardware's own evidence with the label of a simulation, to a client that takes any root."""
    monkeypatch.setitem(AMD, "Genoa", (tee().root,))
    call = lambda: accepted(attestation(), trust=Trust.simulated())  # noqa: E731
    assert refused(call) == "simulated-expected"


def test_unknown_kinds_and_sections():
    good = attestation()
    for named in ("", "sev", "SEV-SNP", "tdx1", "simulated", "x" * 10_000):
        unknown = relabelled(good, tee=named)
        assert refused(lambda u=unknown: accepted(u)) == "tee-unknown"
    for named in set(KINDS) - {"sev-snp"}:
        other = relabelled(good, tee=named)
        assert refused(lambda o=other: accepted(o)) == "tee-not-trusted"
    nobody = replace(trusted(), policies={})
    assert refused(lambda: accepted(good, trust=nobody)) == "tee-not-trusted"


def test_nonces_of_other_lengths():
    good = attestation()
    for nonce in (b"", NONCE[:31], NONCE + b"\0"):
        assert refused(lambda n=nonce: accepted(good, n)) == "freshness-nonce"


def test_the_twin_signature_gets_the_same_verdict():
    good = attestation()
    raw = good.evidence.files["report.bin"]
    report = abi.parse(raw)
    twin_s = (abi.P384_ORDER - report.s).to_bytes(72, "little")
    twin = with_files(good, report_bin=raw[:0x2E8] + twin_s + raw[0x330:])
    assert twin.evidence.files != good.evidence.files
    assert accepted(twin) == accepted(good)


def flips(data: bytes, count: int | None, seed: int):
    """All single-bit flips, or a sample that touches every byte's neighbourhood."""
    bits = range(len(data) * 8)
    for bit in bits if count is None else sorted(random.Random(seed).sample(bits, count)):
        yield bit, data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def every_flip_is_refused(name: str, data: bytes, count: int | None):
    good, field = attestation(), name.replace(".", "_")
    accepted(with_files(good, **{field: data}))
    for bit, bad in flips(data, count, seed=len(name)):
        try:
            accepted(with_files(good, **{field: bad}))
        except EvidenceError:
            continue
        pytest.fail(f"bit {bit} of {name} was flipped and the evidence accepted")


FILES = ["report.bin", "vcek.der", "ask.pem", "ark.pem"]


def raw_file(name: str) -> bytes:
    data = attestation().evidence.files[name]
    return der(data) if name.endswith(".pem") else data


@pytest.mark.parametrize("name", FILES)
def test_flips(name):
    every_flip_is_refused(name, raw_file(name), 600)


def test_flips_of_pem_text():
    every_flip_is_refused("ask.pem", attestation().evidence.files["ask.pem"].rstrip(), 600)


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
def test_every_flip(name):
    every_flip_is_refused(name, raw_file(name), None)


@pytest.mark.parametrize("name", FILES)
def test_truncated_extended_and_empty_files(name):
    good = attestation()
    data = raw_file(name)
    for bad in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", data + data):
        call = with_files(good, **{name.replace(".", "_"): bad})
        assert refused(lambda c=call: accepted(c)).startswith("parse-")


def test_files_are_bounded():
    good = attestation()
    big = with_files(good, ark_pem=b"0" * (verify.MAX_FILE + 1))
    assert refused(lambda: accepted(big)) == "parse-too-large"
    many = with_files(good, **{f"extra{i}": b"" for i in range(verify.MAX_FILES)})
    assert refused(lambda: accepted(many)) == "parse-too-large"
    each = {f"extra{i}": bytes(verify.MAX_FILE) for i in range(verify.MAX_ALL // verify.MAX_FILE)}
    assert refused(lambda: accepted(with_files(good, **each))) == "parse-too-large"


def test_the_parts_of_two_attestations_do_not_mix():
    """Every mixture of two honest attestations, but the two themselves, is refused."""
    a = attestation()
    b = attestation(tee(1), bound(boot=b"B" * 16))
    names = list(a.evidence.files)
    anything = Trust.simulated()
    for mask in range(1 << len(names) + 1):
        files = {n: (b if mask >> i & 1 else a).evidence.files[n] for i, n in enumerate(names)}
        whose = b if mask >> len(names) else a
        mixed = replace(whose, evidence=Evidence(tee="sev-snp", simulated=True, files=files))
        if mask in (0, (1 << len(names) + 1) - 1):
            accepted(mixed, trust=anything)
        else:
            refused(lambda m=mixed: accepted(m, trust=anything))

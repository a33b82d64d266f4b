"""Every attester through one suite: what it makes, the verifier takes; what it seals, it opens."""

import pytest

from casemate import tee
from casemate.attest import binding
from casemate.attest.trust import Trust
from casemate.attest.verify import verify_attestation
from casemate.seams import OsRng
from casemate.spec import codec
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Attestation, Evidence
from support.disk import SimDisk
from support.evidence import NONCE, NONCES, NOW, FixedClock, bound

# How to open each attester here, and whom a client must trust for it. An attester whose hardware
# the test machine lacks is opened on a faithful fake of its device.
ATTESTERS = {
    "simulated": (
        lambda disk: tee.open("simulated", disk=disk, rng=OsRng(), clock=FixedClock()),
        lambda maker: Trust.simulated(maker.root),
    ),
}
NOT_YET = {"configfs-tsm"}


@pytest.fixture(scope="module", params=sorted(ATTESTERS))
def attester(request):
    open_, trust = ATTESTERS[request.param]
    disk = SimDisk()
    return disk, open_, open_(disk), trust


def answer(maker, what, nonces=NONCES, index=3) -> Attestation:
    return Attestation(
        binding=what,
        index=index,
        count=len(nonces),
        path=binding.nonce_path(nonces, index),
        evidence=maker.attest(binding.report_data(what)),
    )


def test_every_attester_is_in_this_suite():
    assert set(tee.KINDS) == set(ATTESTERS) | NOT_YET


def test_what_it_makes_the_verifier_takes(attester):
    _, _, maker, trust = attester
    verdict = verify_attestation(answer(maker, bound()), NONCE, trust(maker), now=NOW)
    assert verdict.tee == maker.kind
    assert verdict.simulated == maker.simulated
    assert verdict.root == maker.root
    assert verdict.measurement == maker.measurement
    assert verdict.binding == bound()


def test_one_report_answers_many(attester):
    _, _, maker, trust = attester
    evidence = maker.attest(binding.report_data(bound()))
    for i, nonce in enumerate(NONCES):
        path = binding.nonce_path(NONCES, i)
        given = Attestation(
            binding=bound(), index=i, count=len(NONCES), path=path, evidence=evidence
        )
        verify_attestation(given, nonce, trust(maker), now=NOW)


def test_evidence_is_of_what_was_bound(attester):
    _, _, maker, trust = attester
    other = answer(maker, bound(boot=b"B" * 16))
    verify_attestation(other, NONCE, trust(maker), now=NOW)
    mixed = Attestation(binding=bound(), index=3, count=5, path=other.path, evidence=other.evidence)
    with pytest.raises(EvidenceError) as e:
        verify_attestation(mixed, NONCE, trust(maker), now=NOW)
    assert e.value.code == "evidence.binding-mismatch"


def test_evidence_is_a_shared_format_of_files(attester):
    _, _, maker, _ = attester
    evidence = maker.attest(bytes(64))
    assert evidence.tee == maker.kind
    assert evidence.simulated == maker.simulated
    assert codec.decode(Evidence, codec.encode(evidence)) == evidence
    for length in (0, 32, 63, 65):
        with pytest.raises(ValueError, match="64"):
            maker.attest(bytes(length))


def test_sealing_keys_survive_a_restart_and_differ_by_label(attester):
    disk, open_, maker, trust = attester
    again = open_(disk.power_cycle())
    labels = ["", "store", "store2", "Store", "ledger|1", "é"]
    keys = [maker.sealing_key(label) for label in labels]
    assert keys == [again.sealing_key(label) for label in labels]
    assert len({*keys}) == len(labels)
    assert {len(k) for k in keys} == {32}
    assert again.root == maker.root
    verify_attestation(answer(again, bound()), NONCE, trust(maker), now=NOW)


def test_another_machine_has_other_keys(attester):
    _, open_, maker, _ = attester
    other = open_(SimDisk(1))
    assert other.sealing_key("store") != maker.sealing_key("store")


def test_each_start_has_a_report_key_of_its_own(attester):
    disk, open_, maker, _ = attester
    if maker.simulated:
        first, second = (m.attest(bytes(64)).files["vcek.der"] for m in (maker, open_(disk)))
        assert first != second

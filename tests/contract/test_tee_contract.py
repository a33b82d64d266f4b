"""Every attester through one suite: what it makes, the verifier takes; what it seals, it opens."""

import pytest

from casemate import tee
from casemate.attest import binding
from casemate.attest.verify import verify_attestation
from casemate.spec import codec
from casemate.spec.errors import EvidenceError
from casemate.spec.evidence import Attestation, Evidence
from casemate.tee.sealing import KINDS as SEALING
from support import tees
from support.evidence import NONCE, NONCES, NOW, PROMISES, bound

# Each attester on a machine of its own (support.tees): the simulated one, software TPMs, and
# faithful fakes of the devices that the test machine lacks.


@pytest.fixture(scope="module", params=sorted(tees.PLACES))
def attester(request, tmp_path_factory):
    if request.param in tees.NEEDS_TPM and (reason := tees.lacks_tpm()):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("tee")
    with tees.PLACES[request.param](folder, 0) as place:
        maker = place.open()
        yield request.param, place, maker, place.trust(maker)


def answer(maker, what, nonces=NONCES, index=3) -> Attestation:
    return Attestation(
        binding=what,
        policy=PROMISES,
        index=index,
        count=len(nonces),
        path=binding.nonce_path(nonces, index),
        evidence=maker.attest(binding.report_data(what)),
    )


def test_every_attester_is_in_this_suite():
    assert set(tee.KINDS) == {name.partition("/")[0] for name in tees.PLACES}


def test_what_it_makes_the_verifier_takes(attester):
    _, _, maker, trust = attester
    verdict = verify_attestation(answer(maker, bound()), NONCE, trust, now=NOW)
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
            binding=bound(),
            policy=PROMISES,
            index=i,
            count=len(NONCES),
            path=path,
            evidence=evidence,
        )
        verify_attestation(given, nonce, trust, now=NOW)


def test_evidence_is_of_what_was_bound(attester):
    _, _, maker, trust = attester
    other = answer(maker, bound(boot=b"B" * 16))
    verify_attestation(other, NONCE, trust, now=NOW)
    mixed = Attestation(
        binding=bound(), policy=PROMISES, index=3, count=5, path=other.path, evidence=other.evidence
    )
    with pytest.raises(EvidenceError) as e:
        verify_attestation(mixed, NONCE, trust, now=NOW)
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
    _, place, maker, trust = attester
    labels = ["", "store", "store2", "Store", "ledger|1", "é"]
    keys = [maker.sealing_key(label) for label in labels]
    again = restarted(place)
    assert keys == [again.sealing_key(label) for label in labels]
    assert len({*keys}) == len(labels)
    assert {len(k) for k in keys} == {32}
    assert again.root == maker.root
    verify_attestation(answer(again, bound()), NONCE, trust, now=NOW)


def restarted(place):
    """After a power failure; an owner who releases keys looks at the disk that came back."""
    place.disk = place.disk.power_cycle()
    if isinstance(place.machine.pause, tees.Owner):
        place.machine.pause.disk = place.disk
    return place.open()


def test_another_machine_has_other_keys(attester, tmp_path):
    name, _, maker, _ = attester
    with tees.PLACES[name](tmp_path, 1) as other:
        assert other.open().sealing_key("store") != maker.sealing_key("store")


def test_the_sealing_key_is_of_a_known_kind(attester):
    _, _, maker, _ = attester
    assert maker.sealing in SEALING
    assert (maker.sealing == "development-file") == maker.simulated


def test_each_start_has_a_report_key_of_its_own(attester):
    _, place, maker, _ = attester
    if maker.simulated:
        first, second = (m.attest(bytes(64)).files["vcek.der"] for m in (maker, place.open()))
        assert first != second

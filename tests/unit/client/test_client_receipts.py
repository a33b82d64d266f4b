"""A receipt holds, or the check that fails is named; every field that is changed is noticed."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casemate.accounting import pld
from casemate.accounting.filters import RdpFilter
from casemate.attest.trust import Trust, Unchecked
from casemate.client import receipts
from casemate.client.memory import Memory
from casemate.client.receipts import Witnesses, verify_receipt
from casemate.seal import dsse
from casemate.server.attestation import attest_now, boot_nonce
from casemate.spec import codec
from casemate.spec.errors import CasemateError, EvidenceError, FormatError, ReceiptError, UsageError
from casemate.spec.job import DpEvent
from casemate.spec.log import commitment
from casemate.spec.receipt import (
    Guarantee,
    Receipt,
    ReceiptBundle,
    ReceiptDataset,
)
from support.evidence import PROMISES
from support.publog import PublicLog, Witness, keys_of, origin
from support.receipts import (
    DELTA,
    MODEL,
    POLICY,
    REQUEST,
    SALT,
    WEIGHTS,
    maker,
    plan,
    receipt,
    statement,
)


@pytest.fixture
def bundle(keys, tee, public):
    return maker(keys, tee, public)


def test_a_true_receipt_passes_every_check(bundle, keys, trust):
    done = verify_receipt(bundle(receipt(keys)), trust=trust, weights=WEIGHTS)
    assert {c.name: c.state for c in done.checks} == {
        "evidence": "simulated",
        "signature": "ok",
        "statement": "ok",
        "log": "ok",
        "witnesses": "unchecked",
        "seen before": "unchecked",
        "consistency": "ok",
        "weights": "ok",
        "charge (RDP)": "ok",
        "epsilon (PLD)": "ok",
    }
    assert done.simulated == ("tee",)
    assert "SIMULATED" in str(done)
    assert "SIMULATED" in done._repr_html_()


def test_a_native_step_is_named_and_not_vouched_for(bundle, keys, trust):
    artifact = "sha256:" + "a" * 64
    done = verify_receipt(bundle(receipt(keys, artifact=artifact)), trust=trust)
    (check,) = (c for c in done.checks if c.name == "native step")
    assert check.state == "unchecked"
    assert artifact in check.found and f"casemate native build {POLICY}" in check.found


@pytest.mark.parametrize("artifact", ["sha256:", "a" * 64, "sha256:" + "A" * 64, "\x1b[2J"])
def test_a_native_step_is_named_by_a_digest_alone(artifact, bundle, keys, trust):
    said = statement(receipt(keys))
    said["predicate"]["artifact"] = artifact
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(bundle(said), trust=trust)
    assert caught.value.code == "receipt.predicate"


def test_simulation_must_be_asked_for_by_name(bundle, keys):
    hardware = Trust.sev_snp(measurements=Unchecked("any, in this test"))
    with pytest.raises(EvidenceError) as caught:
        verify_receipt(bundle(receipt(keys)), trust=hardware)
    assert caught.value.code == "evidence.simulated-not-asked"


def changed_plan(**changes):
    return lambda r: dataclasses.replace(r, plan=dataclasses.replace(r.plan, **changes))


def replaced(**changes):
    return lambda r: dataclasses.replace(r, **changes)


def less_charged(r: Receipt) -> Receipt:
    first = r.datasets[0]
    charge = dataclasses.replace(first.charge, rdp_nano=tuple(x - 1 for x in first.charge.rdp_nano))
    return dataclasses.replace(
        r, datasets=(dataclasses.replace(first, charge=charge), *r.datasets[1:])
    )


def less_delta(r: Receipt) -> Receipt:
    last = r.datasets[-1]
    charge = dataclasses.replace(last.charge, delta_femto=last.charge.delta_femto - 1)
    return dataclasses.replace(
        r, datasets=(*r.datasets[:-1], dataclasses.replace(last, charge=charge))
    )


def claims(**changes):
    return lambda r: dataclasses.replace(r, guarantee=dataclasses.replace(r.guarantee, **changes))


LIES = {
    "another boot": (replaced(boot=b"\1" * 16), "receipt.contradiction"),
    "another model": (replaced(model_digest=POLICY), "receipt.contradiction"),
    "another request": (replaced(request_digest=POLICY), "receipt.contradiction"),
    "hides simulation": (replaced(simulated=()), "receipt.contradiction"),
    "units": (changed_plan(units=301), "receipt.contradiction"),
    "claims privacy": (changed_plan(private=False), "receipt.contradiction"),
    "fewer events": (changed_plan(events=()), "receipt.events"),
    "events of fewer steps": (
        changed_plan(events=(DpEvent(rate=0.25, noise_multiplier=4.0, steps=4),)),
        "receipt.events",
    ),
    "events of more noise": (
        changed_plan(events=(DpEvent(rate=0.25, noise_multiplier=8.0, steps=40),)),
        "receipt.events",
    ),
    "less noise than said": (changed_plan(sigma=2.0), "receipt.sigma"),
    "a sensitivity below the clip": (
        changed_plan(sensitivity=0.5, sigma=2.0),
        "receipt.sensitivity",
    ),
    "smaller epsilon": (claims(epsilon=0.5), "receipt.epsilon"),
    "smaller delta, same epsilon": (claims(delta=5e-6), "receipt.epsilon"),
    "a delta below the plan's own": (claims(delta=1e-7), "receipt.guarantee"),
    "a delta of one": (claims(delta=1.0), "receipt.guarantee"),
    "no noise at all": (
        changed_plan(
            noise_multiplier=0.0, events=(DpEvent(rate=0.25, noise_multiplier=0.0, steps=40),)
        ),
        "receipt.events",
    ),
    "an impossible rate": (
        changed_plan(rate=2.0, events=(DpEvent(rate=2.0, noise_multiplier=4.0, steps=40),)),
        "receipt.events",
    ),
    "a dataset charged less": (less_charged, "receipt.charge"),
    "a delta charged less": (less_delta, "receipt.charge"),
    "other weights": (replaced(result_digest=POLICY), "receipt.weights"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_signed_lie_is_found(name, bundle, keys, trust):
    lie, code = LIES[name]
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(bundle(lie(receipt(keys))), trust=trust, weights=WEIGHTS)
    assert caught.value.code == code


def test_noise_that_the_receipt_overstates_costs_more_than_it_says(bundle, keys, trust):
    """The whole plan is consistent, but the charges are those of twice the noise."""
    honest, quiet = receipt(keys), plan(noise_multiplier=2.0, sigma=2.02, events=(
        DpEvent(rate=0.25, noise_multiplier=2.0, steps=40),))  # fmt: skip
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(bundle(dataclasses.replace(honest, plan=quiet)), trust=trust)
    assert caught.value.code == "receipt.charge"


def test_another_key_cannot_sign(bundle, keys, trust):
    other = Ed25519PrivateKey.generate()
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(bundle(receipt(keys), sign=other.sign), trust=trust)
    assert caught.value.code == "receipt.signature"


def test_an_attestation_for_another_nonce_is_refused(bundle, keys, tee, trust):
    made = bundle(receipt(keys))
    other = attest_now(tee, keys, PROMISES, [bytes(32)])[0]
    with pytest.raises(EvidenceError):
        verify_receipt(dataclasses.replace(made, attestation=other), trust=trust)


def test_another_boots_evidence_is_refused(bundle, keys, tee, trust, public):
    made, other = bundle(receipt(keys)), keys_of(public)
    foreign = attest_now(tee, other, PROMISES, [boot_nonce(other.boot)])[0]
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(dataclasses.replace(made, attestation=foreign), trust=trust)
    assert caught.value.code == "receipt.signer"


STATEMENTS = {
    "another type": {"_type": "https://in-toto.io/Statement/v0.1"},
    "another predicate": {"predicateType": "https://slsa.dev/provenance/v1"},
    "a field more": {"extra": 1},
    "no subject": {"subject": []},
    "two subjects": {"subject": [{"name": "w", "digest": {"sha256": "0" * 64}}] * 2},
    "another digest beside": {
        "subject": [{"name": "w", "digest": {"sha256": "0" * 64, "md5": "0"}}]
    },
    "another subject": {"subject": [{"name": "w", "digest": {"sha256": "0" * 64}}]},
    "a predicate of no form": {"predicate": {"type": "receipt/v1"}},
    "a subject that is no list": {"subject": {"name": "w"}},
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_statement_is_strict(name, bundle, keys, trust):
    made = bundle(statement(receipt(keys), **STATEMENTS[name]))
    with pytest.raises(ReceiptError):
        verify_receipt(made, trust=trust)


def test_another_payload_type_is_refused(bundle, keys, trust):
    made = bundle(receipt(keys), kind="application/json")
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(made, trust=trust)
    assert caught.value.code == "receipt.payload-type"


def test_a_run_without_privacy_says_so(bundle, keys, trust):
    open_plan = plan(private=False, noise_multiplier=0.0, sigma=0.0, events=(), delta_sampler=0.0,
                     delta_truncation=0.0)  # fmt: skip
    found = receipt(keys, plan=open_plan)
    done = verify_receipt(bundle(found), trust=trust)
    assert [c.found for c in done.checks if c.name == "privacy"] == ["no privacy guarantee"]
    for lie in (claims(statement="fine"), claims(epsilon=1.0)):
        with pytest.raises(ReceiptError) as caught:
            verify_receipt(bundle(lie(found)), trust=trust)
        assert caught.value.code == "receipt.guarantee"


def test_what_is_not_checked_is_said(bundle, keys, trust, monkeypatch):
    def absent(*_):
        raise UsageError("usage.extra", "No dp-accounting.", mend="Install it.")

    monkeypatch.setattr(pld, "epsilon", absent)
    made = bundle(claims(epsilon=0.0)(dataclasses.replace(receipt_without_pld(keys))))
    done = verify_receipt(made, trust=trust)
    states = {c.name: c.state for c in done.checks}
    assert states["weights"] == "unchecked"
    assert states["epsilon (PLD)"] == "unchecked"
    assert states["charge (RDP)"] == "ok"


def receipt_without_pld(keys) -> Receipt:
    made = plan()
    charge = RdpFilter.charge(made.events, 2e-7, delta_shown=DELTA)
    part = ReceiptDataset(
        dataset="ds_" + "a" * 40, owner="id_x", policy_digest=POLICY, units=300, charge=charge
    )
    words = Guarantee(private=True, epsilon=1.0, delta=DELTA, unit="unit", statement="private")
    return Receipt(
        job="job_" + "0" * 32, scientist="id_s", boot=keys.boot, model_digest=MODEL,
        result_digest=POLICY, request_digest=REQUEST, quote_digest=POLICY, plan=made,
        guarantee=words, datasets=(part,), simulated=("tee",), software="x",
        log=origin(keys.log.public), reserved=1,
    )  # fmt: skip


@pytest.mark.parametrize("payload", [None, b"", b"[", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_a_statement_to_be_read_must_be_one(payload, bundle, keys):
    """``receipt show`` and ``verify`` look at it before anything is verified."""
    text = "[" * 100_000 if payload is None else dsse.sign("x", payload, lambda _: b"", "k")
    with pytest.raises(ReceiptError) as caught:
        receipts.predicate_type(dataclasses.replace(bundle(receipt(keys)), envelope=text))
    assert caught.value.code == "receipt.envelope"


def test_bundles_survive_a_file(bundle, keys, trust, tmp_path):
    path = tmp_path / "receipt.json"
    path.write_bytes(codec.encode(bundle(receipt(keys))) + b"\n")
    found = receipts.load_bundle(path)
    file = tmp_path / "weights"
    file.write_bytes(WEIGHTS)
    assert verify_receipt(found, trust=trust, weights=file).receipt.reserved == 1
    path.write_bytes(path.read_bytes().replace(b'"index"', b'"Index"'))
    with pytest.raises(FormatError):
        receipts.load_bundle(path)
    with pytest.raises(UsageError):
        receipts.load_bundle(tmp_path / "none")
    with pytest.raises(UsageError):
        verify_receipt(found, trust=trust, weights=tmp_path / "none")


def flipped_is_refused(data: bytes, at: int, bit: int, trust, witnesses) -> None:
    bad = bytearray(data)
    bad[at] ^= 1 << bit
    with pytest.raises(CasemateError):
        verify_receipt(
            codec.decode(ReceiptBundle, bytes(bad)), trust=trust, weights=WEIGHTS,
            witnesses=witnesses,
        )  # fmt: skip


@pytest.fixture
def cosigned(bundle, keys):
    """A bundle's bytes, and the witnesses who stand in it."""
    who = [Witness("one.example"), Witness("two.example")]
    data = codec.encode(bundle(receipt(keys), witnesses=who))
    return data, Witnesses.of([str(w.verifier) for w in who])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_bit_changed_anywhere_in_a_bundle_is_found(cosigned, trust, data):
    whole, witnesses = cosigned
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped_is_refused(whole, at, data.draw(st.integers(0, 7)), trust, witnesses)


def test_one_bit_changed_in_the_logs_part_is_found(cosigned, trust):
    """Every seventh byte of proof, salt and entry."""
    whole, witnesses = cosigned
    verify_receipt(codec.decode(ReceiptBundle, whole), trust=trust, witnesses=witnesses)
    for field in (b'"entry":', b'"proof":', b'"salt":'):
        start = whole.index(field)
        end = whole.index(b'"', whole.index(b'"', start + len(field)) + 1)
        for at in range(start, end, 7):
            flipped_is_refused(whole, at, at % 8, trust, witnesses)


@pytest.mark.full
def test_each_bit_of_a_bundle_counts(cosigned, trust):
    whole, witnesses = cosigned
    for at in range(len(whole)):
        for bit in range(8):
            flipped_is_refused(whole, at, bit, trust, witnesses)


# The log's part.


LOG_LIES = {
    "another job": {"said": {"job": "job_" + "1" * 32}},
    "another result": {"said": {"result": commitment(SALT, POLICY)}},
    "another receipt": {"said": {"receipt": commitment(SALT, POLICY)}},
    "another salt": {"said": {"receipt": commitment(bytes(32), POLICY)}},
    "another boot": {"boot": bytes(16)},
    "no commit": {"what": "abandon"},
}


@pytest.mark.parametrize("name", LOG_LIES)
def test_an_entry_about_something_else_is_refused(name, bundle, keys, trust):
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(bundle(receipt(keys), **LOG_LIES[name]), trust=trust)
    assert caught.value.code == "receipt.log-entry"


def test_a_commit_before_its_reservation_is_refused(bundle, keys, trust):
    found = dataclasses.replace(receipt(keys), reserved=2)  # the place of the commit itself
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(bundle(found), trust=trust)
    assert caught.value.code == "receipt.log-entry"


def test_an_entry_that_is_not_in_the_log_is_refused(bundle, keys, trust, public):
    made = bundle(receipt(keys))
    other = public.fork(2).pad(4)
    signed = other.sign()
    for proof in (public.prove(3, public.sign()), other.prove(2, signed)):
        with pytest.raises(ReceiptError) as caught:
            verify_receipt(dataclasses.replace(made, proof=str(proof)), trust=trust)
        assert caught.value.code in ("receipt.inclusion", "receipt.log-entry")


def test_another_logs_head_is_refused(bundle, keys, trust, public):
    made = bundle(receipt(keys))
    stranger = PublicLog(public.leaves)
    proof = str(stranger.prove(2, stranger.sign()))
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(dataclasses.replace(made, proof=proof), trust=trust)
    assert caught.value.code.startswith("receipt.note-")


def test_witnesses_are_counted_named_and_dated(bundle, keys, trust):
    one, two, three = (Witness(f"{n}.example") for n in ("one", "two", "three"))
    made = bundle(receipt(keys), witnesses=[one, two])
    vkeys = [str(w.verifier) for w in (one, two, three)]
    done = verify_receipt(made, trust=trust, witnesses=Witnesses.of(vkeys, 2))
    (check,) = [c for c in done.checks if c.name == "witnesses"]
    assert check.state == "ok"
    assert check.found == (
        "2 of 3 cosigned: one.example at 2023-11-14T22:13:20Z, two.example at 2023-11-14T22:13:20Z"
    )
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(made, trust=trust, witnesses=Witnesses.of(vkeys))
    assert (caught.value.code, caught.value.where) == ("receipt.witnesses", "three.example")


def test_a_cosignature_of_any_time_can_be_shown(public):
    public.pad(3)
    witness = Witness("one.example")
    text = public.sign().text
    for seconds, shown in ((0, "1970-01-01T00:00:00Z"), (2**62, f"{2**62} s")):
        signed = public.sign().add([witness.line(text, seconds)])
        assert shown in Witnesses.of([str(witness.verifier)]).check(signed).found


def test_a_false_cosignature_is_refused_though_others_suffice(bundle, keys, trust, public):
    one, two = Witness("one.example"), Witness("two.example")
    made = bundle(receipt(keys), witnesses=[one])
    forged = Witness("two.example")
    forged.verifier = two.verifier  # its name and id, another key's signature
    place = public.leaves.index(made.entry)
    made = dataclasses.replace(
        made, proof=str(public.prove(place, public.sign(witnesses=[one, forged])))
    )
    witnesses = Witnesses.of([str(one.verifier), str(two.verifier)], 1)
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(made, trust=trust, witnesses=witnesses)
    assert caught.value.code == "receipt.note-signature"


def test_witnesses_are_named_once_by_keys_that_cosign(public):
    one = Witness("one.example")
    twin = str(dataclasses.replace(one.verifier, name="twin.example"))
    for keys, needed in (
        ([str(public.verifier)], None), ([str(one.verifier), twin], None),
        ([str(one.verifier)], 2), ([str(one.verifier)], 0), ([], 1),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            Witnesses.of(keys, needed)
        assert caught.value.code == "usage.witness"
    assert Witnesses.of([]).keys == ()
    with pytest.raises(FormatError):
        Witnesses.of(["nobody"])


def seen(done) -> tuple[str, str]:
    (check,) = [c for c in done.checks if c.name == "seen before"]
    return check.state, check.found


def test_a_receipt_is_held_against_what_was_seen(bundle, keys, trust, public, tmp_path):
    memory = Memory(tmp_path)
    made = bundle(receipt(keys))  # at 6 entries
    assert seen(verify_receipt(made, trust=trust))[0] == "unchecked"
    assert "audit sync" in seen(verify_receipt(made, trust=trust, memory=memory))[1]
    older = public.fork(4)
    memory.meet("https://h:1", public.public, older.file)
    state, found = seen(verify_receipt(made, trust=trust, memory=memory))
    assert state == "unchecked"
    assert "newer than the 4 entries" in found and "audit sync" in found
    memory.meet("https://h:1", public.public, public.pad(3).file)
    state, found = seen(verify_receipt(made, trust=trust, memory=memory))
    assert (state, "9 entries" in found) == ("ok", True)


def test_a_receipt_of_a_fork_is_refused_and_kept(bundle, keys, trust, public, tmp_path):
    memory = Memory(tmp_path)
    other = public.fork(0).pad(20)
    memory.meet("https://h:1", public.public, other.file)
    made = bundle(receipt(keys))
    with pytest.raises(ReceiptError) as caught:
        verify_receipt(made, trust=trust, memory=memory)
    assert caught.value.code == "receipt.fork"
    (proof,) = (tmp_path / "forks").iterdir()
    assert (proof / "seen").read_text() == str(other.sign())
    assert (proof / "shown").read_text() in made.proof


def test_receipts_need_no_heavy_package():
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pyarrow', 'dp_accounting', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        "import casemate.client.receipts, casemate.client.log, casemate.cli.receipt\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

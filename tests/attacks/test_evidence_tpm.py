"""TPM quotes and event logs captured from clouds and from a software TPM: the answers that each
case states, its values and its window, every kind of change refused or told. Then forgeries under a
test root, each of which gets through once the check that stops it is taken away."""

from __future__ import annotations

import random

import pytest

from casemate.attest import crl, folder, kinds, x509
from casemate.attest.tpm import abi, certificates, collateral, eventlog, verify
from casemate.attest.tpm.policy import DEFAULT, TpmPolicy
from support import tpm
from support.collection import Collection, at
from support.mutation import flipped, flips, mutated

CAPTURED = Collection("tpm")
NAMES, captured = CAPTURED.names, CAPTURED.needed
about, files, stated = CAPTURED.about, CAPTURED.files, CAPTURED.stated


def now_of(name):
    return at(about(name).get("verify_at", "2026-11-22T00:00:00Z"))


def judge(name, changed=None, now=None, **policy):
    kept = {f: getattr(DEFAULT, f) for f in DEFAULT.__dataclass_fields__}
    merged = {n: data for n, data in (files(name) | (changed or {})).items() if data is not None}
    return folder.judge(
        merged, now=now_of(name) if now is None else now,
        policies={"tpm": TpmPolicy(**(kept | policy))},
    )  # fmt: skip


GOOD = [n for n in NAMES if stated(n, "default_policy") == "accept"]
LOGS = [n for n in NAMES if stated(n, "default_policy") == "needs-collateral"]
QUOTED = ("msg", "tpmt_signature", "sig")


@captured
@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_the_stated_ones(name):
    judged = folder.judge(files(name), now=now_of(name))
    assert judged.tee == "tpm"
    assert judged.crypto == stated(name, "crypto")
    assert judged.decision == stated(name, "default_policy")
    assert judged == judge(name)


@captured
@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_stated_ones(name):
    values, shown = about(name)["values"], kinds.KINDS["tpm"].fields(files(name))
    stated_pcrs = values.get("pcr_sha256", {})
    assert shown["pcrs"].get("sha256", {}) | stated_pcrs == shown["pcrs"].get("sha256", {})
    if "banks" in values:
        assert sorted(shown["pcrs"]) == sorted(values["banks"])
    for file, quote in shown.items():
        if not file.endswith(".msg"):
            continue
        if "nonce" in values:
            assert quote["extraData"] == values["nonce"]
        if "quote" in values:
            said = values["quote"]
            assert quote["extraData"] == said["extra"]
            assert quote["qualifiedSigner"] == said["signer"]
            assert quote["firmwareVersion"] == said["fw"]
            assert quote["pcrDigest"] == said["digest"]
            assert quote["clockInfo"] == {
                "clock": str(said["clock"]), "resetCount": said["reset"],
                "restartCount": said["restart"], "safe": bool(said["safe"]),
            }  # fmt: skip
            assert [(abi.ALGORITHMS[int(h, 16)][0], n) for h, n in said["sel"]] == [
                (one["hash"], one["pcrs"]) for one in quote["pcrSelect"]
            ]


@captured
@pytest.mark.parametrize("name", [n for n in NAMES if "event_log.bin" in files(n)])
def test_event_logs_replay_as_others_found(name):
    """``confirmed`` says which PCRs an independent script replayed."""
    found = {k.removeprefix("eventlog_"): v for k, v in about(name)["confirmed"].items()}
    log, banks = eventlog.parse(files(name)["event_log.bin"]), collateral.pcrs(files(name))
    for bank, replayed in found.items():
        if bank not in banks or not isinstance(replayed, dict):
            continue
        ours = log.replay(bank)
        assert {str(n): ours[n] == banks[bank][n] for n in ours if n in banks[bank]} == replayed


@captured
@pytest.mark.parametrize("name", GOOD)
def test_outside_its_window_it_is_refused(name):
    valid = about(name)["valid"]
    start, end = at(valid["from"]), at(valid["to"])
    for now in (start, end):
        assert judge(name, now=now).decision == "accept"
    assert judge(name, now=start - 1).code == "evidence.validity-not-yet"
    assert judge(name, now=end + 1).code == "evidence.validity-expired"
    assert {judge(name, now=now).crypto for now in (start - 1, end + 1)} == {"valid"}


@captured
@pytest.mark.parametrize("name", GOOD)
def test_pins_and_the_nonce(name):
    values = about(name)["values"]
    pins = {n: ("ab" * 32, value) for n, value in values["pcr_sha256"].items()}
    assert judge(name, pcrs=pins, event_log=True, secure_boot=True).decision == "accept"
    for n in pins:
        judged = judge(name, pcrs=pins | {n: ("ab" * 32,)})
        assert (judged.crypto, judged.code) == ("valid", f"evidence.appraise-pcr-{n}")
    assert judge(name, secure_boot=False).code == "evidence.appraise-secure-boot"
    nonce = bytes.fromhex(values["nonce"])
    for asked, code in ((nonce, ""), (nonce + b"\0", "evidence.freshness-mismatch"),
                        (b"", "evidence.freshness-nonce")):  # fmt: skip
        assert folder.judge(files(name), now=now_of(name), nonce=asked).code == code


def refused_or_told(name, file, changed, before):
    """A change is refused; or nothing that was read differs; or it is in what a check lists."""
    judged = judge(name, {file: changed})
    if judged.decision != "accept":
        return
    if file == "event_log.bin":
        assert told_of_the_log(files(name)[file], changed, judged)
    elif file.startswith("pcrs"):
        assert judged.claims == before.claims
    elif file == "ak_public.tpmt":
        assert judged.claims == before.claims
        assert tpm.check(judged, "signer")[0] == "unchecked"
    else:
        lists = [*(c.detail for c in judged.checks)]
        assert any(file in one for one in lists if "not read" in one or "Of no use" in one), file


def told_of_the_log(old, new, judged):
    """Where two logs differ only in what nothing vouches for, and the check says so."""
    first, second = eventlog.parse(old), eventlog.parse(new)
    detail = tpm.check(judged, "event-log")[1]
    assert "nothing vouches for the header, the types of events" in detail
    if first.events == second.events:
        return True
    for n, (a, b) in enumerate(zip(first.events, second.events, strict=True)):
        if (a.register, a.digests) != (b.register, b.digests):
            return False
        if a.data != b.data and n not in second.uncovered:
            return False
    return True


@captured
@pytest.mark.parametrize("name", GOOD)
def test_sampled_flips_are_refused_or_told(name):
    draw, before = random.Random(name), judge(name)
    for file, data in files(name).items():
        for bit in draw.sample(range(8 * len(data)), 12):
            refused_or_told(name, file, flipped(data, bit), before)


def refused_crypto(judged, file):
    assert (judged.crypto, judged.decision) == ("invalid", "reject"), file


@captured
@pytest.mark.parametrize("name", GOOD)
def test_sampled_flips_of_what_is_signed_are_invalid(name):
    draw = random.Random(name)
    signed = {n: d for n, d in files(name).items() if n.endswith(QUOTED) or n == "ak_cert.der"}
    for file, data in signed.items():
        for bit in draw.sample(range(8 * len(data)), 30):
            judged = judge(name, {file: flipped(data, bit)})
            refused_crypto(judged, file)


WHOLE = [(n, f) for n in GOOD for f in files(n) if f not in ("attestation.pb", "event_log.bin")]


@captured
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "file"), WHOLE)
def test_every_flip_is_refused_or_told(name, file):
    """attestation.pb is the same parts once more, and not read."""
    before = judge(name)
    for changed in flips(files(name)[file]):
        if file.endswith(QUOTED) or file == "ak_cert.der":
            refused_crypto(judge(name, {file: changed}), file)
        else:
            refused_or_told(name, file, changed, before)


@captured
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [n for n in NAMES if "event_log.bin" in files(n)])
def test_every_flip_of_a_log_is_refused_or_told(name):
    """The log and the values of its PCRs, without the quotes over them."""
    pcrs = {n: data for n, data in files(name).items() if n.startswith("pcrs")}
    data = files(name)["event_log.bin"]
    for changed in flips(data):
        judged = folder.judge({**pcrs, "event_log.bin": changed}, now=0.0)
        assert judged.decision != "accept"
        if judged.decision == "needs-collateral":
            flips_of_a_log(data, changed, judged)


@captured
@pytest.mark.parametrize("name", GOOD)
def test_cuts_and_additions_are_refused(name):
    for file, data in files(name).items():
        if file == "attestation.pb":
            continue
        for changed in (b"", data[: len(data) // 2], data[:-1], data + b"\1", data * 2):
            judged = judge(name, {file: changed})
            told = any(file in c.detail for c in judged.checks if "Of no use" in c.detail)
            same = judged.claims == judge(name).claims and changed.strip() == data.strip()
            assert judged.decision == "reject" or told or same, file


@captured
@pytest.mark.parametrize("name", GOOD)
def test_parts_that_are_missing(name):
    wanted = {
        "ak_cert.der": ("valid", "reject", "root-ak-unvouched"),
        "tpm_ek_intermediate_2.crt": ("unknown", "reject", "root-ak-unvouched"),
        "quote_sha256.tpmt_signature": ("invalid", "reject", "signature-missing"),
        "pcrs_sha256.json": ("unknown", "needs-collateral", "needs-pcrs"),
        "tpm_ek_root_1.cer": ("valid", "accept", ""),
        "event_log.bin": ("valid", "accept", ""),
        "ak_public.tpmt": ("valid", "accept", ""),
        "attestation.pb": ("valid", "accept", ""),
    }
    for file, answer in wanted.items():
        if file in files(name):
            assert tpm.outcome(judge(name, {file: None})) == answer, file


@captured
@pytest.mark.parametrize("name", GOOD)
def test_the_sha1_bank_alone_is_not_enough(name):
    others = {n: None for n in files(name) if "sha256" in n or "sha384" in n}
    judged = judge(name, others)
    assert tpm.outcome(judged) == ("valid", "reject", "appraise-hash-algorithms")


@captured
@pytest.mark.parametrize("name", GOOD)
def test_parts_of_other_cases_do_not_mix(name):
    own = files(name)
    for other in NAMES:
        theirs = files(other)
        if other == name:
            continue
        if "event_log.bin" in theirs:
            judged = judge(name, {"event_log.bin": theirs["event_log.bin"]})
            assert (judged.crypto, judged.code) == ("invalid", "evidence.signature-event-log")
        if "pcrs.json" in theirs:
            flat = {n: None for n in own if n.startswith("pcrs")}
            judged = judge(name, flat | {"pcrs.json": theirs["pcrs.json"]})
            assert judged.decision != "accept"
        for quote in (n for n in theirs if n.endswith(".msg")):
            judged = judge(name, {"quote_sha256.msg": theirs[quote]})
            assert (judged.crypto, judged.code) == ("invalid", "evidence.signature-quote")
    swapped = {"quote_sha256.msg": own["quote_sha384.msg"]}
    assert judge(name, swapped).code == "evidence.signature-quote"
    cert = tpm.der(tpm.certificate("", "between", tpm.key("ak")))
    assert judge(name, {"ak_cert.der": cert}).code == "evidence.endorsement-ak"


def flips_of_a_log(old, new, judged):
    """Only what nothing vouches for differs, and the check says so."""
    first, log = eventlog.parse(old), eventlog.parse(new)
    detail = tpm.check(judged, "event-log")[1]
    for n, (a, b) in enumerate(zip(first.events, log.events, strict=True)):
        for bank in a.digests:
            same = a.digests[bank] == b.digests.get(bank)
            assert same or f"{bank} digests are compared with nothing" in detail
        assert a.data == b.data or n in log.uncovered


@captured
@pytest.mark.parametrize("name", LOGS)
def test_flips_of_a_log_alone_are_refused_or_told(name):
    own, draw = files(name), random.Random(name)
    for file, data in own.items():
        for bit in draw.sample(range(8 * len(data)), 30):
            changed = flipped(data, bit)
            judged = judge(name, {file: changed})
            assert judged.decision != "accept"
            if judged.decision == "needs-collateral" and file == "event_log.bin":
                flips_of_a_log(data, changed, judged)


@captured
@pytest.mark.full
def test_mutated_captured_logs_and_quotes_give_answers():
    draw = random.Random(0)
    seeds = [files(n)["event_log.bin"] for n in NAMES if "event_log.bin" in files(n)]
    for _ in range(20000):
        changed = mutated(draw.choice(seeds), draw)
        judged = folder.judge({"event_log.bin": changed}, now=0.0)
        assert judged.decision in ("reject", "needs-collateral")


# Forgeries, and the check that stops each.


def _stranger():
    return tpm.evidence(by=tpm.key("stranger"))


def _values():
    other = {"sha256": {**tpm.banks("sha256")["sha256"], 4: bytes(32)}}
    return tpm.evidence({"pcrs.json": tpm.shown(other)})


def _usage():
    leaf = tpm.certificate("", "between", tpm.key("ak"), usage="1.3.6.1.5.5.7.3.1")
    return tpm.evidence({"ak_cert.der": tpm.der(leaf)})


def _loose():
    area = tpm.public(tpm.key("ak"), 0x40072)
    return tpm.evidence({"ak_public.tpmt": area}, signer=tpm.qualified(area))


def _log():
    values = tpm.replayed(tpm.boot(), "sha256")
    return tpm.evidence({"event_log.bin": tpm.boot(secure=False)}, values=values)


def _boots():
    values = tpm.banks("sha384")
    quote = tpm.attest(values, signer=tpm.qualified(tpm.public(tpm.key("ak"))), resets=9)
    return tpm.evidence({
        "other.msg": quote, "other.tpmt_signature": tpm.signature(tpm.key("ak"), quote),
        "pcrs_sha384.json": tpm.shown(values),
    })  # fmt: skip


def _revoked():
    return tpm.evidence({"between.crl": tpm.crl(revoked=(1,))})


def _swapped():
    return tpm.evidence({"ak_public.tpmt": tpm.public(tpm.key("stranger"))})


def _nothing(*args, **kwargs):
    return None


BUGS = [
    ("signature-quote", _stranger, verify, "signature",
     lambda quote, key: abi.Signature(scheme="rsassa", hash="sha256")),
    ("signature-pcr-digest", _values, verify, "pcr_digest", lambda quote, name, banks: banks),
    ("chain-usage", _usage, certificates, "check_leaf", _nothing),
    ("endorsement-ak-attributes", _loose, verify, "_attributes", _nothing),
    ("signature-event-log", _log, verify, "replayed", lambda *a, **k: True),
    ("freshness-mixed", _boots, verify, "same_boot", _nothing),
    ("freshness-empty", lambda: tpm.evidence(extra=b""), verify, "nonce", _nothing),
    ("revocation-revoked", _revoked, crl, "check_revoked", _nothing),
    ("endorsement-ak", _swapped, verify, "copies",
     lambda parts: [(x509.public_key(parts.certificate, ""), "")]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "forge", "module", "name", "bug"), BUGS)
def test_a_check_that_is_missing_lets_its_forgery_through(
    code, forge, module, name, bug, monkeypatch
):
    assert tpm.judge(forge()).code == f"evidence.{code}"
    monkeypatch.setattr(module, name, bug)
    assert tpm.judge(forge()).decision == "accept"


def test_time_is_looked_at(monkeypatch):
    late = tpm.END.timestamp() + 1
    assert tpm.judge(tpm.evidence(), now=late).code == "evidence.validity-expired"
    monkeypatch.setattr(x509, "check_validity", _nothing)
    assert tpm.judge(tpm.evidence(), now=late).decision == "accept"


def test_the_root_is_looked_at(monkeypatch):
    assert tpm.judge(tpm.evidence(), roots=("ab" * 32,)).code == "evidence.root-unknown"
    monkeypatch.setattr(verify, "root", lambda *a: "")
    assert tpm.judge(tpm.evidence(), roots=("ab" * 32,)).decision == "accept"


def test_whole_folders_of_noise_give_answers():
    """Any file of a folder, mutated: an answer, and never an acceptance of other values."""
    draw, good = random.Random(1), tpm.evidence(log=tpm.boot(), kind="p256")
    before = tpm.judge(good).claims
    for _ in range(300):
        name = draw.choice(sorted(good))
        judged = tpm.judge({**good, name: mutated(good[name], draw)})
        if judged.decision == "accept":
            assert judged.claims == before

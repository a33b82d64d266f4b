"""Azure confidential VMs captured from AMD and Intel hardware: the answers that each case states,
its values and its window, every kind of change refused or told. Then forgeries under test roots,
each of which gets through once the check that stops it is taken away."""

from __future__ import annotations

import dataclasses
import random

import pytest

from casemate.attest import folder, kinds, x509
from casemate.attest.azure import abi, hardware, verify
from casemate.attest.azure.policy import DEFAULT
from casemate.attest.tpm import verify as tpm_verify
from support import azure, dcap, tpm
from support.collection import Collection, at
from support.mutation import flipped, flips, mutated

CAPTURED = Collection("azure-cvm")
NAMES, captured = CAPTURED.names, CAPTURED.needed
about, files, stated = CAPTURED.about, CAPTURED.files, CAPTURED.stated
HCL, QUOTE = "hcl_report.bin", "tpm_quote.msg"


def judge(name, changed=None, now=None, **policy):
    inner = {
        part: dataclasses.replace(getattr(DEFAULT, part), **policy.pop(part, {}))
        for part in ("snp", "tdx", "tpm")
    }
    merged = {n: data for n, data in (files(name) | (changed or {})).items() if data is not None}
    return folder.judge(
        merged, now=at(about(name)["verify_at"]) if now is None else now,
        policies={"azure-cvm": dataclasses.replace(DEFAULT, **inner, **policy)},
    )  # fmt: skip


GENUINE = [n for n in NAMES if stated(n, "crypto") == "valid"]
GOOD = [n for n in NAMES if stated(n, "default_policy") == "accept"]


@captured
@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_the_stated_ones(name):
    judged = folder.judge(files(name), now=at(about(name)["verify_at"]))
    assert judged.tee == "azure-cvm"
    assert judged.crypto == stated(name, "crypto")
    assert judged.decision == stated(name, "default_policy")
    assert judged == judge(name)


@captured
@pytest.mark.parametrize("name", GENUINE)
def test_the_values_are_the_stated_ones(name):
    values, shown = about(name)["values"], kinds.KINDS["azure-cvm"].fields(files(name))
    said, quote = values["quote"], shown[QUOTE]
    assert quote["extraData"] == said["extra"]
    assert quote["pcrSelect"] == [{"hash": "sha256", "pcrs": said["sel"][0][1]}]
    clock = quote["clockInfo"]
    assert (clock["resetCount"], clock["restartCount"]) == (said["reset"], said["restart"])
    assert clock["clock"] == str(said.get("clock", clock["clock"]))
    assert clock["safe"] is bool(said["safe"])
    claims = shown["runtime_claims"]
    assert claims["user-data"] == values["user_data"]
    assert list(claims) == values.get("runtime_claims_keys", list(claims))
    if "vm_configuration" in values:
        assert claims["vm-configuration"] == values["vm_configuration"]
    for field, value in values.get("snp", {}).items():
        if field in ("measurement", "report_data", "host_data", "chip_id", "id_key_digest"):
            assert shown["report"][field] == value
    for field, value in values.get("tdx", {}).items():
        if field in ("mrtd", "mrseam", "report_data", "xfam", "tdattributes", "tee_tcb_svn"):
            assert shown["report"][field] == value
    if name in GOOD:
        found = judge(name).claims
        assert found.bound.hex() == said["extra"]
        hardware_values = values.get("snp", values.get("tdx", {}))
        assert found.measurement == hardware_values.get("measurement", hardware_values.get("mrtd"))


@captured
@pytest.mark.parametrize("name", GOOD)
def test_outside_its_window_it_is_refused(name):
    valid = about(name)["valid"]
    start, end = at(valid["from"]), at(valid["to"])
    for now in (start, end):
        assert judge(name, now=now).decision == "accept"
    before, after = judge(name, now=start - 1), judge(name, now=end + 1)
    assert (before.code, after.code) == ("evidence.validity-not-yet", "evidence.validity-expired")
    assert (before.crypto, after.crypto) == ("valid", "valid")


@captured
@pytest.mark.parametrize("name", GOOD)
def test_pins_and_the_nonce(name):
    shown = kinds.KINDS["azure-cvm"].fields(files(name))
    claims, part = judge(name).claims, shown["header"]["hardware"]
    measured = {"snp": "measurements", "tdx": "mrtd"}[part]
    good = {part: {measured: ("ab" * 48, claims.measurement)}, "secure_boot": True}
    pins = {n: (value,) for n, value in shown["pcrs"]["sha256"].items()}
    configuration = shown["runtime_claims"]["vm-configuration"]
    good |= {"vm_ids": (configuration["vmUniqueId"].upper(),), "tpm": {"pcrs": pins}}
    assert judge(name, **good).decision == "accept"
    wrong = judge(name, **good | {part: {measured: ("ab" * 48,)}})
    assert wrong.code in ("evidence.appraise-measurement", "evidence.appraise-mrtd")
    wrong = judge(name, **good | {"tpm": {"pcrs": pins | {"4": ("ab" * 32,)}}})
    assert (wrong.crypto, wrong.code) == ("valid", "evidence.appraise-pcr-4")
    assert judge(name, secure_boot=False).code == "evidence.appraise-vm-secure-boot"
    now = at(about(name)["verify_at"])
    for nonce, code in ((claims.bound, ""), (b"another", "evidence.freshness-mismatch"),
                        (b"", "evidence.freshness-nonce")):  # fmt: skip
        assert folder.judge(files(name), now=now, nonce=nonce).code == code


def told(name, file, changed, judged, before):
    """Where nothing but what a check lists as covered by nothing was changed."""
    if judged.decision != "accept":
        return True
    old = files(name)[file]
    details = [c.detail for c in judged.checks]
    if file == HCL:
        first, second = abi.parse(old), abi.parse(changed)
        same = dataclasses.replace(second, padding=b"", report=b"", version=0, ak=first.ak)
        if same != dataclasses.replace(first, padding=b"", report=b"", version=0):
            return False
        listed = any(
            f"{len(second.padding)} bytes follow that nothing covers" in one for one in details
        )
        if first.hardware == "snp":  # one of two versions, which say the same
            return first.report == second.report and listed
        a, b = abi.td_report(first.report), abi.td_report(second.report)
        free = {n for n in a if a[n] != b[n]}
        return free <= {"reporttype", "cpusvn", "mac"} and listed
    if file.startswith("pcrs"):
        return judged.claims == before.claims
    if file == "td_quote.bin":
        return any("follow it that nothing covers" in one for one in details)
    if file == "collateral.json":
        return judged.claims == before.claims
    if file.endswith(".pem"):  # PEM may end in one line's end or another
        return x509.from_pem(old) == x509.from_pem(changed)
    return any("not read" in one and file in one for one in details)


@captured
@pytest.mark.parametrize("name", GOOD)
def test_sampled_flips_are_refused_or_told(name):
    draw, before = random.Random(name), judge(name)
    for file, data in files(name).items():
        for bit in draw.sample(range(8 * len(data)), min(10, 8 * len(data))):
            changed = flipped(data, bit)
            assert told(name, file, changed, judge(name, {file: changed}), before), (file, bit)


def signed_parts(name):
    """Parts of files that are signed: (file, start, end)."""
    hcl = files(name)[HCL]
    parsed = abi.parse(hcl)
    yield QUOTE, 0, len(files(name)[QUOTE])
    yield HCL, abi.CLAIMS_AT, abi.CLAIMS_AT + len(parsed.claims)
    if parsed.hardware == "snp":
        yield HCL, 32, 32 + 0x2A0
        yield "vcek.der", 0, len(files(name)["vcek.der"])
    else:
        yield "td_quote.bin", 0, 48 + 584
        yield HCL, 32 + 0x80, 32 + 0xC0
        yield HCL, 32 + 0x100, 32 + 0x400
    for file in ("tpm_quote.sig", "tpm_quote.tpmt_signature", "aik_cert.der"):
        if file in files(name):
            yield file, 0, len(files(name)[file])


def refused_crypto(judged, file):
    assert (judged.crypto, judged.decision) == ("invalid", "reject"), file


@captured
@pytest.mark.parametrize("name", GENUINE)
def test_sampled_flips_of_what_is_signed_are_invalid(name):
    draw = random.Random(name)
    for file, start, end in signed_parts(name):
        for bit in draw.sample(range(8 * start, 8 * end), 12):
            refused_crypto(judge(name, {file: flipped(files(name)[file], bit)}), file)


@captured
@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", GENUINE)
def test_every_flip_is_refused_or_told(name):
    for file, start, end in signed_parts(name):
        for changed in flips(files(name)[file], start, end):
            refused_crypto(judge(name, {file: changed}), file)
    if name in GOOD:
        before = judge(name)
        for file in {HCL, "pcrs.json", "tpm_quote.sig"} & set(files(name)):
            for changed in flips(files(name)[file]):
                assert told(name, file, changed, judge(name, {file: changed}), before), file


@captured
@pytest.mark.parametrize("name", GOOD)
def test_cuts_and_additions_are_refused_or_told(name):
    before = judge(name)
    for file, data in files(name).items():
        for changed in (b"", data[: len(data) // 2], data[:-1], data + b"\1", data * 2):
            judged = judge(name, {file: changed})
            same = judged.claims == before.claims and changed.strip() == data.strip()
            assert same or told(name, file, changed, judged, before), file


@captured
def test_parts_of_different_vms_do_not_mix():
    for name in GOOD:
        own = files(name)
        for other in GENUINE:
            theirs = files(other)
            if theirs[HCL] == own[HCL]:
                continue
            judged = judge(name, {HCL: theirs[HCL]})
            assert (judged.crypto != "valid", judged.decision != "accept") == (True, True)
            quote = {n: None for n in own if n.startswith("tpm_quote")}
            quote |= {n: d for n, d in theirs.items() if n.startswith("tpm_quote")}
            judged = judge(name, quote | {"pcrs.json": theirs["pcrs.json"]})
            assert (judged.crypto, judged.code) == ("invalid", "evidence.signature-quote")
            if theirs["pcrs.json"] != own["pcrs.json"]:
                judged = judge(name, {"pcrs.json": theirs["pcrs.json"]})
                assert judged.code == "evidence.signature-pcr-digest"
            if {"vcek.der"} <= set(theirs) & set(own) and theirs["vcek.der"] != own["vcek.der"]:
                chain = {n: theirs[n] for n in ("vcek.der", "ask.pem", "ark.pem")}
                assert judge(name, chain).crypto == "invalid"
            # The hardware report of one VM around the claims of another.
            a, b = own[HCL], theirs[HCL]
            if abi.parse(a).hardware == abi.parse(b).hardware:
                for mixed in (a[: abi.CLAIMS_AT - 20] + b[abi.CLAIMS_AT - 20 :],
                              b[: abi.CLAIMS_AT - 20] + a[abi.CLAIMS_AT - 20 :]):  # fmt: skip
                    judged = judge(name, {HCL: mixed})
                    assert judged.crypto == "invalid"


@captured
@pytest.mark.parametrize("name", [n for n in GOOD if "vcek.der" in files(n)])
def test_the_root_is_ours_not_the_folders(name):
    assert judge(name, {"ark.pem": None}).decision == "accept"
    foreign = {files(n)["ark.pem"] for n in GOOD if "ark.pem" in files(n)}
    for other in foreign - {files(name)["ark.pem"]}:
        if x509.from_pem(other) != x509.from_pem(files(name)["ark.pem"]):
            assert judge(name, {"ark.pem": other}).code == "evidence.chain-issuer"


@captured
@pytest.mark.parametrize("name", [n for n in GOOD if "aik_cert.der" in files(n)])
def test_the_keys_certificate_is_microsofts(name):
    judged = judge(name, aik=True)
    assert judged.decision == "accept"
    assert "microsoft-vtpm-root-2023.pem" in tpm.check(judged, "aik-chain")[1]
    other = tpm.der(tpm.certificate("vm", "between", tpm.key("ak")))
    assert judge(name, {"aik_cert.der": other}).code == "evidence.endorsement-ak"


# Forgeries, and the check that stops each.


def _stranger():
    return azure.evidence(by=tpm.key("stranger"))


def _claims():
    mine = tpm.key("stranger")
    bound = azure.hashlib.sha256(azure.claims(tpm.key("ak"))).digest().ljust(64, b"\0")
    return azure.evidence(text=azure.claims(mine), bound=bound, by=mine)


def _values():
    other = {"sha256": {**tpm.banks("sha256")["sha256"], 4: bytes(32)}}
    return azure.evidence(files={"pcrs.json": tpm.shown(other)})


def _td():
    return azure.evidence("tdx", {"td_quote.bin": dcap.Case(
        body=dcap.td(report_data=azure.hashlib.sha256(
            azure.claims(tpm.key("ak"))).digest().ljust(64, b"\0"), mrtd=b"o" * 48),
    ).quote()})  # fmt: skip


def _aik():
    leaf = tpm.certificate("vm", "between", tpm.key("stranger"))
    return azure.evidence(files={"aik_cert.der": tpm.der(leaf)})


def _empty():
    return azure.evidence(quote={"extra": b""})


def _debug():
    return azure.evidence(policy=(1 << 17) | (1 << 16) | (1 << 19))


def _log():
    files = azure.evidence(log=tpm.boot())
    return {**files, "event_log.bin": tpm.boot(secure=False)}


def _nothing(*args, **kwargs):
    return None


BUGS = [
    ("signature-quote", _stranger, tpm_verify, "signature",
     lambda quote, key: tpm_verify.abi.Signature(scheme="rsassa", hash="sha256")),
    ("endorsement-runtime-claims", _claims, verify, "runtime_claims", _nothing),
    ("signature-pcr-digest", _values, tpm_verify, "pcr_digest", lambda quote, name, banks: banks),
    ("endorsement-td-report", _td, abi, "QUOTED", ()),
    ("endorsement-ak", _aik, tpm_verify, "copies", lambda parts: []),
    ("freshness-empty", _empty, tpm_verify, "nonce", _nothing),
    ("appraise-guest-policy-debug", _debug, hardware, "snp_appraise", _nothing),
    ("signature-event-log", _log, tpm_verify, "replayed", lambda *a, **k: True),
]  # fmt: skip


@pytest.mark.parametrize(("code", "forge", "module", "name", "bug"), BUGS)
def test_a_check_that_is_missing_lets_its_forgery_through(
    code, forge, module, name, bug, monkeypatch
):
    forged = forge()
    assert azure.judge(forged).code == f"evidence.{code}"
    monkeypatch.setattr(module, name, bug)
    assert azure.judge(forged).decision == "accept"


def test_an_old_quote_beside_new_claims_is_not_fresh():
    """user-data holds the challenge, but the quote answers another: what was booted is not known
    to be what boots now."""
    nonce = b"challenge".ljust(64, b"\0")
    text = azure.claims(tpm.key("ak"), user=nonce.hex())
    judged = azure.judge(azure.evidence(text=text), nonce=nonce)
    assert judged.code == "evidence.freshness-mismatch"


def test_whole_folders_of_noise_give_answers():
    """Any file of a folder, mutated: an answer, and never an acceptance of other values."""
    draw = random.Random(1)
    for kind in ("snp", "tdx"):
        good = azure.evidence(kind, log=tpm.boot())
        before = azure.judge(good).claims
        for _ in range(100):
            name = draw.choice(sorted(good))
            judged = azure.judge({**good, name: mutated(good[name], draw)})
            if judged.decision == "accept":
                assert judged.claims == before

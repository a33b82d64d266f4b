"""Made-up confidential VMs: how the parts of the evidence hang together, and the policy."""

from __future__ import annotations

import dataclasses
import json

import pytest

from casemate.attest import fields, folder, kinds
from casemate.attest.azure.policy import DEFAULT, AzurePolicy
from casemate.attest.tpm import verify as tpm_verify
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError
from support import azure, dcap, snp, tpm

VALID = ("valid", "accept", "")
AK = tpm.key("ak")
BOTH = pytest.mark.parametrize("hardware", ["snp", "tdx"])


def refused(files, code, crypto="invalid", **policy):
    found = azure.judge(files, **policy)
    assert tpm.outcome(found) == (crypto, "reject", code), found.message


@BOTH
@pytest.mark.parametrize("name", ["sha256", "sha384", "sha512"])
def test_genuine_evidence(hardware, name):
    judged = azure.judge(azure.evidence(hardware, hash=name))
    assert tpm.outcome(judged) == VALID
    assert judged.tee == "azure-cvm"
    claims = judged.claims
    assert claims.bound == tpm.NONCE
    assert claims.fresh == (tpm.NONCE,)
    assert claims.measurement == (snp.MEASURED if hardware == "snp" else b"m" * 48).hex()
    assert claims.chip_id == (snp.hwid("Genoa") if hardware == "snp" else dcap.PPID).hex()
    assert claims.other["user_data"] == azure.USER.hex()
    assert claims.other["ak"] == tpm_verify.fingerprint(AK.public_key())
    json.dumps(judged.to_json())


def test_a_td_report_1_5():
    assert tpm.outcome(azure.judge(azure.evidence("tdx", fifteen=True))) == VALID
    refused(azure.evidence("tdx", fifteen=True, td={"tee_tcb_svn2": bytes(16)}),
            "endorsement-td-report")  # fmt: skip


@BOTH
def test_claims_that_the_hardware_does_not_vouch_for(hardware):
    other = azure.claims(tpm.key("stranger"))
    mine = azure.evidence(hardware)
    text = azure.claims(AK)
    bound = azure.hashlib.sha256(text).digest()
    forged = azure.evidence(
        hardware, text=other, bound=bound.ljust(64, b"\0"), by=tpm.key("stranger")
    )
    refused(forged, "endorsement-runtime-claims")
    # The rest of report data is zero, and the hash is the whole of what is named.
    refused(azure.evidence(hardware, bound=bound.ljust(64, b"\1")), "endorsement-runtime-claims")
    refused(azure.evidence(hardware, header={"hash": 2}), "endorsement-runtime-claims")
    refused(azure.evidence(hardware, bound=bytes(64)), "endorsement-runtime-claims")
    assert tpm.outcome(azure.judge(mine)) == VALID


@BOTH
def test_quotes_of_another_vm(hardware):
    refused(azure.evidence(hardware, by=tpm.key("stranger")), "signature-quote")
    theirs = azure.evidence(hardware, ak=tpm.key("stranger"))
    mine = azure.evidence(hardware)
    for swapped in ("hcl_report.bin", "tpm_quote.sig"):
        assert azure.judge({**mine, swapped: theirs[swapped]}).crypto == "invalid"
    both = {n: theirs[n] for n in ("tpm_quote.msg", "tpm_quote.sig")}
    refused({**mine, **both}, "signature-quote")


@BOTH
def test_nonces(hardware):
    files = azure.evidence(hardware)
    assert tpm.outcome(azure.judge(files, nonce=tpm.NONCE)) == VALID
    for other in (b"another", azure.USER):
        assert tpm.outcome(azure.judge(files, nonce=other))[2] == "freshness-mismatch"
    refused(azure.evidence(hardware, quote={"extra": b""}), "freshness-empty", crypto="valid")


@BOTH
def test_what_is_missing(hardware):
    quoteless = azure.evidence(hardware, {"tpm_quote.msg": None, "tpm_quote.sig": None})
    assert tpm.outcome(azure.judge(quoteless)) == ("valid", "needs-collateral", "needs-quote")
    refused(azure.evidence(hardware, {"tpm_quote.sig": None}), "signature-missing")
    bare = azure.evidence(hardware, {"pcrs.json": None})
    assert tpm.outcome(azure.judge(bare))[1:] == ("needs-collateral", "needs-pcrs")
    wanted = {
        "vcek.der": ("unknown", "needs-collateral", "needs-vcek"),
        "ask.pem": ("unknown", "needs-collateral", "needs-ask"),
        "ark.pem": ("invalid", "reject", "chain-issuer"),  # AMD's own stands in for it
        "td_quote.bin": ("unknown", "needs-collateral", "needs-td-quote"),
        "collateral.json": ("valid", "needs-collateral", "needs-tcb-info"),
    }
    for file, answer in wanted.items():
        if file in bare:
            assert tpm.outcome(azure.judge(azure.evidence(hardware, {file: None}))) == answer


def test_what_is_wrong_comes_before_what_is_missing():
    files = azure.evidence("tdx", {"collateral.json": None}, quote={"extra": b""})
    refused(files, "freshness-empty", crypto="valid")
    debug = azure.evidence(policy=(1 << 17) | (1 << 16) | (1 << 19))
    quoteless = {n: data for n, data in debug.items() if not n.startswith("tpm_quote")}
    refused(quoteless, "appraise-guest-policy-debug", crypto="valid")


def test_a_copy_of_the_report_is_the_report():
    files = azure.evidence()
    report = files["hcl_report.bin"][32 : 32 + 1184]
    for name in ("snp_report.bin", "report.bin"):
        assert tpm.outcome(azure.judge({**files, name: report})) == VALID
        refused({**files, name: snp.report("Genoa")}, "endorsement-report-copy")


def test_a_tdreport_and_a_quote_of_another_td():
    for name in ("mrtd", "rtmr0", "rtmr3", "mrseam", "xfam", "mrconfigid", "report_data"):
        different = {name: b"x" * {"xfam": 8, "report_data": 64}.get(name, 48)}
        refused(azure.evidence("tdx", td=different), "endorsement-td-report")
    files = azure.evidence("tdx", {"td_quote.bin": dcap.Case().quote()})
    refused(files, "endorsement-td-report")
    sgx = dcap.Case(version=3).quote()
    refused(azure.evidence("tdx", {"td_quote.bin": sgx}), "parse-quote-version")


def test_hardware_is_judged_by_its_own_policy():
    debug = (1 << 17) | (1 << 16) | (1 << 19)
    refused(azure.evidence(policy=debug), "appraise-guest-policy-debug", crypto="valid")
    debug_td = bytes.fromhex("0100001000000000")
    refused(azure.evidence("tdx", tdattributes=debug_td), "appraise-debug", crypto="valid")
    refused(azure.evidence(), "appraise-measurement", crypto="valid",
            snp={"measurements": ("ab" * 48,)})  # fmt: skip
    refused(azure.evidence("tdx"), "appraise-mrtd", crypto="valid", tdx={"mrtd": ("ab" * 48,)})
    refused(azure.evidence(), "root-unknown", snp={"roots": {"Genoa": ("ab" * 32,)}})
    refused(azure.evidence("tdx"), "root-unknown", tdx={"roots": ("ab" * 32,)})
    refused(azure.evidence(), "appraise-hardware", crypto="unknown", snp=Unchecked("TDX only"))
    refused(azure.evidence("tdx"), "appraise-hardware", crypto="unknown", tdx=Unchecked("no"))
    late = tpm.END.timestamp() + 1
    assert azure.judge(azure.evidence(), now=late).code == "evidence.validity-expired"


# The attestation key's certificate.


def aik(**changed):
    return {
        "aik_cert.der": tpm.der(tpm.certificate("vm", "between", AK, **changed)),
        "between.crt": tpm.der(tpm.authorities()[1]),
        "root.crt": tpm.der(tpm.authorities()[0]),
    }


@BOTH
def test_a_certificate_of_the_key(hardware):
    judged = azure.judge(azure.evidence(hardware, aik()), aik=True)
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "aik-chain")[0] == "passed"
    alone = azure.evidence(hardware, {"aik_cert.der": aik()["aik_cert.der"]})
    judged = azure.judge(alone)
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "aik-chain")[0] == "unchecked"
    refused(alone, "appraise-aik", crypto="valid", aik=True)
    refused(azure.evidence(hardware), "appraise-aik", crypto="valid", aik=True)


def test_certificates_of_the_key_that_do_not_fit():
    stranger = tpm.der(tpm.certificate("vm", "between", tpm.key("stranger")))
    refused(azure.evidence(files=aik() | {"aik_cert.der": stranger}), "endorsement-ak")
    refused(azure.evidence(files=aik(usage="1.3.6.1.5.5.7.3.1")), "chain-usage")
    refused(azure.evidence(files=aik(signer=tpm.key("stranger"))), "chain-signature")
    refused(azure.evidence(files=aik()), "root-unknown", tpm={"roots": ("ab" * 32,)})
    public = tpm.public(tpm.key("stranger"))
    refused(azure.evidence(files={"ak_public.tpmt": public}), "endorsement-ak")
    lives = (tpm.START, azure.snp.datetime(2026, 3, 1, tzinfo=azure.snp.UTC))
    refused(azure.evidence(files=aik(lives=lives)), "validity-expired", crypto="valid")
    revoked = aik() | {"between.crl": tpm.crl(revoked=(1,))}
    refused(azure.evidence(files=revoked), "revocation-revoked", crypto="valid")


def test_an_event_log():
    files = azure.evidence(log=tpm.boot())
    asked = {"event_log": True, "secure_boot": True}
    assert tpm.outcome(azure.judge(files, tpm=asked)) == VALID
    refused({**files, "event_log.bin": tpm.boot(secure=False)}, "signature-event-log")
    refused(azure.evidence(), "appraise-log-required", crypto="valid", tpm=asked)


def test_what_is_not_read_is_told():
    judged = azure.judge(azure.evidence(files={"nonce.bin": b"x", "td_quote.bin": b"y"}))
    assert tpm.outcome(judged) == VALID
    assert tpm.check(judged, "other-files") == ("unchecked", "not read: nonce.bin, td_quote.bin")
    judged = azure.judge(azure.evidence(header={"padding": b"rest"}))
    assert (
        "4 bytes follow that nothing covers: not all zero" in tpm.check(judged, "runtime-claims")[1]
    )


# The policy.


@pytest.mark.parametrize(
    ("given", "wrong", "code"),
    [
        ({"secure_boot": True}, {"secure_boot": False}, "vm-secure-boot"),
        ({"console": True}, {"console": False}, "vm-console"),
        ({"vm_ids": (azure.VM,)}, {"vm_ids": ("OTHER",)}, "vm-id"),
        ({"user_data": (azure.USER.hex(),)}, {"user_data": ("00" * 64,)}, "user-data"),
        ({"aik": False}, {"aik": True}, "aik"),
        ({"tpm": {"reset_counts": (3,)}}, {"tpm": {"reset_counts": (4,)}}, "reset-count"),
        ({"tpm": {"pcrs": {"0": (tpm.banks("sha256")["sha256"][0].hex(),)}}},
         {"tpm": {"pcrs": {"0": ("ab" * 32,)}}}, "pcr-0"),
        ({"tpm": {"aks": (tpm_verify.fingerprint(AK.public_key()),)}},
         {"tpm": {"aks": ("ab" * 32,)}}, "ak-pin"),
    ],
)  # fmt: skip
def test_fields_of_the_policy(given, wrong, code):
    assert tpm.outcome(azure.judge(azure.evidence(), **given)) == VALID
    refused(azure.evidence(), f"appraise-{code}", crypto="valid", **wrong)


def test_what_the_claims_do_not_state_is_not_admitted():
    bare = json.dumps({"keys": [azure.jwk(AK)]}).encode()
    files = azure.evidence(text=bare)
    assert tpm.outcome(azure.judge(files)) == VALID
    for wrong, code in (
        ({"secure_boot": False}, "vm-secure-boot"), ({"console": False}, "vm-console"),
        ({"vm_ids": (azure.VM,)}, "vm-id"), ({"user_data": ("00" * 64,)}, "user-data"),
    ):  # fmt: skip
        refused(files, f"appraise-{code}", crypto="valid", **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tpm": Unchecked("x")}, {"snp": Unchecked("x"), "tdx": Unchecked("x")}, {"snp": 5},
        {"tdx": ("x",)}, {"aik": 1}, {"secure_boot": "on"}, {"console": None},
        {"vm_ids": ("abc",)}, {"vm_ids": ()}, {"user_data": ("ab" * 32,)},
    ],
)  # fmt: skip
def test_policies_that_are_none(wrong):
    with pytest.raises(UsageError):
        dataclasses.replace(DEFAULT, **wrong)


def table(policy):
    """A policy as TOML has it, but for its roots."""
    out = {}
    for f in dataclasses.fields(policy):
        value = getattr(policy, f.name)
        if f.name == "roots":
            continue
        if isinstance(value, Unchecked):
            out[f.name] = {"unchecked": value.reason}
        elif dataclasses.is_dataclass(value):
            out[f.name] = table(value)
        else:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def test_a_policy_in_toml():
    section = table(DEFAULT)
    loaded = fields.load(AzurePolicy, section, "azure-cvm")
    assert loaded == DEFAULT
    section["snp"] |= {"products": ["Genoa"], "firmware": "1.55.21"}
    loaded = fields.load(AzurePolicy, section, "azure-cvm")
    assert set(loaded.snp.roots) == {"Genoa"}
    assert loaded.snp.firmware == (1, 55, 21)
    section["tdx"] = {"unchecked": "SEV-SNP only"}
    assert fields.load(AzurePolicy, section, "azure-cvm").tdx == Unchecked("SEV-SNP only")
    for broken in (
        {"products": ["Naples"]}, {"products": {"unchecked": "x"}}, {"firmware": "1.2"},
        {"further": 1},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            fields.load(AzurePolicy, section | {"snp": section["snp"] | broken}, "azure-cvm")
    assert kinds.KINDS["azure-cvm"].default() is DEFAULT


def test_recognised_by_content():
    files = azure.evidence()
    assert kinds.recognise(files).tee == "azure-cvm"
    renamed = {"other.bin" if n == "hcl_report.bin" else n: d for n, d in files.items()}
    judged = folder.judge(renamed, now=azure.NOW)
    assert (judged.tee, judged.code) == ("azure-cvm", "evidence.parse-hcl")


@BOTH
def test_every_field_is_shown(hardware):
    shown = kinds.KINDS["azure-cvm"].fields(azure.evidence(hardware, log=tpm.boot()))
    assert shown["header"] == {"version": 2, "hardware": hardware, "hash": "sha256"}
    assert shown["runtime_claims"]["vm-configuration"]["vmUniqueId"] == azure.VM
    assert shown["tpm_quote.msg"]["extraData"] == tpm.NONCE.hex()
    assert shown["report"]["report_data"]
    assert shown["event_log"]["events"]
    json.dumps(shown)

"""Tokens against trust policies, field by field; what evidence says once verified. Tokens and keys
are made here."""

import base64
from dataclasses import fields as fields_of
from dataclasses import replace

import pytest

from casemate.attest import fields, kinds
from casemate.attest.tokens import abi
from casemate.attest.tokens import policy as policies
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError
from support import tokens as made
from support.tokens import NOW, code, judge

OPEN = Unchecked("a test")
HEX = "ab" * 48


def coded(name):
    """The code of a failed check."""
    return name if name.startswith("tcb-") else f"appraise-{name}"


def check(found, name):
    return [c for c in found.checks if c.name == name]


@pytest.mark.parametrize(
    ("field", "admitted", "other", "name"),
    [
        ("issuers", made.GOOGLE["iss"], "https://x.test", "issuer"),
        ("audiences", "https://example.test", "https://x.test", "audience"),
        ("eat_profiles", "https://example.test/profile", "x", "eat-profile"),
        ("nonces", "a second nonce", "x", "nonce"),
        ("hwmodels", "GCP_AMD_SEV", "GCP_INTEL_TDX", "hwmodel"),
        ("dbgstats", "disabled-since-boot", "enabled", "dbgstat"),
        ("swnames", "CONFIDENTIAL_SPACE", "GCE", "swname"),
        ("swversions", "250800", "250900", "swversion"),
        ("support_attributes", "STABLE", "EXPERIMENTAL", "support-attributes"),
        ("image_digests", "sha256:" + "1" * 64, "sha256:" + "2" * 64, "image-digest"),
        ("image_references", "registry.test/image@sha256:" + "1" * 64, "x", "image-reference"),
        ("projects", "project", "x", "project"),
        ("service_accounts", "workload@project.test", "x", "service-account"),
    ],
)
def test_google_pins(field, admitted, other, name):
    files = made.files(abi.GOOGLE)
    for value, wanted in (((admitted,), ""), ((other,), coded(name)), (OPEN, "")):
        found = judge(files, made.pinned(abi.GOOGLE, **{field: value}))
        assert found.code.removeprefix("evidence.") == wanted
        (one,) = check(found, name)
        assert one.outcome == ("unchecked" if value is OPEN else "failed" if wanted else "passed")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"dbgstat": "enabled"}, "dbgstat"), ({"dbgstat": ...}, "dbgstat"),
        ({"dbgstat": "DISABLED-SINCE-BOOT"}, "dbgstat"), ({"swname": "GCE"}, "swname"),
        ({"secboot": False}, "secure-boot"), ({"secboot": ...}, "secure-boot"),
        ({"hwmodel": "GCP_SHIELDED_VM"}, "hwmodel"), ({"hwmodel": ...}, "hwmodel"),
        ({"tdx": {"gcp_attester_tcb_status": "OutOfDate"}}, "tcb-status"),
        ({"tdx": {"gcp_attester_tcb_status": "Revoked"}}, "tcb-status"),
    ],
)  # fmt: skip
def test_google_defaults(changes, wanted):
    assert code(made.files(abi.GOOGLE, **changes), made.pinned(abi.GOOGLE)) == coded(wanted)


def test_googles_tcb_status_is_told():
    files = made.files(abi.GOOGLE, tdx={"gcp_attester_tcb_status": "SWHardeningNeeded"})
    found = judge(files, made.pinned(abi.GOOGLE))
    assert (found.decision, found.tcb_status) == ("accept-with-status", "SWHardeningNeeded")
    absent = judge(made.files(abi.GOOGLE), made.pinned(abi.GOOGLE))
    assert check(absent, "tcb-status")[0].outcome == "unchecked"


def test_all_is_looked_at_before_the_first_failure():
    files = made.files(abi.GOOGLE, dbgstat="enabled", secboot=False, swname="GCE")
    found = judge(files)
    failed = [c.name for c in found.checks if c.outcome == "failed"]
    assert failed == ["key-pin", "dbgstat", "swname", "secure-boot"]
    assert found.code == "evidence.root-key-unpinned"


def test_age():
    files = made.files(abi.GOOGLE)
    for age, wanted in ((59, "appraise-age"), (60, "")):
        assert code(files, made.pinned(abi.GOOGLE, max_age=age)) == wanted


MAA_TEE = "x-ms-isolation-tee"


@pytest.mark.parametrize(
    ("field", "admitted", "other", "name"),
    [
        ("attestation_types", "sevsnpvm", "tdxvm", "attestation-type"),
        ("compliance_statuses", "azure-compliant-cvm", "x", "compliance"),
        ("policy_hashes", "hash", "x", "policy-hash"), ("measurements", HEX, "cd" * 48,
        "measurement"), ("host_data", "00" * 32, "11" * 32, "host-data"), ("vmpls", 0, 1, "vmpl"),
        ("issuers", made.MAA["iss"], "https://own.weu.attest.azure.net", "issuer"),
    ],
)  # fmt: skip
def test_azure_pins(field, admitted, other, name):
    for value, wanted in (((admitted,), ""), ((other,), coded(name)), (OPEN, "")):
        found = code(made.files(abi.MAA), made.pinned(abi.MAA, **{field: value}))
        assert found == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({f"{MAA_TEE}/x-ms-sevsnpvm-is-debuggable": True}, "debug"),
        ({f"{MAA_TEE}/x-ms-sevsnpvm-is-debuggable": ...}, "debug"),
        # A tenant's own policy can issue claims of other names, not of these.
        ({f"{MAA_TEE}/x-ms-sevsnpvm-is-debuggable": ..., "tdx_is_debuggable": False}, "debug"),
        ({"is-debuggable": True}, "debug"),
        ({f"{MAA_TEE}/x-ms-sevsnpvm-migration-allowed": True}, "migration"),
        ({f"{MAA_TEE}/x-ms-attestation-type": "vbs"}, "debug"),
        ({MAA_TEE: ...}, "debug"),
    ],
)
def test_azure_defaults(changes, wanted):
    assert code(made.files(abi.MAA, **changes), made.pinned(abi.MAA)) == coded(wanted)


def test_azures_measurement_is_its_tees_own():
    claims = {f"{MAA_TEE}/tdx_mrtd": "cd" * 48, "tdx_mrtd": "cd" * 48}
    files = made.files(abi.MAA, **claims)
    assert code(files, made.pinned(abi.MAA, measurements=("cd" * 48,))) == "appraise-measurement"
    assert code(files, made.pinned(abi.MAA, measurements=(HEX,))) == ""


def test_azures_secure_boot():
    policy = made.pinned(abi.MAA, secure_boot=True)
    assert code(made.files(abi.MAA), policy) == ""
    runtime = f"{MAA_TEE}/x-ms-runtime/vm-configuration/secure-boot"
    for changes in ({"secureboot": False}, {runtime: False},
                    {"secureboot": ..., f"{MAA_TEE}/x-ms-runtime": ...}):  # fmt: skip
        assert code(made.files(abi.MAA, **changes), policy) == "appraise-secure-boot"


FLAT = {"iss": made.MAA["iss"], "iat": NOW - 60, "exp": NOW + 60}
SGX = FLAT | {"x-ms-attestation-type": "sgx", "x-ms-sgx-is-debuggable": False,
              "x-ms-sgx-mrenclave": "ab" * 32, "x-ms-sgx-mrsigner": "cd" * 32,
              "x-ms-sgx-report-data": "ee" * 64, "x-ms-sgx-ehd": "aGVsZA"}  # fmt: skip
TDX = FLAT | {"x-ms-attestation-type": "tdxvm", "tdx_td_attributes_debug": False,
              "tdx_mrtd": HEX, "tdx_report_data": "ee" * 64,
              "attester_tcb_status": "UpToDate"}  # fmt: skip


def test_azures_other_tees():
    sgx = made.pinned(abi.MAA, measurements=("ab" * 32,), signers=("cd" * 32,))
    found = judge(made.files(abi.MAA, SGX), sgx)
    assert found.decision == "accept" and found.claims.bound == bytes.fromhex("ee" * 64)
    assert b"held" in found.claims.fresh
    assert code(made.files(abi.MAA, SGX), replace(sgx, signers=("11" * 32,))) == "appraise-signer"
    debug = made.files(abi.MAA, SGX | {"x-ms-sgx-is-debuggable": True})
    assert code(debug, sgx) == "appraise-debug"
    tdx = made.pinned(abi.MAA, measurements=(HEX,))
    assert code(made.files(abi.MAA, TDX), tdx) == ""
    old = TDX | {"attester_tcb_status": "OutOfDate", "attester_advisory_ids": ["INTEL-SA-1"]}
    found = judge(made.files(abi.MAA, old), tdx)
    assert found.code == "evidence.tcb-status"
    assert (found.tcb_status, found.advisories) == ("OutOfDate", ("INTEL-SA-1",))


@pytest.mark.parametrize(
    ("field", "admitted", "other", "name"),
    [
        ("attester_types", "TDX", "SGX", "attester-type"),
        ("dbgstats", "disabled", "enabled", "dbgstat"),
        ("policies", "p1", "p2", "policies"),
        ("measurements", HEX, "cd" * 48, "measurement"),
        ("tcb_statuses", "UpToDate", "OutOfDate", "tcb-status"),
    ],
)
def test_intel_pins(field, admitted, other, name):
    for claims in (made.ITA_1, made.ITA_2):
        files = made.files(abi.ITA, claims)
        for value, wanted in (((admitted,), ""), ((other,), coded(name)), (OPEN, "")):
            assert code(files, made.pinned(abi.ITA, **{field: value})) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"tdx/tdx_is_debuggable": True}, "debug"),
        ({"tdx/tdx_td_attributes_debug": True}, "debug"),
        ({"tdx/tdx_is_debuggable": ..., "tdx/tdx_td_attributes_debug": ...}, "debug"),
        ({"dbgstat": "enabled"}, "dbgstat"), ({"tdx/dbgstat": "enabled"}, "dbgstat"),
        ({"tdx/attester_tcb_status": "OutOfDate"}, "tcb-status"),
    ],
)  # fmt: skip
def test_intel_defaults(changes, wanted):
    assert code(made.files(abi.ITA, **changes), made.pinned(abi.ITA)) == coded(wanted)


def test_intels_sev_snp():
    sev = {"attester_type": "AMD SEV-SNP", "sevsnp_is_debuggable": False,
           "sevsnp_launchmeasurement": HEX, "sevsnp_reportdata": "cd" * 64}  # fmt: skip
    files = made.files(abi.ITA, tdx=..., sevsnp=sev, dbgstat=...)
    policy = made.pinned(abi.ITA, measurements=(HEX,), attester_types=("SEVSNP",))
    found = judge(files, policy)
    assert found.decision == "accept" and found.claims.bound == bytes.fromhex("cd" * 64)
    assert check(found, "dbgstat")[0].outcome == "unchecked"
    open_to_debug = made.files(abi.ITA, tdx=..., sevsnp=sev | {"sevsnp_is_debuggable": True})
    assert code(open_to_debug, policy) == "appraise-debug"


def test_intels_advisories_and_what_is_not_looked_at():
    files = made.files(abi.ITA, **{"tdx/attester_advisory_ids": ["INTEL-SA-1", "INTEL-SA-2"]})
    denied = made.pinned(abi.ITA, denied_advisories=("INTEL-SA-2",))
    assert code(files, denied) == "tcb-advisories"
    found = judge(files, made.pinned(abi.ITA, denied_advisories=("INTEL-SA-3",)))
    assert found.decision == "accept" and found.advisories == ("INTEL-SA-1", "INTEL-SA-2")
    assert check(found, "nvgpu")[0].outcome == "unchecked"
    with_tpm = judge(made.files(abi.ITA, tpm={}), made.pinned(abi.ITA))
    assert check(with_tpm, "tpm")[0].outcome == "unchecked"


GPU = "x-nvidia-gpu-"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"measres": "fail"}, "measres"), ({"measres": None}, "measres"),
        ({"secboot": False}, "secure-boot"), ({"secboot": None}, "secure-boot"),
        ({"dbgstat": "enabled"}, "dbgstat"),
        ({f"{GPU}driver-rim-signature-verified": False}, "device-checks"),
        ({f"{GPU}arch-check": False}, "device-checks"),
        ({f"{GPU}attestation-report-nonce-match": None}, "device-checks"),
        ({f"{GPU}attestation-report-cert-chain-fwid-match": None}, "device-checks"),
        ({f"{GPU}attestation-report-cert-chain": {"x-nvidia-cert-status": "valid"}},
         "ocsp-status"),
        ({f"{GPU}attestation-report-cert-chain": None}, "certificate-status"),
        ({f"{GPU}driver-rim-cert-chain": {"x-nvidia-cert-status": "expired",
                                          "x-nvidia-cert-ocsp-status": "good"}},
         "certificate-status"),
        ({f"{GPU}driver-rim-cert-chain": {"x-nvidia-cert-status": "valid",
                                          "x-nvidia-cert-ocsp-status": "revoked"}}, "ocsp-status"),
        ({f"{GPU}driver-rim-cert-chain": {"x-nvidia-cert-status": "valid",
                                          "x-nvidia-cert-ocsp-status": "good",
                                          "x-nvidia-cert-ocsp-nonce-matches": False}},
         "device-checks"),
        ({"x-nvidia-attestation-warning": "CERT_HOLD"}, "warnings"),
        ({"x-nvidia-attestation-warning": True}, "warnings"),
        ({"iss": "https://x.test"}, "device-issuer"), ({"eat_nonce": "00"}, "device-nonce"),
    ],
)  # fmt: skip
def test_nvidia_defaults(changes, wanted):
    good, bad = made.device(), made.device(**changes)
    for devices in ({"GPU-0": bad}, {"GPU-0": good, "GPU-1": bad}):
        found = code(made.detached(devices), made.pinned(abi.NRAS))
        assert found == coded(wanted)


def test_nvidias_result():
    policy = made.pinned(abi.NRAS)
    for value in (False, None):
        files = made.detached(**{"x-nvidia-overall-att-result": value})
        assert code(files, policy) == "appraise-result"
    assert code(made.detached({}), policy) == "appraise-devices"
    assert code(made.detached(), replace(policy, devices=2)) == "appraise-devices"


@pytest.mark.parametrize(
    ("field", "admitted", "other", "name"),
    [
        ("hwmodels", "GH100", "GB100", "hwmodel"),
        ("driver_versions", "550.90.07", "535.86.09", "driver"),
        ("vbios_versions", "96.00.9F.00.01", "x", "vbios"), ("ueids", "1234", "1", "ueid"),
    ],
)  # fmt: skip
def test_nvidia_pins(field, admitted, other, name):
    for value, wanted in (((admitted,), ""), ((other,), coded(name)), (OPEN, "")):
        assert code(made.detached(), made.pinned(abi.NRAS, **{field: value})) == wanted


def test_nvidias_switches_have_no_driver():
    files = made.detached({"GPU-0": made.device(), "SWITCH-0": made.device("switch")})
    policy = made.pinned(abi.NRAS, driver_versions=("550.90.07",))
    assert code(files, policy) == ""
    both = ("96.00.9F.00.01", "96.10.55.00.01")
    assert code(files, replace(policy, vbios_versions=both)) == ""
    assert code(files, replace(policy, vbios_versions=both[:1])) == "appraise-vbios"


def test_nvidias_claims_of_version_2():
    old = made.device(**{f"{GPU}attestation-report-cert-chain": None,
                         f"{GPU}attestation-report-cert-chain-fwid-match": None,
                         f"{GPU}attestation-report-cert-chain-validated": True})  # fmt: skip
    files = made.detached({"GPU-0": old}, **{"x-nvidia-ver": "2.0"})
    found = judge(files, made.pinned(abi.NRAS))
    assert found.decision == "accept"
    assert check(found, "ocsp-status")[0].outcome == "unchecked"
    bad = old | {f"{GPU}attestation-report-cert-chain-validated": False}
    files = made.detached({"GPU-0": bad}, **{"x-nvidia-ver": "2.0"})
    assert code(files, made.pinned(abi.NRAS)) == "appraise-device-checks"


def test_what_a_policy_admits_knowingly():
    bad = made.device(**{f"{GPU}arch-check": False, "x-nvidia-attestation-warning": "CERT_HOLD"})
    files = made.detached({"GPU-0": bad})
    for value in (OPEN, False):
        policy = made.pinned(abi.NRAS, checks=value, warnings=True)
        assert code(files, policy) == ""
    assert code(files, made.pinned(abi.NRAS, checks=OPEN, warnings=OPEN, devices=OPEN)) == ""


@pytest.mark.parametrize(
    ("claims", "wanted"),
    [
        ({"submods/cpu0/ear.status": ("affirming", "warning")}, ""),
        ({"submods/cpu0/ear.status": ("contraindicated",)}, "appraise-claim"),
        ({"submods/cpu0/level": (1,)}, ""), ({"submods/cpu0/level": (True,)}, "appraise-claim"),
        ({"submods/cpu0/flag": (True,)}, ""), ({"submods/cpu0/flag": (1,)}, "appraise-claim"),
        ({"submods/cpu1/ear.status": ("affirming",)}, "appraise-claim"),
        ({"iss/x": ("y",)}, "appraise-claim"), (OPEN, ""),
    ],
)  # fmt: skip
def test_claims_of_other_services(claims, wanted):
    assert code(made.files(abi.OTHER), made.pinned(abi.OTHER, claims=claims)) == wanted


def test_the_issuer_of_another_service_is_refused():
    staging = "https://nras.attestation-stg.nvidia.com"
    files = made.detached({"GPU-0": made.device(iss=staging)}, iss=staging)
    for issuers in (OPEN, made.pinned(abi.NRAS).issuers):
        assert code(files, made.pinned(abi.NRAS, issuers=issuers)) == "appraise-issuer"
    assert code(files, made.pinned(abi.NRAS, issuers=(staging,))) == ""


# --- claims -------------------------------------------------------------------------------------


def test_nonces_in_every_form():
    nonce = bytes(range(32))
    forms = [nonce.hex(), nonce.hex().upper(), base64.b64encode(nonce).decode(),
             base64.urlsafe_b64encode(b"\xff" * 32).rstrip(b"=").decode()]  # fmt: skip
    found = judge(made.files(abi.GOOGLE, eat_nonce=forms), made.pinned(abi.GOOGLE)).claims.fresh
    assert nonce in found and b"\xff" * 32 in found and forms[0].encode() in found
    assert b"" not in found
    empty = judge(made.files(abi.GOOGLE, eat_nonce=""), made.pinned(abi.GOOGLE)).claims.fresh
    assert empty == ()
    none = judge(made.files(abi.GOOGLE, eat_nonce=...), made.pinned(abi.GOOGLE)).claims
    assert none.fresh == () and none.bound == b""


def test_the_folders_nonce():
    files, policy = made.files(abi.GOOGLE), made.pinned(abi.GOOGLE)
    assert judge(files, policy, nonce=bytes.fromhex(made.NONCE)).decision == "accept"
    assert judge(files, policy, nonce=b"other").code == "evidence.freshness-mismatch"
    azure, azures = made.files(abi.MAA), made.pinned(abi.MAA)
    for nonce in (b"n" * 32, bytes.fromhex("cd" * 32), bytes.fromhex("cd" * 32 + "00" * 32)):
        assert judge(azure, azures, nonce=nonce).decision == "accept"
    nvidia = judge(made.detached(), made.pinned(abi.NRAS), nonce=bytes.fromhex(made.NONCE))
    assert nvidia.decision == "accept"
    intel = judge(made.files(abi.ITA), made.pinned(abi.ITA), nonce=b"h" * 64)
    assert intel.decision == "accept"


def test_what_a_token_says():
    found = judge(made.files(abi.MAA), made.pinned(abi.MAA)).claims
    assert found.tcb == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}
    assert (found.product, found.measurement) == ("Azure Attestation (sevsnpvm)", HEX)
    assert found.bound == bytes.fromhex("cd" * 32 + "00" * 32)
    google = judge(made.files(abi.GOOGLE), made.pinned(abi.GOOGLE)).claims
    assert google.measurement == "1" * 64 and google.bound == made.NONCE.encode()
    nvidia = judge(made.detached(), made.pinned(abi.NRAS)).claims
    assert nvidia.chip_id == "1234" and nvidia.bound == bytes.fromhex(made.NONCE)
    odd = judge(made.detached({"GPU-0": made.device(eat_nonce="no hex")}, eat_nonce="no hex"),
                made.pinned(abi.NRAS)).claims  # fmt: skip
    assert odd.bound == b""


@pytest.mark.parametrize("tee", sorted(made.DEFAULTS))
def test_fields_for_people(tee):
    import json

    files = made.detached() if tee == abi.NRAS else made.files(tee)
    kind = kinds.KINDS[tee]
    shown = json.loads(json.dumps(kind.fields(files)))
    assert shown["claims"]["iss"] and shown["keys"][0]["kid"] == "k1"
    assert len(kind.of(b"r" * 64)) in (32, 64) and kind.field
    pem = f"-----BEGIN CERTIFICATE-----\n{made.x5c(made.chain())[2]}\n-----END CERTIFICATE-----\n"
    assert kind.fields(files | {"root.pem": pem.encode()})["root"]["name"] == "root 0"


# --- policies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", sorted(made.DEFAULTS))
def test_every_field_is_needed_and_checked(tee):
    cls = type(made.DEFAULTS[tee])
    section = {f.name: {"unchecked": "a test"} for f in fields_of(cls)}
    section |= {"keys": [], "roots": []}
    assert fields.load(cls, section, tee).keys == ()
    for name in section:
        for value in (None, 5.5, [], "x", [None], {"a": 1}, -1):
            if name in ("keys", "roots") and value == []:
                continue
            if name == "claims" and value == {"a": 1}:
                value = {"a": []}
            with pytest.raises(UsageError):
                fields.load(cls, section | {name: value}, tee)
        with pytest.raises(UsageError):
            fields.load(cls, {k: v for k, v in section.items() if k != name}, tee)


@pytest.mark.parametrize(
    ("tee", "field", "value"),
    [
        (abi.GOOGLE, "keys", ("ab" * 32,)), (abi.GOOGLE, "keys", OPEN),
        (abi.GOOGLE, "roots", ("AB" * 32,)), (abi.GOOGLE, "roots", OPEN),
        (abi.GOOGLE, "image_digests", ("1" * 64,)), (abi.GOOGLE, "max_age", 0),
        (abi.MAA, "measurements", ("ab",)), (abi.MAA, "vmpls", (4,)),
        (abi.NRAS, "devices", 0), (abi.OTHER, "claims", {"a": "b"}),
        (abi.OTHER, "claims", {"a": (1.5,)}),
    ],
)  # fmt: skip
def test_malformed_policies_are_refused(tee, field, value):
    with pytest.raises(UsageError):
        made.pinned(tee, **{field: value})


def test_defaults_pin_no_key_but_googles_root():
    for tee, policy in made.DEFAULTS.items():
        assert policy.keys == () and bool(policy.roots) == (tee == abi.GOOGLE)
    assert policies.GOOGLE_DEFAULT is kinds.KINDS[abi.GOOGLE].default()

"""NVIDIA's own evidence, captured from GPUs, switches and its manifest service: the answers that
each case states, its values, its times, and every kind of change refused."""

import base64
import hashlib
import json
import random
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from casemate.attest import folder, x509
from casemate.attest.nvidia import abi, collateral, kind, rim, verify, xmldsig
from casemate.attest.nvidia.policy import DEFAULT
from casemate.attest.verdict import Checks, Refused, Step, Unchecked
from support.mutation import flipped, fuzz
from support.nvidia import twin

CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "evidence" / "nvidia"
pytestmark = pytest.mark.skipif(
    not CAPTURED.is_dir(), reason="no captured evidence beside the project"
)
NAMES = sorted(p.name for p in CAPTURED.glob("*")) if CAPTURED.is_dir() else []


def about(name: str) -> dict:
    return json.loads((CAPTURED / name / "about.json").read_text())


def files(name: str) -> dict[str, bytes]:
    return folder.read(CAPTURED / name)


def at(name: str) -> float:
    return datetime.fromisoformat(about(name)["verify_at"]).timestamp()


def said(name: str) -> str:
    return about(name)["expect"]["default_policy"].split()[0]


def judge(name, changed=None, now=None, policy=DEFAULT):
    """(code, crypto, claims)"""
    kept = {n: d for n, d in (files(name) | (changed or {})).items() if d is not None}
    checks = Checks()
    try:
        claims = kind.check(kept, policy, at(name) if now is None else now, checks)
    except Refused as e:
        assert e.checks
        return e.code.removeprefix("evidence."), checks.crypto, None
    return "", checks.crypto, claims


REPORTS = [n for n in NAMES if "report.bin" in about(n)["files"]]
GENUINE = [n for n in REPORTS if about(n)["expect"]["crypto"] == "valid"]
ACCEPTED = [n for n in NAMES if said(n) == "accept"]
SWITCH, ALONE = "nvswitch-ls10-rim-match", "rim-driver-550.144-genuine"
VBIOS = "h100-535.86-vbios-rim-match"
RIMS = [(n, f) for n in NAMES for f in sorted(files(n)) if f.endswith((".xml", ".swidtag"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_the_stated_ones(name):
    expect = about(name)["expect"]
    policies = {"nvidia": DEFAULT}
    found = folder.judge(files(name), now=at(name), policies=policies)
    assert found.tee == "nvidia"
    assert found.crypto == expect["crypto"].split()[0]
    assert found.decision == said(name)
    assert found.tcb_status == ""
    assert found.advisories == ()


@pytest.mark.parametrize("name", REPORTS)
def test_the_values_are_the_stated_ones(name):
    values = about(name)["values"]
    report = abi.parse(files(name)["report.bin"])
    device = collateral.device(files(name))
    assert report.request_nonce.hex() == values["nonce"]
    assert len(report.measurements) == values["measurement_count"]
    stated = {int(n): v for n, v in values["measurements"].items()}
    assert {n: m.value.hex() for n, m in report.measurements.items()} == stated
    for field, value in values["opaque"].items():
        ours = {"26": "SWITCH_GPU_PDIS"}.get(field, field)
        if ours in report.texts:
            assert report.texts[ours] == value
        elif ours != "BOARD_ID":  # stated as text that it is not
            assert report.opaque[ours].hex().startswith(value)
    for (certificate, _), subject in zip(device.path, values["cert_subjects"], strict=True):
        assert subject in f"CN={certificate.name()},O=,C=US" or certificate.name()[:20] in subject


@pytest.mark.parametrize(("name", "file"), RIMS)
def test_the_manifests_say_what_is_stated(name, file):
    found = rim.parse(files(name)[file], file)
    stated = about(name)
    listed = [r for r in stated.get("confirmed", {}).get("rims", []) if r["file"] == file]
    values = listed[0] if listed else stated["values"]
    assert (found.version, found.tag_id) == (values["version"], values["tag"])
    assert len(found.golden) == values.get("active_measurements", values.get("active"))
    if listed:
        report = abi.parse(files(name)["report.bin"])
        wrong = {
            n for n, golden in found.golden.items()
            if report.measurements[n + 1].value not in golden
        }  # fmt: skip
        assert wrong == set(values["mismatched_rim_indices"])
        whole = hashlib.sha384(found.signed.content).digest() == found.signed.digest
        assert whole is values["xml_digest_ok"]
        lives = [datetime.fromtimestamp(t, UTC).date().isoformat()
                 for t in (found.chain[0].not_before, found.chain[0].not_after)]  # fmt: skip
        assert lives == values["signer_valid"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_window_of_time(name):
    """The device's certificates do not end; the manifests' do."""
    paths = [
        verify.rim_path(rim.parse(data, file))
        for file, data in collateral.rim_files(files(name)).items()
    ]
    if "cert_chain.pem" in files(name):
        paths.append(collateral.device(files(name)).path)
    start = max(c.not_before for path in paths for c, _ in path)
    end = min(c.not_after for path in paths for c, _ in path)
    assert start < at(name) < end
    for now in (start, end):
        assert judge(name, now=now)[0] == ""
    assert judge(name, now=start - 1)[:2] == ("validity-not-yet", "valid")
    assert judge(name, now=end + 1)[:2] == ("validity-expired", "valid")


def test_a_manifest_that_expires_under_good_evidence():
    """Its note states the day."""
    end = datetime(2025, 6, 23, tzinfo=UTC).timestamp()
    assert judge(VBIOS, now=end)[:2] == ("validity-expired", "valid")


@pytest.mark.parametrize("name", NAMES)
def test_roots_in_the_folder_are_not_read(name):
    roots = [f for f in files(name) if f.endswith("_root.pem")]
    assert roots
    for data in (None, b"", b"x"):
        assert judge(name, dict.fromkeys(roots, data)) == judge(name)


@pytest.mark.parametrize("name", GENUINE)
def test_only_pinned_roots_are_trusted(name):
    other = DEFAULT.rim_roots
    policy = type(DEFAULT)(**{**vars(DEFAULT), "roots": other})
    assert judge(name, policy=policy)[:2] == ("root-unknown", "")
    chain = files(name)["cert_chain.pem"]
    cut = chain[: chain.rindex(b"-----BEGIN")]
    assert judge(name, {"cert_chain.pem": cut}) == judge(name)


def test_manifests_under_another_root():
    policy = type(DEFAULT)(**{**vars(DEFAULT), "rim_roots": DEFAULT.roots})
    assert judge(SWITCH, policy=policy)[:2] == ("collateral-rim-root", "valid")
    assert judge(ALONE, policy=policy)[:2] == ("root-unknown", "")


def test_pins_of_captured_values():
    claims = judge(SWITCH)[2]
    pins = {
        "models": ("LS_10",), "vbios_versions": ("96.10.55.00.01",), "instances": (claims.chip_id,),
    }  # fmt: skip
    assert judge(SWITCH, policy=type(DEFAULT)(**{**vars(DEFAULT), **pins}))[0] == ""
    for field, other in (("models", "GH100"), ("vbios_versions", "x"), ("instances", "00" * 32)):
        policy = type(DEFAULT)(**{**vars(DEFAULT), **pins, field: (other,)})
        assert judge(SWITCH, policy=policy)[0].startswith("appraise-")


def test_the_nonce_is_the_challengers():
    nonce = bytes.fromhex(about(SWITCH)["values"]["nonce"])
    policies = {"nvidia": DEFAULT}
    found = folder.judge(files(SWITCH), now=at(SWITCH), policies=policies, nonce=nonce)
    assert found.decision == "accept"
    response = abi.parse(files(SWITCH)["report.bin"]).response_nonce
    for other in (response, nonce[:31], nonce + b"\0", b"\0" * 32):
        found = folder.judge(files(SWITCH), now=at(SWITCH), policies=policies, nonce=other)
        assert found.code == "evidence.freshness-mismatch"


def test_a_device_on_hold_is_known_by_a_list_that_casemate_carries():
    """No answer of NVIDIA's responder is in the collection. Without the list the device would be
    as good as any other, and the verdict would say that nothing was asked."""
    name = "h100-cert-hold"
    assert judge(name)[:2] == ("revocation-listed", "valid")
    lax = type(DEFAULT)(**{**vars(DEFAULT), "revoked": Unchecked("a test")})
    assert judge(name, policy=lax)[0] == "needs-driver-rim"


@pytest.mark.parametrize("name", [n for n in GENUINE if said(n) != "needs-collateral"])
def test_the_twin_of_a_reports_signature(name):
    raw = files(name)["report.bin"]
    assert judge(name, {"report.bin": raw[:-96] + twin(raw[-96:])}) == judge(name)


@pytest.mark.parametrize("name", [SWITCH, ALONE])
def test_the_twin_of_a_manifests_signature(name):
    [file] = collateral.rim_files(files(name))
    data = files(name)[file]
    old = re.search(rb"<ds:SignatureValue>([^<]*)<", data)[1]
    new = base64.b64encode(twin(base64.b64decode(old)))
    assert judge(name, {file: data.replace(old, new)}) == judge(name)


def refused_report(raw: bytes, device: collateral.Device) -> None:
    with pytest.raises(Refused):
        verify.verify(abi.parse(raw), device, DEFAULT, checks=Checks())


@pytest.mark.parametrize("name", GENUINE)
def test_sampled_flips_of_a_report(name):
    raw, device = files(name)["report.bin"], collateral.device(files(name))
    verify.verify(abi.parse(raw), device, DEFAULT, checks=Checks())
    for bit in random.Random(name).sample(range(len(raw) * 8), 40):
        refused_report(flipped(raw, bit), device)


@pytest.mark.full
@pytest.mark.parametrize("name", GENUINE)
def test_every_flip_of_a_report(name, monkeypatch):
    """The chain, which no flip here touches, is checked once."""
    raw, device = files(name)["report.bin"], collateral.device(files(name))
    key = x509.p384(device.leaf, "a test")
    verify.verify(abi.parse(raw), device, DEFAULT, checks=Checks())
    monkeypatch.setattr(verify, "_chain", lambda path: key)
    for bit in range(len(raw) * 8):
        refused_report(flipped(raw, bit), device)


def ders(name: str) -> list[bytes]:
    return [c.raw for c in x509.bundle(files(name)["cert_chain.pem"], "a test")]


def pem(raws: list[bytes]) -> bytes:
    return b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.b64encode(raw) + b"\n-----END CERTIFICATE-----\n"
        for raw in raws
    )


def _flips_of_chains(name: str, bits) -> None:
    raws = ders(name)
    assert judge(name, {"cert_chain.pem": pem(raws)}) == judge(name)
    for n, bit in bits(raws):
        bad = [*raws[:n], flipped(raws[n], bit), *raws[n + 1 :]]
        code, crypto, _ = judge(name, {"cert_chain.pem": pem(bad)})
        assert code.split("-")[0] in ("parse", "chain", "root", "endorsement", "signature"), bit
        assert crypto == ""


@pytest.mark.parametrize("name", GENUINE)
def test_sampled_flips_of_a_chain(name):
    draw = random.Random(name)
    _flips_of_chains(
        name,
        lambda raws: [
            (n, draw.randrange(8 * len(raws[n]))) for n in range(len(raws)) for _ in "123"
        ],
    )


@pytest.mark.full
@pytest.mark.parametrize("name", [SWITCH, "b100-driver-575.32"])
def test_every_flip_of_a_chain(name):
    _flips_of_chains(
        name, lambda raws: [(n, bit) for n, r in enumerate(raws) for bit in range(8 * len(r))]
    )


def _flips_of_manifests(name: str, bits) -> None:
    """A flip is refused, or leaves what is read as it was: canonical XML drops some space."""
    [(file, data)] = collateral.rim_files(files(name)).items()
    good = verify.rim(data, file, DEFAULT, Step())
    for bit in bits(data):
        try:
            found = verify.rim(flipped(data, bit), file, DEFAULT, Step())
        except Refused as e:
            assert e.code.split(".")[1].split("-")[0] in ("parse", "chain", "root", "signature")
            continue
        assert found == good, bit
        assert flipped(data, bit)[bit // 8 : bit // 8 + 1].isspace(), bit


@pytest.mark.parametrize("name", [SWITCH, ALONE])
def test_sampled_flips_of_a_manifest(name):
    def bits(data: bytes) -> list[int]:
        draw, signature = random.Random(name), data.index(b"<ds:Signature ")
        spread = draw.sample(range(8 * len(data)), 100)
        return spread + draw.sample(range(8 * signature, 8 * len(data)), 100)

    _flips_of_manifests(name, bits)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", [SWITCH, ALONE])
def test_every_flip_of_a_manifest(name, part, monkeypatch):
    """A chain that no flip touched is checked once; in parts, for slow machines."""
    chain, seen = verify._chain, {}

    def once(path):
        raws = tuple(c.raw for c, _ in path)
        if not seen or raws in seen:
            seen[raws] = seen.get(raws) or chain(path)
            return seen[raws]
        return chain(path)

    monkeypatch.setattr(verify, "_chain", once)
    _flips_of_manifests(name, lambda data: range(part, 8 * len(data), 8))


@pytest.mark.parametrize("name", GENUINE)
def test_cuts_and_additions(name):
    found = files(name)
    raw, chain = found["report.bin"], found["cert_chain.pem"]
    draw = random.Random(name)
    for size in draw.sample(range(len(raw)), 20):
        code, crypto, _ = judge(name, {"report.bin": raw[:size]})
        assert (code.split("-")[0], crypto) == ("parse", "")
    for more in (b"\0", b"\0" * 96, raw):
        assert judge(name, {"report.bin": raw + more})[0] == "parse-report-length"
    for size in draw.sample(range(len(chain) - 3), 10):
        assert (
            judge(name, {"cert_chain.pem": chain[:size]})[0].startswith(
                ("parse-", "chain-", "needs-", "collateral-", "revocation-")
            )
            or chain[size:].count(b"BEGIN") == 0
        )
        assert judge(name, {"cert_chain.pem": chain[: size // 4]})[0].startswith("parse-")
    for more in (b"x", chain, b"-----BEGIN CERTIFICATE-----"):
        assert judge(name, {"cert_chain.pem": chain + more})[0].split("-")[0] in ("parse", "chain")


@pytest.mark.parametrize(("name", "file"), RIMS)
def test_cuts_of_manifests(name, file):
    data = files(name)[file]
    for size in random.Random(name).sample(range(len(data.rstrip())), 30):
        code, crypto, _ = judge(name, {file: data[:size]})
        if name.startswith("rim-"):
            assert (code, crypto) == ("parse-rim", "")
        else:
            assert code.startswith(("collateral-rim-", "parse-"))
            assert crypto == "valid"


def test_reports_and_chains_of_different_devices_do_not_mix():
    for name in GENUINE:
        for other in GENUINE:
            if ders(name)[0] != ders(other)[0]:
                code, crypto, _ = judge(name, {"report.bin": files(other)["report.bin"]})
                assert (code, crypto) == ("signature-report", "")


def test_certificates_of_different_devices_do_not_mix():
    for name in GENUINE:
        for other in GENUINE:
            for n in (0, 1):
                mixed = ders(name)
                mixed[n] = ders(other)[n]
                if mixed != ders(name):
                    code, crypto, _ = judge(name, {"cert_chain.pem": pem(mixed)})
                    assert code.split("-")[0] in ("chain", "parse")
                    assert crypto == ""
        swapped = ders(name)
        swapped[2:4] = reversed(swapped[2:4])
        assert judge(name, {"cert_chain.pem": pem(swapped)})[0].startswith("chain-")


@pytest.mark.parametrize("name", GENUINE)
def test_manifests_for_others_do_not_help(name):
    """Each good manifest of the collection, with each device that it is not for."""
    for other, file in RIMS:
        data = files(other)[file]
        good = all(
            r.get("xml_digest_ok") for r in about(other).get("confirmed", {}).get("rims", ())
        )
        if other in (name, "rim-driver-550.144-bad-signature") or not good:
            continue
        found = rim.parse(data, file)
        now = (found.chain[0].not_before + found.chain[0].not_after) / 2
        report = abi.parse(files(name)["report.bin"])
        keep = dict.fromkeys(collateral.rim_files(files(name)))
        code, crypto, _ = judge(name, keep | {file: data}, now=now)
        assert crypto == "valid"
        if found.version not in (report.driver_version, report.vbios_version):
            assert code.startswith(("collateral-rim-", "revocation-", "validity-"))


def test_an_older_manifest_and_a_newer_one_are_not_the_same():
    """Two genuine manifests of one VBIOS version; one of them is not about this board."""
    other = files("h100-535.86-driver-rim-mismatch")["vbios_rim.xml"]
    now = datetime(2024, 6, 1, tzinfo=UTC).timestamp()
    assert judge(VBIOS, now=now)[0] == "needs-driver-rim"
    changed = {"vbios_rim.swidtag": other}
    assert judge(VBIOS, changed, now=now)[:2] == ("appraise-measurements", "valid")
    both = {"vbios_rim.xml": other}
    assert judge(VBIOS, both, now=now)[0] == "collateral-rim-conflict"


def _wrapped(data: bytes) -> dict[str, bytes]:
    signature = re.search(rb"<ds:Signature .*</ds:Signature>", data, re.DOTALL)[0]
    forged = data.replace(signature, b"").replace(b'active="True"', b'active="False"', 1)
    return {
        "the signature on a forged document": forged.replace(
            b"</SoftwareIdentity>", signature + b"</SoftwareIdentity>"
        ),
        "the genuine one inside the forged": forged.replace(
            b"</SoftwareIdentity>", data.strip() + b"</SoftwareIdentity>"
        ),
        "the genuine one inside its signature": forged.replace(
            b"</SoftwareIdentity>",
            signature.replace(
                b"</ds:Signature>", b"<ds:Object>" + data.strip() + b"</ds:Object></ds:Signature>"
            )
            + b"</SoftwareIdentity>",
        ),
        "the forged one before it": forged + data,
        "a payload after the signature": data.replace(
            b"</SoftwareIdentity>", b"<ns0:Payload/></SoftwareIdentity>"
        ),
        "a reference to a part": data.replace(b'URI=""', b'URI="#x"').replace(
            b"<ns0:Payload ", b'<ns0:Payload Id="x" '
        ),
        "no signature": data.replace(signature, b""),
        "a document type": b"<!DOCTYPE SoftwareIdentity>" + data,
        "a comment": data.replace(b"<ns0:Payload ", b"<!-- --><ns0:Payload "),
    }


@pytest.mark.parametrize("name", [SWITCH, ALONE])
def test_signature_wrapping(name):
    [(file, data)] = collateral.rim_files(files(name)).items()
    for attack, bad in _wrapped(data).items():
        code, _, _ = judge(name, {file: bad})
        wanted = ("parse-rim", "signature-rim-digest")
        if name == SWITCH:
            wanted = ("collateral-rim-parse", "collateral-rim-signature")
        assert code in wanted, attack


def test_what_is_read_is_what_was_signed():
    for name, file in RIMS:
        signed = xmldsig.parse(files(name)[file], file)
        assert b"Signature" not in signed.content
        found = rim.parse(files(name)[file], file)
        for values in found.golden.values():
            assert all(v.hex().encode() in signed.content.lower() for v in values)


def test_fuzzed_captured_reports():
    fuzz(abi.parse, [files(n)["report.bin"] for n in REPORTS], count=3000)


def test_fuzzed_captured_manifests():
    seeds = [files(n)[f] for n, f in RIMS]
    fuzz(lambda data: rim.parse(data, "rim.xml"), seeds, count=400)


def test_fuzzed_evidence():
    """Whatever is changed, in whatever file, only refusals come out, and nothing else is accepted
    than what was there."""
    found = files(SWITCH)
    for file in ("report.bin", "cert_chain.pem", "bios_rim.xml"):

        def check(data: bytes, file: str = file) -> None:
            code, _, claims = judge(SWITCH, {file: data})
            assert code or (claims == judge(SWITCH)[2] and data.split() == found[file].split())

        fuzz(check, [found[file]], count=60)


def test_fields_of_every_case():
    for name in NAMES:
        assert json.dumps(kind.fields(files(name)))

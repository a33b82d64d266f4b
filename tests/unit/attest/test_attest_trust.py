import dataclasses
import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from casemate.attest import folder
from casemate.attest import trust as module
from casemate.attest.kinds import KINDS
from casemate.attest.roots import AMD, amd
from casemate.attest.trust import PRESETS, TERMS, SnpPolicy, Trust, Unchecked, parts_of
from casemate.attest.verdict import Checks
from casemate.attest.verify import appraise_terms
from casemate.spec.errors import CasemateError, EvidenceError, UsageError
from support.evidence import der, tee


def example() -> str:
    """The policy that the module's docstring shows."""
    lines = module.__doc__.split("::\n", 1)[1].splitlines()
    text = "\n".join(line[4:] for line in lines if not line or line.startswith("    "))
    return text.replace("<96 hex digits>", "ab" * 48)


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "trust.toml"
    path.write_text(text)
    return path


def refused(call, *args) -> UsageError:
    with pytest.raises(UsageError) as e:
        call(*args)
    assert e.value.code == "usage.trust"
    return e.value


def test_the_example_loads(tmp_path):
    trust = Trust.load(write(tmp_path, example()))
    policy = trust.policies["sev-snp"]
    assert not trust.simulation
    assert policy.roots == {"Genoa": AMD["Genoa"], "Turin": AMD["Turin"]}
    assert policy.measurements == ("ab" * 48,)
    assert policy.firmware == (1, 55, 21)
    assert policy.vmpl == (0,)
    assert policy.chip_ids == Unchecked("any genuine chip")
    assert policy.reported_tcb["Turin"]["fmc"] == 1


def fields_of_example() -> list[str]:
    return [line for line in example().splitlines() if " = " in line]


@pytest.mark.parametrize(
    "line", [ln for ln in fields_of_example() if not ln.startswith(("Genoa", "Turin"))]
)
def test_no_field_may_be_left_out(tmp_path, line):
    name = line.split(" = ")[0]
    error = refused(Trust.load, write(tmp_path, example().replace(line + "\n", "")))
    assert error.where == name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("simulated = false\n", ""),
        ("simulated = false\n", "simulated = 0\n"),
        ("simulated = false\n", "simulated = false\ncolour = 'red'\n"),
        ("[sev-snp]\n", "[sev-snp]\ncolour = 'red'\n"),
        ("[sev-snp]\n", "[sev]\n"),
        ("collateral_age = 30", "collateral_age = 0"),
        ("collateral_age = 30", "collateral_age = '30 days'"),
        ("operator_physical_access = false", "operator_physical_access = 1"),
        ('{ unchecked = "the TCB floors stand for them" }', "[]"),
        ('{ unchecked = "the TCB floors stand for them" }', '"INTEL-SA-00837"'),
        ('{ unchecked = "no GPU is used" }', '"none"'),
        ('{ unchecked = "AMD\'s word is enough" }', "1"),
        ('{ unchecked = "AMD\'s word is enough" }', "2"),
        ("simulated = false\n", "simulated = false\npreset = 'nothing'\n"),
        ("simulated = false\n", "simulated = false\npreset = 3\n"),
        ('"any genuine chip"', '""'),
        ('"any genuine chip"', "3"),
        ("ab" * 48, "ab" * 47),
        ("ab" * 48, "AB" * 48),
        ('measurements = ["' + "ab" * 48 + '"]', "measurements = []"),
        ('measurements = ["' + "ab" * 48 + '"]', 'measurements = "' + "ab" * 48 + '"'),
        ('["Genoa", "Turin"]', '["Genoa", "Roma"]'),
        ('["Genoa", "Turin"]', "[]"),
        ('["Genoa", "Turin"]', '{ unchecked = "any" }'),
        ('["VCEK"]', '["XCEK"]'),
        ('["VCEK"]', '{ unchecked = "any" }'),
        ("vmpl = [0]", "vmpl = [4]"),
        ("vmpl = [0]", "vmpl = [true]"),
        ("vmpl = [0]", "vmpl = 0"),
        ('"1.55.21"', '"1.55"'),
        ('"1.55.21"', '"1.55.256"'),
        ('"1.55.21"', "[1, 55]"),
        ("debug = false, migrate_ma = false", "debug = false"),
        ("debug = false", "debug = 0"),
        ("debug = false", "debug = false, party = true"),
        ("bootloader = 10, ", ""),
        ("bootloader = 10", "bootloader = 256"),
        ("Genoa = {", "Roma = {"),
        ("fmc = 1, ", ""),
        ("simulated", "simulated = [[["),
    ],
)
def test_malformed_policies(tmp_path, old, new):
    text = example()
    assert old in text
    refused(Trust.load, write(tmp_path, text.replace(old, new, 1)))


def test_a_policy_must_name_a_kind_and_be_readable(tmp_path):
    refused(Trust.load, write(tmp_path, "simulated = true\n"))
    refused(Trust.load, write(tmp_path, "simulated = true\nsev-snp = 3\n"))
    refused(Trust.load, tmp_path / "absent.toml")
    refused(Trust.load, tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    refused(Trust.load, tmp_path / "binary")


def test_simulation_in_a_file_names_roots(tmp_path):
    text = example().replace("simulated = false", "simulated = true")
    pinned = text.replace('products = ["Genoa", "Turin"]', f'roots = ["{tee().root}"]')
    policy = Trust.load(write(tmp_path, pinned)).policies["sev-snp"]
    assert policy.roots["Genoa"] == (tee().root,)
    refused(Trust.load, write(tmp_path, text))
    hardware = pinned.replace("simulated = true", "simulated = false")
    refused(Trust.load, write(tmp_path, hardware))


def test_only_simulation_leaves_the_root_unchecked():
    policy = Trust.simulated().policies["sev-snp"]
    assert isinstance(policy.roots, Unchecked)
    refused(lambda: Trust(simulation=False, policies={"sev-snp": policy}, **TERMS))


def test_a_simulated_root_by_fingerprint_or_certificate(tmp_path):
    pem = tee()._chain.ark
    path = tmp_path / "ark.pem"
    path.write_bytes(pem)
    colons = ":".join(tee().root[i : i + 2] for i in range(0, 64, 2)).upper()
    for root in (
        tee().root,
        f"sha256:{tee().root}",
        colons,
        pem,
        pem.decode(),
        der(pem),
        path,
        str(path),
    ):
        found = Trust.simulated(root).policies["sev-snp"].roots
        assert found["Genoa"] == (tee().root,)
    for root in ("no such file", b"noise"):
        with pytest.raises(CasemateError):
            Trust.simulated(root)


def test_parse_for_the_command_line(tmp_path):
    assert Trust.parse("simulated") == Trust.simulated()
    assert Trust.parse(f"simulated:{tee().root}") == Trust.simulated(tee().root)
    path = write(tmp_path, example())
    assert Trust.parse(str(path)) == Trust.load(path)
    refused(Trust.parse, "simulated:")
    refused(Trust.parse, "")
    refused(Trust.parse, "amd")


def test_hardware_must_say_what_it_measures():
    with pytest.raises(TypeError):
        Trust.sev_snp()
    trust = Trust.sev_snp(measurements=("ab" * 48,), products=("Turin",), vmpl=(0, 1))
    assert not trust.simulation
    assert trust.policies["sev-snp"].roots == {"Turin": AMD["Turin"]}
    refused(lambda: Trust.sev_snp(measurements=("ab" * 48,), colour="red"))
    refused(lambda: Trust.sev_snp(measurements=(), products=("Turin",)))
    refused(lambda: Trust.sev_snp(measurements=("ab" * 48,), products=("Roma",)))


def test_the_carried_roots_are_the_pinned_ones():
    for line, pins in AMD.items():
        assert amd(line).fingerprint in pins
        assert amd(line).name() == f"ARK-{line}"
        assert len(pins) == 1


def test_unchecked_needs_a_reason():
    for reason in ("", "  "):
        with pytest.raises(ValueError, match="reason"):
            Unchecked(reason)


def test_a_policy_of_no_root_is_none():
    policy = Trust.simulated("0" * 64).policies["sev-snp"]
    fields = {name: getattr(policy, name) for name in SnpPolicy.__dataclass_fields__}
    refused(lambda: SnpPolicy(**(fields | {"roots": {}})))


# What a policy may not leave open.


def hardware(**other) -> Trust:
    return Trust.sev_snp(**({"measurements": ("ab" * 48,)} | other))


def test_milan_only_with_a_list_of_chips():
    error = refused(lambda: hardware(products=("Genoa", "Milan")))
    assert error.where == "chip_ids"
    hardware(products=("Milan",), chip_ids=("5" * 128,))
    by_cloud = {"products": ("Milan",), "signing_keys": ("VLEK",)}
    refused(lambda: hardware(**by_cloud))
    hardware(**by_cloud, csp_ids=("a cloud",))
    refused(lambda: hardware(**by_cloud | {"signing_keys": ("VCEK", "VLEK")}, csp_ids=("a cloud",)))


def test_milan_in_a_file(tmp_path):
    text = example().replace('["Genoa", "Turin"]', '["Genoa", "Milan"]', 1)
    assert refused(Trust.load, write(tmp_path, text)).where == "chip_ids"
    listed = text.replace('{ unchecked = "any genuine chip" }', f'["{"5" * 128}"]')
    assert "Milan" in Trust.load(write(tmp_path, listed)).policies["sev-snp"].roots


def test_physical_access_only_with_a_list_of_instances(tmp_path):
    error = refused(lambda: hardware(operator_physical_access=True))
    assert error.where == "chip_ids"
    for name in ("TEE.fail", "Battering RAM", "BadRAM", "WireTap"):
        assert name in error.message
    hardware(operator_physical_access=True, chip_ids=("5" * 128,))
    hardware(operator_physical_access=False)
    text = example().replace("physical_access = false", "physical_access = true")
    refused(Trust.load, write(tmp_path, text))
    listed = text.replace('{ unchecked = "any genuine chip" }', f'["{"5" * 128}"]')
    assert Trust.load(write(tmp_path, listed)).operator_physical_access is True


def test_what_no_section_can_show_is_refused():
    assert refused(lambda: hardware(gpu=True)).where == "gpu"
    assert refused(lambda: hardware(independent_roots=2)).where == "independent_roots"
    refused(lambda: Trust.of("roman"))
    refused(lambda: Trust.of("sev-snp", colour="red"))


def test_what_is_not_given_is_unchecked_with_a_reason():
    given = hardware(collateral_age=7)
    assert given.collateral_age == 7
    for name in TERMS:
        if name != "collateral_age":
            assert getattr(given, name) == TERMS[name]
            assert getattr(Trust.simulated(), name).reason.startswith("simulation")


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_each_kind_says_whose_word_it_is_and_which_fields_list_instances(kind):
    names = {f.name for part in parts_of(kind.default()) for f in dataclasses.fields(part)}
    assert set(kind.instances) <= names
    assert kind.vendor or kind.tee == "token"
    refused(lambda: Trust.of(kind.tee, operator_physical_access=True))
    if kind.device:
        refused(lambda: Trust.of(kind.tee))


# Presets, with what each leaves to its owner.

NVIDIA = {
    "revoked": {"unchecked": "a test"},
    "revocation": {"unchecked": "a test"},
    "reference_values": True,
    "models": ["GH100"],
    "driver_versions": {"unchecked": "a test"},
    "vbios_versions": {"unchecked": "a test"},
    "modes": {"unchecked": "a test"},
    "protected_pcie": {"unchecked": "a test"},
    "instances": ["7" * 64],
}
SHA384, SHA256 = "ab" * 48, "cd" * 32
GIVEN = {
    "aws-nitro": {"nitro": {"pcrs": {"0": [SHA384], "1": [SHA384], "2": [SHA384]}}},
    "aws-snp": {
        "sev-snp": {"measurements": [SHA384], "csp_ids": ["CN=cc-us-east-2.amazonaws.com"]}
    },
    "azure-aci": {"sev-snp": {"host_data": [SHA256]}},
    "azure-cvm": {"azure-cvm": {"tpm": {"pcrs": {"4": [SHA256]}}}},
    "bare-metal-snp": {
        "sev-snp": {
            "measurements": [SHA384],
            "chip_ids": ["5" * 128],
            "reported_tcb": {
                "Genoa": {"bootloader": 10, "tee": 0, "snp": 25, "microcode": 84},
                "Turin": {"fmc": 1, "bootloader": 1, "tee": 1, "snp": 4, "microcode": 81},
            },
        }
    },
    "bare-metal-tdx": {
        "tdx": {
            "mrtd": [SHA384],
            "rtmr1": [SHA384],
            "rtmr2": [SHA384],
            "instances": ["6" * 32],
        }
    },
    "google-cloud": {"tdx": {"mrtd": [SHA384], "rtmr1": [SHA384], "rtmr2": [SHA384]}},
}


def inline(value) -> str:
    """A value of JSON in TOML's form."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {inline(v)}' for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def toml(given) -> str:
    return "".join(
        f"[{kind}]\n" + "".join(f"{field} = {inline(v)}\n" for field, v in section.items())
        for kind, section in given.items()
    )


def test_every_preset_is_tried():
    assert set(GIVEN) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_something_to_its_owner_and_loads_with_it(name, tmp_path):
    refused(lambda: Trust.preset(name))
    trust = Trust.preset(name, GIVEN[name])
    assert not trust.simulation
    text = f'preset = "{name}"\n' + toml(GIVEN[name])
    assert Trust.load(write(tmp_path, text)) == trust
    for kind, section in GIVEN[name].items():
        for field in section:
            less = {**GIVEN[name], kind: {k: v for k, v in section.items() if k != field}}
            inner = section[field] if field == "tpm" else {field: 0}
            error = refused(lambda less=less: Trust.preset(name, less))
            assert error.where == next(iter(inner))


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_field_can_be_given_another_value(name):
    kind, section = next(iter(GIVEN[name].items()))
    other = Unchecked("a test")
    base = Trust.preset(name, GIVEN[name])
    assert base.collateral_age == 400
    open_ = {"collateral_age": {"unchecked": "a test"}, **GIVEN[name]}
    assert Trust.preset(name, open_).collateral_age == other
    assert not isinstance(base.operator_physical_access, Unchecked)
    with_gpu = {**GIVEN[name], "gpu": True, "nvidia": NVIDIA}
    assert Trust.preset(name, with_gpu).policies["nvidia"].reference_values is True
    refused(lambda: Trust.preset(name, {**GIVEN[name], "gpu": True}))
    refused(lambda: Trust.preset(name, {**GIVEN[name], kind: {**section, "colour": "red"}}))


def test_a_table_inside_a_section_is_one_value():
    """Of guest_policy no bit is kept that the owner does not name."""
    section = {**GIVEN["azure-aci"]["sev-snp"], "platform_info": {"ecc_en": True}}
    found = Trust.preset("azure-aci", {"sev-snp": section}).policies["sev-snp"]
    assert found.platform_info == {"ecc_en": True}


def test_parts_of_a_section_are_taken_over_one_by_one():
    given = {"azure-cvm": {"tpm": GIVEN["azure-cvm"]["azure-cvm"]["tpm"],
                           "snp": {"chip_ids": ["5" * 128]},
                           "tdx": {"unchecked": "no TDX"}}}  # fmt: skip
    found = Trust.preset("azure-cvm", given).policies["azure-cvm"]
    assert found.snp.chip_ids == ("5" * 128,)
    assert found.snp.signing_keys == ("VCEK",)
    assert found.tdx == Unchecked("no TDX")
    milan = {"azure-cvm": {**given["azure-cvm"], "snp": {"products": ["Milan"]}}}
    assert refused(lambda: Trust.preset("azure-cvm", milan)).where == "chip_ids"


def test_two_vendors_need_sections_of_two():
    given = {**GIVEN["google-cloud"], "independent_roots": 2}
    assert refused(lambda: Trust.preset("google-cloud", given)).where == "independent_roots"
    assert Trust.preset("google-cloud", {**given, "nvidia": NVIDIA}).independent_roots == 2


def test_devices_alone_are_no_policy():
    alone = {name: {"unchecked": "a test"} for name in TERMS}
    refused(lambda: Trust.read({"simulated": False, **alone, "nvidia": NVIDIA}))


# Presets on captured machines, with what they show given as their owner's.

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "evidence"


def stated(case: str) -> tuple[dict, float]:
    about = json.loads((CAPTURED / case / "about.json").read_text())
    return about["values"], datetime.fromisoformat(about["verify_at"]).timestamp()


def judged(name: str, case: str, given: dict):
    policies = Trust.preset(name, given).policies
    _, now = stated(case)
    return folder.judge(folder.read(CAPTURED / case), now=now, policies=policies)


def snp_given(case: str, *names: str) -> dict:
    values, now = stated(case)
    found = folder.judge(folder.read(CAPTURED / case), now=now).claims
    fields = {
        "measurements": [values["measurement"]],
        "chip_ids": [values["chip_id"]],
        "host_data": [values["host_data"]],
        "csp_ids": [found.other["csp_id"]],
        "reported_tcb": {found.product: dict(found.tcb)},
        "products": [found.product],
    }
    return {"sev-snp": {name: fields[name] for name in names}}


def tdx_given(case: str) -> dict:
    _, now = stated(case)
    shown = folder.judge(folder.read(CAPTURED / case), now=now).claims
    report = shown.other["report"]
    section = {name: [report[name.removesuffix("s")]] for name in ("mrtd", "rtmr1", "rtmr2")}
    return {"tdx": section | {"instances": [shown.chip_id]}}


def pcrs_given(case: str) -> dict:
    _, now = stated(case)
    found = folder.judge(folder.read(CAPTURED / case), now=now).claims.other["pcrs"]
    return {"azure-cvm": {"tpm": {"pcrs": {n: [found["sha256"][n]] for n in ("4", "7")}}}}


def nitro_given(case: str) -> dict:
    _, now = stated(case)
    pcrs = folder.judge(folder.read(CAPTURED / case), now=now).claims.other["pcrs"]
    return {"nitro": {"pcrs": {n: [pcrs[n]] for n in ("0", "1", "2")}}}


MACHINES = [
    ("aws-snp", "snp/milan-v3-vlek-aws", lambda c: snp_given(c, "measurements", "csp_ids")),
    ("azure-aci", "snp/milan-v3-aci-uvm-endorsed",
     lambda c: {"sev-snp": snp_given(c, "host_data", "chip_ids", "products")["sev-snp"]
                | {"firmware": "1.55.29"}}),
    ("bare-metal-snp", "snp/genoa-v5-oak-genoa-oc",
     lambda c: snp_given(c, "measurements", "chip_ids", "reported_tcb")),
    ("bare-metal-tdx", "tdx/v5-td15-uptodate", tdx_given),
    ("bare-metal-tdx", "tdx/v4-uptodate-emr", tdx_given),
    ("azure-cvm", "azure-cvm/snp-genoa-coco", pcrs_given),
    ("azure-cvm", "azure-cvm/tdx-live-2026", pcrs_given),
    ("aws-nitro", "nitro/prod-evervault-ratls-san", nitro_given),
]  # fmt: skip


@pytest.mark.skipif(not CAPTURED.is_dir(), reason="no captured evidence beside the project")
@pytest.mark.parametrize(("name", "case", "given"), MACHINES, ids=[m[1] for m in MACHINES])
def test_a_captured_machine_passes_its_preset_and_another_does_not(name, case, given):
    own = given(case)
    found = judged(name, case, own)
    assert (found.decision, found.code) == ("accept", "")
    foreign = json.loads(re.sub(r'"[0-9a-f]{64,96}"', '"' + "9" * 96 + '"', json.dumps(own)))
    if "host_data" in str(foreign) or "tpm" in str(foreign):
        foreign = json.loads(json.dumps(foreign).replace("9" * 96, "9" * 64))
    assert judged(name, case, foreign).stage == "policy"


@pytest.mark.skipif(not CAPTURED.is_dir(), reason="no captured evidence beside the project")
def test_the_age_of_captured_collateral_is_known():
    case = "tdx/v5-td15-uptodate"
    _, now = stated(case)
    checks = Checks()
    kind = KINDS["tdx"]
    kind.check(folder.read(CAPTURED / case), kind.default(), now, checks)
    assert set(checks.issued) == {"tcb_info", "qe_identity", "pck_crl", "root_ca_crl"}
    assert all(issued <= now for issued in checks.issued.values())
    fresh = Trust.preset("google-cloud", {**GIVEN["google-cloud"], "collateral_age": 1})
    with pytest.raises(EvidenceError) as e:
        appraise_terms(fresh, checks, now=now)
    assert e.value.code == "evidence.collateral-age"

from pathlib import Path

import pytest

from casemate.attest import trust as module
from casemate.attest.roots import AMD, amd
from casemate.attest.trust import SnpPolicy, Trust, Unchecked
from casemate.spec.errors import CasemateError, UsageError
from support.evidence import der, tee


def example() -> str:
    """The policy that the module's docstring shows."""
    lines = module.__doc__.split("::\n", 1)[1].splitlines()
    text = "\n".join(line[4:] for line in lines)
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
    section = example().split("[sev-snp]\n")[1]
    return [line for line in section.splitlines() if " = " in line and not line.startswith(" ")]


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
    refused(lambda: Trust(simulation=False, policies={"sev-snp": policy}))


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

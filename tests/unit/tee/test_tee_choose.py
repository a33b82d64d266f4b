from dataclasses import replace

import pytest

from casemate.seams import OsRng
from casemate.spec.errors import UsageError
from casemate.tee import choose, nvidia, simulated
from support import tees
from support.disk import SimDisk
from support.evidence import FixedClock, tee


def open_(kind, machine):
    return choose.open(kind, disk=SimDisk(), rng=OsRng(), clock=FixedClock(), machine=machine)


@pytest.fixture(autouse=True)
def quick_chain(monkeypatch):
    chain = tee()._chain
    monkeypatch.setattr(simulated, "_chain", lambda _: chain)


@pytest.fixture
def empty(tmp_path):
    return tees.machine(tmp_path)


@pytest.fixture
def snp(tmp_path):
    with tees.snp_place(tmp_path, 0) as place:
        yield place.machine


def test_simulation_by_name(empty):
    assert open_("simulated", empty).simulated


def test_auto_never_falls_back_to_simulation(empty):
    with pytest.raises(UsageError) as e:
        open_("auto", empty)
    assert e.value.code == "usage.tee-absent"
    assert choose.detect(empty, OsRng()) is None


@pytest.mark.parametrize("kind", ["", "sev-snp", "Simulated", "x" * 1000])
def test_unknown_kinds(empty, kind):
    with pytest.raises(UsageError) as e:
        open_(kind, empty)
    assert e.value.code == "usage.tee-unknown"


def test_every_hardware_kind_that_is_absent_says_so(empty):
    assert [found.present for found in choose.look(empty, OsRng())] == [False] * len(choose.KINDS)
    codes = {"nsm": "usage.tee-device", "configfs-tsm": "usage.tee-device"}
    for kind, code in codes.items():
        with pytest.raises(UsageError) as e:
            open_(kind, empty)
        assert e.value.code == code, kind


def test_the_order_is_that_of_the_table(empty, snp, tmp_path):
    assert list(choose.KINDS) == ["nsm", "configfs-tsm", "azure-vtpm", "tpm", "simulated"]
    assert choose.detect(snp, OsRng()) == "configfs-tsm"
    (tmp_path / "nsm").touch()
    both = replace(snp, nsm_path=tmp_path / "nsm")
    assert choose.detect(both, OsRng()) == "nsm"


def test_auto_opens_what_it_finds(snp):
    found = open_("auto", snp)
    assert (found.kind, found.simulated, found.sealing) == ("sev-snp", False, "snp-derived")


def test_an_unknown_provider_is_found_and_not_claimed(tmp_path):
    fake = tees._tsm(tmp_path, 0, tees.snp_report, provider="arm_cca_guest")
    machine = tees.machine(tmp_path, tsm_path=fake.root, tsm_folder=lambda _: fake)
    row = next(f for f in choose.look(machine, OsRng()) if f.kind == "configfs-tsm")
    assert not row.present
    assert "arm_cca_guest" in row.reason
    with pytest.raises(UsageError) as e:
        open_("configfs-tsm", machine)
    assert e.value.code == "usage.tee-unsupported"
    assert list(fake.root.iterdir()) == []


def test_looking_changes_nothing(snp, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    choose.look(snp, OsRng())
    assert sorted(tmp_path.rglob("*")) == before


def test_without_an_owner_a_td_has_no_sealing_key(tmp_path):
    with tees.tdx_place(tmp_path, 0) as place:
        maker = open_("auto", replace(place.machine, owner=None))
        assert maker.attest(bytes(64)).tee == "tdx"  # evidence there is all the same
        with pytest.raises(UsageError) as e:
            maker.sealing_key("store")
    assert e.value.code == "usage.tee-sealing"


def test_snp_without_its_guest_device_waits_for_an_owner(tmp_path, snp):
    maker = open_("auto", replace(snp, guest_path=tmp_path / "absent"))
    assert maker.sealing == "owner-release"


@tees.needs_tpm
def test_a_tpm_comes_last(tmp_path, snp):
    with tees.swtpm(tmp_path / "tpm") as tcti:
        alone = tees.machine(tmp_path, tpm_path=tmp_path, tcti=tcti)
        assert choose.detect(alone, OsRng()) == "tpm"
        beside = replace(snp, tpm_path=tmp_path, tcti=tcti)
        assert choose.detect(beside, OsRng()) == "configfs-tsm"
        found = {f.kind: f for f in choose.look(alone, OsRng())}
        assert not found["azure-vtpm"].present
        assert "encrypts no memory" in found["tpm"].reason


def test_a_tpm_without_its_library_is_told(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def refusing(name, *rest):
        if name == "tpm2_pytss":
            raise ImportError("No module named 'tpm2_pytss'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refusing)
    machine = tees.machine(tmp_path, tpm_path=tmp_path)
    for kind in ("tpm", "azure-vtpm"):
        with pytest.raises(UsageError) as e:
            open_(kind, machine)
        assert e.value.code == "usage.extra"
        assert "casemate[tpm]" in e.value.mend
        assert "libtss2-dev" in e.value.mend
    rows = {f.kind: f for f in choose.look(machine, OsRng())}
    assert "tpm2_pytss" in rows["tpm"].reason


def test_gpus_stand_beside_the_cpu(snp, tmp_path):
    from support.nvidia import device_chain, pem, report

    class Source:
        name = "test"

        def count(self):
            return 2

        def collect(self, index, nonce):
            return report(nonce=nonce), pem(*device_chain())

    gpus = nvidia.Found(Source(), 2, "2")
    maker = open_("auto", replace(snp, gpus=lambda: gpus))
    files = maker.attest(bytes(range(64))).files
    assert {"gpu0/report.bin", "gpu1/report.bin", "gpu0/cert_chain.pem"} <= set(files)
    assert files["gpu0/report.bin"][4:36] != files["gpu1/report.bin"][4:36]

import pytest

from casemate.seams import OsRng
from casemate.spec.errors import UsageError
from casemate.tee import choose, simulated
from support.disk import SimDisk
from support.evidence import FixedClock, tee


def open_(kind, tsm):
    return choose.open(kind, disk=SimDisk(), rng=OsRng(), clock=FixedClock(), tsm=tsm)


@pytest.fixture(autouse=True)
def quick_chain(monkeypatch):
    chain = tee()._chain
    monkeypatch.setattr(simulated, "_chain", lambda _: chain)


def test_simulation_by_name(tmp_path):
    assert open_("simulated", tmp_path).simulated


def test_auto_never_falls_back_to_simulation(tmp_path):
    with pytest.raises(UsageError) as e:
        open_("auto", tmp_path / "absent")
    assert e.value.code == "usage.tee-absent"
    assert choose.detect(tmp_path / "absent") is None


def test_hardware_is_found_and_not_claimed(tmp_path):
    assert choose.detect(tmp_path) == "configfs-tsm"
    for kind in ("auto", "configfs-tsm"):
        with pytest.raises(UsageError) as e:
            open_(kind, tmp_path)
        assert e.value.code == "usage.tee-unsupported"


@pytest.mark.parametrize("kind", ["", "sev-snp", "Simulated", "x" * 1000])
def test_unknown_kinds(tmp_path, kind):
    with pytest.raises(UsageError) as e:
        open_(kind, tmp_path)
    assert e.value.code == "usage.tee-unknown"

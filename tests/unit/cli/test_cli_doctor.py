"""``casemate doctor`` on machines with and without a TEE (support.tees)."""

import pytest

from casemate.cli import doctor
from casemate.seams import OsDisk, SystemClock
from casemate.tee import collateral, nvidia
from support import tees


def named(findings):
    return {f.name: f for f in findings}


def test_no_tee_and_why(tmp_path):
    found = named(doctor._tee(tees.machine(tmp_path)))
    assert found["TEE"].state == "missing"
    for kind in ("nsm", "configfs-tsm", "azure-vtpm", "tpm"):
        assert f"{kind}: no {tmp_path}" in found["TEE"].found
    assert "simulated" not in found["TEE"].found
    assert "--dev" in found["TEE"].mend
    assert set(found) == {"TEE", "GPU evidence"}


def test_what_was_found_which_evidence_which_key(tmp_path):
    with tees.snp_place(tmp_path, 0) as place:
        found = named(doctor._tee(place.machine))
    assert found["TEE"].state == found["evidence"].state == found["sealing key"].state == "ok"
    assert "configfs-tsm" in found["TEE"].found
    assert "not nsm: no " in found["TEE"].found
    assert found["evidence"].found.startswith("sev-snp, measurement ")
    assert found["sealing key"].found.startswith("snp-derived: ")
    assert found["collateral"].state == "missing"


def test_evidence_that_a_client_would_refuse(tmp_path):
    """The test root is none of AMD's: what a client with the default policy says, is said here."""
    from dataclasses import replace

    with tees.snp_place(tmp_path, 0) as place:
        found = named(doctor._tee(replace(place.machine, policies=None)))
    assert found["evidence"].state == "failed"
    assert "reject" in found["evidence"].found
    assert "root" in found["evidence"].found


def test_ages_of_collateral(tmp_path):
    state = tmp_path / "state"
    now = SystemClock().wall()
    collateral.keep(OsDisk(state), "cpu", {"crl.der": b"0"}, "https://x", now - 3 * 86400)
    collateral.keep(OsDisk(state), "gpu0", {"driver_rim.xml": b"0"}, "https://y", now)
    with tees.snp_place(tmp_path, 0) as place:
        found = named(doctor._tee(place.machine, state))
    assert found["collateral"].state == "ok"
    assert found["collateral"].found == "2 file(s), the oldest cpu/crl.der of 3.0 days ago"


def test_a_td_without_an_owner_has_no_sealing_key(tmp_path):
    from dataclasses import replace

    with tees.tdx_place(tmp_path, 0) as place:
        with_owner = named(doctor._tee(place.machine))
        without = named(doctor._tee(replace(place.machine, owner=None)))
    assert with_owner["sealing key"].state == "ok"
    assert without["sealing key"].state == "missing"
    assert "--release-owner" in without["sealing key"].mend


@pytest.mark.parametrize("count", [0, 2])
def test_gpus(tmp_path, count):
    machine = tees.machine(tmp_path, gpus=lambda: nvidia.Found(None, count, "because"))
    found = named(doctor._tee(machine))["GPU evidence"]
    assert (found.state == "ok", found.found) == (bool(count), "because")


def test_doctor_leaves_nothing_behind(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    with tees.snp_place(tmp_path, 0) as place:
        doctor.examine(place.machine, state)
    assert list(state.iterdir()) == []

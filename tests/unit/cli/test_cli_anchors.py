"""`receipt anchor`, `receipt anchored`, `audit post`: a proof made, posted for and checked."""

from __future__ import annotations

import json

import pytest

from casemate.cli.main import main
from casemate.client.memory import Mirror
from casemate.seams import OsDisk, OsRng, SystemClock
from casemate.spec import codec
from casemate.tee.simulated import SimulatedTee
from support.publog import PublicLog, Witness, keys_of
from support.receipts import maker, receipt


@pytest.fixture(scope="module")
def tee(tmp_path_factory) -> SimulatedTee:
    return SimulatedTee(OsDisk(tmp_path_factory.mktemp("tee")), OsRng(), SystemClock())


class Place:
    """A folder with a receipt, the log that it stands in, and a mirror of that."""

    def __init__(self, folder, tee) -> None:
        self.folder, self.log, self.witness = folder, PublicLog(), Witness("w")
        keys = keys_of(self.log)
        made = maker(keys, tee, self.log)(receipt(keys), witnesses=[self.witness])
        self.receipt, self.proof = str(folder / "receipt.json"), str(folder / "proof.json")
        self.anchor, self.mirror = str(folder / "anchor"), folder / "mirror"
        (folder / "receipt.json").write_bytes(codec.encode(made) + b"\n")
        self.grow(0)

    def grow(self, count: int) -> None:
        self.log.pad(count)
        Mirror(self.mirror, entries=True).extend(self.log.public, self.log.file)


@pytest.fixture
def place(tmp_path, tee, monkeypatch):
    for name in ("CASEMATE_LOGS", "CASEMATE_TRUST", "CASEMATE_ENCLAVE", "CASEMATE_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CASEMATE_HOME", str(tmp_path / "home"))
    return Place(tmp_path, tee)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    shown = capsys.readouterr()
    return int(caught.value.code or 0), shown.out, shown.err


def call(capsys, *arguments: str) -> dict:
    """What a command prints as JSON, or its error."""
    code, out, err = run(capsys, *arguments, "--format", "json")
    return json.loads(err if code else out)


TRUST = ("--trust", "simulated")


def test_the_way_from_a_receipt_to_a_checked_proof(capsys, place):
    assert call(capsys, "audit", "post", place.anchor, "--dir", place.mirror)["posted"] is True
    place.grow(40)
    second = call(capsys, "audit", "post", place.anchor, "--dir", place.mirror)
    assert (second["checkpoints"], second["entries"]) == (2, len(place.log.leaves))
    made = call(capsys, "receipt", "anchor", place.receipt, *TRUST, "--anchor", place.anchor,
                "--dir", place.mirror, "--out", place.proof)  # fmt: skip
    assert made["file"] == place.proof and made["proof"]["type"] == "receipt-proof/v1"
    found = call(capsys, "receipt", "anchored", place.proof, "--anchor", place.anchor,
                 "--receipt", place.receipt, *TRUST)  # fmt: skip
    states = {c["name"]: c["state"] for c in found["checks"]}
    assert states == {"receipt": "ok", "log": "ok", "witnesses": "unchecked", "anchor": "ok",
                      "bundle": "simulated"}  # fmt: skip
    assert found["receipt"] == made["proof"]["receipt"]
    assert found["key"] == place.log.public.hex()


def test_a_later_checkpoint_is_led_to_by_a_mirror(capsys, place):
    place.grow(40)
    call(capsys, "audit", "post", place.anchor, "--dir", place.mirror)
    ask = ("receipt", "anchor", place.receipt, *TRUST, "--anchor", place.anchor)
    refused = call(capsys, *ask)
    assert refused["error"]["code"] == "usage.undecided"
    made = call(capsys, *ask, "--dir", place.mirror, "--out", place.proof)
    assert f"of {len(place.log.leaves)}," in made["checks"][1]["found"]
    assert call(capsys, "receipt", "anchored", place.proof, "--anchor", place.anchor)["checks"]


def test_without_a_file_the_proof_goes_to_stdout_on_one_line(capsys, place):
    code, out, err = run(capsys, "receipt", "anchor", place.receipt, *TRUST)
    assert code == 0 and out.count("\n") == 1
    assert "SIMULATED" in err
    (place.folder / "proof.json").write_text(out)
    code, out, _ = run(capsys, "receipt", "anchored", place.proof)
    assert code == 0 and "not given: who posted" in out


def test_simulation_must_be_asked_for_by_name(capsys, place):
    assert call(capsys, "receipt", "anchor", place.receipt)["error"]["code"] == "usage.trust"
    run(capsys, "receipt", "anchor", place.receipt, *TRUST, "--out", place.proof)
    ask = ("receipt", "anchored", place.proof, "--receipt", place.receipt)
    assert call(capsys, *ask)["error"]["code"] == "usage.trust"
    assert "SIMULATED" in run(capsys, *ask, *TRUST)[2]


def test_witnesses_are_asked_for(capsys, place):
    run(capsys, "receipt", "anchor", place.receipt, *TRUST, "--out", place.proof)
    ask = ("receipt", "anchored", place.proof, "--witness")
    assert call(capsys, *ask, str(place.witness.verifier))["checks"][2]["state"] == "ok"
    refused = call(capsys, *ask, str(Witness("other").verifier))
    assert refused["error"]["code"] == "receipt.witnesses"


def test_calls_for_a_contract_are_printed_alone(capsys, place):
    from casemate.client import contract

    methods = contract.made()["methods"]
    ask = ("audit", "post", place.anchor, "--dir", place.mirror)
    code, posted, _ = run(capsys, *ask, "--calldata")
    assert code == 0 and posted.startswith(methods["post(uint256,bytes32,bytes32[])"])
    assert call(capsys, *ask)["calldata"] == posted.strip()  # again: nothing new was posted
    run(capsys, "receipt", "anchor", place.receipt, *TRUST, "--out", place.proof)
    code, asked, _ = run(capsys, "receipt", "anchored", place.proof, "--calldata")
    assert (
        code == 0 and asked.strip() == call(capsys, "receipt", "anchored", place.proof)["calldata"]
    )
    assert asked[:10] in methods.values()


def test_a_changed_anchor_is_refused(capsys, place):
    call(capsys, "audit", "post", place.anchor, "--dir", place.mirror)
    run(capsys, "receipt", "anchor", place.receipt, *TRUST, "--out", place.proof)
    path = place.folder / "anchor"
    path.write_text(path.read_text()[:-1])
    refused = call(capsys, "receipt", "anchored", place.proof, "--anchor", place.anchor)
    assert refused["error"]["code"] == "format.anchor"


@pytest.mark.parametrize("verb", ["anchor", "anchored"])
def test_files_that_are_none_are_named(capsys, place, verb):
    (place.folder / "bad").write_text("{}")
    for name, code in (("bad", "format.version"), ("none", "usage.file")):
        found = call(capsys, "receipt", verb, str(place.folder / name), *TRUST)
        assert found["error"]["code"] == code


def test_a_folder_without_a_log_is_no_mirror(capsys, place, tmp_path):
    (tmp_path / "empty").mkdir()
    found = call(capsys, "audit", "post", place.anchor, "--dir", str(tmp_path / "empty"))
    assert found["error"]["code"] == "usage.file"

"""`casemate enclave verify --evidence` and `show`: words in, a judgement and an exit code out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from casemate.attest.verdict import EXITS
from support.evidence import NOW, attestation
from unit.cli.test_cli_basics import call


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """What a simulated TEE shows: in AMD's form, under a root that is not AMD's."""
    folder = tmp_path / "evidence"
    folder.mkdir()
    for name, data in attestation().evidence.files.items():
        (folder / name).write_bytes(data)
    return folder


def verify(capsys: Any, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    args = ("enclave", "verify", "--evidence", str(folder), *more, "--format", "json")
    code, out, _ = call(capsys, *args)
    return code, json.loads(out)


def test_a_root_that_nobody_pinned_is_refused_with_its_stage(capsys, evidence):
    code, found = verify(capsys, evidence, "--at", str(NOW))
    assert code == EXITS["signature"] == 12
    assert (found["tee"], found["decision"]) == ("sev-snp", "reject")
    assert (found["code"], found["stage"]) == ("evidence.root-unknown", "signature")
    assert [c["outcome"] for c in found["checks"]][-1] == "failed"
    code, out, _ = call(capsys, "enclave", "verify", "--evidence", str(evidence))
    assert code == 12
    assert "reject" in out
    assert "evidence.root-unknown" in out


def test_simulation_is_accepted_by_name_alone_and_says_so(capsys, evidence):
    code, found = verify(capsys, evidence, "--at", str(NOW), "--trust", "simulated")
    assert (code, found["decision"], found["simulated"]) == (0, "accept", True)
    assert any("SIMULATED" in c["detail"] for c in found["checks"])
    args = ("--at", str(NOW), "--trust", "simulated")
    _, out, _ = call(capsys, "enclave", "verify", "--evidence", str(evidence), *args)
    assert "SIMULATED" in out


def test_a_policy_for_another_kind_is_no_policy_for_this_one(capsys, evidence, tmp_path):
    policy = tmp_path / "trust.toml"
    policy.write_text("simulated = false\n[no-such-kind]\n")
    args = ("enclave", "verify", "--evidence", str(evidence), "--trust", str(policy))
    code, _, err = call(capsys, *args)
    assert code == 2
    assert "usage.trust" in err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--at", "yesterday"), "usage.time"),
        (("--at", "1e400"), "usage.time"),
        (("--nonce", ""), "usage.nonce"),
        (("--nonce", "xyz"), "usage.nonce"),
    ],
)
def test_words_that_mean_nothing(words, code, capsys, evidence):
    args = ("enclave", "verify", "--evidence", str(evidence), *words)
    exit_code, out, err = call(capsys, *args)
    assert (exit_code, out) == (2, "")
    assert f"error {code}" in err
    assert "mend: " in err


@pytest.mark.parametrize("words", [("--at", "2026-01-01"), ("--nonce", "ab")])
def test_a_live_enclave_takes_neither_time_nor_nonce(words, capsys):
    code, _, err = call(capsys, "enclave", "verify", *words)
    assert code == 2
    assert "usage.arguments" in err


def test_a_folder_of_other_things(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    code, found = verify(capsys, tmp_path)
    assert (code, found["code"]) == (10, "evidence.tee-unknown")
    code, out, err = call(capsys, "enclave", "show", str(tmp_path))
    assert (code, out) == (10, "")
    assert "evidence.tee-unknown" in err


def test_a_folder_too_large(capsys, evidence):
    (evidence / "more.bin").write_bytes(bytes(5 << 20))
    code, found = verify(capsys, evidence)
    assert (code, found["code"]) == (EXITS["parse"], "evidence.parse-too-large")


def test_show_prints_every_field(capsys, evidence):
    code, out, _ = call(capsys, "enclave", "show", str(evidence), "--format", "json")
    assert code == 0
    found = json.loads(out)
    assert found["tee"] == "sev-snp"
    assert bytes.fromhex(found["fields"]["report"]["measurement"])
    code, out, _ = call(capsys, "enclave", "show", str(evidence))
    assert code == 0
    shown = "".join("".join(out.split()))
    assert found["fields"]["report"]["measurement"][:40] in shown


def test_collateral_of_a_machine_without_a_tee(capsys, tmp_path):
    state = str(tmp_path / "state")
    code, out, _ = call(capsys, "enclave", "collateral", "--state", state, "--list")
    assert (code, out.strip()) == (0, "No collateral is kept.")
    args = ("enclave", "collateral", "--state", state, "--tee", "no-such-kind")
    code, _, err = call(capsys, *args)
    assert code == 2
    assert "usage.tee-unknown" in err


def test_collateral_that_is_fetched_is_kept_with_its_age(capsys, tmp_path, monkeypatch):
    from casemate.tee import collateral as kept

    def refresh(tee, disk, fetch, now):
        kept.keep(disk, "cpu", {"crl.der": b"0"}, "https://vendor.example/crl", now)
        good = kept.Outcome("cpu", "list", "https://vendor.example/crl", ("crl.der",), "")
        return (good, kept.Outcome("cpu", "VCEK", "https://vendor.example/vcek", (), "status 429"))

    monkeypatch.setattr(kept, "refresh", refresh)
    args = ("enclave", "collateral", "--state", str(tmp_path), "--tee", "simulated")
    code, out, _ = call(capsys, *args, "--format", "json")
    assert code == 23
    found = json.loads(out)
    assert [row["file"] for row in found["kept"]] == ["crl.der"]
    assert [o["error"] for o in found["asked"]] == ["", "status 429"]
    code, out, _ = call(capsys, *args)
    assert code == 23
    assert "0.0 days" in out
    assert "status 429" in out


def test_an_owner_releases_the_sealing_secret_to_evidence_alone(capsys, tmp_path):
    from casemate.seal.identity import Identity
    from casemate.seams import OsRng
    from casemate.tee import release
    from support.evidence import tee

    owner = Identity.generate("Anna")
    owner.save(tmp_path / "anna.json")
    request, key = release.request(tee().attest, owner.public.sign_key, OsRng())
    (tmp_path / "request.json").write_bytes(request)
    out = tmp_path / "grant.json"
    args = ("enclave", "release", str(tmp_path / "request.json"), "--out", str(out))
    args = (*args, "-i", str(tmp_path / "anna.json"), "--trust")
    code, _, err = call(capsys, *args, "simulated:" + "ab" * 32)
    assert code == 10
    assert "evidence.root-unknown" in err
    assert not out.exists()
    assert call(capsys, *args, f"simulated:{tee().root}")[0] == 0
    secret = release.accept(request, out.read_bytes(), key, owner.public.sign_key)
    assert secret == owner.derive(release.TAG)

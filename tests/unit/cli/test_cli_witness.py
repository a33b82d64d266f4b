"""``casemate witness``: made once, shown without its passphrase, never started on a lost state."""

import json
import stat
import sys
from types import SimpleNamespace

import pytest

from casemate.cli import main
from casemate.seal import note
from casemate.seal.identity import Identity
from casemate.seams import OsDisk
from casemate.witness import service, state
from support.witness import Tree

LOG = Tree([b"a", b"b"])


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.delenv("CASEMATE_PASSPHRASE", raising=False)

    def call(*words):
        with pytest.raises(SystemExit) as e:
            main.main(["witness", *map(str, words)])
        out, err = capsys.readouterr()
        return e.value.code, out, err

    return call


def as_json(run, *words):
    code, out, err = run(*words, "--format", "json")
    assert code == 0, err
    return json.loads(out)


def test_a_witness_is_made_once(run, tmp_path):
    folder = tmp_path / "w"
    made = as_json(run, "init", folder, "--name", "w.example/a")
    key = note.verifier(made["vkey"])
    assert key.kind == note.COSIGNATURE and key.name == "w.example/a"
    assert service.verifier(Identity.load(folder / "key.json")) == key
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    code, _, err = run("init", folder, "--name", "w.example/b")
    assert code == 2 and "usage.witness-exists" in err
    assert as_json(run, "show", folder) == {"name": "w.example/a", "vkey": made["vkey"], "logs": []}


@pytest.mark.parametrize("name", ["two words", "a+b", ""])
def test_names_that_are_none(run, tmp_path, name):
    code, _, err = run("init", tmp_path / "w", "--name", name)
    assert code == 3 and "format.note" in err and not (tmp_path / "w").exists()


def test_logs_are_watched(run, tmp_path):
    folder = tmp_path / "w"
    run("init", folder, "--name", "w.example/a")
    assert as_json(run, "add", folder, LOG.log)["new"] is True
    assert as_json(run, "add", folder, LOG.log)["new"] is False
    shown = as_json(run, "show", folder)["logs"]
    assert [(x["origin"], x["size"], x["forks"]) for x in shown] == [(LOG.origin, None, 0)]
    code, out, _ = run("show", folder)
    assert code == 0 and LOG.origin in out and str(state.witness(OsDisk(folder))) in out
    code, _, err = run("add", folder, "no+key")
    assert code == 3 and "format.note" in err
    for words in ([], [LOG.log, "--from", "https://enclave.example"]):
        code, _, err = run("add", folder, *words)
        assert code == 2 and "either VKEY or --from" in err


def test_a_fork_is_said(run, tmp_path):
    folder = tmp_path / "w"
    made = as_json(run, "init", folder, "--name", "w.example/a")
    run("add", folder, LOG.log)
    disk = OsDisk(folder)
    state.keep_evidence(
        disk,
        state.Evidence(
            log=str(LOG.log), kind="fork", held=str(LOG.signed(1)),
            request=LOG.request(1, 1).decode(), seconds=1,
        ),
    )  # fmt: skip
    code, _, err = run("show", folder)
    assert code == 0 and "two histories" in err and made["vkey"]


def test_a_passphrase_is_needed_to_serve_alone(run, tmp_path, monkeypatch):
    folder = tmp_path / "w"
    monkeypatch.setenv("CASEMATE_PASSPHRASE", "correct horse")
    run("init", folder, "--name", "w.example/a")
    monkeypatch.delenv("CASEMATE_PASSPHRASE")
    assert as_json(run, "add", folder, LOG.log)["new"] is True
    assert as_json(run, "show", folder)["logs"]
    code, _, err = run("serve", folder, "--port", 0)
    assert code == 7 and "auth.passphrase" in err


def test_a_witness_is_served(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CASEMATE_PASSPHRASE", "correct horse")
    made = as_json(run, "init", tmp_path / "w", "--name", "w.example/a")
    seen = []

    def serve(folder, identity, host, port, *, ready, event):
        seen.append((folder, host, port))
        event({"event": "cosigned"})
        ready("http://w.example", SimpleNamespace(key=service.verifier(identity)))

    monkeypatch.setattr("casemate.witness.serve.serve", serve)
    code, out, err = run("serve", tmp_path / "w", "--host", "::1", "--port", 5, "--format", "json")
    assert code == 0 and seen == [(tmp_path / "w", "::1", 5)]
    assert json.loads(out) == {
        "url": "http://w.example", "name": "w.example/a", "vkey": made["vkey"],
    }  # fmt: skip
    assert json.loads(err) == {"event": "cosigned"}
    code, out, _ = run("serve", tmp_path / "w")
    assert code == 0 and made["vkey"] in out and "http://w.example" in out


def test_what_is_missing_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "casemate.witness.serve", None)
    code, _, err = run("serve", tmp_path / "w")
    assert code == 2 and "usage.extra" in err and "casemate[witness]" in err


@pytest.mark.parametrize("command", [["show"], ["add", str(LOG.log)], ["serve"]])
def test_a_lost_state_is_never_begun_anew(run, tmp_path, command):
    folder = tmp_path / "w"
    verb, *rest = command
    code, _, err = run(verb, folder, *rest)
    assert code == 21 and "ledger.witness-missing" in err and not folder.exists()
    run("init", folder, "--name", "w.example/a")
    (folder / "witness.json").unlink()
    code, _, err = run(verb, folder, *rest)
    assert code == 21 and "ledger.witness-missing" in err
    assert not (folder / "witness.json").exists()
    code, _, err = run("init", folder, "--name", "w.example/a")
    assert code == 2, "not even init makes another state for a key that may have cosigned"

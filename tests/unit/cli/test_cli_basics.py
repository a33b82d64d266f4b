"""Help without heavy imports, one error shape, documented exit codes, settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from casemate.cli import config, doctor, output
from casemate.cli.main import COMMANDS, cli, main
from casemate.spec.errors import FAMILIES, CasemateError, UsageError

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "numpy", "pyarrow", "pandas", "httpx", "cryptography", "starlette", "rich")


def run(*arguments, env=None, code=None):
    """The command line in a process of its own: (exit code, stdout, stderr)."""
    start = code or "from casemate.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CASEMATE_HOME": "/nonexistent", **(env or {})},
    )
    return done.returncode, done.stdout, done.stderr


def call(capsys, *arguments):
    """The command line in this process: (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("CASEMATE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CASEMATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from casemate.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in sys.modules if m.split('.')[0] in {HEAVY!r}])"
    )
    status, out, err = run(code=code)
    assert status == 0, err
    assert "LOADED []" in out
    assert all(name in out for name in COMMANDS)


def test_the_package_imports_nothing_heavy():
    names = (*HEAVY, "click", "tqdm")
    code = f"import sys, casemate; print([m for m in sys.modules if m.split('.')[0] in {names!r}])"
    assert run(code=code)[1].strip() == "[]"


def test_light_modules_work_without_torch_numpy_pyarrow():
    """All of client, cli and what they stand on, but the exporter and the server's door."""
    code = (
        "import sys, importlib, pkgutil\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'numpy', 'pyarrow', 'pandas', 'polars',\n"
        "                                  'dp_accounting', 'apsw', 'starlette', 'uvicorn'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import casemate as cm\n"
        "for name in cm.__all__: getattr(cm, name)\n"
        "count = 0\n"
        "for room in ('client', 'cli', 'attest', 'seal', 'spec', 'accounting', 'graph', 'seams'):\n"
        "    top = importlib.import_module('casemate.' + room)\n"
        "    for m in pkgutil.walk_packages(top.__path__, top.__name__ + '.', lambda _: 0):\n"
        "        if not m.name.startswith('casemate.client.torch'):\n"
        "            importlib.import_module(m.name); count += 1\n"
        "print(count)\n"
    )
    status, out, err = run(code=code)
    assert status == 0, err
    assert int(out) > 50


def walk(command, path=()):
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), (*path, name))


COMMANDS_AND_PATHS = list(walk(cli))


@pytest.mark.parametrize("path", [p for p, _ in COMMANDS_AND_PATHS], ids=" ".join)
def test_every_command_has_help(path, capsys):
    code, out, _ = call(capsys, *path, "--help")
    assert code in (0, None)
    assert len(out.split()) > 5


def test_every_command_that_shows_something_takes_format_json():
    without = {
        " ".join(p)
        for p, c in COMMANDS_AND_PATHS
        if not isinstance(c, click.Group) and not any(o.name == "form" for o in c.params)
    }
    assert without <= {"dataset template", "demo sms"}


def test_one_line_helps_are_those_of_the_commands():
    """The listing's words are written twice, since help must not import the commands."""
    context = click.Context(cli)
    for name, (_, line) in COMMANDS.items():
        assert cli.get_command(context, name) is not None
        assert line.endswith(".")
        assert len(line) < 80


def test_wrong_arguments_are_usage_errors(capsys):
    code, out, err = call(capsys, "dataset", "shove")
    assert code == 2
    assert out == ""
    assert err.startswith("error usage.arguments: ")
    assert "mend: " in err
    code, _, err = call(capsys, "job", "quote", "--format", "json")
    assert code == 2
    assert json.loads(err)["error"]["code"] == "usage.arguments"


@pytest.mark.parametrize("kind", FAMILIES.values(), ids=FAMILIES)
def test_every_error_ends_with_its_exit_code(kind, capsys, monkeypatch):
    def fail(*_, **__):
        raise kind(f"{kind.family}.test", "It broke.", mend="Mend it.", where="here")

    monkeypatch.setattr(config, "read", fail)
    code, out, err = call(capsys, "enclave", "ls")
    assert code == kind.exit_code
    assert out == ""
    assert err == f"error {kind.family}.test [here]: It broke.\nmend: Mend it.\n"
    code, _, err = call(capsys, "enclave", "ls", "--format=json")
    assert code == kind.exit_code
    assert json.loads(err) == {
        "error": {"code": f"{kind.family}.test", "message": "It broke.", "mend": "Mend it.",
                  "where": "here"}
    }  # fmt: skip


def test_faults_of_casemate_show_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(config, "read", lambda: 1 / 0)
    code, _, err = call(capsys, "enclave", "ls")
    assert code == 1
    assert err.startswith("error internal.fault: ZeroDivisionError")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "x/y"), "[x/y]: x/y cannot be"),
        (OSError(28, "No space left on device"), ": A file cannot be read or written: No space"),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_casemate(capsys, monkeypatch, fault, words):
    def fail():
        raise fault

    monkeypatch.setattr(config, "read", fail)
    code, _, err = call(capsys, "enclave", "ls")
    assert code == 2
    assert err.startswith("error usage.file") and words in err
    assert "Report it" not in err


def test_exit_codes_are_documented():
    text = (ROOT / "docs" / "cli.md").read_text()
    for family, kind in FAMILIES.items():
        assert re.search(rf"\| {kind.exit_code} \| `{family}\.\*` \|", text), family


def test_what_others_name_cannot_drive_the_terminal(capsys):
    output.show_error(UsageError("usage.x", "a\x1b[2Jb\nc", mend="d\r"), as_json=False)
    err = capsys.readouterr().err
    assert "\x1b[2J" not in err
    assert "\r" not in err
    assert err.count("\n") == 2


def test_identity_new_and_show(capsys, home):
    code, out, _ = call(capsys, "identity", "new", "Anna", "--format", "json")
    assert code == 0
    made = json.loads(out)
    assert made["id"].startswith("id_")
    path = home / "identity.json"
    assert made["file"] == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    code, out, _ = call(capsys, "identity", "show", "--format", "json")
    assert json.loads(out) == made
    code, _, err = call(capsys, "identity", "new", "Anna")
    assert code == 2
    assert "usage.identity-exists" in err


def test_a_passphrase_is_taken_from_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("CASEMATE_PASSPHRASE", "correct horse")
    assert call(capsys, "identity", "new", "Anna")[0] == 0
    assert call(capsys, "identity", "show")[0] == 0
    monkeypatch.setenv("CASEMATE_PASSPHRASE", "wrong")
    code, _, err = call(capsys, "identity", "show")
    assert code == 7
    assert "auth.passphrase" in err


def test_a_trust_policy_must_be_named(capsys):
    call(capsys, "identity", "new", "Anna")
    code, _, err = call(capsys, "dataset", "ls", "-e", "https://127.0.0.1:1")
    assert code == 2
    assert "usage.trust" in err
    code, _, err = call(capsys, "dataset", "ls")
    assert "usage.enclave" in err


def test_an_unreachable_server_is_exit_code_23(capsys):
    call(capsys, "identity", "new", "Anna")
    code, _, err = call(
        capsys, "dataset", "ls", "-e", "https://127.0.0.1:1", "--trust", "simulated"
    )
    assert code == 23
    assert "net.unreachable" in err


def write(home, text):
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(text)


def test_named_enclaves_come_from_the_settings(home):
    write(home, 'default = "lab"\n[enclaves.lab]\nurl = "https://h:1"\ntrust = "simulated"\n')
    assert config.place(None, None) == config.Place("https://h:1", "simulated")
    assert config.place("lab", "other") == config.Place("https://h:1", "other")
    assert config.place("https://x:2", None) == config.Place("https://x:2", None)
    with pytest.raises(UsageError):
        config.place("elsewhere", None)


@pytest.mark.parametrize(
    "text",
    [
        "default = ", "nonsense = 1", "enclaves = 3", "[enclaves.a]\ntrust = 'x'",
        "[enclaves.a]\nurl = 3", "[enclaves.a]\nurl = 'u'\ncolour = 'red'", "[enclaves]\na = 'u'",
    ],
)  # fmt: skip
def test_settings_are_strict(home, text):
    write(home, text)
    with pytest.raises(UsageError) as caught:
        config.read()
    assert caught.value.code == "usage.config"


def test_written_settings_are_read_again(home):
    config.add_enclave("a", config.Place("https://h:1", 'si"m\\u'), default=False)
    config.add_enclave("b", config.Place("https://i:2", None), default=True)
    found = config.read()
    assert found["default"] == "b"
    assert found["enclaves"] == {
        "a": {"url": "https://h:1", "trust": 'si"m\\u'},
        "b": {"url": "https://i:2"},
    }
    with pytest.raises(UsageError):
        config.add_enclave("a b", config.Place("https://h:1", None), default=False)


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    code, out, _ = call(capsys, "doctor", "--format", "json")
    found = json.loads(out)
    assert code == 0
    assert found["usable"] is True
    names = {c["name"]: c for c in found["checks"]}
    assert {"python", "TLS 1.3", "sealing", "disk", "memory", "TEE", "sandbox"} <= set(names)
    assert all(c["mend"] for c in found["checks"] if c["state"] != "ok")

    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: n != "pyarrow" and installed(n))
    monkeypatch.setattr(doctor.ssl, "HAS_TLSv1_3", False)
    code, out, _ = call(capsys, "doctor", "--format", "json")
    names = {c["name"]: c for c in json.loads(out)["checks"]}
    assert code == 1
    assert names["extra data"]["state"] == "missing"
    assert "pyarrow" in names["extra data"]["found"]
    assert "casemate[data]" in names["extra data"]["mend"]
    assert names["TLS 1.3"]["state"] == "failed"


def test_doctor_names_each_layer_that_does_not_hold(monkeypatch):
    from casemate.server import pool
    from casemate.spec.evidence import SANDBOX

    for held in (SANDBOX, ("rlimits", "seccomp"), ()):
        monkeypatch.setattr(pool, "layers", lambda held=held: held)
        first, *missing = doctor._sandbox()
        assert first.state == ("ok" if held else "failed")
        assert {f.name for f in missing} == {f"sandbox: {n}" for n in SANDBOX if n not in held}
        assert all(f.mend for f in missing)


def test_a_model_file_that_fails_is_the_users(tmp_path, capsys):
    from casemate.cli.model import load_model

    file = tmp_path / "mine.py"
    for text, name in (("1/0", "build"), ("x = 1", "build")):
        file.write_text(text)
        with pytest.raises(UsageError) as caught:
            load_model(f"{file}:{name}")
        assert caught.value.code == "usage.model"
    with pytest.raises(CasemateError):
        load_model(f"{tmp_path}/none.py:build")
    with pytest.raises(CasemateError):
        load_model(str(tmp_path / "none.cmm"))
    junk = tmp_path / "junk.cmm"
    junk.write_bytes(b"\x80\x04pickle")
    code, _, err = call(capsys, "model", "check", str(junk))
    assert code == 3
    assert "format." in err


@pytest.mark.parametrize(
    "url", ["not a url", "w.example:7380", "ftp://w.example", "http://", "http://w:x", "http://[w"]
)
def test_a_witness_that_nobody_can_ask_is_refused_at_once(url, capsys, tmp_path):
    code, _, err = call(capsys, "serve", "--state", str(tmp_path / "s"), "--witness", url)
    assert code == 2 and "usage.arguments" in err and url in err
    assert not (tmp_path / "s").exists()

"""A release's own checks: hashes of what is installed, advisories, bill of materials, wheel.

What needs the network (advisories, tools) is run by make; here their judgement is tried."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "constraints.txt").read_text()
LOCKS = [LOCK, *(p.read_text() for p in sorted((ROOT / "deploy").glob("*.txt")))]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_dependency_but_torch_is_locked_by_hash() -> None:
    assert len(LOCKS) > 5
    for lock in LOCKS:
        for part in re.split(r"\n(?=\S)", lock.strip()):
            name, _, rest = part.partition("==")
            assert rest, part
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}(?=\s|$)", rest)
            assert bool(hashes) != (name == "torch"), name


def test_make_installs_nothing_without_its_hash() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if " install " in line and "pip" in line]
    assert len(lines) >= 4
    for line in lines:
        for part in line.split(" && "):
            hashed = "--require-hashes" in part or "-c constraints.txt -b deploy/build.txt" in part
            assert hashed or " install " not in part, part
    for name in re.findall(r"^PIN_(\w+) :=", text, re.M):
        pins = re.search(rf"^PIN_{name} := (.*)$", text, re.M)
        assert pins is not None
        for pin in pins[1].split():
            assert pin in (ROOT / "deploy" / f"{name}.txt").read_text(), pin


def test_a_file_of_another_hash_is_not_installed(tmp_path: Path) -> None:
    """uv checks the hashes that stand in constraints, as make setup gives them."""
    uv = Path(sys.executable).with_name("uv")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "aa"\nversion = "1"\n')
    (tmp_path / "aa.py").write_text("")
    build = [uv, "build", "-q", "--wheel", "--offline", "--no-build-isolation", "--python"]
    subprocess.run([*build, sys.executable, "-o", tmp_path, tmp_path], check=True)
    for wrong in (True, False):
        (wheel,) = tmp_path.glob("*.whl")
        digest = "0" * 64 if wrong else script("wheel").digest(wheel)
        (tmp_path / "c.txt").write_text(f"aa==1 --hash=sha256:{digest}\n")
        done = subprocess.run(
            [uv, "pip", "install", "-q", "--no-cache", "--offline", "--no-index", "--find-links",
             tmp_path, "--target", tmp_path / f"into{wrong}", "-c", tmp_path / "c.txt", "aa"],
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode != 0) == wrong, done.stderr
        assert not wrong or "Hash mismatch" in done.stderr


CLEAN = {"dependencies": [{"name": "Aa.b", "version": "1", "vulns": []}]}


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (CLEAN, None),
        ({"dependencies": []}, "not looked up"),
        ({"dependencies": [{"name": "aa-b", "skip_reason": "no such version"}]}, "no such"),
        ({"dependencies": [{"name": "aa-b", "version": "2", "vulns": []}]}, "not looked up"),
        ({"dependencies": [{"name": "aa-b", "version": "1", "vulns": [{"id": "CVE-1"}]}]}, "CVE-1"),
    ],
)
def test_a_skipped_or_weak_package_stops_a_release(report: dict, problem: str | None) -> None:
    found = script("audit_deps").problems({"aa-b": "1"}, report)
    assert ([problem in line for line in found] == [True]) if problem else not found


def test_the_audit_looks_at_every_locked_package() -> None:
    found = script("audit_deps").locked(LOCK)
    assert len(found) == len(re.findall("^\\S", LOCK, re.M)) and found["torch"] == "2.13.0"


def test_a_failed_audit_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for said in ("", json.dumps(CLEAN)):
        (tool := tmp_path / "tool").write_text(f"#!/bin/sh\necho '{said}'\n")
        tool.chmod(0o755)
        assert script("audit_deps").main(str(tool)) == 1
    assert "no report" in capsys.readouterr().out


def test_a_bill_of_materials_says_versions_and_hashes() -> None:
    check = script("sbom").problems
    good = {"name": "a", "version": "1", "externalReferences": [{"hashes": [{"alg": "SHA-256"}]}]}
    assert check({"components": [good, {"name": "torch", "version": "2"}]}) == []
    assert check({}) == ["it lists nothing"]
    bare = {"name": "b", "version": "1"}
    assert check({"components": [bare]}) == ["b has no hash"]
    assert check({"components": [good | {"version": ""}]}) == ["a has no version"]


def test_two_builds_of_the_wheel_are_the_same_bytes(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert script("wheel").main(tmp_path) == 0
    finally:
        os.umask(before)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size > 1 << 16


def test_a_wheel_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = script("wheel")

    def build(commit: str, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "a.whl").write_text(str(folder))
        return folder / "a.whl"

    monkeypatch.setattr(made, "build", build)
    assert made.main(tmp_path) == 1

"""The base install: built, installed without extras into a fresh environment, and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
MOST_PACKAGES = 22
MOST_BYTES = 60 * 10**6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The python of a fresh environment with casemate and nothing that it does not need."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("base")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(
        ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", str(python), str(source)],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    if done.returncode != 0 and ("dns error" in done.stderr or "Network" in done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return python


def run(python, *arguments, home="/nonexistent"):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CASEMATE_", "PYTHON"))}
    return subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, check=False,
        env={**kept, "CASEMATE_HOME": str(home)},
    )  # fmt: skip


def test_few_and_light_packages(base):
    code = "from importlib.metadata import distributions; print(len(list(distributions())))"
    assert int(run(base, "-c", code).stdout) <= MOST_PACKAGES
    site = next((base.parent.parent / "lib").glob("python*/site-packages"))
    total = sum(p.stat().st_size for p in site.rglob("*") if p.is_file())
    assert total <= MOST_BYTES


def test_it_imports_and_helps(base):
    for arguments in (["-c", "import casemate as cm; cm.Budget(8, 1e-5); cm.connect"],
                      ["-m", "casemate", "--help"], ["-m", "casemate", "job", "quote", "--help"],
                      ["-m", "casemate", "receipt", "verify", "--help"]):  # fmt: skip
        done = run(base, *arguments)
        assert done.returncode == 0, done.stderr


def test_keys_csv_and_errors_work_without_extras(base, tmp_path):
    assert run(base, "-m", "casemate", "identity", "new", "me", home=tmp_path).returncode == 0
    assert run(base, "-m", "casemate", "doctor", home=tmp_path).returncode == 0
    table = tmp_path / "t.csv"
    table.write_text("a,b\n0.5,1\n0.25,0\n")
    code = (
        "import sys; from casemate.client import data\n"
        "e = data.encode(sys.argv[1], name='t', label='b', bounds={'a': (0, 1), 'b': (0, 1)})\n"
        "print(e.schema.rows)"
    )
    done = run(base, "-c", code, str(table))
    assert done.stdout.strip() == "2", done.stderr


def test_what_needs_an_extra_says_which(base, tmp_path):
    wanted = {
        ("serve", "--dev"): "casemate[server]",
        ("demo",): "casemate[server]",
    }
    for command, extra in wanted.items():
        done = run(base, "-m", "casemate", *command, home=tmp_path)
        assert done.returncode == 2
        assert "error usage.extra" in done.stderr
        assert extra in done.stderr


def test_receipts_are_checked_without_extras_but_for_the_second_accountant(base):
    code = (
        "from casemate.client import receipts\n"
        "from casemate.accounting.filters import RdpFilter\n"
        "from casemate.spec.job import DpEvent\n"
        "e = (DpEvent(rate=0.25, noise_multiplier=4.0, steps=40),)\n"
        "print(round(RdpFilter.charge(e, 1e-7, delta_shown=1e-5).epsilon, 2))\n"
        "from casemate.accounting import pld\n"
        "try:\n    pld.epsilon(e, 1e-5)\n"
        "except Exception as error:\n    print(error.code)\n"
    )
    done = run(base, "-c", code)
    assert done.stdout.splitlines()[1] == "usage.extra", done.stderr

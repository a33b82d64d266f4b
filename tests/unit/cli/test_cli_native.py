"""``casemate native build``: what it refuses before it builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from casemate.cli.main import cli
from casemate.engine import native
from casemate.spec.errors import UsageError


def refused(*more: str) -> UsageError:
    done = CliRunner().invoke(
        cli, ["native", "build", "sha256:0", "--model", "m.cmm", "--out", "step", *more]
    )
    assert isinstance(done.exception, UsageError), done.output
    return done.exception


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"artifact": "00"}', '{"artifact": 3, "ways": []}',
     '{"artifact": "00", "ways": [3]}', '{"artifact": "00", "ways": 3}',
     '{"artifact": "00", "ways": "loop"}', '{"artifact": "00", "ways": null}', "\xff"],
)  # fmt: skip
def test_a_file_that_is_no_manifest_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(text.encode("latin-1"))
    error = refused("--like", str(path))
    assert (error.code, error.where) == ("usage.file", str(path))


def test_a_machine_without_a_compiler_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    assert refused().code == "usage.compiler"

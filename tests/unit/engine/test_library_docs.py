"""docs/library.md runs, and names only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import casemate.engine as ce
from casemate.engine.private import Private

TEXT = (Path(__file__).parents[3] / "docs" / "library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_run_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) >= 4
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/library.md", "exec"), names)  # noqa: S102
    shown = capsys.readouterr().out
    assert "epsilon 2 at delta 1e-05" in shown
    assert "model.batchnorm - Replace it by GroupNorm" in shown


def test_every_name_exists() -> None:
    found = set(re.findall(r"\bce\.([A-Za-z_]+)", TEXT))
    assert found and all(hasattr(ce, name) for name in found)
    used = set(re.findall(r"\bprivate\.([a-z_]+)\b", TEXT)) - {"md"}
    assert used and all(hasattr(Private, name) for name in used)


def test_every_public_name_is_in_the_text() -> None:
    # Cost is what quote returns.
    assert {n for n in ce.__all__ if f"ce.{n}" not in TEXT} == {"Cost"}

"""docs/sdk.md names only what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import casemate as cm
from casemate.client.datasets import Datasets
from casemate.client.jobs import Jobs, QuoteView, Run

TEXT = (Path(__file__).parents[3] / "docs" / "sdk.md").read_text(encoding="utf-8")
THINGS = {
    "cm": cm, "enclave": cm.Enclave, "enclave.datasets": Datasets, "enclave.jobs": Jobs,
    "quote": QuoteView, "run": Run, "cm.Trust": cm.Trust, "cm.Identity": cm.Identity,
}  # fmt: skip


def test_the_examples_are_python():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        ast.parse(block)


def test_every_name_in_the_text_exists():
    found = set(re.findall(r"\b((?:cm|enclave|quote|run)(?:\.[A-Za-z_]+)+)", TEXT))
    checked = 0
    for name in found:
        owner, _, attribute = name.rpartition(".")
        if owner in THINGS and name not in ("enclave.datasets", "enclave.jobs", "enclave.example"):
            assert hasattr(THINGS[owner], attribute), name
            checked += 1
    assert checked > 25


def test_every_public_name_is_in_the_text():
    # Enclave and Run are what connect and train return.
    assert {n for n in cm.__all__ if f"cm.{n}" not in TEXT} == {"Enclave", "Run"}

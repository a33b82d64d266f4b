"""docs/cli.md says what the commands take."""

from __future__ import annotations

from pathlib import Path

from casemate.cli import reference

DOC = Path(__file__).parents[3] / "docs" / "cli.md"


def test_the_reference_is_that_of_the_commands():
    text = DOC.read_text(encoding="utf-8")
    assert reference.BEGIN in text
    assert reference.END in text
    assert reference.rewritten(text) == text, "run python -m casemate.cli.reference docs/cli.md"


def test_a_changed_reference_is_noticed():
    text = DOC.read_text(encoding="utf-8")
    assert reference.rewritten(text.replace("`--batch-size`", "`--batch`")) == text

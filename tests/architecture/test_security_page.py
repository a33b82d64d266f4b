"""SECURITY.md names tests, modules and commands that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith("|-") and line.count("|") == 5
]


def test_every_row_names_a_test_that_is_there() -> None:
    rows = [r for r in ROWS if r[0] != "controls"]
    assert len(rows) > 25
    for row in rows:
        names = re.findall(r"[\w./*]+\.(?:py|md)\b|tests/[\w/]+|make [a-z-]+", row[3])
        assert names, row
        for name in names:
            if name.startswith("make "):
                assert re.search(f"^{name[5:]}:", (ROOT / "Makefile").read_text(), re.M), name
            else:
                place = ROOT if "/" in name or name.endswith(".md") else ROOT / "tests/attacks"
                assert list(place.glob(name)), name


def _source(name: str) -> tuple[str, str]:
    """The text of the module that a dotted name lies in, and what is left of the name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path = ROOT / "src/casemate" / "/".join(parts[:cut])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.read_text(), ".".join(parts[cut:])
    raise AssertionError(name)


def test_every_module_is_there() -> None:
    named = set(re.findall(r"`([a-z]+(?:\.\w+)+)`", PAGE))
    assert len(named) > 12
    for name in named:
        text, thing = _source(name)
        assert not thing or re.search(rf"^(class|def) {re.escape(thing)}\b", text, re.M), name


def test_every_command_is_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", PAGE)):
        assert re.search(f"^{target}:", makefile, re.M), target

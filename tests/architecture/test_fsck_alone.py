"""The checker of the store shares no code with the writer: what it imports, all the way down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import casemate

SOURCE = Path(casemate.__file__).parent
WITHIN = ("casemate.spec.", "casemate.seams", "casemate.ledger.fsck")
EMPTY = {"casemate", "casemate.ledger", "casemate.spec"}  # packages without code that matters


def imports(path: Path) -> set[str]:
    """What a module names in its imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, path
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
    return {name for name in found if name.split(".")[0] == "casemate"}


def module_file(name: str) -> Path | None:
    path = SOURCE.joinpath(*name.split(".")[1:])
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


def reached() -> set[str]:
    """All modules of casemate that fsck reaches, imports within functions too."""
    left, found = ["casemate.ledger.fsck"], set()
    while left:
        name = left.pop()
        path = module_file(name)
        if path is not None and name not in found:
            found.add(name)
            left += imports(path)
    return found


def test_fsck_reaches_nothing_but_the_formats() -> None:
    found = reached() - EMPTY
    assert {"casemate.ledger.fsck_costs", "casemate.ledger.fsck_notes"} < found
    assert not {name for name in found if not name.startswith(WITHIN)}
    assert "casemate.spec.merkle" not in found  # the writer's trees


def test_importing_fsck_loads_nothing_else() -> None:
    script = (
        "import sys, casemate.ledger.fsck;"
        "print('\\n'.join(n for n in sys.modules if n.split('.')[0] == 'casemate'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = set(run.stdout.split()) - EMPTY
    assert not {name for name in found if not name.startswith(WITHIN)}


def test_packages_on_the_way_have_no_code() -> None:
    for name in EMPTY - {"casemate"}:
        assert not (module_file(name) or Path()).read_text().strip(), name

"""docs/models.md lists the table as it is.

To rewrite the list: python tests/unit/graph/test_graph_docs.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from casemate.graph import ops, unknown
from casemate.graph.ops import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
MARKS = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.S)


def listing() -> str:
    lines = ["| family | operations |", "|---|---|"]
    for family, entries in FAMILIES.items():
        names = sorted(
            e.schema.name.removeprefix("aten.").removesuffix(".default") for e in entries
        )
        lines.append(f"| {family} | {', '.join(f'`{n}`' for n in names)} |")
    return "\n".join(lines) + "\n"


def test_the_page_lists_the_table() -> None:
    found = MARKS.search(PAGE.read_text())
    assert found is not None
    assert found.group(0) == f"<!-- table -->\n{listing()}<!-- end -->"


def test_the_page_names_every_code() -> None:
    from casemate.graph import check

    modules = [check, unknown, *(getattr(ops, f) for f in FAMILIES), ops.base]
    codes = {c for m in modules for c in re.findall(r'"(model\.[a-z-]+)"', inspect.getsource(m))}
    assert len(codes) > 10
    text = PAGE.read_text()
    assert {c for c in codes if f"`{c}`" not in text} == set()


if __name__ == "__main__":
    PAGE.write_text(MARKS.sub(lambda m: m[1] + listing() + m[2], PAGE.read_text()))

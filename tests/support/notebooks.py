"""A notebook of examples/ holds what the script of its name holds: cells of ``# %%``.

``python tests/support/notebooks.py`` writes the notebooks anew from such scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
ABOUT = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def scripts() -> list[Path]:
    """The scripts that are written in cells."""
    return [p for p in sorted(EXAMPLES.glob("*.py")) if p.read_text().startswith("# %%")]


def notebook(script: str) -> dict:
    """The notebook (nbformat 4.5) of a script in cells."""
    cells = []
    parts = re.split(r"^# %%(.*)\n", script, flags=re.M)[1:]
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        prose = kind.strip() == "[markdown]"
        if prose:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        lines = text.strip().splitlines(keepends=True)
        cell = {"cell_type": "markdown" if prose else "code", "id": f"cell-{number}",
                "metadata": {}, "source": lines}  # fmt: skip
        cells.append(cell if prose else cell | {"execution_count": None, "outputs": []})
    return {"cells": cells, "metadata": ABOUT, "nbformat": 4, "nbformat_minor": 5}


def text(script: str) -> str:
    return json.dumps(notebook(script), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in scripts():
        path.with_suffix(".ipynb").write_text(text(path.read_text()))
        print("wrote", path.with_suffix(".ipynb").name)

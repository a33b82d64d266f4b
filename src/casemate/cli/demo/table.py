"""Wisconsin breast cancer (Street, Wolberg, Mangasarian 1993), shared out as two hospitals differ.

Each hospital gets its rows as a CSV file of its own; the scientist keeps rows that no hospital has.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, TypeAlias

from casemate.spec.errors import UsageError

#: What can occur, declared by hand: the ranges published with the data set (UCI, "Breast Cancer
#: Wisconsin (Diagnostic)", summary statistics), widened to round numbers. Never computed.
BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "worst radius": (7.0, 37.0),
    "worst texture": (12.0, 50.0),
    "worst perimeter": (50.0, 252.0),
    "worst area": (180.0, 4260.0),
    "worst smoothness": (0.07, 0.23),
    "worst compactness": (0.027, 1.06),
    "worst concavity": (0.0, 1.26),
    "worst concave points": (0.0, 0.3),
    "worst symmetry": (0.15, 0.67),
    "worst fractal dimension": (0.05, 0.21),
}
# Where these ten begin among the file's columns: means, standard errors, then worst values.
WORST: Final = 20
LABEL: Final = "diagnosis"
CLASSES: Final = ("malignant", "benign")
# In the proportion of the whole table.
HELD_OUT: Final = {"malignant": 63, "benign": 106}
# The case mix: which share of the malignant, and of the benign cases, goes to the cancer centre.
TO_CENTRE: Final = {"malignant": 0.85, "benign": 0.25}
SEED: Final = 7

Row: TypeAlias = "tuple[tuple[float, ...], str]"


@dataclass(frozen=True, slots=True)
class Shares:
    """Rows of (features in the order of BOUNDS, diagnosis)."""

    clinic: tuple[Row, ...]
    centre: tuple[Row, ...]
    held_out: tuple[Row, ...]


def _file() -> Path:
    """The file in scikit-learn's folder; to import scikit-learn would take seconds."""
    found = find_spec("sklearn")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / "datasets" / "data" / "breast_cancer.csv"
        if path.is_file():
            return path
    raise UsageError(
        "usage.extra",
        "The demo's data comes with scikit-learn, which is not installed.",
        mend="Run pip install 'casemate[server]' scikit-learn.",
    )


def load() -> Shares:
    """The table, shared out the same way each time. Raises ``UsageError`` without scikit-learn."""
    with _file().open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    words = lines[0][2:]
    rows = [
        (tuple(float(v) for v in line[WORST : WORST + len(BOUNDS)]), words[int(line[-1])])
        for line in lines[1:]
    ]
    chance = random.Random(SEED)
    chance.shuffle(rows)
    held_out = [r for w, n in HELD_OUT.items() for r in [x for x in rows if x[1] == w][:n]]
    rest = [r for r in rows if r not in held_out]
    to_centre = [chance.random() < TO_CENTRE[word] for _, word in rest]
    return Shares(
        clinic=tuple(r for r, there in zip(rest, to_centre, strict=True) if not there),
        centre=tuple(r for r, there in zip(rest, to_centre, strict=True) if there),
        held_out=tuple(held_out),
    )


def share(rows: tuple[Row, ...], word: str) -> float:
    """The part of ``rows`` that have this diagnosis."""
    return sum(w == word for _, w in rows) / len(rows)


def write(path: Path, rows: tuple[Row, ...]) -> None:
    """A CSV file as a hospital's system would export it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*BOUNDS, LABEL])
        out.writerows([*values, word] for values, word in rows)


def read(path: Path) -> tuple[Row, ...]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return tuple((tuple(float(line[n]) for n in BOUNDS), line[LABEL]) for line in lines)


def scaled(rows: tuple[Row, ...]) -> tuple[list[list[float]], list[int]]:
    """Features mapped from their declared bounds to [-1, 1], and class indices."""
    spans = list(BOUNDS.values())
    x = [
        [2 * (v - low) / (high - low) - 1 for v, (low, high) in zip(values, spans, strict=True)]
        for values, _ in rows
    ]
    return x, [CLASSES.index(word) for _, word in rows]

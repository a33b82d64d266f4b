"""The captured evidence beside the project, one kind at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from casemate.attest import folder

ALL = Path(__file__).resolve().parents[3] / "shared" / "evidence"


def at(text: str) -> float:
    """Unix seconds of a time as about.json writes it."""
    return datetime.fromisoformat(text).timestamp()


@cache
def _about(case: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((case / "about.json").read_text())
    return found


@cache
def _files(case: Path) -> dict[str, bytes]:
    return folder.read(case)


@dataclass(frozen=True)
class Collection:
    """``tee``: the folder's name. Empty where there is no evidence; ``needed`` then skips."""

    tee: str

    @property
    def names(self) -> list[str]:
        here = ALL / self.tee
        return sorted(p.name for p in here.glob("*")) if here.is_dir() else []

    @property
    def needed(self) -> pytest.MarkDecorator:
        reason = "no captured evidence beside the project"
        return pytest.mark.skipif(not self.names, reason=reason)

    def about(self, name: str) -> dict[str, Any]:
        return _about(ALL / self.tee / name)

    def files(self, name: str) -> dict[str, bytes]:
        return _files(ALL / self.tee / name)

    def stated(self, name: str, key: str) -> str:
        """The first word of an expected answer."""
        expected: str = self.about(name)["expect"][key]
        return expected.split()[0].rstrip(":")

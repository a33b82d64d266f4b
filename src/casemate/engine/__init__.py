"""The engine; as a library too, without any server (docs/library.md): ``import casemate.engine``.

Names load their modules, and torch, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

_HOMES: Final = {
    "CasemateError": "casemate.spec.errors",
    "Cost": "casemate.engine.private",
    "Crop": "casemate.spec.job",
    "Flip": "casemate.spec.job",
    "Private": "casemate.engine.private",
    "Views": "casemate.spec.job",
    "groupnorm": "casemate.engine.capture",
    "noise_for": "casemate.engine.private",
}

__all__ = [
    "CasemateError", "Cost", "Crop", "Flip", "Private", "Views", "groupnorm", "noise_for",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'casemate.engine' has no attribute {name!r}")
    found = getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

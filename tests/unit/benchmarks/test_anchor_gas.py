"""docs/anchors.md says what the contract's gas is."""

from __future__ import annotations

import sys
from pathlib import Path

from support.contract import needs_a_chain

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "anchors.md"


def test_the_page_has_the_measured_gas() -> None:
    needs_a_chain()
    from benchmarks import anchor

    assert anchor.table() in PAGE.read_text(), "run python -m benchmarks.anchor"

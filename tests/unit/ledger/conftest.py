"""A store whose ledger the independent checker finds whole at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from casemate.ledger import fsck
from casemate.ledger.store import Store
from support.disk import SimDisk
from support.ledgers import open_store


@pytest.fixture
def store() -> Iterator[Store]:
    made = open_store(SimDisk())
    yield made
    assert not fsck.check(made.all, recompute=True).findings
    made.close()

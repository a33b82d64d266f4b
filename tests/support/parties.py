"""Fixtures: one real server for the tests of a file, its owner and its scientist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Party, RunningServer, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with start(folder / "state") as running:
        yield running


@pytest.fixture(scope="module")
def owner(server: RunningServer) -> Party:
    return Party(server, "owner")


@pytest.fixture(scope="module")
def scientist(server: RunningServer) -> Party:
    return Party(server, "scientist")

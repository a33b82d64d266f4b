"""The default counts of `make torture` (2,000 simulations, 200 kills), slices of its disk errors,
copies and race, and bugs put in on purpose that each of them must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from casemate.ledger import catalog
from casemate.server.config import Limits
from casemate.server.uploads import Uploads
from casemate.spec.errors import CasemateError
from support.disk import SimDisk
from support.ledgers import OWNER, open_store
from torture import bugs, faults, forks, kills, race, rows, sim, syscalls
from torture.model import Model, Violation
from torture.zygote import Zygote, zygote

# While SQLite undoes what a first error stopped, a second one reaches the interpreter only.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SEED = 1
TWICE = [0, pytest.param(1, marks=pytest.mark.full)]


def _sound(part: rows.Part) -> Counter[str]:
    assert not part.wrong, "\n".join(f"{what}\n  {command}" for what, command in part.wrong)
    return part.counts


@pytest.fixture(scope="module")
def servers() -> Iterator[Zygote]:
    with zygote() as made:
        yield made


@pytest.fixture(scope="module")
def template(servers: Zygote) -> Iterator[tuple[Path, Model]]:
    with rows.folder() as folder:
        yield folder, kills.template(servers, folder)


# Simulations.


@pytest.mark.parametrize("part", range(40))
def test_simulated_servers_lose_nothing(part: int) -> None:
    seen = _sound(rows.play_sim(SEED * rows.SPAN + part * 50, 50))
    assert seen["acknowledged"] > 2000 and seen["jobs"] > 20 and seen["crashes"] > 20


def test_a_simulation_replays_from_its_seed() -> None:
    for seed in (3, 11):
        assert sim.run(seed) == sim.run(seed)


@pytest.mark.parametrize("name", bugs.BUGS)
def test_seeded_bug_is_found_by_simulations(name: str) -> None:
    assert bugs.find(name) >= 1


# Copies of the state.


@pytest.mark.parametrize("part", TWICE)
def test_copies_of_the_state_are_refused_or_found(part: int) -> None:
    seen = _sound(rows.play_fork(SEED * rows.SPAN + 10 * part, 10))
    assert sum(seen[by] for by in ("the start", "a witness", "a client", "two clients")) >= 5


def test_seeded_bug_copies_that_nobody_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casemate.server.service.Service.remembers", lambda self, text: None)

    async def never(self: object) -> None:
        pass

    monkeypatch.setattr("casemate.server.publish.Publisher.ask", never)
    found = 0
    for seed in range(20):
        try:
            forks.fork(seed)
        except Violation:
            found += 1
    assert found >= 3


# Disk errors.


@pytest.mark.parametrize("kind", sim.FAULTS)
@pytest.mark.parametrize("fresh", [False, True])
def test_disk_errors_of_a_whole_server(kind: str, fresh: bool) -> None:
    start = 1 + 16 * sim.FAULTS.index(kind)
    assert faults.sweep(kind, start, 64, fresh=fresh) > 5


# Real servers.


@pytest.mark.e2e
@pytest.mark.parametrize("part", range(8))
def test_killed_servers_lose_nothing(
    servers: Zygote, template: tuple[Path, Model], part: int
) -> None:
    folder, begun = template
    found = kills.series(servers, folder, begun, SEED * rows.SPAN + part, 25)
    assert found.kills == 25 and found.acknowledged > 25


@pytest.mark.e2e
def test_servers_killed_at_calls_of_the_disk(servers: Zygote, tmp_path: Path) -> None:
    died = [syscalls.one(servers, tmp_path, n, "seam") for n in range(40, 700, 190)]
    assert any(died)


@pytest.mark.e2e
@pytest.mark.skipif(not syscalls.can_trace(), reason="no process may be traced here")
def test_a_server_killed_by_strace(servers: Zygote, tmp_path: Path) -> None:
    assert syscalls.one(servers, tmp_path, 60, "strace")


@pytest.mark.e2e
def test_sixty_four_clients_on_one_budget(servers: Zygote, tmp_path: Path) -> None:
    found = race.race(servers, tmp_path, 256)
    assert (found.requests, found.granted) == (256, race.fitting(race.budget()))


@pytest.mark.e2e
def test_seeded_bug_a_run_before_its_charge_is_found_by_kills(
    servers: Zygote, template: tuple[Path, Model]
) -> None:
    folder, begun = template
    with pytest.raises(Violation, match=r"without a debit|never reserved"):
        for seed in range(5, 15):  # in some lives no job comes to its turn
            kills.series(servers, folder, begun, seed, 20, bug="reserved after the run")


def test_a_failed_sync_of_an_upload_is_never_taken_for_done() -> None:
    """What the kernel still shows after a failed fsync is not durable: nothing tells of it."""
    for call in range(1, 40):
        disk = SimDisk(call)
        store = open_store(disk)
        catalog.enrol(store, OWNER)
        uploads = Uploads(disk, store, Limits())
        disk.fault = (len(disk.trace) + call, "EIO")
        told = 0
        name = ""
        try:
            name = uploads.begin(OWNER.id, 10)
            told = uploads.append(OWNER.id, name, 0, b"12345")
        except (OSError, CasemateError):
            failed = disk.trace[-1].startswith("sync")
            with suppress(OSError, CasemateError):
                told = uploads.offset(name)  # as a client would ask
                assert not failed
        disk.turn_off()
        store.close()
        after = open_store(disk.power_cycle(), 2)
        if told:
            assert Uploads(after._mount.disk, after, Limits()).offset(name) >= told
        after.close()

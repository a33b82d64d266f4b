"""States that pass on, against real server processes: a backup put back, an operator that keeps
what was lost, consents used twice, a client that remembers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from casemate.cli.main import main
from casemate.client import consents
from casemate.client.connection import Connection
from casemate.client.enclave import connect
from casemate.client.memory import Memory, enclave_name
from casemate.seal.identity import Identity
from casemate.server import state
from casemate.server.config import Config
from casemate.spec import codec
from casemate.spec.data import DatasetInfo
from casemate.spec.errors import CasemateError
from support.server import Party, RunningServer, start

pytestmark = pytest.mark.e2e


def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class World:
    """``folder``: a state with ``dataset``, another owner's ``others``, and a later visit that the
    backup ``file`` lacks."""

    folder: Path
    file: Path
    port: int
    owner: Identity
    dataset: str
    other: Identity
    others: str
    seen: Path


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as e:
        main([str(w) for w in words])
    code = e.value.code
    assert isinstance(code, int)
    return code


def visit(server: RunningServer, memory: Memory | None, identity: Identity) -> None:
    with connect(server.url, trust=server.trust, identity=identity, memory=memory) as enclave:
        enclave.sync()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("passes")
    folder, where = base / "state", port()
    seen = base / "seen"
    with start(folder, port=where) as server:
        party = Party(server, "owner")
        dataset = party.push().dataset
        other = Party(server, "other owner")
        others = other.push().dataset
        visit(server, Memory(seen), party.identity)
        assert server.stop() == 0
    file = base / "state.tar"
    assert command("state", "backup", file, "--dev", "--state", folder) == 0
    with start(folder, port=where, spares=0) as server:  # what the backup does not know
        visit(server, Memory(seen), Identity.generate("later"))
        assert server.stop() == 0
    return World(folder, file, where, party.identity, dataset, other.identity, others, seen)


def restored(world: World, to: Path) -> Path:
    assert command("state", "restore", world.file, "--dev", "--state", to) == 0
    shutil.copytree(world.folder / "tee", to / "tee")  # the simulated machine
    return to


def memory(world: World, to: Path) -> Memory:
    shutil.copytree(world.seen, to)
    return Memory(to)


def show(folder: Path) -> dict[str, object]:
    with state.at(Config(state=folder, dev=True)) as place:
        return state.show(place)


def recovered(
    world: World, folder: Path, to: Path, *, rest: bool = False
) -> consents.RecoveryRequest:
    """The ceremony, with the owner's consent."""
    asked = to / "ask.json"
    assert command("state", "recover", asked, "--dev", "--state", folder) == 0
    request = consents.load_request(asked)
    given = to / "consent"
    envelope = consents.to_recovery(request, world.dataset, world.owner, newest=None, rest=rest)
    given.write_text(envelope + "\n")
    words = ("state", "recover", asked, "--consent", given, "--dev", "--state", folder)
    assert command(*words) == 0
    return request


def test_a_restored_state_is_not_served(world: World, tmp_path: Path) -> None:
    folder = restored(world, tmp_path / "state")
    with pytest.raises(RuntimeError, match=r"ledger\.restored"), start(folder, spares=0):
        pass


def test_taking_the_mark_away_does_not_help(world: World, tmp_path: Path) -> None:
    """A dishonest operator: the first client that saw more refuses, and so does the server."""
    folder = restored(world, tmp_path / "state")
    (folder / "ledger" / "restored.json").unlink()
    known = memory(world, tmp_path / "seen")
    with start(folder, port=world.port, spares=0) as server:
        with pytest.raises(CasemateError) as e:
            visit(server, known, world.owner)
        assert e.value.code in ("receipt.rolled-back", "receipt.fork", "ledger.rolled-back")
        assert server.process.wait(60) != 0
        assert "ledger.rolled-back" in server.log.read_text()
    with pytest.raises(RuntimeError, match=r"ledger\.restored"), start(folder, spares=0):
        pass


def test_the_ceremony_and_the_clients(world: World, tmp_path: Path) -> None:
    """The server serves after the owner's consent; a client that saw more is told, and follows."""
    folder = restored(world, tmp_path / "state")
    asked = recovered(world, folder, tmp_path)
    assert show(folder)["origin"] == asked.next
    known = memory(world, tmp_path / "seen")
    with start(folder, port=world.port, spares=0) as server:
        with pytest.warns(UserWarning, match="2 entries that this client saw are not in it"):
            visit(server, known, world.owner)
        with consents.met(asked, server.url, server.trust, world.owner, known) as enclave:
            (info,) = list(enclave.datasets.list())
            assert isinstance(info, DatasetInfo)
            assert (info.dataset, info.state) == (world.dataset, "ready")
            checkpoint = enclave.sync()
            assert checkpoint is not None and checkpoint.origin == asked.next
        visit(server, known, world.owner)
        assert server.stop() == 0


def test_the_owner_consents_to_a_server_that_runs(world: World, tmp_path: Path) -> None:
    """Another owner's word let it start; this owner's dataset waits for the command."""
    folder = restored(world, tmp_path / "state")
    request = tmp_path / "ask.json"
    assert command("state", "recover", request, "--dev", "--state", folder) == 0
    asked = consents.load_request(request)
    with state.at(Config(state=folder, dev=True)) as place:
        word = consents.to_recovery(asked, world.others, world.other, newest=None, rest=False)
        state.recover(place, asked, [word])
    known = memory(world, tmp_path / "seen")
    with start(folder, port=world.port, spares=0) as server:
        with consents.met(asked, server.url, server.trust, world.owner, known) as enclave:
            assert enclave.datasets.show(world.dataset).info.state == "frozen"
            seen = consents.compare(asked, known)
            assert seen.compared and seen.lost > 0
            given = consents.to_recovery(
                asked, world.dataset, world.owner, newest=seen.newest, rest=True
            )
            info = enclave.datasets.give(world.dataset, given).info
            assert info.state == "ready"
            assert info.budget is not None and info.budget.left_epsilon == 0.0
        assert server.stop() == 0


def test_an_edited_request_needs_the_owners_all_the_same(world: World, tmp_path: Path) -> None:
    """The operator takes the datasets out of the file; then nobody would have to consent."""
    folder = restored(world, tmp_path / "state")
    asked, none = tmp_path / "ask.json", tmp_path / "none"
    assert command("state", "recover", asked, "--dev", "--state", folder) == 0
    edited = dataclasses.replace(consents.load_request(asked), datasets=())
    asked.write_bytes(codec.encode(edited))
    none.write_text("")
    words = ("state", "recover", asked, "--consent", none, "--dev", "--state", folder)
    assert command(*words) == 21
    with pytest.raises(RuntimeError, match=r"ledger\.restored"), start(folder, spares=0):
        pass


def test_another_enclave_cannot_pose_as_the_recovered_one(world: World, tmp_path: Path) -> None:
    folder = restored(world, tmp_path / "state")
    asked = recovered(world, folder, tmp_path)
    with start(tmp_path / "other", spares=0) as server:
        known = memory(world, tmp_path / "seen")
        with pytest.raises(CasemateError) as e:
            consents.met(asked, server.url, server.trust, world.owner, known)
        assert e.value.code == "receipt.log-replaced"
        assert known.log_of(enclave_name(server.url, server.facts["root"])) is None


def test_one_consent_does_not_serve_two_restores(world: World, tmp_path: Path) -> None:
    """The operator runs the backup to its end, then restores it again with the same consent."""
    first = restored(world, tmp_path / "first")
    asked = recovered(world, first, tmp_path)
    second = restored(world, tmp_path / "second")
    words = ("state", "recover", tmp_path / "ask.json", "--consent", tmp_path / "consent", "--dev",
             "--state", second)  # fmt: skip
    assert command(*words) == 21
    again = tmp_path / "again.json"
    assert command("state", "recover", again, "--dev", "--state", second) == 0
    assert consents.load_request(again).next != asked.next
    words = ("state", "recover", again, *words[3:])
    assert command(*words) == 8
    with pytest.raises(RuntimeError, match=r"ledger\.restored"), start(second, spares=0):
        pass


def test_two_branches_of_a_recovery_are_a_fork(world: World, tmp_path: Path) -> None:
    """After the ceremony its own copy is put back: clients of the new log find it like any other
    rollback."""
    folder = restored(world, tmp_path / "state")
    asked = recovered(world, folder, tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    known = memory(world, tmp_path / "seen")
    with start(folder, port=world.port, spares=0) as server:
        consents.met(asked, server.url, server.trust, world.owner, known).close()
        visit(server, known, world.owner)
        assert server.stop() == 0
    with start(tmp_path / "copy", port=world.port, spares=0) as server:
        with pytest.raises(CasemateError) as e:
            visit(server, known, world.owner)
        assert e.value.code in ("receipt.rolled-back", "receipt.fork", "ledger.rolled-back")


def test_the_lost_state_and_the_recovered_one_spend_one_budget(
    world: World, tmp_path: Path
) -> None:
    """The operator kept what it said was lost. With ``rest`` the two together hold the budget."""
    folder = restored(world, tmp_path / "state")
    recovered(world, folder, tmp_path, rest=True)
    with start(folder, spares=0) as server:
        connection = Connection(server.url, trust=server.trust, identity=world.owner)
        with contextlib.closing(connection):
            path = f"/v1/datasets/{world.dataset}"
            info = connection.request("GET", path).value(DatasetInfo)
            assert info.budget is not None and info.budget.left_epsilon == 0.0
            assert json.loads(connection.request("GET", "/v1/quotes").body) == []
        assert server.stop() == 0

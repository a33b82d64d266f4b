"""An operator that restores an older state, or runs it twice, against clients that remember: real
server processes, their real folder copied and put back."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from casemate.cli.main import main
from casemate.client import log as logs
from casemate.client import memory as memories
from casemate.client.connection import CHECKPOINT_HEADER, Connection
from casemate.client.datasets import Datasets
from casemate.client.enclave import connect
from casemate.client.memory import Memory, Mirror
from casemate.seal import checkpoint, note
from casemate.seal.identity import Identity
from casemate.spec.errors import CasemateError, LedgerError, ReceiptError
from support import rfc6962
from support.server import Party, RunningServer, start

pytestmark = pytest.mark.e2e


def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def visit(server: RunningServer, memory: Memory | None, name: str = "someone") -> None:
    """Somebody new enrols, which is one entry of the log."""
    with connect(
        server.url, trust=server.trust, identity=Identity.generate(name), memory=memory
    ) as enclave:
        enclave.sync()


@dataclass
class World:
    """``old``: the state after a first visit; ``new``: after a restart and a second one.
    ``folder``: what the visitor of both remembers."""

    old: Path
    new: Path
    folder: Path
    port: int

    def memory(self, where: Path) -> Memory:
        """The visitor's memory, a copy for one test."""
        shutil.copytree(self.folder, where)
        return Memory(where)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("rollback")
    made = World(folder / "old", folder / "new", folder / "seen", port())
    memory = Memory(made.folder)
    for kept in (made.old, made.new):
        with start(folder / "state", spares=0, port=made.port) as server:
            visit(server, memory)
            assert server.stop() == 0
        shutil.copytree(folder / "state", kept)
    (log,) = memory.enclaves().values()
    seen = memory.mirror(log.key).seen()
    assert seen is not None and seen.head.size == 4, "two starts, two visits: a restart is no fork"
    return made


def head(memory: Memory) -> memories.Seen:
    (log,) = set(memory.enclaves().values())
    seen = memory.mirror(log.key).seen()
    assert seen is not None
    return seen


def state(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def test_a_restored_state_is_noticed_by_the_first_who_saw_more(world, tmp_path):
    memory = world.memory(tmp_path / "seen")
    before = head(memory)
    with start(state(world.old, tmp_path / "state"), spares=0, port=world.port) as server:
        # Whoever remembers nothing cannot know.
        visit(server, None, "newcomer")
        with pytest.raises(ReceiptError) as caught:
            visit(server, memory)
        assert caught.value.code in ("receipt.fork", "receipt.rolled-back")
        (proof,) = memory.proofs.iterdir()
        kept = [checkpoint.verify(note.parse((proof / n).read_bytes()), before.key)
                for n in ("seen", "shown")]  # fmt: skip
        assert kept[0] == before.head and kept[1].root != before.head.root
        # The server heard of it: it says so, serves nobody, and ends.
        assert server.process.wait(60) != 0
        assert "ledger.rolled-back" in server.log.read_text()
    assert head(memory) == before, "what was seen stays seen"


def test_a_server_refuses_who_has_seen_more(world, tmp_path):
    """Without the client's own check: only the header speaks."""
    seen = head(world.memory(tmp_path / "seen"))
    with start(state(world.old, tmp_path / "state"), spares=0) as server:
        someone = Identity.generate("someone")
        connection = Connection(server.url, trust=server.trust, identity=someone)
        known = {CHECKPOINT_HEADER: memories.header(seen.signed, seen.key)}
        with pytest.raises(LedgerError) as caught:
            connection.request(
                "PUT", f"/v1/identities/{someone.id}", someone.public, headers=known, retry=False
            )
        assert caught.value.code == "ledger.rolled-back"
        with pytest.raises(CasemateError):
            visit(server, None)
        assert server.process.wait(60) != 0


def test_a_revocation_that_was_acknowledged_is_not_rolled_back_unseen(tmp_path):
    """The state is copied while the server runs, the server killed after its answer, the copy put
    back: the owner's next connection finds it."""
    place, memory = port(), Memory(tmp_path / "seen")
    with start(tmp_path / "state", port=place) as server:
        party = Party(server, "owner")
        party.connection = Connection(
            server.url, trust=server.trust, identity=party.identity, memory=memory
        )
        dataset = party.push().dataset
        shutil.copytree(tmp_path / "state", tmp_path / "copy")
        Datasets(party.connection).revoke(dataset)
        assert party.dataset(dataset).state == "revoked"
        server.stop(signal.SIGKILL)
        party.connection.close()
    with start(tmp_path / "copy", port=place) as server:
        party.connection = Connection(
            server.url, trust=server.trust, identity=party.identity, memory=memory
        )
        with pytest.raises(ReceiptError) as caught:
            party.dataset(dataset)
        assert caught.value.code in ("receipt.fork", "receipt.rolled-back")
        assert server.process.wait(60) != 0, "the server heard of it"


def run(home: Path, *arguments: str) -> tuple[int, dict]:
    """The command line with this home, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("CASEMATE_")]:
            patch.delenv(name)
        patch.setenv("CASEMATE_HOME", str(home))
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
            main([*arguments, "--format", "json"])
    code = caught.value.code or 0
    return int(code), json.loads(err.getvalue() if code else out.getvalue())


def test_two_clones_are_found_by_two_clients_who_compare(world, tmp_path):
    """One state, two machines, two owners who each see one of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        start(state(world.new, tmp_path / "a"), spares=0) as first,
        start(state(world.new, tmp_path / "b"), spares=0) as second,
    ):
        assert first.facts["root"] == second.facts["root"]
        for home, server in ((one, first), (two, second)):
            for name in ("first", "second"):
                visit(server, Memory(home / "logs"), name)
            trust = f"simulated:{server.facts['root']}"
            code, seen = run(home, "audit", "sync", "-e", server.url, "--trust", trust)
            assert (code, seen["entries"]) == (0, 7)
            (home / "checkpoint").write_text(seen["checkpoint"])
            code, found = run(
                home, "audit", "mirror", str(home / "log"), "-e", server.url, "--trust", trust
            )
            assert (code, found["entries"]) == (0, 7)
        # Each for itself sees nothing wrong; together they see the fork.
        older = tmp_path / "older"
        older.write_text(str(head(world.memory(tmp_path / "seen")).signed))
        for home in (one, two):
            code, found = run(home, "audit", "compare", str(older), str(home / "checkpoint"))
            assert (code, found["relation"]) == (0, "second-extends-first")
            code, found = run(home, "audit", "verify", "--dir", str(home / "log"),
                              "--trust", "simulated")  # fmt: skip
            assert (code, found["kinds"]) == (0, {"start": 3, "identity": 4})
        for other in (two / "checkpoint", two / "log"):
            code, error = run(one, "audit", "compare", str(one / "checkpoint"), str(other))
            assert (code, error["error"]["code"]) == (20, "receipt.fork")
        (proof,) = (one / "logs" / "forks").iterdir()
        assert {(proof / n).read_text() for n in ("seen", "shown")} == {
            (h / "checkpoint").read_text() for h in (one, two)
        }
        # A mirror of the one against what the other saw.
        code, error = run(two, "audit", "verify", "--dir", str(one / "log"), "--trust", "simulated")
        assert (code, error["error"]["code"]) == (20, "receipt.fork")
        # And by one client that comes to both ports.
        with pytest.raises(ReceiptError) as caught:
            visit(second, Memory(one / "logs"))
        assert caught.value.code == "receipt.fork"
        # Read by a verifier that shares nothing with this one.
        key = head(Memory(one / "logs")).key
        leaves = rfc6962.read(one / "log", key.name, key.key)
        assert len(leaves) == 7
        log = logs.read(one / "log", first.trust)
        assert list(log.leaves) == leaves
        assert Mirror(one / "log").root(5) == rfc6962.mth(leaves[:5])


def test_a_new_state_at_a_known_address_is_refused_until_it_is_forgotten(world, tmp_path):
    """The operator begins anew under the same simulated TEE: budgets would be fresh."""
    fresh = tmp_path / "fresh"
    shutil.copytree(world.new / "tee", fresh / "tee")
    home = tmp_path / "home"
    world.memory(home / "logs")
    with start(fresh, spares=0, port=world.port) as server:
        target = ("-e", server.url, "--trust", f"simulated:{server.facts['root']}")
        code, error = run(home, "audit", "sync", *target)
        assert (code, error["error"]["code"]) == (20, "receipt.log-replaced")
        assert "casemate enclave forget" in error["error"]["mend"]
        code, found = run(home, "enclave", "forget", server.url, "--yes")
        assert (code, len(found["logs"])) == (0, 1)
        assert run(home, "audit", "sync", *target)[0] == 0
    assert urlsplit(server.url).port == world.port

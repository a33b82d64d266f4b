"""``casemate state`` and ``casemate dataset consent`` on real folders, no server running."""

import fcntl
import json
import os
import shutil

import pytest

from casemate import seams
from casemate.cli.main import main
from casemate.client.memory import Memory
from casemate.ledger import catalog, consent, log, recovery
from casemate.seal import dsse, tiles
from casemate.seal.identity import Identity
from casemate.seams import OsDisk, OsRng
from casemate.server import keeping, state
from casemate.server.config import Config
from casemate.spec import codec, merkle
from casemate.spec.consent import RecoveryConsent
from casemate.tee import simulated
from support import passing
from support.desk import AutoClock, WitnessNet, fresh_disk
from support.ledgers import OPEN, attestation, boot, changed_policy, dataset_id, push, queue, run
from support.passing import to_software
from support.witness import FakeWitness

NEW = "bb" * 48


class Cli:
    def __init__(self, capsys, folder):
        self.capsys, self.folder = capsys, folder

    def run(self, *words):
        """(exit code, stdout, stderr)"""
        with pytest.raises(SystemExit) as e:
            main([str(w) for w in words])
        out, err = self.capsys.readouterr()
        return e.value.code, out, err

    def json(self, *words):
        code, out, err = self.run(*words, "--format", "json")
        assert code == 0, err
        return json.loads(out)

    def state(self, *words, at=None):
        return self.json("state", *words, "--dev", "--state", at or self.folder)

    def refused(self, *words, at=None):
        """The error's code."""
        given = [] if words[0] == "dataset" else ["--dev", "--state", at or self.folder]
        code, _, err = self.run(*words, *given, "--format", "json")
        assert code != 0
        return json.loads(err.splitlines()[-1])["error"]["code"]


def started(folder, number):
    here = state.open_place(
        Config(state=folder, dev=True), OsDisk(folder), rng=OsRng(), clock=AutoClock()
    )
    found = keeping.open_store(here.disk, here.tee, boot(number), OsRng())
    recovery.start(found, attestation(found), software="t", measurement=here.tee.measurement)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A state folder, its owner's home, the dataset."""
    folder = tmp_path_factory.mktemp("state") / "state"
    for path, data in fresh_disk().snapshot().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    home = folder.parent / "home"
    owner = Identity.generate("owner")
    owner.save(home / "identity.json")
    found = started(folder, 1)
    dataset = push(found, "a", owner.public)
    push(found, "b", passing.owner("second").public)
    run(found, queue(found, "1", (dataset,)))
    found.close()
    (folder / "uploads").mkdir()
    (folder / "uploads" / "up_1").write_bytes(b"sealed")
    return folder, home, owner, dataset


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, made):
    """Commands on a copy of the state."""
    for name in ("CASEMATE_STATE", "CASEMATE_TEE", "CASEMATE_FORMAT", "CASEMATE_LOGS"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(made[1], tmp_path / "home")
    shutil.copytree(made[0], tmp_path / "state")
    monkeypatch.setenv("CASEMATE_HOME", str(tmp_path / "home"))
    return Cli(capsys, tmp_path / "state")


def machine(cli, folder):
    """What stands for the simulated machine goes along by its own way."""
    shutil.copytree(cli.folder / "tee", folder / "tee", dirs_exist_ok=True)


def test_backup_and_restore(cli, tmp_path):
    file, other = tmp_path / "backups" / "state.tar", tmp_path / "other"
    made = cli.state("backup", file)
    shown = cli.state("show")
    assert shown["checkpoint"] == made["checkpoint"]
    assert cli.state("restore", file, "--check")["files"] == made["files"] == 2
    assert cli.state("restore", file, at=other)["checkpoint"] == made["checkpoint"]
    machine(cli, other)
    found = cli.state("show", at=other)
    assert found.pop("restored") is True and shown.pop("restored") is False
    assert found == shown
    assert (other / "uploads" / "up_1").read_bytes() == b"sealed"
    assert oct((other / "ledger" / "store.db").stat().st_mode)[-3:] == "600"
    assert cli.refused("state", "restore", file, at=other) == "ledger.restore"
    code, out, err = cli.run("state", "restore", file, "--dev", "--state", tmp_path / "third")
    assert code == 0 and "state confirm" in err and "entries" in out


def test_a_backup_without_a_tee(cli, tmp_path):
    file = tmp_path / "state.tar"
    shutil.rmtree(cli.folder / "tee")
    assert cli.state("backup", file, "--unopened")["checkpoint"] is None
    code, out, _ = cli.run("state", "restore", file, "--check")
    assert code == 0 and "not opened" in out


def test_a_running_server_is_not_disturbed(cli, tmp_path):
    fd = os.open(cli.folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        for words in (("backup", tmp_path / "x"), ("rotate",), ("show",),
                      ("recover", tmp_path / "x")):  # fmt: skip
            assert cli.refused("state", *words) == "ledger.in-use"
    finally:
        os.close(fd)


def test_there_is_no_state(cli, tmp_path):
    empty = tmp_path / "nothing"
    for words in (("backup", tmp_path / "x"), ("rotate",), ("show",), ("recover", tmp_path / "x"),
                  ("confirm", "--witness", "https://w")):  # fmt: skip
        assert cli.refused("state", *words, at=empty) == "ledger.missing"
    assert not empty.exists()


def test_a_damaged_backup(cli, tmp_path):
    file = tmp_path / "state.tar"
    cli.state("backup", file)
    file.write_bytes(file.read_bytes()[:-4096])
    data = bytearray(file.read_bytes())
    data[4096] ^= 1
    file.write_bytes(bytes(data))
    assert cli.refused("state", "restore", file, at=tmp_path / "o") == "format.backup"
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["lock"]


@pytest.mark.parametrize("name", ["ledger/store.db", "monday.tar"])
def test_a_backup_never_goes_over_what_it_is_of(cli, name):
    before = (cli.folder / "ledger" / "store.db").read_bytes()
    assert cli.refused("state", "backup", cli.folder / name) == "usage.file"
    assert (cli.folder / "ledger" / "store.db").read_bytes() == before
    assert not (cli.folder / "monday.tar").exists()


def test_files_that_are_no_text(cli, tmp_path):
    (tmp_path / "octets").write_bytes(b"\xff\xfe\n")
    ask = tmp_path / "ask.json"
    assert cli.refused("state", "recover", ask, "--newest", tmp_path / "octets") == "format.note"
    cli.state("recover", ask)
    assert (
        cli.refused("state", "recover", ask, "--consent", tmp_path / "octets") == "policy.consent"
    )


def test_a_folder_that_is_not_there(cli, tmp_path):
    for words in (("recover", tmp_path / "no" / "ask"),
                  ("take-over", "--request", tmp_path / "no" / "ask")):  # fmt: skip
        assert cli.refused("state", *words) == "usage.file"


def test_rotate(cli):
    assert cli.state("rotate")["generation"] == 1
    assert cli.state("show")["generation"] == 1
    code, out, _ = cli.run("state", "rotate", "--dev", "--state", cli.folder)
    assert code == 0 and "generation 2" in out


def restored(cli, tmp_path):
    file, other = tmp_path / "state.tar", tmp_path / "other"
    cli.state("backup", file)
    cli.state("restore", file, at=other)
    machine(cli, other)
    return other


def test_confirm(cli, tmp_path, monkeypatch, made):
    _, _, owner, dataset = made
    found = started(cli.folder, 2)
    w = FakeWitness(logs=[log.key(found).verifier])
    policy = changed_policy(OPEN, witnesses=(w.vkey,), cosignatures=1)
    second = passing.owner("second")
    for name, by in ((dataset, owner), (dataset_id("b"), second)):
        catalog.set_policy(found, name, by.id, policy)
    found.close()
    other = restored(cli, tmp_path)
    monkeypatch.setattr(seams, "HttpNet", lambda: WitnessNet({"https://w": w}))
    w.conduct = "down"
    words = ("state", "confirm", "--witness", "https://w")
    assert cli.refused(*words, at=other) == "ledger.restored"
    w.conduct = "honest"
    assert cli.state(*words[1:], at=other) == {"witnesses": [w.name]}
    assert cli.state("show", at=other)["restored"] is False


def test_the_ceremony(cli, tmp_path, made):
    dataset = made[3]
    other, asked, given = restored(cli, tmp_path), tmp_path / "ask.json", tmp_path / "consent"
    first = cli.state("recover", asked, at=other)
    assert first["recovered"] is False and len(first["datasets"]) == 2
    consents = ("dataset", "consent", "--recovery", asked, "--assume", "rest", "--out", given)
    said = cli.json(*consents)
    assert (said["datasets"], said["lost"], said["compared"]) == ([dataset], 0, False)
    done = cli.state("recover", asked, "--consent", given, at=other)
    assert done["recovered"] is True and dataset not in done["frozen"] and len(done["frozen"]) == 1
    shown = cli.state("show", at=other)
    assert (shown["origin"], shown["restored"]) == (first["next"], False)
    second = Identity.generate("x")
    second.save(tmp_path / "home" / "x.json")
    assert cli.refused(*consents, "-i", "x.json") == "usage.datasets"
    # The other owner's word comes later.
    by, (waiting,) = passing.owner("second"), done["frozen"]
    by.save(tmp_path / "home" / "second.json")
    later = tmp_path / "later"
    cli.json("dataset", "consent", waiting, "--recovery", asked, "--assume", "none",
             "--out", later, "-i", "second.json")  # fmt: skip
    assert cli.state("recover", asked, "--consent", later, at=other)["frozen"] == []
    code, out, _ = cli.run("state", "show", "--dev", "--state", other)
    assert code == 0 and first["next"] in out


def remembered(folder, upto):
    """What an owner's client has seen of the log: its hashes and a head."""
    found = started(folder, 30)
    try:
        signed = log.sign(found)
        size = found.size()

        def get(path):
            if path == "checkpoint":
                return str(signed).encode()
            return tiles.hashes(tiles.read_path(path), found.node)

        Memory().mirror(log.key(found).public).extend(log.key(found).public, get)
        assert size > upto
        return size, merkle.root(size, found.node)
    finally:
        found.close()


def test_the_owner_is_told_what_is_lost(cli, tmp_path, made):
    dataset = made[3]
    other, asked, given = restored(cli, tmp_path), tmp_path / "ask.json", tmp_path / "consent"
    size = cli.state("recover", asked, at=other)["entries"]
    newest, _ = remembered(cli.folder, size)
    words = ("dataset", "consent", dataset, "--recovery", asked, "--assume", "rest", "--out", given)
    said = cli.json(*words)
    assert (said["lost"], said["compared"]) == (newest - size, True)
    payload = dsse.verify(given.read_text().strip(), {made[2].id: made[2].public.sign_key})[1]
    assert codec.decode(RecoveryConsent, payload).newest.size == newest
    # A request that names another history than the one seen.
    shown = json.loads(asked.read_text())
    shown["head"]["root"] = "A" * 43
    asked.write_text(json.dumps(shown, separators=(",", ":"), sort_keys=True) + "\n")
    assert cli.refused(*words) == "receipt.fork"
    shown["head"]["origin"] = "casemate.dev/log/../../x"
    asked.write_text(json.dumps(shown, separators=(",", ":"), sort_keys=True) + "\n")
    assert cli.refused(*words) == "usage.value"
    assert cli.refused(*words[:4], tmp_path / "state.tar", *words[5:]).startswith("format.")


def test_an_upgrade(cli, tmp_path, made, monkeypatch):
    _, _, owner, dataset = made
    old = simulated.measurement()
    found = started(cli.folder, 3)
    for by, name in ((owner, dataset),):
        consent.give(found, to_software(found, name, NEW, by=by), by.id)
    found.close()
    asked = tmp_path / "request.json"
    monkeypatch.setattr(simulated, "measurement", lambda: bytes.fromhex(NEW))
    assert cli.state("take-over", "--request", asked) == {"measurement": NEW, "taken": False}
    assert cli.refused("state", "take-over") == "ledger.handover"
    monkeypatch.setattr(simulated, "measurement", lambda: old)
    assert cli.refused("state", "hand-over", asked) == "ledger.consent-missing"
    done = cli.state("hand-over", asked, "--drop")
    assert done["measurement"] == NEW and len(done["dropped"]) == 1
    assert cli.state("show")["handed_over"] == NEW
    code, out, _ = cli.run("state", "hand-over", asked, "--dev", "--state", cli.folder)
    assert code == 0 and "did not sign" in " ".join(out.split())
    monkeypatch.setattr(simulated, "measurement", lambda: bytes.fromhex(NEW))
    assert cli.state("take-over") == {"measurement": NEW, "taken": True}
    assert cli.state("show")["handed_over"] is None


@pytest.mark.parametrize(
    "words",
    [
        (), ("ds_1",), ("ds_1", "--measurement", NEW, "--withdraw"), ("--measurement", NEW),
        ("ds_1", "--measurement", NEW, "--assume", "rest"), ("ds_1", "--measurement", NEW,
        "--out", "x"), ("--recovery", __file__),
        ("ds_1", "--measurement", NEW, "-e", "https://x", "--trust", "policy.toml"),
    ],
)  # fmt: skip
def test_usage(cli, words):
    assert cli.refused("dataset", "consent", *words) == "usage.arguments"


def test_fsck_shows_the_head_and_compares_one(cli, tmp_path):
    shown = cli.state("show")
    other = restored(cli, tmp_path)
    found = started(cli.folder, 2)
    kept = tmp_path / "kept"
    kept.write_text(str(log.sign(found)))
    found.close()
    for folder, lacks in ((cli.folder, False), (other, True)):
        words = ("audit", "fsck", folder, "--tee", "simulated", "--checkpoint", kept)
        _, out, _ = cli.run(*words, "--format", "json")
        said = json.loads(out)
        assert said["origin"] == shown["origin"]
        assert any("the log lacks entries" in f for f in said["findings"]) == lacks
    assert (said["entries"], said["root"]) == (shown["entries"], shown["root"])


def test_a_scientists_budget_for_anyone_is_warned_of(cli, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("x\n1\n")
    words = ("dataset", "push", table, "--epsilon", "1", "--delta", "1e-6", "--scientist-budget",
             "0.5", "1e-7", "--enclave", "https://127.0.0.1:1")  # fmt: skip
    for scientist, warned in (("*", True), (f"id_{'0' * 40}", False)):
        _, _, err = cli.run(*words, "--scientist", scientist)
        assert ("binds nobody" in err) == warned

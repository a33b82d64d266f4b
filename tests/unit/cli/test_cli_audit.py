"""The audit commands on a log in memory: what holds, what is refused, what is kept as proof."""

from __future__ import annotations

import json
import shutil

import pytest

from casemate.cli import config
from casemate.cli.main import main
from casemate.client.memory import Memory
from casemate.seams import OsDisk, OsRng, SystemClock
from casemate.server.attestation import attest_now, boot_nonce
from casemate.spec import codec
from casemate.spec.errors import UsageError
from casemate.spec.log import Enrolled, Started
from casemate.tee.simulated import SimulatedTee
from support.evidence import PROMISES
from support.fake_enclave import FakeEnclave
from support.publog import PublicLog, Witness, keys_of


@pytest.fixture(scope="module")
def tee(tmp_path_factory) -> SimulatedTee:
    return SimulatedTee(OsDisk(tmp_path_factory.mktemp("tee")), OsRng(), SystemClock())


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("CASEMATE_LOGS", "CASEMATE_TRUST", "CASEMATE_ENCLAVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CASEMATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Lab:
    """A fake enclave whose log begins with a start that its evidence covers."""

    def __init__(self, tee: SimulatedTee) -> None:
        self.tee, self.log = tee, PublicLog()
        self.start()
        self.fake = FakeEnclave(
            attest=lambda nonce: attest_now(tee, self.keys, PROMISES, [nonce])[0],
            context=self.keys.tls.context,
            log=self.log,
        ).start()

    def start(self, *, boot=None, log=None, digest=None) -> None:
        """A start, by its own keys or with something amiss."""
        self.keys = keys_of(self.log)
        shown = self.keys if log is None else keys_of(log, self.keys.boot)
        attestation = attest_now(self.tee, shown, PROMISES, [boot_nonce(shown.boot)])[0]
        raw = codec.encode(attestation)
        said = digest or codec.digest(attestation)
        self.log.files[f"attestation/{said.removeprefix('sha256:')}"] = raw
        body = Started(software="casemate test", measurement="00", attestation=said)
        name = boot or self.keys.boot
        self.log.append("start", name.hex(), body, name)

    def enrol(self, name: str) -> None:
        self.log.append("identity", name, Enrolled(identity=name), self.keys.boot)

    def copy(self, folder, **changes) -> None:
        """The log as static files."""
        from casemate.seal import tiles

        files = {t.path for t in tiles.tiles(len(self.log.leaves))} | {"checkpoint"}
        for path in files | set(self.log.files):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(changes.get(path) or self.log.file(path))


@pytest.fixture
def lab(tee):
    made = Lab(tee)
    yield made
    made.fake.stop()


def call(capsys, *arguments: str) -> tuple[int, dict]:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--format", "json"])
    shown = capsys.readouterr()
    code = int(caught.value.code or 0)
    return code, json.loads(shown.err if code else shown.out)


def target(lab) -> tuple[str, ...]:
    return ("-e", lab.fake.url, "--trust", "simulated")


def test_verify_needs_no_identity_and_shows_what_follows(capsys, home, lab):
    lab.enrol("id_a")
    code, found = call(capsys, "audit", "verify", *target(lab))
    assert code == 0
    assert found["kinds"] == {"start": 1, "identity": 1}
    assert found["starts"][0]["simulated"] is True and found["simulated"] is True
    states = {c["name"]: c["state"] for c in found["checks"]}
    assert states == {"witnesses": "unchecked", "seen before": "ok"}
    with pytest.raises(SystemExit) as caught:
        main(["audit", "verify", *target(lab)])
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "SIMULATED" in shown and "1 of 1 with evidence that holds" in shown


def test_sync_sees_what_is_new_and_refuses_a_fork(capsys, home, lab):
    code, found = call(capsys, "audit", "sync", *target(lab))
    assert (code, found["entries"], found["new"]) == (0, 1, 1)
    lab.enrol("id_a")
    code, found = call(capsys, "audit", "sync", *target(lab))
    assert (code, found["entries"], found["new"]) == (0, 2, 1)
    fork = lab.log.fork(1)
    fork.append("identity", "id_b", Enrolled(identity="id_b"), lab.keys.boot)
    lab.fake.log = fork
    code, error = call(capsys, "audit", "sync", *target(lab))
    assert (code, error["error"]["code"]) == (20, "receipt.fork")
    assert len(list((home / "logs" / "forks").iterdir())) == 1


def test_impossible_entries_are_refused_though_they_are_signed(capsys, home, lab):
    lab.enrol("id_a")
    lab.enrol("id_a")
    code, error = call(capsys, "audit", "verify", *target(lab))
    assert (code, error["error"]["code"]) == (20, "receipt.log-impossible")


AMISS = {
    "another boot": {"boot": bytes(16)},
    "another log": {"log": PublicLog()},
    "another attestation": {"digest": "sha256:" + "0" * 64},
}


@pytest.mark.parametrize("name", AMISS)
def test_every_start_must_show_its_evidence(capsys, home, lab, name):
    first = lab.keys
    lab.start(**AMISS[name])
    lab.keys = first  # the connection's own evidence is fine
    code, error = call(capsys, "audit", "verify", *target(lab))
    assert (code, error["error"]["code"]) == (20, "receipt.log-attestation")
    assert error["error"]["where"] == "entry 1"


def test_older_starts_may_be_left_out(capsys, home, lab):
    lab.log.files.clear()
    lab.start()
    lab.fake.stop()
    lab.fake.context = lab.keys.tls.context
    lab.fake.start()
    code, error = call(capsys, "audit", "verify", *target(lab))
    assert (code, error["error"]["code"]) == (20, "receipt.log-attestation")
    code, found = call(capsys, "audit", "verify", "--starts", "last", *target(lab))
    assert (code, len(found["starts"])) == (0, 1)


def test_a_folder_is_audited_offline(capsys, home, lab, tmp_path):
    lab.enrol("id_a")
    lab.copy(tmp_path / "files")  # by any tlog client: no file of ours beside it
    folder = ("audit", "verify", "--dir", str(tmp_path / "files"), "--trust", "simulated")
    code, found = call(capsys, *folder)
    assert (code, found["entries"]) == (0, 2)
    code, made = call(capsys, "audit", "mirror", str(tmp_path / "mirror"), *target(lab))
    assert (code, made["new"]) == (0, 2)
    lab.enrol("id_b")
    code, made = call(capsys, "audit", "mirror", str(tmp_path / "mirror"), *target(lab))
    assert (code, made["entries"], made["new"]) == (0, 3, 1)
    code, found = call(
        capsys, "audit", "verify", "--dir", str(tmp_path / "mirror"), "--trust", "simulated"
    )
    assert (code, found["entries"]) == (0, 3)
    assert call(capsys, *folder[:-2])[1]["error"]["code"] == "usage.trust"


@pytest.mark.parametrize("path", ["checkpoint", "tile/entries/000.p/2"])
def test_a_folder_that_was_changed_is_refused(capsys, home, lab, tmp_path, path):
    lab.enrol("id_a")
    raw = bytearray(lab.log.file(path))
    raw[len(raw) // 2] ^= 1
    lab.copy(tmp_path, **{path: bytes(raw)})
    code, _ = call(capsys, "audit", "verify", "--dir", str(tmp_path), "--trust", "simulated")
    assert code in (3, 20)
    (tmp_path / path).unlink()
    code, error = call(capsys, "audit", "verify", "--dir", str(tmp_path), "--trust", "simulated")
    assert (code, error["error"]["code"]) == (3, "format.tile")


def test_two_heads_are_compared(capsys, home, lab, tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    one.write_text(str(lab.log.sign()))
    lab.enrol("id_a")
    two.write_text(str(lab.log.sign()))
    fork = lab.log.fork(1)
    fork.append("identity", "id_b", Enrolled(identity="id_b"), lab.keys.boot)
    other.write_text(str(fork.sign()))

    code, error = call(capsys, "audit", "compare", str(one), str(two))
    assert (code, error["error"]["code"]) == (2, "usage.undecided"), "nobody knows this log's key"
    key = ("--key", str(lab.log.verifier))
    assert call(capsys, "audit", "compare", str(one), str(two), *key)[0] == 2, "nor its entries"
    assert call(capsys, "audit", "compare", str(one), str(one), *key)[1]["relation"] == "equal"
    code, error = call(capsys, "audit", "compare", str(two), str(other), *key)
    assert (code, error["error"]["code"]) == (20, "receipt.fork"), "one size, two roots"
    code, found = call(capsys, "audit", "compare", str(one), str(two), *target(lab))
    assert (code, found["relation"]) == (0, "second-extends-first")
    code, found = call(capsys, "audit", "compare", str(two), str(one))
    assert (code, found["relation"]) == (0, "first-extends-second"), "from what was seen"
    lab.enrol("id_c")
    big = tmp_path / "big"
    big.write_text(str(lab.log.sign()))
    assert call(capsys, "audit", "sync", *target(lab))[0] == 0
    code, error = call(capsys, "audit", "compare", str(other), str(big))
    assert (code, error["error"]["code"]) == (20, "receipt.fork")
    assert {p.read_text() for p in (home / "logs" / "forks").rglob("s*") if p.is_file()} >= {
        other.read_text(), big.read_text(),
    }  # fmt: skip


def test_heads_of_two_logs_and_forged_heads_are_no_comparison(capsys, home, lab, tmp_path):
    stranger = PublicLog(lab.log.leaves)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text(str(lab.log.sign()))
    two.write_text(str(stranger.sign()))
    key = ("--key", str(lab.log.verifier))
    code, error = call(capsys, "audit", "compare", str(one), str(two), *key)
    assert (code, error["error"]["code"].startswith("receipt.note-")) == (20, True)
    for log in (lab.log, stranger):  # both are known here
        Memory(home / "logs").meet(f"https://{log.origin[-8:]}:1", log.public, log.file)
    code, error = call(capsys, "audit", "compare", str(one), str(two))
    assert (code, error["error"]["code"]) == (20, "receipt.note-origin")


def test_witnesses_come_from_the_command_line_or_the_settings(capsys, home, lab, tmp_path):
    one, two = Witness("one.example"), Witness("two.example")
    lab.copy(tmp_path / "log", checkpoint=str(lab.log.sign(witnesses=[one])).encode())
    verify = ("audit", "verify", "--dir", str(tmp_path / "log"), "--trust", "simulated")
    keys = [str(w.verifier) for w in (one, two)]
    given = [x for key in keys for x in ("--witness", key)]
    code, error = call(capsys, *verify, *given)
    assert (code, error["error"]["code"]) == (20, "receipt.witnesses")
    code, found = call(capsys, *verify, *given, "--cosignatures", "1")
    assert code == 0
    assert found["checks"][0]["found"].startswith("1 of 2 cosigned: one.example at 2023-")
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f"witnesses = {json.dumps(keys)}\ncosignatures = 2\n")
    assert call(capsys, *verify)[1]["error"]["code"] == "receipt.witnesses"
    config.add_enclave("lab", config.Place("https://h:1", None), default=True)
    assert config.read()["witnesses"] == keys and config.read()["cosignatures"] == 2
    for bad in ("witnesses = 3", "witnesses = [3]", "cosignatures = 'x'", "cosignatures = true"):
        (home / "config.toml").write_text(bad)
        with pytest.raises(UsageError):
            config.read()


def test_an_enclave_that_begins_anew_is_refused_until_it_is_forgotten(capsys, home, lab, tee):
    code, _ = call(capsys, "enclave", "add", "lab", lab.fake.url, "--trust", "simulated")
    assert code == 0
    assert call(capsys, "enclave", "verify")[0] == 0
    other = Lab(tee)
    other.fake.stop()
    lab.fake.log, lab.keys = other.log, other.keys
    lab.fake.stop()
    lab.fake.context = other.keys.tls.context
    lab.fake.start()
    code, error = call(capsys, "enclave", "verify")
    assert (code, error["error"]["code"]) == (20, "receipt.log-replaced")
    code, found = call(capsys, "enclave", "forget", "lab", "--yes")
    assert (code, found["named"], len(found["logs"])) == (0, True, 1)
    assert call(capsys, "enclave", "ls")[1] == {"default": None, "enclaves": {}}
    assert call(capsys, "enclave", "verify", *target(lab))[0] == 0
    assert call(capsys, "enclave", "forget", "lab", "--yes")[1]["error"]["code"] == "usage.enclave"
    shutil.rmtree(home)


def test_the_log_is_posted_from_the_enclave(capsys, home, lab, tmp_path):
    path = tmp_path / "anchor"
    code, found = call(capsys, "audit", "post", str(path), *target(lab))
    assert (code, found["posted"], found["entries"]) == (0, True, 1)
    lab.enrol("id_a")
    code, found = call(capsys, "audit", "post", str(path), *target(lab))
    assert (code, found["checkpoints"], found["entries"]) == (0, 2, 2)
    before, lab.fake.log = path.read_bytes(), lab.log.fork(1)
    code, error = call(capsys, "audit", "post", str(path), *target(lab))
    assert (code, error["error"]["code"]) == (20, "receipt.rolled-back")
    assert path.read_bytes() == before

"""What was seen of a log: it grows with the log, outlives crashes and damage, no fork passes."""

from __future__ import annotations

import base64
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casemate.client import memory as module
from casemate.client.connection import CHECKPOINT_HEADER, Connection
from casemate.client.enclave import connect
from casemate.client.jobs import Run
from casemate.client.memory import Memory, Mirror, default_folder, enclave_name
from casemate.seal import checkpoint, note
from casemate.spec import codec
from casemate.spec.data import DatasetInfo, Policy
from casemate.spec.errors import CasemateError, ReceiptError, UsageError
from casemate.spec.job import JobStatus
from support import rfc6962, server
from support.publog import PublicLog, Witness, keys_of

NAME = "https://h:1"
EDGES = (1, 2, 255, 256, 257, 511, 512, 513, 700)


def meet(memory: Memory, log: PublicLog, name: str = NAME) -> module.Seen:
    return memory.meet(name, log.public, log.file)


def refused(memory: Memory, log: PublicLog, name: str = NAME) -> ReceiptError:
    with pytest.raises(ReceiptError) as caught:
        meet(memory, log, name)
    return caught.value


@pytest.fixture
def memory(tmp_path) -> Memory:
    return Memory(tmp_path / "seen")


@settings(max_examples=15)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.data())
@example([255, 1, 1, 255], None)
@example([256, 256, 1], None)
def test_every_earlier_root_follows_from_the_mirror(steps, data):
    log = PublicLog()
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            log.pad(step)
            seen = meet(Memory(folder), log)
            assert seen.head == log.head()
        mirror = Memory(folder).mirror(log.public)
        size = len(log.leaves)
        sizes = {0, 1, size - 1, size, *(s for s in EDGES if s <= size)}
        if data is not None:
            sizes.add(data.draw(st.integers(0, size)))
        for at in sizes:
            assert mirror.root(at) == rfc6962.mth(log.leaves[:at])
        with pytest.raises(IndexError):
            mirror.root(size + 1)
        found = {p.relative_to(mirror.folder).as_posix() for p in mirror.folder.rglob("*")
                 if p.is_file()}  # fmt: skip
        from casemate.seal import tiles

        hashes = {t.path for t in tiles.tiles(size) if t.level != tiles.ENTRIES}
        assert found == hashes | {"checkpoint", "key", ".lock"}, "no partial tile stays behind"
        assert all((mirror.folder / p).read_bytes() == log.file(p) for p in hashes)


def test_only_what_is_missing_is_fetched(memory):
    log, asked = PublicLog().pad(300), []

    def get(path):
        asked.append(path)
        return log.file(path)

    memory.meet(NAME, log.public, get)
    assert asked == ["checkpoint", "tile/0/000", "tile/0/001.p/44"]
    asked.clear()
    memory.meet(NAME, log.public, get)
    assert asked == ["checkpoint"]
    log.pad(250)
    asked.clear()
    assert memory.meet(NAME, log.public, get).before == 300
    assert asked == ["checkpoint", "tile/0/001", "tile/0/002.p/38"]


SIZES = (
    (5, 3, 3),
    (5, 3, 4),
    (5, 3, 5),
    (5, 3, 9),
    (300, 256, 280),
    (300, 10, 600),
    (256, 255, 256),
)


@pytest.mark.parametrize(("seen", "common", "shown"), SIZES)
def test_no_fork_passes_and_both_heads_are_kept(memory, seen, common, shown):
    log = PublicLog().pad(seen)
    meet(memory, log)
    other = log.fork(common)
    other.leaves += [b"other %d" % i for i in range(shown - common)]
    error = refused(memory, other)
    assert error.code == ("receipt.rolled-back" if shown == common else "receipt.fork")
    (folder,) = (memory.folder / "forks").iterdir()
    assert str(folder) in error.message
    for name, whose in (("seen", log), ("shown", other)):
        kept = note.parse((folder / name).read_bytes())
        assert checkpoint.verify(kept, log.verifier) == whose.head()
    # What was seen stays seen, and the true log goes on.
    assert refused(memory, other).code == error.code
    assert meet(memory, log.pad(3)).head.size == seen + 3


def test_a_fork_that_lies_about_its_tiles_is_no_way_out(memory):
    """The head of the fork, with tiles of the true log."""
    log = PublicLog().pad(5)
    meet(memory, log)
    other = log.fork(3).pad(6)
    other.leaves[4] = b"another"
    log.pad(4)
    lies = {"checkpoint": other.file("checkpoint")}
    with pytest.raises(ReceiptError) as caught:
        memory.meet(NAME, log.public, lambda path: lies.get(path) or log.file(path))
    assert caught.value.code == "receipt.log-tiles"


def test_another_key_or_no_signature_is_refused(memory):
    log, other = PublicLog().pad(5), PublicLog().pad(5)
    for claim in (other.sign(), note.Note(log.sign().text, other.sign().lines)):
        with pytest.raises(CasemateError) as caught:
            memory.meet(NAME, log.public, lambda _, claim=claim: str(claim).encode())
        assert caught.value.code.startswith("receipt.note-")
    assert memory.mirror(log.public).seen() is None


def files(memory: Memory, log: PublicLog) -> list[Path]:
    folder = memory.mirror(log.public).folder
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "swap"])
@pytest.mark.parametrize("at", range(5))
def test_damage_is_mended_or_said_and_never_lets_a_fork_in(tmp_path, how, at):
    log = PublicLog().pad(300)
    fork = log.fork(100)
    fork.pad(250).leaves[120] = b"other"
    memory = Memory(tmp_path / "seen")
    meet(memory, log)
    names = [p.name for p in files(memory, log)]
    assert len(names) == 5  # checkpoint, key, two tiles of hashes, one above
    for then in (fork, log.pad(3)):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(memory.folder, tmp_path / "copy")
        copy = Memory(tmp_path / "copy")
        path = files(copy, log)[at]
        data = bytearray(path.read_bytes())
        if how == "flip":
            data[len(data) // 2] ^= 1
        elif how == "cut":
            del data[-1:]
        elif path.name in ("key", "checkpoint"):
            data = bytearray(b"x\n\nx")
        else:  # the fork's own, as an attacker on this machine might put it there
            place = path.relative_to(copy.mirror(log.public).folder)
            data = bytearray(fork.file(place.as_posix()))
        path.write_bytes(data)
        if how == "gone":
            path.unlink()
        if path.name == "checkpoint" and how == "gone":
            continue  # nothing was seen: nobody can know better
        if then is fork:
            assert refused(copy, then).code in ("receipt.fork", "receipt.memory")
            continue
        try:
            assert meet(copy, then).head == then.head()
            assert copy.mirror(log.public).root(150) == rfc6962.mth(log.leaves[:150])
        except ReceiptError as e:
            # A full tile is not needed to go on from; it is when something below it is asked for.
            assert e.code == "receipt.memory"
            assert path.name in ("key", "checkpoint", "000")


def test_a_crash_at_any_write_loses_nothing_that_was_seen(tmp_path, monkeypatch):
    log, true = PublicLog().pad(250), module.write
    start = Memory(tmp_path / "start")
    meet(start, log)
    old = log.head()
    log.pad(20)
    fork = log.fork(200)
    fork.leaves += [b"other %d" % i for i in range(100)]
    for fails in range(6):
        copy = Memory(tmp_path / f"copy{fails}")
        shutil.copytree(start.folder, copy.folder)
        left = [fails]

        def crash(path, data, left=left):
            if left[0] == 0:
                raise SystemExit("the power went")
            left[0] -= 1
            true(path, data)

        monkeypatch.setattr(module, "write", crash)
        try:
            meet(copy, log)
            whole = True
        except SystemExit:
            whole = False
        monkeypatch.setattr(module, "write", true)
        seen = copy.mirror(log.public).seen()
        assert seen is not None and seen.head == (log.head() if whole else old)
        assert refused(copy, fork).code == "receipt.fork"
        assert meet(copy, log).head == log.head()
        assert copy.mirror(log.public).root(255) == rfc6962.mth(log.leaves[:255])
    assert whole, "the last of them went through"


def test_another_process_may_see_more_meanwhile(memory):
    """Between our checkpoint and our tiles another process of this person goes further."""
    log = PublicLog().pad(10)
    meet(memory, log)
    log.pad(5)
    shown = log.fork(15)

    def get(path):
        data = shown.file(path)
        if path == "checkpoint":
            meet(Memory(memory.folder), log.pad(300))
        return data

    assert memory.meet(NAME, log.public, get).head.size == 15
    seen = memory.mirror(log.public).seen()
    assert seen is not None and seen.head.size == 315
    # What the other one saw counts for us too.
    fork = log.fork(300)
    fork.leaves += [b"other"] * 40

    def forked(path):
        data = fork.file(path)
        if path == "checkpoint":
            meet(Memory(memory.folder), log.pad(30))
        return data

    with pytest.raises(ReceiptError) as caught:
        memory.meet(NAME, log.public, forked)
    assert caught.value.code == "receipt.fork"


def test_many_at_once_leave_a_whole_mirror(memory):
    log, failed = PublicLog().pad(20), []
    shown = [log.fork(20).pad(7 * i) for i in range(40)]

    def work(mine):
        try:
            for each in mine:
                meet(Memory(memory.folder), each)
        except CasemateError as e:
            failed.append(e.code)

    threads = [threading.Thread(target=work, args=(shown[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One that saw an older head after another saw a newer one may have been told so; no other word.
    assert set(failed) <= {"receipt.rolled-back"}
    assert meet(memory, shown[-1]).head == shown[-1].head()
    assert memory.mirror(log.public).root(100) == rfc6962.mth(shown[-1].leaves[:100])


def test_a_new_log_at_a_known_address_is_refused_until_it_is_forgotten(memory):
    log, other = PublicLog().pad(5), PublicLog().pad(50)
    meet(memory, log)
    error = refused(memory, other)
    assert (error.code, error.where) == ("receipt.log-replaced", log.origin)
    assert "casemate enclave forget" in error.mend
    assert meet(memory, other, "https://elsewhere:1").head.size == 50
    assert memory.forget(NAME) == (log.origin,)
    assert memory.forget(NAME) == ()
    assert meet(memory, other).head.size == 50
    assert [p.name for p in (memory.folder / "forgotten").rglob("checkpoint")] == ["checkpoint"]


def test_a_known_log_at_a_new_address_is_still_known(memory):
    """Two clones of one machine on two ports."""
    log = PublicLog().pad(5)
    meet(memory, log)
    clone = log.fork(4).pad(9)
    clone.leaves[4] = b"other"
    assert refused(memory, clone, "https://h:2").code == "receipt.fork"


def test_owners_may_let_another_log_go_on(memory):
    log, other = PublicLog().pad(5), PublicLog().pad(50)
    meet(memory, log)
    memory.accept(NAME, other.verifier)
    assert meet(memory, other).head.size == 50
    assert refused(memory, log).code == "receipt.log-replaced"


def test_a_port_used_again_by_another_simulation_is_another_enclave(memory):
    one, two = enclave_name(NAME, "aa" * 32), enclave_name(NAME, "bb" * 32)
    meet(memory, PublicLog().pad(5), one)
    meet(memory, PublicLog().pad(5), two)
    assert set(memory.enclaves()) == {one, two}
    assert len(memory.forget(NAME)) == 2


def test_what_is_kept_of_enclaves_is_strict(memory):
    meet(memory, PublicLog().pad(5))
    (path,) = (memory.folder / "enclaves").iterdir()
    for bad in (b"", b"\xff", b"x", path.read_bytes()[:-9] + b"\n", b"other\n" + path.read_bytes()):
        path.write_bytes(bad)
        error = refused(memory, PublicLog().pad(5))
        assert (error.code, error.where) == ("receipt.memory", str(path))
        with pytest.raises(ReceiptError, match=path.name) as caught:  # never "forgotten"
            memory.forget(NAME)
        assert (caught.value.code, caught.value.mend) == ("receipt.memory", error.mend)
    assert "remove it" in error.mend
    path.unlink()
    assert meet(memory, PublicLog().pad(5)).head.size == 5


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "logs").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        meet(Memory(tmp_path), PublicLog().pad(5))
    assert caught.value.code == "usage.memory"
    assert "CASEMATE_LOGS" in caught.value.mend


def test_where_things_are_kept(monkeypatch, tmp_path):
    for name in ("CASEMATE_LOGS", "CASEMATE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".local/state/casemate-client"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert default_folder() == tmp_path / "x/casemate-client"
    monkeypatch.setenv("CASEMATE_HOME", str(tmp_path / "h"))
    assert default_folder() == tmp_path / "h/logs"
    monkeypatch.setenv("CASEMATE_LOGS", str(tmp_path / "l"))
    assert default_folder() == tmp_path / "l" == Memory().folder


def test_a_mirror_with_entries_is_the_whole_log_as_files(tmp_path):
    log = PublicLog().pad(300)
    mirror = Mirror(tmp_path / "log", entries=True)
    mirror.extend(log.public, log.file)
    assert rfc6962.read(tmp_path / "log", log.origin, log.public) == log.leaves
    mirror.extend(log.public, log.pad(300).file)
    assert rfc6962.read(tmp_path / "log", log.origin, log.public) == log.leaves
    assert list(mirror.leaves()) == log.leaves
    other = PublicLog().pad(700)
    with pytest.raises(ReceiptError) as caught:
        mirror.extend(other.public, other.file)
    assert caught.value.code == "receipt.log-replaced"


def test_entries_are_compared_with_their_hashes(tmp_path):
    log = PublicLog().pad(3)
    bad = log.fork(2).pad(0)
    bad.leaves.append(b"a leaf that is another")

    def get(path):
        return (bad if "entries" in path else log).file(path)

    with pytest.raises(ReceiptError) as caught:
        Mirror(tmp_path / "log", entries=True).extend(log.public, get)
    assert caught.value.code == "receipt.log-tiles"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    log, memory = PublicLog().pad(5), Memory(tmp_path)
    meet(memory, log)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UsageError) as caught:
        meet(memory, log.pad(300))
    assert caught.value.code == "usage.memory"
    assert caught.value.where.startswith(str(tmp_path))
    assert f"{caught.value.where}: No space left" in caught.value.message
    monkeypatch.undo()
    assert not list(tmp_path.rglob(".new-*")), "no half of a file stays"
    seen = memory.mirror(log.public).seen()
    assert seen is not None and seen.head.size == 5
    assert meet(memory, log).head.size == 305


def test_tiles_that_never_fit_are_not_kept(memory):
    log = PublicLog().pad(5)
    lies = {"tile/0/000.p/5": bytes(5 * 32)}
    with pytest.raises(ReceiptError) as caught:
        memory.meet(NAME, log.public, lambda path: lies.get(path) or log.file(path))
    assert caught.value.code == "receipt.log-tiles"
    assert memory.mirror(log.public).seen() is None
    with pytest.raises(CasemateError) as short:
        memory.meet(NAME, log.public, lambda p: log.file(p)[:-1] if "tile" in p else log.file(p))
    assert short.value.code == "format.tile"


def test_a_mirror_without_its_entries_says_so(tmp_path):
    log = PublicLog().pad(3)
    mirror = Mirror(tmp_path / "log", entries=True)
    assert mirror.leaves() == ()
    mirror.extend(log.public, log.file)
    (tmp_path / "log" / "tile" / "entries" / "000.p" / "3").unlink()
    with pytest.raises(ReceiptError) as caught:
        mirror.leaves()
    assert caught.value.code == "receipt.memory"
    log.pad(2)
    mirror.extend(log.public, log.file)
    assert list(mirror.leaves()) == log.leaves


def test_an_origin_that_changes_under_one_key_is_another_log(memory):
    log = PublicLog().pad(5)
    meet(memory, log)
    log.pad(1).origin = "casemate.dev/log/renamed"
    assert refused(memory, log).code == "receipt.log-replaced"


# Over a connection.


def test_requests_carry_the_newest_checkpoint(fakes, keys, trust, someone, public, memory):
    public.pad(3)
    fake = fakes(keys, log=public, last=4)
    connection = Connection(fake.url, trust=trust, identity=someone, memory=memory,
                            pause=lambda _: None)  # fmt: skip
    connection.request("GET", "/v1/jobs")
    witness = Witness("w")
    public.pad(4)
    connection.request("POST", "/v1/uploads", {"size": 5})  # on a second stream
    for request, size in zip(fake.requests[2::3], (3, 7), strict=True):
        sent = note.parse(base64.b64decode(request.headers[CHECKPOINT_HEADER]))
        assert checkpoint.verify(sent, public.verifier) == public.head(size)
        assert len(sent.lines) == 1
        assert len(request.headers[CHECKPOINT_HEADER]) < 512
    header = module.header(public.sign(witnesses=[witness]), public.verifier)
    assert "w" not in [x.name for x in note.parse(base64.b64decode(header)).lines]


def test_nothing_is_sent_to_a_server_that_was_rolled_back(
    fakes, keys, trust, someone, public, memory
):
    public.pad(9)
    with connect(fakes(keys, log=public).url, trust=trust, identity=someone, memory=memory) as one:
        assert one.checkpoint == public.head()
        public.pad(1)
        assert one.sync() == public.head()
    back = fakes(keys, log=public.fork(8))
    connection = Connection(back.url, trust=trust, identity=someone, memory=memory)
    with pytest.raises(ReceiptError) as caught:
        connection.request("POST", "/v1/quotes", {"secret": "model"})
    assert caught.value.code == "receipt.rolled-back"
    assert {r.target for r in back.requests} == {"/log/checkpoint"}
    told = note.parse(base64.b64decode(back.requests[-1].headers[CHECKPOINT_HEADER]))
    assert checkpoint.verify(told, public.verifier).size == 10, "an honest server learns of it"


def test_a_log_that_is_rolled_back_under_a_live_stream_is_noticed(
    fakes, keys, trust, someone, public, memory
):
    fake = fakes(keys, log=public.pad(9))
    connection = Connection(fake.url, trust=trust, identity=someone, memory=memory)
    connection.request("GET", "/v1/jobs")
    fake.log = public.fork(8).pad(3)
    fake.log.leaves[8] = b"other"
    with pytest.raises(ReceiptError):
        connection.sync()
    with pytest.raises(ReceiptError):
        connection.request("GET", "/v1/jobs")
    assert [r.target for r in fake.requests].count("/v1/jobs") == 1


DATASET = DatasetInfo(
    dataset="ds_" + "ab" * 20, owner="id_" + "cd" * 16, schema=server.schema(),
    policy=Policy(scientists=("*",)), policy_digest="sha256:" + "0" * 64, epoch=1, state="ready",
)  # fmt: skip
ENDED = JobStatus(job="job_1", state="done", tick=1, ticks=1, quote_digest="sha256:" + "1" * 64)
CHANGES = {
    "policy": lambda one: one.datasets.set_policy(DATASET.dataset, DATASET.policy),
    "epoch": lambda one: one.datasets.advance_epoch(DATASET.dataset, 1),
    "consent": lambda one: one.datasets.give(DATASET.dataset, "{}"),
    "revoke": lambda one: one.datasets.revoke(DATASET.dataset),
    "approve": lambda one: one.jobs.approve(ENDED.quote_digest),
    "reject": lambda one: one.jobs.reject(ENDED.quote_digest),
    "cancel": lambda one: Run(one.jobs._connection, ENDED.job, one._trust).cancel(),
    "end": lambda one: list(Run(one.jobs._connection, ENDED.job, one._trust).ticks()),
}


@pytest.fixture
def changing(fakes, keys, trust, someone, public, memory):
    """An enclave whose every change is one entry, and a client that has seen it before."""
    fake = fakes(keys, log=public.pad(3))

    def changed(_):
        public.pad(1)
        return 200, {}, codec.to_json(DATASET)

    def ended(_):
        public.pad(1)
        return 200, {}, codec.to_json(ENDED)

    base = f"/v1/datasets/{DATASET.dataset}"
    approval = f"/v1/quotes/{ENDED.quote_digest}/approval"
    fake.answers = {
        ("PUT", f"{base}/policy"): changed, ("POST", f"{base}/epoch"): changed,
        ("POST", f"{base}/consents"): changed, ("DELETE", base): changed,
        ("POST", approval): changed, ("DELETE", approval): changed,
        ("GET", f"/v1/jobs/{ENDED.job}"): ended, ("DELETE", f"/v1/jobs/{ENDED.job}"): ended,
    }  # fmt: skip
    with connect(fake.url, trust=trust, identity=someone, enrol=False, memory=memory) as one:
        assert one.checkpoint == public.head(3)
        yield fake, one


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_was_acknowledged_is_remembered(changing, public, memory, name):
    fake, one = changing
    CHANGES[name](one)
    seen = memory.mirror(public.public).seen()
    assert seen is not None and seen.head == public.head(4) == one.checkpoint
    # It is what the next request carries, and what the next connection compares.
    one.jobs._connection.request("GET", "/v1/jobs")
    sent = note.parse(base64.b64decode(fake.requests[-1].headers[CHECKPOINT_HEADER]))
    assert checkpoint.verify(sent, public.verifier) == public.head(4)
    fake.log = public.fork(3)
    one.close()
    with pytest.raises(ReceiptError) as caught:
        one.jobs._connection.request("GET", "/v1/jobs")
    assert caught.value.code == "receipt.rolled-back"


def test_a_change_stands_where_its_head_cannot_be_had(changing, public, memory):
    """The server goes away after its answer, or shows no head: told, and no error."""
    fake, one = changing
    fake.log = None
    with pytest.warns(UserWarning, match=r"rolled back.*look whether it\s+still stands"):
        assert one.datasets.set_policy(DATASET.dataset, DATASET.policy).id == DATASET.dataset
    fake.log, fake.last = public, 3
    with pytest.warns(UserWarning, match="the connection was closed"):
        one.datasets.revoke(DATASET.dataset)
    seen = memory.mirror(public.public).seen()
    # The older head of the connection: one that opens only now proves nothing of the answer.
    assert seen is not None and seen.head == public.head(4)


def test_a_fork_after_a_change_is_an_error(changing, public):
    fake, one = changing
    fake.log = public.fork(2)
    fake.log.leaves += [b"another"] * 5
    with pytest.raises(ReceiptError) as caught:
        one.datasets.revoke(DATASET.dataset)
    assert caught.value.code == "receipt.fork"


def test_requests_carry_what_another_process_remembers(changing, public, memory):
    fake, one = changing
    public.pad(2)
    memory.mirror(public.public).extend(public.public, public.file)
    one.jobs._connection.request("GET", "/v1/jobs")
    sent = note.parse(base64.b64decode(fake.requests[-1].headers[CHECKPOINT_HEADER]))
    assert checkpoint.verify(sent, public.verifier) == public.head(5)


def test_without_a_memory_nothing_is_asked_or_sent(fakes, keys, trust, someone, public):
    fake = fakes(keys, log=public.pad(9))
    with connect(fake.url, trust=trust, identity=someone, enrol=False, memory=None) as one:
        assert one.checkpoint is None
        assert one.sync() is None
        one.jobs._connection.request("GET", "/v1/jobs")
    assert [r.target for r in fake.requests] == ["/v1/jobs"]
    assert CHECKPOINT_HEADER not in fake.requests[0].headers


def test_public_files_need_no_identity_and_wait_for_a_busy_server(
    fakes, keys, trust, public, memory
):
    from casemate.spec.errors import LimitError

    fake = fakes(keys, log=public.pad(9))
    busy, waits = [3], []

    def answer(_):
        busy[0] -= 1
        if busy[0] >= 0:
            return 503, {}, LimitError("limit.rate", "Too fast.", mend="Wait.").to_wire()
        return 200, {}, b"x"

    fake.answers["GET", "/file"] = answer
    connection = Connection(fake.url, trust=trust, memory=memory, pause=waits.append)
    assert connection.public("/file") == b"x"
    assert waits == [1.0] * 3
    assert CHECKPOINT_HEADER in fake.requests[-1].headers
    busy[0] = 10**6
    with pytest.raises(LimitError):
        connection.public("/file")


# Seeded bugs: each check is what finds its attack.


def test_the_old_root_is_what_finds_a_fork(memory, monkeypatch):
    log = PublicLog().pad(5)
    meet(memory, log)
    fork = log.fork(3).pad(9)
    fork.leaves[3] = b"other"
    true = module._Hashes.root

    def newest_only(self, size):
        return log.head().root if size == 5 else true(self, size)

    monkeypatch.setattr(module._Hashes, "root", newest_only)
    assert meet(memory, fork).head == fork.head()


def test_the_mirrors_name_is_what_finds_a_clone_on_another_port(memory, monkeypatch):
    log = PublicLog().pad(5)
    meet(memory, log)
    clone = log.fork(3).pad(9)
    clone.leaves[3] = b"other"
    monkeypatch.setattr(Memory, "mirror", lambda self, _: Mirror(self.folder / "another"))
    meet(memory, clone, "https://h:2")


def test_keys_of_another_log_are_anothers():
    assert keys_of(PublicLog()).log.public != keys_of(PublicLog()).log.public

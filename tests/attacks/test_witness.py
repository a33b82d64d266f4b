"""A witness against forks, replays, races and crashes: it never lets out two cosignatures on trees
of which neither extends the other, and never one on a smaller tree after a larger one.

Each property is proved to bite: with a bug put in (answering before it is durable, no lock, a rule
left out, no sync) the same test finds the two cosignatures.
"""

import itertools
import os
import random
import threading
from contextlib import nullcontext, suppress

import pytest

from casemate.seal import checkpoint, note
from casemate.seal.identity import Identity
from casemate.seams import files
from casemate.spec.errors import LedgerError
from casemate.witness import decide as rule
from casemate.witness import service, state
from casemate.witness.decide import Accepted, decide
from casemate.witness.service import Witness
from support import rfc6962
from support import vectors_tlog as vectors
from support.disk import SimDisk
from support.witness import CONDUCTS, USELESS, Down, FakeWitness, Tree

RUNS = int(os.environ.get("CASEMATE_WITNESS_RUNS", "100"))
ANNA = Identity.generate("w.example/anna")
KEY = service.verifier(ANNA)


class Clock:
    def __init__(self):
        self.now = 1_700_000_000

    def wall(self):
        self.now += 1
        return float(self.now)


class Watch:
    """All that a witness ever let out, and the trees that its log ever signed."""

    def __init__(self, *trees):
        self.trees = trees
        self.out = []  # (size, entries of that tree), in the order in which they were let out
        self.wrong = []

    def saw(self, text):
        head = checkpoint.head(text)
        for tree in self.trees:
            entries = tree.entries[: head.size]
            if len(entries) == head.size and rfc6962.mth(entries) == head.root:
                break
        else:
            raise AssertionError("a tree that nobody signed")
        for before in self.out:
            if len(entries) < len(before):
                self.wrong.append(("back", len(before), len(entries)))
            elif entries[: len(before)] != before:
                self.wrong.append(("fork", len(before), len(entries)))
        self.out.append(entries)


def new_disk(*trees):
    disk = SimDisk()
    state.create(disk, KEY)
    for tree in trees:
        state.add(disk, KEY, tree.log)
    return SimDisk.of(disk.snapshot())


def cosignature(body, answer):
    """The text that the answer cosigns; None when it cosigns nothing."""
    if answer.status != 200:
        return None
    signed = checkpoint.read_request(body).signed
    verified = note.verify(signed.add(note.lines(answer.body.decode())), [KEY])
    assert list(verified) == [KEY]
    return signed.text


def log_and_forks(rng):
    """A log, and other histories of the same key that share a beginning with it."""
    main = Tree([b"entry %d" % i for i in range(9)])
    at = rng.randrange(0, 8)
    return main, main.fork(at, [b"other %d" % i for i in range(9 - at)]), main.fork(0, [b"x"] * 9)


# Crashes at every call of the disk.


def campaign(seed, fault=None, rounds=14):
    """Requests of a log and its forks, one fault of the disk and a restart; what was let out."""
    rng = random.Random(seed)
    trees = log_and_forks(rng)
    watch, clock = Watch(*trees), Clock()
    disk = new_disk(trees[0])
    disk.fault = fault
    calls, witness = 0, None
    for _ in range(rounds):
        tree = rng.choice(trees)
        size = rng.randrange(1, 10)
        try:
            witness = witness or Witness(disk, ANNA, clock)
        except LedgerError as e:  # the fault came while it started
            assert e.code == "ledger.witness-stopped"
            calls, disk = calls + len(disk.trace), disk.power_cycle()
            continue
        # A host knows what the witness holds, or guesses.
        held = witness.about()["logs"][0]["size"] or 0
        old = min(held if rng.random() < 0.8 else rng.randrange(10), size)
        body = tree.request(old, size, None if rng.random() < 0.9 else (bytes(32),))
        try:
            answer = witness.add_checkpoint(body)
        except LedgerError:
            calls, disk, witness = calls + len(disk.trace), disk.power_cycle(), None
            continue
        if (text := cosignature(body, answer)) is not None:
            watch.saw(text)
    return watch, calls + len(disk.trace)


KINDS = ("POWER", "EIO", "ENOSPC", "SHORT")


def sweep(seeds):
    """Every call of each campaign fails once in each way; all that went wrong, and how often."""
    wrong, out, runs = [], 0, 0
    for seed in seeds:
        clean, calls = campaign(seed)
        wrong += clean.wrong
        out += len(clean.out)
        for at, kind in itertools.product(range(1, calls + 1), KINDS):
            found, _ = campaign(seed, (at, kind))
            wrong += found.wrong
            out += len(found.out)
            runs += 1
    return wrong, out, runs


def test_a_fault_at_every_call_of_the_disk():
    wrong, out, runs = sweep(range(4))
    assert not wrong
    assert out > runs, "the campaigns let something out"


@pytest.mark.full
def test_a_fault_at_every_call_of_the_disk_many():
    assert not sweep(range(50))[0]


def _unsynced(disk, path, data):
    file = disk.open(f"{path}.new", create=True)
    file.truncate(0)
    file.write(0, data)
    disk.rename(f"{path}.new", path)


def _never(disk, log, newest):
    """Keeps nothing: as if it answered first and the power failed before it wrote."""


def _unsynced_folder(disk, path, data):
    file = disk.open(f"{path}.new", create=True)
    file.truncate(0)
    file.write(0, data)
    file.sync()
    disk.rename(f"{path}.new", path)


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [(state, "save", _never), (files, "store", _unsynced_folder)],
    ids=["answers before it is kept", "the folder is not synced"],
)
def test_the_sweep_finds_a_witness_that_forgets(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    assert sweep(range(2))[0]


def test_a_witness_that_does_not_sync_its_file_loses_it(monkeypatch):
    """What arrives torn is refused at the next start: safe, but the state is lost."""
    lost = 0
    for seed in range(20):
        tree = Tree([b"entry"] * 9)
        disk = new_disk(tree)
        disk = SimDisk.of(disk.snapshot(), seed)
        with monkeypatch.context() as m:
            m.setattr(files, "store", _unsynced)
            Witness(disk, ANNA, Clock()).add_checkpoint(tree.request(0, 5))
        disk.sync_folder(state.LOGS)
        try:
            Witness(disk.power_cycle(), ANNA, Clock())
        except LedgerError as e:
            assert e.code == "ledger.witness-state"
            lost += 1
    assert lost > 3


@pytest.mark.parametrize("kind", KINDS)
def test_watching_a_log_survives_a_fault_at_every_call(kind):
    first, second = Tree([b"a"] * 5), Tree([b"b"] * 5, "log.example/b")
    base = new_disk(first)
    Witness(base, ANNA, Clock()).add_checkpoint(first.request(0, 5))
    kept = base.snapshot()
    for at in range(1, 20):
        disk = SimDisk.of(kept, at)
        disk.fault = (at, kind)
        with suppress(LedgerError):
            state.add(disk, KEY, second.log)
        after = disk.power_cycle()
        assert Witness(after, ANNA, Clock()).about()["logs"][0]["size"] == 5
        state.add(after, KEY, second.log)
        again = Witness(after, ANNA, Clock())
        assert again.add_checkpoint(second.request(0, 3)).status == 200
        assert again.add_checkpoint(first.request(0, 5)).body == b"5\n"


# Rules left out.


def storm(seed, heads=None):
    """One witness in memory against a hostile host; what it let out."""
    rng = random.Random(seed)
    trees = log_and_forks(rng)
    watch, fake = Watch(*trees), FakeWitness(logs=[trees[0].log])
    requests = [t.request(0, s) for t in trees for s in range(10)]  # a host keeps all, to replay
    for _ in range(30):
        held = fake.heads.get(trees[0].origin)
        tree, size = rng.choice(trees), rng.randrange(10)
        old = rng.choice((held.size if held else 0, rng.randrange(10)))
        proof = None
        if rng.random() < 0.3:  # a proof of another tree
            other = rng.choice(trees).request(min(old, size), size)
            proof = checkpoint.read_request(other).proof
        body = rng.choice((tree.request(old, size, proof), rng.choice(requests)))
        before = len(fake.cosigned)
        fake.add_checkpoint(body)
        for head in fake.cosigned[before:]:
            watch.saw(str(head))
    return watch


def test_a_hostile_host_gets_nothing_inconsistent():
    found = [storm(seed) for seed in range(RUNS)]
    assert not [w for f in found for w in f.wrong]
    assert sum(len(f.out) for f in found) > RUNS


@pytest.mark.full
def test_a_hostile_host_gets_nothing_inconsistent_many():
    assert not [w for seed in range(5_000) for w in storm(seed).wrong]


def _without(monkeypatch, words):
    left = tuple(r for r in rule.RULES if not r[1].startswith(words))
    assert len(left) == len(rule.RULES) - 1
    monkeypatch.setattr(rule, "RULES", left)


def _trusting(case):
    """A proof checked from whatever tree the request begins with, and none from the empty one."""
    root = case.held.root if case.held is not None and case.request.old else rule.merkle.EMPTY
    try:
        rule.merkle.check_consistency(
            case.request.old, root, case.head.size, case.head.root, case.request.proof
        )
    except ValueError:
        return True
    return False


def test_the_storm_finds_a_witness_without_a_check_of_the_proof(monkeypatch):
    _without(monkeypatch, "The consistency proof")
    assert {w[0] for seed in range(30) for w in storm(seed).wrong} == {"fork"}


def test_the_storm_finds_a_witness_that_believes_the_old_size(monkeypatch):
    _without(monkeypatch, "The old size is not that")
    # The proof alone still holds, since it is checked from the root that was cosigned.
    assert not [w for seed in range(30) for w in storm(seed).wrong]
    monkeypatch.setattr(rule.Case, "unproven", property(_trusting))
    assert {w[0] for seed in range(60) for w in storm(seed).wrong} == {"back", "fork"}


def test_no_rule_is_idle():
    """The other two are needed for their status; without them a fork is still refused."""
    for i in range(len(rule.RULES)):
        assert rule.RULES[i][1]
    log = Tree([b"a"] * 9)
    other = log.fork(2, [b"b"] * 7)
    case = rule.Case(checkpoint.read_request(other.request(5, 5, ())), other.head(5), log.head(5))
    assert [broken(case) for _, _, broken in rule.RULES] == [False, False, True, True]
    back = rule.Case(checkpoint.read_request(log.request(5, 3, ())), log.head(3), log.head(5))
    assert [broken(back) for _, _, broken in rule.RULES] == [True, False, False, True]


# The race that the specification describes.


def race(witness, bodies):
    """All bodies at once, each held between its check and its keeping until all have got there."""
    answers = [None] * len(bodies)
    gate = threading.Barrier(len(bodies))
    real = state.save

    def slow(disk, log, newest):
        with suppress(threading.BrokenBarrierError):
            gate.wait(0.2)  # with the lock only one is ever here
        real(disk, log, newest)

    def ask(i):
        answers[i] = witness.add_checkpoint(bodies[i])

    state.save = slow
    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        state.save = real
    return [i for i, a in enumerate(answers) if a.status == 200]


def test_of_two_requests_at_once_one_is_a_conflict():
    tree = Tree([b"entry %d" % i for i in range(9)])
    other = tree.fork(1, [b"x"] * 8)
    witness = Witness(new_disk(tree), ANNA, Clock())
    witness.add_checkpoint(tree.request(0, 1))
    won = race(witness, [tree.request(1, 3), tree.request(1, 9), other.request(1, 5)])
    assert len(won) == 1
    held = (3, 9, 5)[won[0]]
    assert witness.about()["logs"][0]["size"] == held
    assert witness.add_checkpoint(tree.request(1, 3)).body == b"%d\n" % held


def test_torchwoods_race():
    log = checkpoint.log_key(vectors.SIGSUM, vectors.SIGSUM_KEY)
    disk = SimDisk()
    state.create(disk, KEY)
    state.add(disk, KEY, log)
    witness = Witness(disk, ANNA, Clock())
    bodies = {n: b.encode() for n, b in vectors.SIGSUM_REQUESTS.items()}
    assert witness.add_checkpoint(bodies[1]).status == 200
    assert len(race(witness, [bodies[3], bodies[5]])) == 1


def test_the_race_finds_a_witness_without_a_lock():
    tree = Tree([b"entry %d" % i for i in range(9)])
    other = tree.fork(1, [b"x"] * 8)
    witness = Witness(new_disk(tree), ANNA, Clock())
    witness._lock = nullcontext()
    witness.add_checkpoint(tree.request(0, 1))
    assert len(race(witness, [tree.request(1, 9), other.request(1, 5)])) == 2


def test_many_at_once_make_one_history():
    tree = Tree([b"entry %d" % i for i in range(30)])
    other = tree.fork(4, [b"x %d" % i for i in range(26)])
    watch, lock = Watch(tree, other), threading.Lock()
    disk = new_disk(tree)
    witness = Witness(disk, ANNA, Clock())
    let_out = []

    def client(seed):
        rng = random.Random(seed)
        for _ in range(15):
            held = witness.about()["logs"][0]["size"] or 0
            size = min(30, held + rng.randrange(3))
            body = rng.choice((tree, other)).request(held, size)
            answer = witness.add_checkpoint(body)
            if (text := cosignature(body, answer)) is not None:
                with lock:
                    let_out.append((len(let_out), text))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    # They were noted after they were let out, so only forks can be told from this order.
    for _, text in sorted(let_out, key=lambda x: checkpoint.head(x[1]).size):
        watch.saw(text)
    assert let_out and not watch.wrong


# Evidence.


def test_a_log_that_forks_is_convicted_by_what_is_kept():
    """Anyone can check it with the log's key alone."""
    tree = Tree([b"entry %d" % i for i in range(9)])
    other = tree.fork(3, [b"x"] * 6)
    disk = new_disk(tree)
    witness = Witness(disk, ANNA, Clock())
    witness.add_checkpoint(tree.request(0, 9))
    for old in (9, 0, 3):
        witness.add_checkpoint(other.request(old, 9))
    (name,) = state.evidence(disk, tree.log, "fork")
    from casemate.spec import codec

    kept = codec.decode(
        state.Evidence, SimDisk.of(disk.snapshot()).open(f"evidence/{name}").read(0, 1 << 20)
    )
    held = checkpoint.verify(note.parse(kept.held), tree.log)
    theirs = checkpoint.verify(checkpoint.read_request(kept.request.encode()).signed, tree.log)
    assert held.size == theirs.size and held.root != theirs.root


def test_nobody_but_the_log_can_fill_the_evidence():
    tree = Tree([b"entry %d" % i for i in range(9)])
    disk = new_disk(tree)
    witness = Witness(disk, ANNA, Clock())
    witness.add_checkpoint(tree.request(0, 5))
    rng = random.Random(1)
    for _ in range(300):  # genuine checkpoints with worthless proofs
        proof = tuple(rng.randbytes(32) for _ in range(rng.randrange(1, 6)))
        assert witness.add_checkpoint(tree.request(5, rng.randrange(5, 10), proof)).status == 422
    assert len(state.evidence(disk, tree.log, "unproven")) == 5
    assert witness.add_checkpoint(tree.request(5, 9)).status == 200


# Fakes, for those who build on them.


@pytest.mark.parametrize("conduct", sorted(CONDUCTS))
def test_a_fake_does_what_it_is_called(conduct):
    tree = Tree([b"entry %d" % i for i in range(9)])
    other = tree.fork(3, [b"x"] * 6)
    fake = FakeWitness(logs=[tree.log], conduct=conduct)
    body = tree.request(0, 5)

    def signs(body):
        try:
            answer = fake.add_checkpoint(body)
            signed = checkpoint.read_request(body).signed
            both = signed.add(note.lines(answer.body.decode())) if answer.status == 200 else signed
            return fake.verifier in note.verify(both, [fake.verifier])
        except Exception as e:
            assert isinstance(e, Down | UnicodeDecodeError) or hasattr(e, "code")
            return False

    assert signs(body) == (conduct not in USELESS)
    assert note.verifier(fake.vkey) == fake.verifier
    assert signs(other.request(5, 9)) == (conduct == "forks")
    assert signs(tree.request(0, 3)) == (conduct in ("forks", "goes-back"))


def test_an_honest_fake_and_the_real_one_agree():
    rng = random.Random(9)
    for seed in range(20):
        trees = log_and_forks(random.Random(seed))
        fake, real = FakeWitness(logs=[trees[0].log]), Witness(new_disk(trees[0]), ANNA, Clock())
        for _ in range(20):
            held = fake.heads.get(trees[0].origin)
            size = rng.randrange(10)
            old = min(size, held.size if held and rng.random() < 0.8 else rng.randrange(10))
            body = rng.choice(trees).request(old, size)
            theirs, ours = fake.add_checkpoint(body), real.add_checkpoint(body)
            assert (theirs.status, theirs.kind) == (ours.status, ours.kind)
            if theirs.status != 200:
                assert theirs.body == ours.body


def test_fuzzed_requests_cosign_nothing_but_what_was_signed():
    rng = random.Random(4)
    tree = Tree([b"entry %d" % i for i in range(9)])
    heads, logs = {tree.origin: tree.head(5)}, {tree.origin: tree.log}
    good = tree.request(5, 9)
    statuses = {}
    for _ in range(int(os.environ.get("CASEMATE_FUZZ", "20000"))):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.choice(b"\n\n +=A0\x00\xff")
                case 1:
                    del data[at : at + rng.randrange(1, 9)]
                case _:
                    data[at] ^= 1 << rng.randrange(8)
        found = decide(heads, bytes(data), logs)
        if isinstance(found, Accepted):
            assert found.signed == tree.signed(9) and found.head == tree.head(9)
        else:
            statuses[found.answer.status] = statuses.get(found.answer.status, 0) + 1
    assert set(statuses) == {400, 403, 404, 409, 422}

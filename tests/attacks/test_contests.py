"""Contests as a way to the rows, to the label, or to a place that nobody earned."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import casemate as cm
from casemate.accounting.filters import RdpFilter
from casemate.attest.trust import Trust
from casemate.cli.main import cli
from casemate.client import contests, models, receipts
from casemate.client.contests import Board
from casemate.client.enclave import Enclave
from casemate.plan.compile import compile_plan
from casemate.spec import codec, tensors
from casemate.spec.contest import Contest, scores
from casemate.spec.data import Budget, DatasetInfo, Policy
from casemate.spec.errors import CasemateError, PlanError, ReceiptError
from casemate.spec.job import (
    DatasetUse,
    Dp,
    InputBinding,
    JobRequest,
    Metric,
    NonPrivate,
    Quote,
    Sgd,
    TrainSpec,
    longest,
)
from casemate.spec.messages import Prepared
from casemate.spec.receipt import Leaderboard, ReceiptBundle
from support.desk import PREPARED, Desk, Person, Script, run_async, told_result
from support.server import CLASSES, FEATURES, Party, schema, table
from support.witness import FakeWitness

pytestmark = pytest.mark.e2e

ROWS, ENTRIES = 64, 3
METRICS = (Metric(name="accuracy"), Metric(name="cross_entropy", limit=8.0))
CONTEST = Contest(target="y", metrics=METRICS, entries=ENTRIES)
NOISED = dataclasses.replace(CONTEST, epsilon=0.5, delta=1e-4)
BUDGET = Budget(epsilon=10, delta=1e-2)
EXACT = NonPrivate(words="")


def hold(owner: Party, contest: Contest = CONTEST, evaluations: int = 20) -> DatasetInfo:
    policy = Policy(
        scientists=("*",), evaluation=True, evaluations=evaluations, contest=contest, last_epoch=0
    )
    return owner.push(ROWS, policy=policy, budget=BUDGET)


@pytest.fixture(scope="module")
def held(owner: Party) -> DatasetInfo:
    return hold(owner)


@pytest.fixture(scope="module")
def enclave(scientist: Party) -> Enclave:
    return Enclave(scientist.connection, scientist.server.trust, scientist.identity)


@pytest.fixture(scope="module")
def rival(scientist: Party) -> Enclave:
    other = Party(scientist.server, "rival")
    return Enclave(other.connection, other.server.trust, other.identity)


class Fn(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(x)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES)


def rows() -> tuple[Tensor, Tensor]:
    found = {n: bytes(v) for n, (_, v) in tensors.load(table(ROWS)).items()}
    x = torch.frombuffer(bytearray(found["x"]), dtype=torch.float32).reshape(ROWS, FEATURES)
    return x, torch.frombuffer(bytearray(found["y"]), dtype=torch.int64)


@functools.cache
def exported(seed: int = 0) -> models.Exported:
    return models.export_entry(linear(seed), schema())


def one_step(privacy: Dp | NonPrivate = EXACT) -> TrainSpec:
    return TrainSpec(batch_size=ROWS, steps=1, privacy=privacy, optimizer=Sgd(lr=1.0))


def ask(who: Party, data: DatasetInfo, *, packed: Any = None, **changes: Any) -> Quote:
    """The quote of an entry as a client of the attacker's own would ask for it."""
    made = exported()
    fields = {"train": one_step(), "inputs": made.inputs, "metrics": METRICS, "target": "y"}
    return who.quote([data], packed or made.packed, **(fields | changes))


def refused(of: Any, *given: Any, **more: Any) -> CasemateError:
    with pytest.raises(CasemateError) as e:
        of(*given, **more)
    assert e.value.mend
    return e.value


@pytest.fixture(scope="module")
def board(enclave: Enclave, rival: Enclave, held: DatasetInfo) -> Board:
    """Two participants, of whom one has entered twice."""
    for who, seed in ((enclave, 0), (enclave, 1), (rival, 2)):
        who.enter(linear(seed), held.dataset).watch(progress=False)
    return enclave.leaderboard(held.dataset)


def test_a_contest_scores_outputs_by_the_organisers_metrics(
    board: Board, enclave: Enclave, held: DatasetInfo
) -> None:
    x, y = rows()
    best = {}
    for who, seeds in ((enclave.identity.id, (0, 1)), ("", (2,))):
        with torch.no_grad():
            outputs = [linear(seed)(x) for seed in seeds]
        hits = [float((o.argmax(1) == y).double().mean()) for o in outputs]
        best[who] = max(hits)
    found = {e.receipt.scientist: e.receipt for e in board.entries}
    assert len(found) == len(board.entries) == 2
    mine = found.pop(enclave.identity.id)
    (other,) = found.values()
    assert mine.scores[0] == pytest.approx(best[enclave.identity.id], abs=1e-6)
    assert other.scores[0] == pytest.approx(best[""], abs=1e-6)
    assert mine.guarantee.statement == "no privacy guarantee for these rows"
    said = receipts.statement_json(board.source.entries[0])
    assert isinstance(said, dict)
    assert said["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert said["predicate"]["passedTests"] == ["accuracy", "cross_entropy"]


def test_trains_on_the_test_set(scientist: Party, held: DatasetInfo) -> None:
    quote = scientist.quote([held])
    assert quote.datasets[0].refusal == "policy.evaluation-only"
    assert refused(scientist.submit, quote).code == "policy.evaluation-only"


def test_brings_a_metric_of_its_own(scientist: Party, held: DatasetInfo) -> None:
    """Its head says 1 whatever the label, or tells something else of the rows."""
    asked = {"accuracy": (lambda out, _: out[:, 0] * 0 + 1, 1.0)}
    made = models.export_metrics(linear(), [schema()], asked)
    quote = ask(
        scientist, held, packed=made.packed, inputs=made.inputs, metrics=METRICS[:1], target=""
    )
    assert quote.datasets[0].refusal == "policy.contest"
    assert refused(scientist.submit, quote).code == "policy.contest"
    error = refused(ask, scientist, held, packed=made.packed, inputs=exported().inputs)
    assert error.code == "model.contest"


def test_is_fed_the_label(scientist: Party, held: DatasetInfo) -> None:
    made = models.export_outputs(Fn(lambda y: torch.eye(CLASSES)[y]), {"x": ("i64", ())},
                                 {"x": (0, CLASSES - 1)})  # fmt: skip
    fed = (InputBinding(input="x", columns=("y",)),)
    assert refused(ask, scientist, held, packed=made, inputs=fed).code == "plan.entry-inputs"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"metrics": METRICS[:1]}, "policy.contest"),
        ({"metrics": METRICS[::-1]}, "policy.contest"),
        ({"metrics": (Metric(name="accuracy", limit=1000.0), METRICS[1])}, "policy.contest"),
        ({"train": one_step(Dp(epsilon=0.5, delta=1e-4, clip=longest(2, 1)))}, "policy.contest"),
        ({"target": "x"}, "plan.entry-target"),
    ],
)
def test_is_scored_by_other_rules(
    scientist: Party, held: DatasetInfo, changes: dict[str, Any], code: str
) -> None:
    try:
        quote = ask(scientist, held, **changes)
    except CasemateError as e:
        assert e.code == code
        return
    assert quote.datasets[0].refusal == code
    assert refused(scientist.submit, quote).code == code


def test_cuts_what_others_score_by_a_smaller_clip(owner: Party, scientist: Party) -> None:
    """Hits and misses have other norms, so that a small clip would count them differently, and
    with less noise than others have."""
    noised = hold(owner, NOISED)
    fair = Dp(epsilon=0.5, delta=1e-4, clip=longest(2, 1))
    assert ask(scientist, noised, train=one_step(fair)).datasets[0].refusal is None
    for unfair in (
        dataclasses.replace(fair, clip=0.1),
        dataclasses.replace(fair, clipping="automatic"),
        dataclasses.replace(fair, clipping="per-layer"),
    ):
        assert refused(ask, scientist, noised, train=one_step(unfair)).code == "plan.entry-clip"
    more = ask(scientist, noised, train=one_step(dataclasses.replace(fair, epsilon=5.0)))
    assert more.datasets[0].refusal == "policy.contest"


def test_is_measured_by_the_form_of_its_output(owner: Party, scientist: Party) -> None:
    """One score where there are three classes, always above 0: as if the label were yes or no, it
    would be right about every class but the first."""
    x, y = schema(rows=ROWS).columns
    three = schema(rows=ROWS, columns=(x, dataclasses.replace(y, high=2)))
    contest = dataclasses.replace(CONTEST, metrics=METRICS[:1])
    policy = Policy(scientists=("*",), evaluation=True, evaluations=1, contest=contest)
    held = owner.push(ROWS, of=three, policy=policy, budget=BUDGET)
    yes = models.export_entry(Fn(lambda x: x[:, 0] * 0 + 1), three)
    given = {"inputs": yes.inputs, "metrics": METRICS[:1]}
    error = refused(ask, scientist, held, packed=yes.packed, **given)
    assert error.code == "model.contest"
    wide = models.export_entry(nn.Linear(FEATURES, 3), three)
    assert ask(scientist, held, packed=wide.packed, metrics=METRICS[:1]).datasets[0].refusal is None


def test_asks_for_a_metric_that_there_is_not(scientist: Party, held: DatasetInfo) -> None:
    error = refused(ask, scientist, held, metrics=(Metric(name="auc"),))
    assert error.code == "model.contest"


def test_looks_at_other_records(enclave: Enclave, held: DatasetInfo) -> None:
    error = refused(enclave.enter, Fn(lambda x: (x - x.mean(0))[:, :CLASSES]), held.dataset)
    assert error.code == "model.mixes-records"


def test_scores_what_is_no_number(rival: Enclave, owner: Party) -> None:
    """NaN compares as larger than anything, and as equal to nothing."""
    held = hold(owner)
    for bad in (lambda x: (x - x)[:, :CLASSES] / 0, lambda x: (x / (x - x))[:, :CLASSES]):
        scores = rival.enter(Fn(bad), held.dataset).watch(progress=False).receipt.receipt.scores
        assert scores[0] <= 0.75 and scores[1] == 8.0


def test_enters_more_often_than_it_may_at_once(owner: Party, scientist: Party) -> None:
    """Each quote is allowed when it is made; only as many entries as are left start."""
    held = hold(owner, dataclasses.replace(CONTEST, entries=1))
    quotes = [ask(scientist, held) for _ in range(3)]
    assert all(q.datasets[0].refusal is None for q in quotes)

    def submit(quote: Quote) -> str:
        try:
            return scientist.wait(scientist.submit(quote).job).state
        except CasemateError as e:
            return e.code

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(submit, quotes)) == ["done", "policy.entries", "policy.entries"]
    assert ask(scientist, held).datasets[0].refusal == "policy.entries"


def test_has_many_names(owner: Party, scientist: Party) -> None:
    """Where anyone may enter, one person enrols often; all names share the exact evaluations."""
    held = hold(owner, dataclasses.replace(CONTEST, entries=1), evaluations=1)
    scientist.wait(scientist.submit(ask(scientist, held)).job)
    sybil = Party(scientist.server, "sybil")
    assert ask(sybil, held).datasets[0].refusal == "policy.evaluations"


def test_enters_after_the_end(owner: Party, scientist: Party) -> None:
    """No clock is asked: the end is the owner's signature on the next epoch."""
    held = hold(owner)
    early = ask(scientist, held)
    owner.request("POST", f"/v1/datasets/{held.dataset}/epoch", {"epoch": 1})
    assert refused(scientist.submit, early).code in ("policy.stale-epoch", "policy.expired")
    late = dataclasses.replace(held, epoch=1)
    assert ask(scientist, late).datasets[0].refusal == "policy.expired"


def test_an_organiser_changes_the_rules_under_way(owner: Party, held: DatasetInfo) -> None:
    for contest in (None, dataclasses.replace(CONTEST, entries=100), NOISED):
        policy = dataclasses.replace(held.policy, contest=contest)
        path = f"/v1/datasets/{held.dataset}/policy"
        assert refused(owner.request, "PUT", path, policy).code == "policy.purpose"
        error = refused(owner.register, ROWS, policy=policy, budget=BUDGET, previous=held.dataset)
        assert error.code == "policy.purpose"


def test_an_organiser_names_no_label(owner: Party) -> None:
    for target in ("x", "z"):
        with pytest.raises(ValueError, match="label column"):
            hold(owner, dataclasses.replace(CONTEST, target=target))


def test_an_organiser_names_metrics_that_no_output_can_have(owner: Party) -> None:
    for other in ("mse", "binary_cross_entropy_with_logits"):
        both = (METRICS[1], Metric(name=other))
        with pytest.raises(ValueError, match="no one output"):
            hold(owner, dataclasses.replace(CONTEST, metrics=both))


def test_a_stranger_reads_the_leaderboard(
    owner: Party, scientist: Party, held: DatasetInfo
) -> None:
    closed = owner.push(
        ROWS, policy=dataclasses.replace(held.policy, scientists=("id_" + "0" * 40,)), budget=BUDGET
    )
    path = f"/v1/datasets/{closed.dataset}/leaderboard"
    assert refused(scientist.request, "GET", path).code == "data.unknown-dataset"
    plain = owner.push(ROWS)
    path = f"/v1/datasets/{plain.dataset}/leaderboard"
    assert owner.request("GET", path).value(Leaderboard).entries == ()


def test_a_leaderboard_is_forged(
    board: Board, enclave: Enclave, rival: Enclave, owner: Party, held: DatasetInfo
) -> None:
    trust = enclave._trust
    first, second = board.source.entries
    (again,) = (
        s for s in enclave.jobs.list() if _is_other(enclave, s.job, board)
    )  # fmt: skip
    twice = enclave.job(again.job).bundle
    other = hold(owner)
    foreign = rival.enter(linear(3), other.dataset).watch(progress=False).bundle
    evaluation = owner.push(
        ROWS, policy=Policy(scientists=("*",), evaluation=True, evaluations=1), budget=BUDGET
    )
    plain = rival.evaluate(linear(3), [evaluation]).watch(progress=False).bundle
    for entries in (
        (second, first), (first, twice), (first, foreign), (first, plain), (first, first),
    ):  # fmt: skip
        forged = Leaderboard(dataset=held.dataset, entries=entries)
        assert refused(contests.verify, forged, trust).code == "receipt.leaderboard"
    assert refused(
        contests.verify, Leaderboard(dataset=other.dataset, entries=(first,)), trust
    ).code == "receipt.leaderboard"  # fmt: skip
    assert len(contests.verify(board.source, trust).entries) == 2


def test_a_saved_leaderboard_is_held_against_what_is_known_of_the_log(
    board: Board, scientist: Party, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each receipt alone: who goes back before an entry, or forks the log, has witnesses against
    it, and whoever saw the log."""
    monkeypatch.setenv("CASEMATE_LOGS", str(tmp_path / "logs"))
    cm.connect(scientist.server.url, trust=Trust.simulated(), identity=scientist.identity).close()
    file, nobody = tmp_path / "board.json", FakeWitness("nobody").vkey
    board.save(file)
    given = ["contest", "verify", str(file), "--trust", "simulated", "--format", "json"]
    shown = CliRunner().invoke(cli, given, catch_exceptions=False)
    for entry in json.loads(shown.stdout)["entries"]:
        (known,) = (c for c in entry["checks"] if c["name"] == "seen before")
        assert known["state"] == "ok"
    refusal = CliRunner().invoke(cli, [*given, "--witness", nobody]).exception
    assert getattr(refusal, "code", "") == "receipt.witnesses"


def test_a_forged_leaderboard_writes_to_the_terminal() -> None:
    empty = Leaderboard(dataset="ds_\x1b[2J\rContest won", entries=())
    assert not {"\x1b", "\r"} & set(str(contests.verify(empty, Trust.simulated())))


def test_is_entered_in_another_enclave_as_well() -> None:
    """An organiser and an operator: the same rows, under the same salt, in a second enclave, where
    entries are counted anew. Both receipts are genuine."""
    vector = tensors.dump({"v": ("f32", (3,), struct.pack("<3f", 1.0, 0.75, 0.125))})
    told = {"parameters": 3, "dimension": 3, **told_result(vector)}

    async def entered(who: Person, held: DatasetInfo) -> ReceiptBundle:
        made = await who.submission([held], one_step())
        request = dataclasses.replace(
            made.request,
            metrics=METRICS,
            target="y",
            inputs=(InputBinding(input="x", columns=("x",)),),
        )
        made = dataclasses.replace(
            made, request=request, sealed_key=who.seal(bytes(32), made.info(codec.digest(request)))
        )
        quote = codec.from_json(Quote, await who.ask("POST", "/v1/quotes", made))
        job = (await who.submit(quote)).job
        assert (await who.finished(job)).state == "done"
        return codec.from_json(ReceiptBundle, await who.ask("GET", f"/v1/jobs/{job}/receipt"))

    async def work() -> None:
        policy, salt = (
            Policy(scientists=("*",), evaluation=True, evaluations=9, contest=CONTEST),
            os.urandom(32),
        )
        found = []
        async with (
            Desk(script=Script(prepared=told, result=vector)) as here,
            Desk(script=Script(prepared=told, result=vector)) as there,
        ):
            organiser, anna = await here.person("organiser"), await here.person("anna")
            for desk in (here, there):
                at = Person(desk, organiser.identity)
                await at.enrol()
                held = await at.push(ROWS, policy=policy, salt=salt)
                found.append(held.dataset)
            assert found[0] == found[1]
            friend = await there.person("friend")
            board = Leaderboard(
                dataset=held.dataset,
                entries=(await entered(anna, held), await entered(friend, held)),
            )
        trust = Trust.simulated()
        error = refused(contests.verify, board, trust)
        assert error.code == "receipt.leaderboard" and "two logs" in error.message
        assert "of 2 logs" in str(contests.verify(board, trust, recovered=True))

    run_async(work())


def _is_other(enclave: Enclave, job: str, board: Board) -> bool:
    """Whether a job is one's entry that is not on the board."""
    if job in {e.receipt.job for e in board.entries}:
        return False
    found = enclave.jobs.quote(enclave.jobs.status(job).quote_digest).quote.request
    return found.target == "y" and found.datasets[0].dataset == board.source.dataset


def test_a_score_is_written_over(board: Board, enclave: Enclave) -> None:
    """The statement is signed, says each thing once, and its scores are its metrics'."""
    first = board.entries[0].receipt
    for given in ((), (1.0,), (1.5, 0.0), (-0.5, 0.0), (float("nan"), 0.0)):
        said = dataclasses.replace(first, scores=given)
        with pytest.raises(ReceiptError):
            receipts._agree(said, board.source.entries[0])
    with pytest.raises(ReceiptError):
        receipts._agree(dataclasses.replace(first, target=""), board.source.entries[0])
    (mine,) = (e.receipt for e in board.entries if e.receipt.scientist == enclave.identity.id)
    result = enclave.job(mine.job).result()
    assert receipts._scored(mine, result).state == "ok"
    lied = dataclasses.replace(mine, scores=(mine.scores[0] / 2, mine.scores[1]))
    with pytest.raises(ReceiptError, match="not those of the result"):
        receipts._scored(lied, result)
    bundle: ReceiptBundle = board.source.entries[1]
    forged = dataclasses.replace(bundle, envelope=board.source.entries[0].envelope)
    assert refused(receipts.verify_receipt, forged, trust=enclave._trust).code.startswith("receipt")


def entry(train: TrainSpec, **changes: Any) -> JobRequest:
    fields: dict[str, Any] = {
        "job": "job_" + "1" * 32,
        "scientist": "id_s",
        "datasets": (DatasetUse(dataset="ds_a", policy_digest="sha256:0", epoch=0),),
        "model_digest": "sha256:0",
        "inputs": (InputBinding(input="x", columns=("x",)),),
        "train": train,
        "metrics": METRICS[:1],
        "target": "y",
    }
    return JobRequest(**(fields | changes))


def prepared(**changes: Any) -> Prepared:
    return Prepared(**{**PREPARED, "model_digest": "", **changes})


def test_no_plan_is_made_of_what_the_route_refuses() -> None:
    compile_plan(entry(one_step()), [schema()], prepared())
    fed = (InputBinding(input="x", columns=("y",)),)
    for changes, code in (({"inputs": fed}, "entry-inputs"), ({"target": "x"}, "entry-target")):
        with pytest.raises(PlanError) as e:
            compile_plan(entry(one_step(), **changes), [schema()], prepared())
        assert e.value.code == f"plan.{code}"


def test_reads_labels_out_of_one_exact_score() -> None:
    """No more than is said of it: in each of eight slices of a feature, chosen before anything is
    known, how many more labels are 1 than 0; a lone row's label with certainty."""
    rng, count, slices, base = np.random.default_rng(0), 64, 8, 5
    x, y = rng.uniform(0, 1, count), rng.integers(0, 2, count)
    place = np.floor(x * count).astype(int)  # one row of each is expected
    weight = np.where(place < slices, float(base) ** -np.minimum(place, slices), 0.0)
    outputs = (0.5 - weight / 2).astype(np.float32)
    values = np.abs(outputs - y.astype(np.float32)).astype(np.float64)
    result = tensors.dump({"v": ("f32", (2,), struct.pack("<2f", 1.0, values.mean()))})
    (score,) = scores((Metric(name="l1"),), result)
    told = round((score * count - count / 2) * 2 * base ** (slices - 1))
    read = []
    for _ in range(slices):
        digit = (told + base // 2) % base - base // 2
        read.append(digit)
        told = (told - digit) // base
    more = [int((2 * y[place == i] - 1).sum()) for i in range(slices)]
    assert read[::-1] == more and any(more)


# Overfitting by many entries: Blum, Hardt 2015 (arXiv:1502.04585), section 3.1, "boosting": enter
# random labels, and let those that scored above one half vote.
N, MANY = 1000, 1000


def boosted(entries: int, noise: float, seed: int) -> float:
    """How the vote does on the test set's own labels, which are a coin's: one half is all that
    there is to learn. noise: standard deviation of a score's."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 1], N)
    guesses = rng.choice([-1, 1], (entries, N))
    scores = (guesses == labels).mean(1) + noise * rng.standard_normal(entries)
    vote = np.sign((guesses * np.sign(scores - 0.5)[:, None]).sum(0) + 0.5)
    return float((vote == labels).mean())


def admitted(contest: Contest, budget: Budget) -> tuple[int, float]:
    """How many entries a budget admits, and the noise of a score, by the plan that they get."""
    assert contest.epsilon is not None and contest.delta is not None
    privacy = Dp(epsilon=contest.epsilon, delta=contest.delta, clip=longest(1, 1))
    train = dataclasses.replace(one_step(privacy), batch_size=N)
    plan = compile_plan(entry(train), [schema(rows=N)], prepared(dimension=2))
    rdp = RdpFilter(budget)
    extra = plan.delta_truncation + plan.delta_sampler
    charge = rdp.charge(plan.events, extra, delta_shown=contest.delta)
    spent, delta, count = charge.rdp_nano, charge.delta_femto, 0
    while rdp.admits(tuple(s * count for s in spent), delta * count, charge):
        count += 1
    return count, plan.sigma / N


def test_overfits_by_entering_again_and_again() -> None:
    """Exact scores of 1,000 rows give 79% of a coin's tosses to who may enter 1,000 times. A budget
    of epsilon 1 ends that: fewer entries, and noise in each.

    The vote's standard deviation is 1.6%; the bounds are six of them from what is expected, so that
    a false alarm has a probability below 1e-8.
    """
    count, noise = admitted(dataclasses.replace(CONTEST, epsilon=0.1, delta=1e-6),
                            Budget(epsilon=1.0, delta=1e-4))  # fmt: skip
    assert 10 < count < MANY and noise > 0.02
    assert boosted(MANY, 0.0, seed=1) > 0.69
    assert boosted(count, noise, seed=1) < 0.62
    assert boosted(MANY, noise / 20, seed=1) > 0.65, "less noise than promised is seen"

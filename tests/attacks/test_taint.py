"""One record is changed, and every byte that goes out is the same, or is on the list of releases
(``server.release``): messages, logs, metrics, errors, receipts, times, sizes.

In the worker the gradients are computed and then erased, so that the weights may not change either.
At the server the worker is hostile: it ends, speaks, writes and dawdles as the record tells it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from casemate.engine import train, windows
from casemate.seal.identity import Identity
from casemate.server import release
from casemate.server import run as server_run
from casemate.spec import codec, tensors
from casemate.spec.errors import CasemateError
from casemate.spec.messages import CheckDataset, Checked, Done, Failed, Run, State
from casemate.worker import session
from support import desk as desk_module
from support import engine_lab as lab
from support import worker_lab
from support.desk import Desk, Person, Script, ScriptedWorker, WorkerGone, run_async
from support.server import FEATURES, Party, mlp, start, table, train_spec
from support.simserver import CountingRng, cheap

# In the worker.

RECORDS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "another value": lambda t: t["x"][7].fill_(-2.0),
    "the other class": lambda t: t["y"][7].sub_(1).abs_(),
    "NaN": lambda t: t["x"][7].fill_(float("nan")),
    "infinity": lambda t: t["x"][7].fill_(float("-inf")),
    "out of its bounds": lambda t: t["x"][7].fill_(1e30),
    "a label out of range": lambda t: t["y"][7].fill_(10**9),
    "a negative label": lambda t: t["y"][7].fill_(-(10**9)),
    "zero": lambda t: t["x"][7].zero_(),
}


@dataclass
class Outbound:
    """All that a worker let out."""

    frames: list[bytes] = field(default_factory=list)
    result: bytes = b""
    states: dict[int, bytes] = field(default_factory=dict)
    said: str = ""


@pytest.fixture(scope="module", params=["graph", "record"])
def prepared(request: pytest.FixtureRequest) -> worker_lab.InProcess:
    made = worker_lab.InProcess(worker_lab.job(steps=24, sizes=(4, 3, 2)))
    if request.param != made.ready.path:
        told = dataclasses.replace(made.ready.prepared, path=(request.param,))
        made.ready = dataclasses.replace(made.ready, fast=None, prepared=told)
    return made


def leave(
    made: worker_lab.InProcess, monkeypatch: pytest.MonkeyPatch, capfd: Any, wire: bytes
) -> Outbound:
    """What leaves a run over ``wire``, whose draws are the same in each."""
    out = Outbound()
    send = session.frames.send

    def sent(sock: Any, value: object, *rest: Any) -> None:
        if isinstance(value, (State, Done, Failed)):
            out.frames.append(codec.encode(value))
        send(sock, value, *rest)

    made.job = dataclasses.replace(made.job, wire=wire)
    with monkeypatch.context() as patch:
        patch.setattr(session.frames, "send", sent)
        patch.setattr(session, "OsRng", lambda: CountingRng(5))
        out.result, out.states = made.run(patch, every=10)
    out.said = "".join(capfd.readouterr())
    return out


@pytest.fixture
def erased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's sum is formed, and forgotten."""
    sums = train._sums

    def without(*given: Any) -> Any:
        real = sums(*given)

        def pieces(chosen: Any) -> Iterator[windows.Piece]:
            for first, total in real(chosen):
                yield first, total.zero_()

        return pieces

    monkeypatch.setattr(train, "_sums", without)


def wires(change: Callable[[dict[str, torch.Tensor]], object]) -> tuple[bytes, bytes]:
    schema = lab.schema(worker_lab.FEATURES, worker_lab.CLASSES, worker_lab.ROWS)
    one, other = lab.table(schema), lab.table(schema)
    change(other)
    assert lab.to_wire(one) != lab.to_wire(other)
    return lab.to_wire(one), lab.to_wire(other)


@pytest.mark.usefixtures("erased")
@pytest.mark.parametrize("record", RECORDS)
def test_nothing_of_a_record_leaves_the_worker(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any, record: str
) -> None:
    one, other = (leave(prepared, monkeypatch, capfd, w) for w in wires(RECORDS[record]))
    assert one == other
    assert one.said == "" and len(one.states) == 2 and one.result


@pytest.mark.parametrize("record", RECORDS)
def test_sizes_and_messages_are_the_same_even_where_weights_are_not(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any, record: str
) -> None:
    one, other = (leave(prepared, monkeypatch, capfd, w) for w in wires(RECORDS[record]))
    assert one.frames == other.frames and one.said == other.said == ""
    assert [*map(len, one.states.values())] == [*map(len, other.states.values())]
    heads = [tensors.read_header(o.result, len(o.result)) for o in (one, other)]
    assert heads[0] == heads[1]


def test_without_the_stub_the_weights_tell_so_the_test_looks_at_them(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    one, other = (leave(prepared, monkeypatch, capfd, w) for w in wires(RECORDS["another value"]))
    assert one.result != other.result and one.states != other.states


@pytest.mark.usefixtures("erased")
@pytest.mark.parametrize("leak", ["a length", "a line", "a buffer"])
def test_a_seeded_leak_is_found(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any, leak: str
) -> None:
    """The number of bad rows as a length, in a line of output, in a tensor beside the weights."""
    assemble = session.rows.assemble
    count = 0

    def counted(schemas: Any, tables: Any, *rest: Any) -> Any:
        nonlocal count
        count = sum(int((~torch.isfinite(t["x"])).any(1).sum()) for t in tables)
        if leak == "a line":
            print("bad rows:", count)
        return assemble(schemas, tables, *rest)

    def packed(result: dict[str, torch.Tensor]) -> bytes:
        if leak == "a buffer":
            result = {**result, "seen": torch.tensor([float(count)])}
        return real(result) + (b"" if leak != "a length" else bytes(count))

    real = session._packed
    monkeypatch.setattr(session.rows, "assemble", counted)
    monkeypatch.setattr(session, "_packed", packed)
    one, other = (leave(prepared, monkeypatch, capfd, w) for w in wires(RECORDS["NaN"]))
    assert one != other


# At the server.

TEXT = "row 7 is 2.718281"


@dataclass(frozen=True)
class Behaviour:
    """How a worker takes a record to heart: what it answers to ``Run``, its result, the seconds it
    takes, what its states hold."""

    answer: Any = None
    result: bytes | None = None
    seconds: float = 0.0
    state: bytes = b""


def failed(phase: Any = "run", code: str = "job.failed", text: str = "") -> Failed:
    return Failed(phase=phase, code=code, message=text, mend=text, where=text)


ROWS = table(8)
ENDS_BADLY = {
    "plainly": Behaviour(failed()),
    "with a text": Behaviour(failed(text=TEXT)),
    "with a code of the data": Behaviour(failed(code="data.bounds", text=TEXT)),
    "with a code that is shown": Behaviour(failed(code="policy.revoked", text=TEXT)),
    "as of another phase": Behaviour(failed("prepare", "model.form", TEXT)),
    "by memory": Behaviour(WorkerGone("memory")),
    "by time": Behaviour(WorkerGone("time")),
    "by a crash": Behaviour(WorkerGone("closed")),
    "by another message": Behaviour(Checked(dataset="7")),
    "by a state out of turn": Behaviour(State(step=7, bytes=1)),
    "by rows for weights": Behaviour(result=ROWS),
    "by no safetensors": Behaviour(result=TEXT.encode()),
    "by nothing": Behaviour(result=b""),
    "by a length": Behaviour(Done(bytes=10**9)),
    "by no length": Behaviour(Done(bytes=0)),
    "late": Behaviour(failed(), seconds=7.0),
}  # fmt: skip
ENDS_WELL = {
    "plainly": Behaviour(),
    "later": Behaviour(seconds=7.0),
    "with other states": Behaviour(state=TEXT.encode()),
}
WEIGHTS = {
    "some": Behaviour(result=desk_module.weights()),
    "others": Behaviour(
        result=tensors.dump({"w0": ("f32", (8, FEATURES), b"\1" * (32 * FEATURES))})
    ),
}
LONG = {"seconds_per_step": 1.0, "seconds_fixed": 1000.0, "seconds_per_microbatch": 1.0}


class Dawdler(ScriptedWorker):
    behaviour = Behaviour()
    clock: Any

    async def expect(self, kinds: Any, seconds: float) -> Any:
        if Done in kinds or State in kinds:
            self.clock.now += self.behaviour.seconds
        return await super().expect(kinds, seconds)


async def life(behaviour: Behaviour, prepared: dict[str, Any]) -> dict[str, Any]:
    """Everything that a server with one owner, a scientist and a job lets out."""
    script = Script(prepared=prepared)
    script.result = behaviour.result if behaviour.result is not None else script.result
    Dawdler.behaviour = behaviour
    desk = Desk(script=script)
    Dawdler.clock = desk.clock
    out: dict[str, Any] = {}
    rng = CountingRng(8)
    async with desk:
        people = [Person(desk, Identity.generate(n, rng)) for n in ("owner", "scientist", "other")]
        owner, scientist, _ = people
        for person in people:
            await person.enrol()
        info = await owner.push()
        quote = await scientist.quote(info, job="job_" + "7" * 32)
        script.answers[Run] = behaviour.answer
        job = (await scientist.submit(quote)).job
        store = desk.service.store
        await desk.until(lambda: server_run.ledger.job(store, job).state in ENDED)
        await desk.until(lambda: not desk.service.queue._running)
        for person in people:
            for path in (f"/v1/jobs/{job}", "/v1/jobs", f"/v1/jobs/{job}/receipt",
                         f"/v1/jobs/{job}/result", f"/v1/datasets/{info.dataset}",
                         "/v1/datasets", "/v1/quotes"):  # fmt: skip
                answer = await person.send("GET", path)
                said = answer.content if "/result" not in path or answer.is_error else b""
                out[f"{person.identity.name} {path}"] = (
                    answer.status_code, len(answer.content), said, sorted(answer.headers.items())
                )  # fmt: skip
        for path in ("/metrics", "/v1/health", "/log/checkpoint", "/log/tile/entries/000.p/1"):
            answer = await desk.http.get(path)
            out[path] = answer.status_code, answer.content
        size = desk.service.store.size()
        out["the log"] = (await desk.http.get(f"/log/tile/entries/000.p/{size}")).content
        out["logs"] = desk.log_text()
        out["the disk"] = {n: len(d) for n, d in desk.disk.snapshot().items()}
        out["the clock"] = round(desk.clock.now, 6)
    return out


ENDED = ("done", "failed", "cancelled")


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour, dict[str, Any]], Any]]:
    """Lives that differ by the behaviour alone: keys, salts and names are drawn alike."""
    monkeypatch.setattr(desk_module, "ScriptedWorker", Dawdler)
    state = desk_module.training_state

    def trained(*given: Any) -> bytes:
        marked = Dawdler.behaviour.state
        return state(*given)[: -len(marked) or None] + marked

    monkeypatch.setattr(desk_module, "training_state", trained)

    def lived(behaviour: Behaviour, prepared: dict[str, Any]) -> Any:
        with monkeypatch.context() as patch, cheap(signed=True):
            patch.setattr(os, "urandom", CountingRng(3).bytes)
            return run_async(life(behaviour, prepared))

    lived(Behaviour(), {})  # what is made once in a process is made
    yield lived


BAD_RESULTS = {k: b for k, b in ENDS_BADLY.items() if b.answer is None}


@pytest.mark.parametrize(
    ("ends", "prepared"),
    [(ENDS_BADLY, {}), (ENDS_WELL, {}), (ENDS_WELL, LONG), (BAD_RESULTS, LONG)],
    ids=["badly", "well", "well, with states", "badly, with states"],
)
def test_nothing_that_a_worker_does_leaves_the_server(
    same: Any, ends: dict[str, Behaviour], prepared: dict[str, Any]
) -> None:
    first, *rest = ends
    wanted = same(ends[first], prepared)
    for name in rest:
        found = same(ends[name], prepared)
        assert {k: v for k, v in found.items() if v != wanted[k]} == {}, name


def test_other_weights_change_what_is_listed_and_no_size(same: Any) -> None:
    one, other = (same(b, {}) for b in WEIGHTS.values())
    changed = {k.rpartition("/")[2] for k in one if one[k] != other[k]}
    assert changed == {"receipt", "checkpoint", "the log"}
    for key in one:
        if isinstance(one[key], tuple) and len(one[key]) == 4:
            assert one[key][:2] == other[key][:2] and one[key][3] == other[key][3]
    assert len(one["the log"]) == len(other["the log"])


@pytest.mark.parametrize("leak", ["its message", "its reason", "its time"])
def test_a_seeded_leak_at_the_server_is_found(
    same: Any, monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    """Errors of a run passed on; why a worker ended, logged; ends shown when they come."""
    if leak == "its message":

        def end(error: CasemateError, *, read: bool) -> tuple[str, str]:
            return error.code, error.message

        monkeypatch.setattr(release, "end", end)
        pair = ENDS_BADLY["by no safetensors"], ENDS_BADLY["by memory"]
    elif leak == "its reason":
        gone = server_run.worker_gone

        def told(error: WorkerGone) -> Any:
            Dawdler.log.event("worker-end", state=error.reason)  # type: ignore[attr-defined]
            return gone(error)

        assemble = desk_module.assemble

        def noted(*given: Any, **more: Any) -> Any:
            made = assemble(*given, **more)
            Dawdler.log = made.log  # type: ignore[attr-defined]
            return made

        monkeypatch.setattr(desk_module, "assemble", noted)
        monkeypatch.setattr(server_run, "worker_gone", told)
        pair = ENDS_BADLY["by memory"], ENDS_BADLY["by time"]
    else:
        monkeypatch.setattr(server_run.Ticks, "wait", lambda self, now: 0.0)
        pair = ENDS_WELL["plainly"], ENDS_WELL["later"]
    one, other = (same(b, {}) for b in pair)
    assert one != other


async def pushed(answer: Any) -> dict[str, Any]:
    """What others than its owner see of a dataset that is refused at push."""
    desk = Desk(script=Script(answers={CheckDataset: answer}))
    rng = CountingRng(8)
    async with desk:
        owner, other = [Person(desk, Identity.generate(n, rng)) for n in ("owner", "other")]
        for person in (owner, other):
            await person.enrol()
        info = await owner.push()
        assert info.state == "refused"
        paths = (f"/v1/datasets/{info.dataset}", "/v1/datasets")
        out: dict[str, Any] = {p: (await other.send("GET", p)).content for p in paths}
        size = desk.service.store.size()
        for path in ("/metrics", f"/log/tile/entries/000.p/{size}"):
            out[path] = (await desk.http.get(path)).content
        out["logs"] = [_words(line) for line in desk.logs]
        out["the disk"] = {n: len(d) for n, d in desk.disk.snapshot().items()}
    return out


def test_what_is_wrong_with_rows_is_said_to_their_owner_alone(
    same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = ("data.bounds", "data.bounds", "data.not-finite", "format.safetensors", "data.bool")
    seen = []
    for code, text in zip(codes, ("", TEXT, "", "", TEXT), strict=True):
        with monkeypatch.context() as patch, cheap(signed=True):
            patch.setattr(os, "urandom", CountingRng(3).bytes)
            seen.append(run_async(pushed(failed("check", code, text))))
    for found in seen:
        assert found == seen[0]
        assert TEXT not in str(found)


# Both, as real processes.


def _words(line: str) -> Any:
    """A line of the log without its time; names by their kind."""
    said = json.loads(line)
    said.pop("time", None)
    return re.sub(r"(job|ds)_[0-9a-f]+", r"\1", json.dumps(said))


@pytest.mark.e2e
def test_one_record_changes_nothing_but_weights_between_real_processes(tmp_path: Any) -> None:
    rows = 64
    kept = table(rows)
    loaded = tensors.load(kept)
    info, _ = loaded["x"]
    other = kept[: info.start] + table(1, seed=9)[-16:] + kept[info.start + 16 :]
    seen = []
    with start(tmp_path / "state", spares=0) as server:
        owner, scientist = Party(server, "owner"), Party(server, "scientist")
        for wire in (kept, other):
            begun = len(server.log.read_text().splitlines())
            dataset = owner.push(rows, wire=wire)
            quote = scientist.quote([dataset], mlp(), train=train_spec(steps=4))
            job = scientist.submit(quote).job
            done = scientist.wait(job)
            receipt = scientist.request("GET", f"/v1/jobs/{job}/receipt").json()
            sealed = bytearray()
            scientist.connection.download(f"/v1/jobs/{job}/result", sealed.extend, limit=1 << 24)
            lines = server.log.read_text().splitlines()[begun:]
            events = [_words(x) for x in lines if '"request"' not in x]
            seen.append((
                done.state, done.error, done.message, done.tick == done.ticks, dataset.state,
                events, quote.execution.path, len(sealed), len(receipt["envelope"]),
            ))  # fmt: skip
    assert seen[0] == seen[1]
    assert seen[0][0] == "done"

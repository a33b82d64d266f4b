"""What a worker says, once a model has taken it over: numbers that cannot be, names that speak of
rows, layers that do not hold."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from casemate.server import release, serve
from casemate.server.config import Config, Limits
from casemate.server.prepared import check_locked, check_prepared
from casemate.spec import tensors
from casemate.spec.data import DatasetInfo
from casemate.spec.errors import CasemateError, DataError, FormatError, InternalError, JobError
from casemate.spec.job import JobStatus, Quote
from casemate.spec.messages import CheckDataset, Locked, Prepared, Run, State
from casemate.worker import dataset, session
from casemate.worker.lock import Entered
from support import engine_lab as lab
from support.desk import (
    PREPARED,
    Desk,
    Person,
    Refused,
    Script,
    ScriptedWorker,
    run_async,
    spent,
    told_result,
    weights,
)
from support.server import FEATURES

DIGEST = "sha256:" + "0" * 64
CONFIG = Config(state=Path("unused"), threads=1)


def _said(**other: Any) -> Prepared:
    return Prepared(**{"model_digest": DIGEST, **PREPARED, **other})


def test_what_a_worker_of_ours_says_is_taken() -> None:
    check_prepared(_said(), DIGEST, CONFIG)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((n, v) for n in ("parameters", "dimension", "microbatch", "bytes", "result_bytes")
          for v in (0, -1, 2**53 - 1)),
        *((n, v) for n in ("seconds_per_microbatch", "seconds_per_step", "seconds_fixed")
          for v in (-1e-9, 1e308, float("inf"), float("nan"))),
        *(("certified_eta", v) for v in (-1e-9, 1.1, float("nan"))),
        *(("rounding", v) for v in (-1e-9, float("inf"), float("nan"))),
        *(("path", v) for v in ((), ("",), ("vmap",), ("record", "\x1b"), ("graph", "x" * 2000))),
        *(("result", v) for v in ("", "sha256:", DIGEST + "0", DIGEST.upper(), "rows say 7")),
        ("model_digest", "sha256:" + "1" * 64),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(JobError) as refused:
        check_prepared(_said(**{name: value}), DIGEST, CONFIG)
    assert refused.value.code == "job.worker-failed"


async def _parties(desk: Desk) -> tuple[Person, Person, DatasetInfo]:
    owner, scientist = await desk.person("owner"), await desk.person("scientist")
    return owner, scientist, await owner.push()


def _refused_quote(script: Script, **limits: Any) -> str:
    """The code with which a quote is refused; nothing is charged, nothing is run."""
    codes: list[str] = []

    async def work() -> None:
        async with Desk(script=script, **limits) as desk:
            owner, scientist, info = await _parties(desk)
            with pytest.raises(Refused) as refused:
                await scientist.quote(info)
            codes.append(refused.value.code)
            assert spent(await owner.dataset(info.dataset)) == 0.0
            assert not any(isinstance(m, Run) for m in script.told)

    run_async(work())
    return codes[0]


def test_no_quote_is_made_of_it() -> None:
    assert _refused_quote(Script(prepared={"certified_eta": -0.9})) == "job.worker-failed"


def test_a_result_too_large_or_a_run_too_long_is_told_before_the_charge() -> None:
    large = {"result_bytes": Limits().result_bytes + 1}
    assert _refused_quote(Script(prepared=large)) == "limit.result"
    long = {"seconds_fixed": 99.0, "seconds_per_step": 99.0}
    assert _refused_quote(Script(prepared=long), run_seconds=100.0) == "limit.run"


# Layers.


def test_a_worker_that_names_too_few_layers_gets_no_key() -> None:
    check_locked(Locked(layers=("landlock", "seccomp", "rlimits")), ("seccomp", "landlock"))
    with pytest.raises(JobError) as refused:
        check_locked(Locked(layers=("seccomp",)), ("seccomp", "landlock"))
    assert refused.value.code == "job.worker-failed" and "landlock" in refused.value.message


def test_nor_is_its_model_quoted() -> None:
    async def work() -> None:
        async with Desk() as desk:
            _, scientist, info = await _parties(desk)
            desk.service.config = replace(desk.service.config, sandbox=("landlock",))
            with pytest.raises(Refused) as refused:
                await scientist.quote(info)
            assert refused.value.code == "job.worker-failed"

    run_async(work())


# Results.


def _job(script: Script, **limits: Any) -> tuple[JobStatus, list[str]]:
    """How a job ends, and the names of the sealed results."""
    found: list[Any] = []

    async def work() -> None:
        async with Desk(script=script, **limits) as desk:
            _, scientist, info = await _parties(desk)
            job = (await scientist.submit(await scientist.quote(info))).job
            status = await scientist.finished(job)
            found.extend((status, [n for n in desk.disk.snapshot() if n.startswith("results/")]))

    run_async(work())
    return found[0], found[1]


ZEROS = bytes(4 * 8 * FEATURES)
ANOTHER = {
    "name": {"w1": ("f32", (8, FEATURES), ZEROS)},
    "shape": {"w0": ("f32", (FEATURES, 8), ZEROS)},
    "shape of one axis": {"w0": ("f32", (8 * FEATURES,), ZEROS)},
    "fewer": {"w0": ("f32", (1,), bytes(4))},
    "none": {},
    "an empty tensor more": {"w0": ("f32", (8, FEATURES), ZEROS), "x": ("f32", (0,), b"")},
    "many names": {
        "w0": ("f32", (8, FEATURES), ZEROS),
        **{f"x{i:04d}" + "R" * 500: ("f32", (0,), b"") for i in range(2000)},
    },
}


@pytest.mark.parametrize("which", ANOTHER)
def test_a_result_of_other_names_or_shapes_never_leaves(which: str) -> None:
    """Its names and shapes were told before the first row was read, and can tell of none."""
    result = tensors.dump(ANOTHER[which])
    status, sealed = _job(Script(result=result))
    assert (status.state, status.error, sealed) == ("failed", "job.failed", [])
    with pytest.raises(FormatError):
        release.check_result(result, _Quoted(), _said())  # type: ignore[arg-type]


class _Request:
    released = None


class _Quoted:
    request = _Request()
    parameters = PREPARED["parameters"]


def test_the_result_that_was_told_leaves() -> None:
    release.check_result(weights(), _Quoted(), _said())  # type: ignore[arg-type]
    status, sealed = _job(Script())
    assert status.state == "done" and len(sealed) == 1
    for more in (b"\0", bytes(4)):
        with pytest.raises(FormatError):
            release.check_result(weights() + more, _Quoted(), _said())  # type: ignore[arg-type]


def test_more_scalars_than_were_quoted_never_leave_though_told() -> None:
    result = tensors.dump({"w0": ("f32", (59,), bytes(4 * 59))})
    status, sealed = _job(Script(result=result, prepared=told_result(result)))
    assert (status.state, sealed) == ("failed", [])


def test_a_result_is_read_to_its_told_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that says more, or wrote more, has the server hold no more."""
    asked: list[int] = []
    real = os.preadv

    def preadv(fd: int, views: Sequence[Any], at: int) -> int:
        asked.append(sum(len(v) for v in views))
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    status, _ = _job(Script(result=weights() + bytes(1 << 20)))
    assert status.state == "failed" and not asked
    status, _ = _job(Script())
    assert status.state == "done" and sum(asked) == len(weights())


# States, deadlines, the guarantee.

LONG = {"seconds_per_step": 1.0, "seconds_fixed": 1000.0, "seconds_per_microbatch": 1.0}


def test_a_state_of_another_step_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what was written is the state that is due."""
    real = ScriptedWorker._on

    def on(self: ScriptedWorker, step: int) -> Any:
        said = real(self, step)
        return replace(said, step=said.step + 1) if isinstance(said, State) else said

    assert _job(Script(prepared=dict(LONG)))[0].state == "done"
    monkeypatch.setattr(ScriptedWorker, "_on", on)
    assert _job(Script(prepared=dict(LONG)))[0].state == "failed"


def _deadlines(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> list[float]:
    seen: list[float] = []
    real = ScriptedWorker.expect

    async def expect(self: ScriptedWorker, kinds: Sequence[type], seconds: float) -> Any:
        if any(isinstance(m, Run) for m in self.script.told):
            seen.append(seconds)
        return await real(self, kinds, seconds)

    monkeypatch.setattr(ScriptedWorker, "expect", expect)
    assert _job(Script(prepared=dict(LONG)), **limits)[0].state == "done"
    return seen


def test_a_run_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made of the quote's seconds, of which the last state leaves less; and the operator's."""
    limits = {"run_floor": 7.0, "run_factor": 3.0}
    seen = _deadlines(monkeypatch, **limits)
    assert 3000.0 < seen[0] < 7.0 + 3.0 * 1100 and seen == sorted(seen, reverse=True)
    assert max(_deadlines(monkeypatch, run_seconds=2000.0)) <= 2000.0


def test_a_guarantee_is_computed_again_before_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(quote: Quote) -> None:
        raise InternalError("internal.guarantee", "Less.", mend="")

    monkeypatch.setattr(release, "check_guarantee", refuse)
    status, sealed = _job(Script())
    assert (status.state, sealed) == ("failed", [])


@pytest.mark.parametrize("guard", ["forbid_unpickling", "_forbid_core_files"])
def test_a_server_forbids_it_before_all_else(
    guard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Called(Exception):
        pass

    def called() -> None:
        raise Called

    for name in ("forbid_unpickling", "_forbid_core_files"):
        monkeypatch.setattr(serve, name, called if name == guard else lambda: None)
    with pytest.raises(Called):
        serve.serve(Config(state=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


# An owner's table.


def _check(monkeypatch: pytest.MonkeyPatch, table: dict[str, torch.Tensor]) -> list[str]:
    """What a worker does with it, in order."""
    done: list[str] = []
    load = dataset.load

    def shut_in(*_: object, **__: object) -> tuple[str, ...]:
        done.append("locked")
        return ()

    def loading(*arguments: Any) -> Any:
        done.append("loaded")
        return load(*arguments)

    monkeypatch.setattr(session, "_shut_in", shut_in)
    monkeypatch.setattr(dataset, "load", loading)
    wire = lab.to_wire(table)
    key, salt = b"k" * 32, b"s" * 32
    message = CheckDataset(
        dataset=lab.commitment(salt, wire), schema=lab.schema(4, 2, 10), key=key, salt=salt
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = lab.sealed_fd(key, wire)
        try:
            session._check(theirs, message, fd, Entered(Path("unused"), ()))
            done.append("checked")
        except CasemateError as e:
            assert isinstance(e, DataError)
            done.append(e.code)
        finally:
            os.close(fd)
    return done


def test_it_is_parsed_by_a_locked_worker_and_its_values_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = lab.table(lab.schema(4, 2, 10), 0)
    assert _check(monkeypatch, table) == ["locked", "loaded", "checked"]
    table["x"][3, 1] = float("nan")
    found = _check(monkeypatch, table)
    assert found[:2] == ["locked", "loaded"] and found[2].startswith("data.")


def test_the_loop_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result's head is parsed beside the event loop."""
    where: list[bool] = []
    real = release.check_result

    def check(*arguments: Any) -> None:
        try:
            asyncio.get_running_loop()
            where.append(True)
        except RuntimeError:
            where.append(False)
        real(*arguments)

    monkeypatch.setattr(release, "check_result", check)
    assert _job(Script())[0].state == "done" and where == [False]

"""Attacks on the native step: code that the model brings, rows swapped on the way, jobs that ask
for more than their privacy. Each is named for what it steals."""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from casemate.engine.aot import build, run
from casemate.engine.aot.step import of as step_of
from casemate.spec.errors import ModelError
from casemate.spec.job import Sgd
from support import native_lab as lab

TRAIN = lab.spec(Sgd(lr=0.1))


@pytest.fixture(scope="module")
def images() -> lab.Built:
    return lab.built("images")


def started(of: lab.Built, given: bytes) -> int:
    with pytest.raises(ModelError, match=r"model\.native|The native step") as e:
        run.run(of.artifact, iter([given]))
    return int(str(e.value).split("status ")[1].split(":")[0])


def job_with(of: lab.Built, **fields: object) -> bytes:
    """A job whose header says something else at these places."""
    whole, size = lab.job(of, lab.plan(of), TRAIN), run.JOB.itemsize
    return run.packed_job(fields, whole[:size]) + whole[size:]


def test_a_model_brings_a_call_that_opens_a_file(images: lab.Built, monkeypatch) -> None:
    """Were AOTInductor talked into it: the build fails by the symbol's name."""
    text, names, results = build.generated(step_of(images.lab.path, lab.CLIP, lab.GRID))
    evil = text + '\nextern "C" int system(const char *);\nint steal() { return system("id"); }\n'
    monkeypatch.setattr(build, "generated", lambda step: (evil, names, results))
    with pytest.raises(ModelError, match="'system'"):
        build.build(images.artifact.step)


def test_rows_are_swapped_or_changed_on_the_way(images: lab.Built) -> None:
    whole = bytearray(lab.job(images, lab.plan(images), TRAIN))
    for at in (-1, -17, -1000):
        wrong = whole.copy()
        wrong[at] ^= 1
        assert started(images, bytes(wrong)) == 70


def test_rows_are_cut_short(images: lab.Built) -> None:
    whole = lab.job(images, lab.plan(images), TRAIN)
    for keep in (run.JOB.itemsize - 1, run.JOB.itemsize + 7, len(whole) // 2, len(whole) - 1):
        assert started(images, whole[:keep]) == 70


@pytest.mark.parametrize(
    "fields",
    [
        {"rate": 0.1},  # accounted at 0.1, sampled at 0.4
        {"all": 1},
        {"threshold": 2**64 - 1},
        {"sigma": 0.0},
        {"sigma": -1.0},
        {"sigma": float("nan")},
        {"rate": float("nan")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"epsilon": float("nan")},
        {"slots": 0},
        {"slots": 3},
        {"processes": 0},
        {"processes": 10**6},
        {"rows": 10**9},
        {"units": 2**61},
        {"rows_bytes": 2**50},
        {"chunk": 0},
        {"magic": b"CMNAT02\n"},
    ],
    ids=str,
)
def test_a_header_that_claims_more_privacy_than_it_has(images: lab.Built, fields) -> None:
    assert started(images, job_with(images, **fields)) == 70


def test_noise_that_is_too_small_for_the_budget_takes_no_step(images: lab.Built) -> None:
    """The runtime accounts for the noise that it adds by its own sensitivity."""
    whole = job_with(images, sigma=2 * lab.GRID, epsilon=10.0)
    found = run.run(images.artifact, iter([whole]))
    assert found.steps == 0
    assert torch.equal(found.weights, images.lab.program.flat)


def test_units_with_more_rows_than_are_clipped_together(images: lab.Built) -> None:
    rows = replace(images.rows, starts=images.rows.starts[::2].copy())
    plan = lab.plan(images, units=rows.units)
    assert started(images, lab.job(images, plan, TRAIN, rows)) == 70


def test_a_run_is_locked_while_it_waits(images: lab.Built, tmp_path: Path) -> None:
    """seccomp and no new privileges hold from the start; no library is mapped."""
    program = tmp_path / "step"
    program.write_bytes(images.artifact.program)
    program.chmod(0o755)
    whole = lab.job(images, lab.plan(images), TRAIN)
    process = subprocess.Popen(
        [str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(whole[:-1])
    process.stdin.flush()
    status = Path(f"/proc/{process.pid}/status")
    wanted = {"Seccomp": "2", "NoNewPrivs": "1", "Threads": "1"}
    for _ in range(200):
        found = dict(
            line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
        )
        if all(found[k].strip() == v for k, v in wanted.items()):
            break
        signal.sigtimedwait([], 0.02)
    assert {k: found[k].strip() for k in wanted} == wanted
    with contextlib.suppress(PermissionError):  # nobody but root looks into it
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert ".so" not in maps and "python" not in maps
    process.stdin.write(whole[-1:])
    process.stdin.close()
    made = process.stdout.read()
    assert process.wait() == 0
    assert struct.unpack("<8sQ", made[:16]) == (run.MADE, 3)


def _filters(pid: int | str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("Seccomp_filters:\t")[1].split()[0])


def test_a_run_under_way_has_locked_itself_again(images: lab.Built) -> None:
    """While it computes on rows it has the second filter: no process, no pipe."""
    before = _filters("self")
    with run.started(images.artifact.program) as process:
        assert process.stdin is not None
        run.feed(process.stdin.fileno(), [lab.job(images, lab.plan(images, steps=10**5), TRAIN)])
        for _ in range(200):
            if _filters(process.pid) == before + 2:
                break
            signal.sigtimedwait([], 0.02)
        found = _filters(process.pid)
        process.kill()
    assert found == before + 2


def test_weights_tell_nothing_of_a_row_without_a_step(images: lab.Built) -> None:
    plan = lab.plan(images)
    other = replace(images.rows, inputs={k: v.flip(0) for k, v in images.rows.inputs.items()})
    one, two = (
        lab.trained(images, plan, TRAIN, rows, epsilon=0.0).weights for rows in (images.rows, other)
    )
    assert torch.equal(one, two)

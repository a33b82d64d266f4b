"""A worker that compiles in phase ``prepare``, with the environment and limits that a server gives,
and runs what it compiled after the lock."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from casemate.server import pool
from casemate.spec import frames, tensors
from casemate.spec.messages import Done, Failed, Locked, Prepare, Prepared, Ready
from support import engine_lab as lab

KEY, SALT = b"k" * 32, b"s" * 32
FEATURES, CLASSES, ROWS = 4, 2, 40

pytestmark = pytest.mark.full


def _run(
    home: str | None, decided: bool, scratch: Path
) -> tuple[Prepared, dict[str, torch.Tensor]]:
    """One job: what was prepared, and the trained tensors."""
    graph, weights = lab.mlp([FEATURES, 3, CLASSES])
    model = lab.packed(graph, weights)
    schema = lab.schema(FEATURES, CLASSES, ROWS)
    prepare = Prepare(
        key=KEY,
        model_digest="sha256:" + hashlib.sha256(model).hexdigest(),
        schemas=(schema,),
        inputs=lab.BINDINGS,
        train=lab.spec_of(8, 3, private=False),
        memory_bytes=4 << 30,
        threads=1,
        compile_seconds=600.0,
        compiled=decided,
    )
    wire = lab.to_wire(lab.table(schema))
    ours, theirs = socket.socketpair()
    env = pool._environment(1, scratch) | ({} if home is None else {"HOME": home})
    process = subprocess.Popen(
        pool.command(theirs.fileno()), pass_fds=[theirs.fileno()], env=env, cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    try:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        frames.receive(ours, (Ready,), timeout=120)
        frames.send(ours, prepare, (lab.sealed_fd(KEY, model),))
        prepared, _ = frames.receive(ours, (Prepared, Failed), timeout=240)
        assert isinstance(prepared, Prepared), prepared
        frames.receive(ours, (Locked,), timeout=60)
        run = lab.run_of(prepare, prepared, wire, KEY, SALT)
        memfd = os.memfd_create("result")
        frames.send(ours, run, (lab.sealed_fd(KEY, wire), os.dup(memfd)))
        done, _ = frames.receive(ours, (Done, Failed), timeout=60)
        assert isinstance(done, Done), done
        found = tensors.load(os.pread(memfd, done.bytes, 0))
        os.close(memfd)
    finally:
        ours.close()
        process.kill()
        process.wait()
    return prepared, {
        n: torch.frombuffer(bytearray(raw), dtype=torch.float32) for n, (_, raw) in found.items()
    }


def _told(prepared: Prepared) -> list[str]:
    return [line for line in prepared.path if line.startswith("compiled")]


def test_a_worker_runs_what_it_compiled_before_the_lock(tmp_path: Path) -> None:
    plain, weights = _run(None, False, tmp_path)
    assert not plain.compiled
    assert not _told(plain)
    made, again = _run(None, True, tmp_path)
    assert made.compiled
    assert "islands of" in _told(made)[0] or "quicker" in _told(made)[0]
    assert weights.keys() == again.keys()


@pytest.mark.parametrize("home", ["/proc/none", "{folder}"])
def test_a_home_that_is_missing_or_fresh_does_not_matter(home: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made, _ = _run(home.format(folder=tmp_path), True, scratch)
    assert made.compiled
    assert "islands of" in _told(made)[0] or "quicker" in _told(made)[0]
    # What this job made is gone: no other one loads it.
    assert not (tmp_path / ".cache" / "casemate" / "native" / "inductor").exists()
    assert not list(scratch.iterdir())

"""Flower on nodes that are real: a SuperLink and SuperNodes, each a process; and its simulation.

Flower lives in a virtual environment of its own under ``build/``, made when it is missing: its
versions of shared packages are not casemate's.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.fortified.local import How
from benchmarks.fortified.workload import ROOT, Workload

PACKAGES: Final = ("flwr[simulation]==1.41.0", "torch==2.13.0", "opacus==1.6.0")
EPOCH: Final = "the slowest node's epoch"
VENV: Final = ROOT / "build" / "bench-flower"
APP: Final = Path(__file__).parent / "flower_app"


def install() -> Path:
    """The environment's ``bin``, installed if its packages are not those of ``PACKAGES``."""
    mark = VENV / hashlib.sha256(repr((PACKAGES, sys.version)).encode()).hexdigest()[:16]
    if not mark.exists():
        env = dict(os.environ)
        links = env.get("PIP_FIND_LINKS") or _pip("global.find-links")
        # uv finds torch's CPU build where pip does, else on PyTorch's index.
        env.update({"UV_FIND_LINKS": links} if links else {"UV_TORCH_BACKEND": "cpu"})
        uv = [sys.executable, "-m", "uv"]
        subprocess.run(
            [*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(VENV)],
            check=True,
            env=env,
        )
        to = ["--python", str(VENV / "bin" / "python")]
        subprocess.run([*uv, "pip", "install", "--quiet", *to, *PACKAGES], check=True, env=env)
        mark.touch()
    return VENV / "bin"


def _pip(setting: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", setting]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def _process(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[Any]:
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=dict(env), stdout=out, stderr=out, cwd=log.parent)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _sweep(folder: Path) -> None:
    """End what Flower and Ray have left running: whose environment names this run's own folder."""
    sign = f"FLWR_HOME={folder / 'home'}".encode()
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if sign in (place / "environ").read_bytes().split(b"\0"):
                    left.append(int(place.name))
            except OSError:
                continue
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if left:
            time.sleep(2)


def _healthy(url: str, process: Any, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"Flower did not start:\n{log.read_text()[-3000:]}")


def run(
    work: Workload, how: How, node_noise: float, seed: int, extra: Mapping[str, str], real: bool
) -> dict[str, Any]:
    """One round over all nodes; ``real``: SuperNodes, else the simulation engine (Ray).

    ``work`` is the whole workload, ``node_noise`` the noise multiplier of a node's own epoch.
    ``seconds``: from the moment at which the slowest node begins to compute until the server has
    the mean of the nodes' models; what comes before is in ``fixed``.
    """
    binaries = install()
    with (
        tempfile.TemporaryDirectory(prefix="casemate-bench-", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        folder = Path(name)
        env = {
            **{k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"},
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            **extra,
        }
        port = _port()
        stack.callback(_sweep, folder)
        began = time.monotonic()
        log = folder / "superlink.log"
        link = [str(binaries / "flower-superlink"), "--insecure", "--port", str(port)]
        link += ["--disable-runtime-dependency-installation"]
        link += [] if real else ["--simulation"]
        process = stack.enter_context(_process(link, env, log))
        _healthy(f"http://127.0.0.1:{port}/health", process, log)
        for node in range(work.nodes if real else 0):
            command = [str(binaries / "flower-supernode"), "--insecure"]
            command += ["--superlink", f"127.0.0.1:{port}", "--port", str(_port())]
            command += ["--node-config", f"partition-id={node} num-partitions={work.nodes}"]
            stack.enter_context(_process(command, env, folder / f"node{node}.log"))
        _configure(folder, port, work.nodes, real)
        out = folder / "result.json"
        job = {
            "work": asdict(work),
            "how": asdict(how),
            "node_noise": node_noise,
            "seed": seed,
            "out": str(out),
        }
        (folder / "run.toml").write_text(f"job = {json.dumps(json.dumps(job))}\n")
        _submit(binaries, env, folder)
        while not out.exists():
            if process.poll() is not None or _ended(binaries, env, folder):
                time.sleep(0.5)
                if not out.exists():
                    raise RuntimeError(f"Flower's run failed:\n{_logs(folder)}")
            time.sleep(0.5)
        found = json.loads(out.read_text())
    return {
        "seconds": found["round"] - found["setup"],
        "cpu": found["cpu"],
        "records": round(found["records"]),
        "steps": round(found["steps"]),
        "fixed": {
            "SuperLink, nodes, submit, ServerApp": found["start"] - began,
            "round: nodes' processes, imports, model, data": found["setup"],
        },
        "within": {
            EPOCH: found["epoch"],
            "models to the server, mean": found["round"] - found["setup"] - found["epoch"],
        },
        "accuracy": found["accuracy"],
        "evaluation": found["evaluation"],
    }


def _configure(folder: Path, port: int, nodes: int, real: bool) -> None:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    lines = ["[superlink]", 'default = "bench"', "", "[superlink.bench]"]
    lines += [f'address = "127.0.0.1:{port}"', "insecure = true"]
    if not real:
        lines += [f"options.num-supernodes = {nodes}"]
        lines += ["options.backend.client-resources.num-cpus = 1"]
        lines += ["options.backend.client-resources.num-gpus = 0"]
        lines += [f"options.backend.init-args.num-cpus = {nodes}"]
    (home / "config.toml").write_text("\n".join(lines) + "\n")


def _flwr(binaries: Path, env: Mapping[str, str], folder: Path, *words: str) -> Any:
    return subprocess.run(
        [str(binaries / "flwr"), *words],
        env=dict(env),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def _submit(binaries: Path, env: Mapping[str, str], folder: Path) -> None:
    config = str(folder / "run.toml")
    done = _flwr(binaries, env, folder, "run", str(APP), "bench", "--run-config", config)
    if done.returncode:
        raise RuntimeError(f"flwr run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _ended(binaries: Path, env: Mapping[str, str], folder: Path) -> bool:
    """Whether Flower says that the run is over. Asked seldom: it starts a process."""
    last = folder / "run.toml"  # its time: when the run was submitted, or asked for
    if time.time() - last.stat().st_mtime < 60:
        return False
    done = _flwr(binaries, env, folder, "list", "bench", "--format", "json")
    last.touch()
    return '"finished:' in done.stdout


def _logs(folder: Path) -> str:
    return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("*.log")))

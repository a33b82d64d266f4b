"""Many clients at once: owners who push, scientists who quote and train, readers who look.

``python -m benchmarks.load [--clients 64] [--seconds 300] [--jobs 0] [--format json]``: a real
server with real workers, clients by the SDK in four processes. Half of the clients read, three in
eight are scientists with small jobs, one in eight pushes tables. It goes on for ``--seconds``, and
until ``--jobs`` jobs have ended. Then the server is stopped while jobs run, started again, and its
ledger is checked. Exit status 1 where a request was lost, a job has no end, or the checker finds
something. Times are reported, not judged: docs/benchmarks.md has them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import serving
from benchmarks.overhead import model, push

PROCESSES: Final = 4
LIGHT: Final = ("datasets", "jobs", "job", "head")
BUDGET: Final = {"epsilon": 1.0, "delta": 1e-6}


# One client.


class Client:
    """One thread's client. ``seen``: (what, seconds, outcome) of each request."""

    def __init__(self, made: dict[str, Any], number: int) -> None:
        import casemate as cm

        self.draw = random.Random(number)
        self.made, self.seen = made, list[tuple[str, float, str]]()
        self.jobs: list[str] = []
        trust = cm.Trust.simulated(made["root"])
        identity = cm.Identity.generate(f"client {number}")
        self.enclave = self.do(
            "connect", lambda: cm.connect(made["url"], trust=trust, identity=identity)
        )
        self.act = (self.train, self.train, self.train, self.push)[number % 8 // 2]
        if number % 2:
            self.act = self.read

    def do(self, what: str, act: Callable[[], Any]) -> Any:
        """One request, until it is answered: a server that says that it is busy is asked again."""
        from casemate.spec.errors import CasemateError

        while True:
            start = time.monotonic()
            try:
                found = act()
            except CasemateError as e:
                outcome = e.code
                if e.status != 503:
                    self.seen.append((what, time.monotonic() - start, outcome))
                    return None
                self.seen.append((what, time.monotonic() - start, "busy"))
                time.sleep(1.0)
                continue
            self.seen.append((what, time.monotonic() - start, "ok"))
            return found

    def ask(self, what: str, path: str) -> Any:
        connection = self.enclave._connection
        return self.do(what, lambda: connection.request("GET", path, retry=False))

    def read(self) -> None:
        what = self.draw.choice(("datasets", "jobs", "head"))
        path = {"datasets": "/v1/datasets", "jobs": "/v1/jobs", "head": "/log/checkpoint"}[what]
        self.ask(what, path)
        time.sleep(self.draw.uniform(0.2, 1.0))

    def train(self) -> None:
        import casemate as cm

        quote = self.do("quote", lambda: self.enclave.quote(
            self.made["model"], [self.made["dataset"]], dp=cm.DP(**BUDGET), batch_size=64, steps=4,
            optimizer="sgd", lr=0.1,
        ))  # fmt: skip
        run = quote and self.do("submit", lambda: self.enclave.submit(quote))
        if not run:
            time.sleep(1.0)
            return
        self.jobs.append(run.job)
        state = "queued"
        while state in ("queued", "running") and not self.made["over"].is_set():
            time.sleep(self.draw.uniform(0.5, 1.5))
            answer = self.ask("job", f"/v1/jobs/{run.job}")
            state = answer.json()["state"] if answer else state

    def push(self) -> None:
        import numpy as np

        import casemate as cm

        x = np.random.default_rng(self.draw.getrandbits(32)).uniform(-1, 1, (512, 8))
        table = {"x": x.astype(np.float32), "y": (x[:, 0] > 0).astype(np.int64)}
        self.do("push", lambda: self.enclave.datasets.push(
            table, name="more", label="y", classes=2, bounds={"x": (-1.0, 1.0)},
            policy=cm.Policy(scientists="*"), budget=cm.Budget(epsilon=4.0, delta=1e-5),
        ))  # fmt: skip
        time.sleep(self.draw.uniform(2, 6))


def clients(folder: Path, first: int, count: int) -> None:
    """A process of clients; what they saw goes to a file when ``folder/over`` is there."""
    made = json.loads((folder / "made.json").read_text())
    made["over"] = over = threading.Event()
    made["model"] = folder / "model.cmm"
    done: list[Client] = []

    broken: list[tuple[str, float, str]] = []

    def live(number: int) -> None:
        try:
            client = Client(made, number)
            done.append(client)
            while not over.is_set():
                client.act()
        except Exception as e:
            broken.append(("client", 0.0, f"internal.{type(e).__name__}"))
            raise

    threads = [threading.Thread(target=live, args=(first + i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    while not (folder / "over").exists():
        time.sleep(0.2)
        counts = {"ended": sum(len(c.jobs) for c in done), "asked": sum(len(c.seen) for c in done)}
        (folder / f"so-far-{first}").write_text(json.dumps(counts))
    over.set()
    for thread in threads:
        thread.join()
    told = {
        "seen": [*broken, *(s for c in done for s in c.seen)],
        "jobs": [j for c in done for j in c.jobs],
    }
    (folder / f"seen-{first}").write_text(json.dumps(told))


# The whole.


def sample(pid: int) -> tuple[float, int, int]:
    """Now, the process's resident bytes, its descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return time.monotonic(), pages * os.sysconf("SC_PAGESIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def _server(state: Path) -> list[str]:
    return [
        sys.executable, "-m", "casemate", "serve", "--dev", "--state", str(state), "--port", "0",
        "--threads", "1",
    ]  # fmt: skip


def _so_far(folder: Path, what: str) -> int:
    total = 0
    for path in folder.glob("so-far-*"):
        try:
            total += json.loads(path.read_text())[what]
        except json.JSONDecodeError:
            continue  # being written
    return total


def measure(folder: Path, count: int, seconds: float, jobs: int) -> dict[str, Any]:
    import casemate as cm
    from casemate.client import models

    state = folder / "state"
    samples: list[tuple[float, int, int]] = []
    env = {**os.environ, "CASEMATE_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with serving.started(_server(state), state, folder / "log") as (facts, pid):
        trust = cm.Trust.simulated(facts["root"])
        owner = cm.connect(facts["url"], trust=trust, identity=cm.Identity.generate("owner"))
        rows = push(owner, "rows")
        exported = models.export(model(), [rows.info.schema], loss="cross_entropy")
        (folder / "model.cmm").write_bytes(exported.packed.data)
        made = {"url": facts["url"], "root": facts["root"], "dataset": rows.info.dataset}
        (folder / "made.json").write_text(json.dumps(made))
        each = -(-count // PROCESSES)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load", "--clients", str(each), "--first",
                 str(each * i), "--folder", str(folder)], env=env,
            )
            for i in range(PROCESSES)
        ]  # fmt: skip
        start = time.monotonic()
        while time.monotonic() - start < seconds or _so_far(folder, "ended") < jobs:
            time.sleep(2.0)
            samples.append(sample(pid))
            if any(p.poll() is not None for p in processes):
                raise RuntimeError("a process of clients ended early")
        (folder / "over").touch()
        for process in processes:
            process.wait(120)
        took = time.monotonic() - start
        began = time.monotonic()
    stopped = time.monotonic() - began
    told = [json.loads(path.read_text()) for path in folder.glob("seen-*")]
    again = folder / "log-again"
    (state / "server.json").unlink(missing_ok=True)
    ends = _ends(state, again, [job for part in told for job in part["jobs"]])
    fsck = [sys.executable, "-m", "casemate", "audit", "fsck", str(state), "--tee", "simulated"]
    checked = subprocess.run(fsck, stdout=subprocess.DEVNULL, check=False).returncode
    return _figures(told, samples, took, stopped, ends, checked, count)


def _ends(state: Path, log: Path, jobs: Sequence[str]) -> Counter[str]:
    """How each job stands after a restart, by the server's own log of ends."""
    from casemate.server.config import Config
    from casemate.server.state import at

    with log.open("wb") as sink:
        process = subprocess.Popen(_server(state), stdout=sink, stderr=sink)
    try:
        while not (state / "server.json").exists():
            time.sleep(0.1)
        time.sleep(5.0)
    finally:
        process.terminate()
        process.wait(300)
    with at(Config(state=state, dev=True, tee="simulated")) as place:
        found = dict(place.using(lambda store: store.all("SELECT id, state FROM jobs")))
    return Counter(found.get(job, "lost") for job in jobs)


def _figures(
    told: Sequence[dict[str, Any]],
    samples: Sequence[tuple[float, int, int]],
    took: float,
    stopped: float,
    ends: Counter[str],
    checked: int,
    count: int,
) -> dict[str, Any]:
    seen = [entry for part in told for entry in part["seen"]]
    light = sorted(s for what, s, outcome in seen if what in LIGHT and outcome == "ok")
    outcomes = Counter(outcome for _, _, outcome in seen)
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    memory = [statistics.median(s[1] for s in part) for part in (early, late)]
    return {
        "clients": count,
        "seconds": round(took, 1),
        "requests": len(seen),
        "outcomes": dict(outcomes),
        "lost": sum(n for code, n in outcomes.items() if code.startswith(("net.", "internal."))),
        "light": {
            "requests": len(light),
            "p50_ms": round(1e3 * light[len(light) // 2], 1),
            "p99_ms": round(1e3 * light[int(0.99 * len(light))], 1),
            "longest_ms": round(1e3 * light[-1], 1),
        },
        "jobs": dict(ends),
        "rss_mib": [round(m / 2**20, 1) for m in memory],
        "rss_late_over_early": round(memory[1] / memory[0], 4),
        "descriptors": [max(s[2] for s in part) for part in (early, late)],
        "stop_seconds": round(stopped, 1),
        "fsck": checked,
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        clients(options.folder, options.first, options.clients)
        return 0
    with tempfile.TemporaryDirectory(prefix="casemate-load-") as name:
        found = measure(Path(name), options.clients, options.seconds, options.jobs)
    if options.format == "json":
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            print(f"{key:22}{value}")
    unended = sum(n for state, n in found["jobs"].items() if state == "lost")
    return 1 if found["lost"] or unended or found["fsck"] else 0


if __name__ == "__main__":
    sys.exit(main())

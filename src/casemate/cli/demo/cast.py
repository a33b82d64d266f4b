"""The processes of the demo: a server, and the parties, each spoken to in JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from casemate.spec.errors import FAMILIES, CasemateError, InternalError

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5.0


def _environment(home: Path) -> dict[str, str]:
    """A party sees its own home and none of this machine's settings of casemate."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CASEMATE_")}
    return {**kept, "CASEMATE_HOME": str(home), "OMP_NUM_THREADS": "1"}


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Server:
    """``casemate serve --dev`` on a free port of the loopback address."""

    def __init__(self, state: Path, log: Path, workers: int) -> None:
        self._ready = state / "server.json"
        self._log = log
        settings = {"--state": state, "--port": 0, "--workers": workers, "--spares": workers}
        arguments = [str(x) for pair in settings.items() for x in pair]
        self.arguments = ["casemate", "serve", "--dev", *arguments, "--threads", "1"]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "casemate", *self.arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=_environment(state),
            )

    def wait(self) -> dict[str, Any]:
        """What the operator publishes once it listens: url, root, measurement."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if self._ready.exists():
                found: dict[str, Any] = json.loads(self._ready.read_bytes())
                return found
            time.sleep(0.02)
        tail = self._log.read_text(errors="replace")[-500:]
        raise InternalError(
            "internal.demo-server",
            f"The server did not start: {tail or 'it said nothing'}",
            mend="Run `casemate doctor`, then `casemate serve --dev` to see why.",
        )

    def close(self) -> None:
        _end(self._process)


class Actor:
    """A party's process; :meth:`ask` sends a task and yields its answers."""

    def __init__(self, role: str, home: Path) -> None:
        self.name = home.name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "casemate.cli.demo.party", role, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(home),
        )

    def tell(self, do: str, **task: Any) -> None:
        """Send a task without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **task}) + "\n")
        self._process.stdin.flush()

    def answers(self) -> Iterator[dict[str, Any]]:
        """The answers to the task that was sent. Raises the error that the party met."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise self._error(answer["error"])
            done = answer.pop("done", False)
            if answer:
                yield answer
            if done:
                return
        raise InternalError(
            "internal.demo-party",
            f"The process of {self.name} ended with code {self._process.wait()}.",
            mend="Look at what it printed above.",
        )

    def _error(self, error: dict[str, str]) -> CasemateError:
        kind = FAMILIES[error["code"].split(".")[0]]
        message = f"{self.name}: {error['message']}"
        return kind(error["code"], message, mend=error["mend"], where=error["where"])

    def answer(self) -> dict[str, Any]:
        """The one answer to the task that was sent."""
        merged: dict[str, Any] = {}
        for answer in self.answers():
            merged |= answer
        return merged

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        self.tell(do, **task)
        return self.answer()

    def close(self) -> None:
        _end(self._process)


class Cast:
    """Everyone, ended together however the story ends: first the parties, then the server."""

    def __init__(self) -> None:
        self._all: list[Server | Actor] = []

    def add(self, one: Server | Actor) -> None:
        self._all.insert(0, one)

    def __enter__(self) -> Cast:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for one in self._all:
            one.close()

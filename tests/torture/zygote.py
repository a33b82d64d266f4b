"""Real servers that start in a tenth of a second: one process imports everything and forks.

``python -m torture.zygote FD`` reads a line of JSON from the socket FD and forks a child that runs
``serve``; the child is a server like any other, but for its worker's program (``stub.py``), the RSA
keys of the simulated TEE that OpenSSL does not check again, and what the line asks for. The zygote
has one thread, so that a fork is a clean start.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
STUB = Path(__file__).with_name("stub.py")


@dataclass
class Child:
    """A forked server."""

    zygote: Zygote
    pid: int

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet; one that has waits to be waited for."""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
            return stat.rpartition(b")")[2].split()[0] != b"Z"
        return False

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        told = self.zygote.ask({"do": "wait", "pid": self.pid})
        self.zygote.cpu += told["cpu"]
        return int(told["status"])

    def kill(self) -> int:
        self.signal(signal.SIGKILL)
        return self.wait()


class Zygote:
    cpu = 0.0  # seconds that children used, their own dead children's included

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        path = [str(STUB.parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torture.zygote", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
            )
        self._file = ours.makefile("rw", encoding="utf-8")
        ours.close()
        self.ask({"do": "wait for imports"})

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()
        line = self._file.readline()
        if not line:
            raise RuntimeError("the zygote is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, state: Path, **options: Any) -> Child:
        """A server on ``state``; see :func:`_serve` for ``options``."""
        told = self.ask({"do": "start", "state": str(state), **options})
        return Child(self, int(told["pid"]))

    def close(self) -> None:
        self._file.close()
        self._process.wait(30)


@contextlib.contextmanager
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    try:
        yield made
    finally:
        made.close()


def _serve(order: dict[str, Any]) -> None:
    """In the child. ``state``, ``journal``: paths; ``log``: where its words go; ``traced``: wait
    until a tracer is attached, and do all in one thread; ``die``: [call, number] of the disk at
    which it kills itself; ``prepared``: fields of what its workers prepare; ``bug``: one of
    ``bugs.BUGS``, or ""."""
    from casemate.server import pool, serve
    from casemate.server.config import Config, Limits
    from support.desk import FREE, PREPARED, weights
    from torture.bugs import BUGS

    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the zygote
    out = os.open(order.get("log", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd in (1, 2):
        os.dup2(out, fd)
    about = {**PREPARED, "seconds_fixed": 0.004, "seconds_per_step": 1e-4}
    about["seconds_per_microbatch"] = 1e-4
    said = json.dumps(about | order.get("prepared", {}))

    def command(fd: int) -> list[str]:
        return [
            sys.executable, "-I", "-S", str(STUB), str(fd), order["journal"], said,
            weights().hex(), str(order.get("seconds", 0.01)),
        ]  # fmt: skip

    pool.command = command
    serve._warm = lambda: None  # the zygote is warm
    if order.get("one_thread"):
        _one_thread()
    if order.get("traced"):
        while b"TracerPid:\t0\n" in Path("/proc/self/status").read_bytes():
            pass
    if "die" in order:
        _die_at(order["die"])
    config = Config(
        state=Path(order["state"]), port=0, dev=True, rates=FREE, threads=1, workers=2,
        limits=Limits(open_uploads=64), attest_window=0.0,
    )  # fmt: skip
    with BUGS[order["bug"]][0]() if order.get("bug") else contextlib.nullcontext():
        serve.serve(config, say=lambda _: None)


def _one_thread() -> None:
    """What goes to threads runs at once, so that the disk's calls have one order."""
    import asyncio

    async def inline(func: Any, /, *args: Any, **named: Any) -> Any:
        return func(*args, **named)

    asyncio.to_thread = inline  # type: ignore[assignment]


def _die_at(number: int) -> None:
    """SIGKILL itself before the disk's system call of that number."""
    count = 0

    def counted(real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in ("pwrite", "fsync", "ftruncate", "unlink", "replace", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def _quick_keys() -> None:
    """The simulated TEE's chain is ours: its RSA keys need no check at each start."""
    import functools

    from cryptography.hazmat.primitives import serialization

    serialization.load_pem_private_key = functools.partial(
        serialization.load_pem_private_key, unsafe_skip_rsa_key_validation=True
    )


def main() -> None:
    from casemate.server import serve
    from casemate.spec import codec
    from casemate.tee import simulated
    from support import desk  # noqa: F401
    from torture import bugs  # noqa: F401

    _quick_keys()
    codec.warm()
    simulated.measurement()
    serve._warm()
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        file = sock.makefile("rw", encoding="utf-8")
        for line in file:
            order = json.loads(line)
            answer: dict[str, float] = {}
            if order["do"] == "start":
                answer["pid"] = pid = os.fork()
                if pid == 0:
                    sock.detach()
                    code = 1
                    try:
                        os.closerange(3, 256)
                        _serve(order)
                        code = 0
                    except BaseException as e:
                        os.write(2, f"{type(e).__name__}: {e}\n".encode())
                    finally:
                        os._exit(code)
            elif order["do"] == "wait":
                _, status, used = os.wait4(order["pid"], 0)
                answer["status"] = os.waitstatus_to_exitcode(status)
                answer["cpu"] = used.ru_utime + used.ru_stime
            file.write(json.dumps(answer) + "\n")
            file.flush()


if __name__ == "__main__":
    main()

"""Workers: keyless processes with their imports done, one job each, never trusted.

A worker is spoken to in frames over a socket pair. Whatever it says beside the one message that is
due ends it: too long, out of order, too late, malformed. Descriptors that it attaches are dropped
by the kernel, since the parent reads with recv(2).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from casemate.server.config import Config
from casemate.spec import frames
from casemate.spec.errors import FAMILIES, CasemateError, InternalError, JobError
from casemate.spec.messages import MAX_FRAME, Failed, Prepared, Ready

T = TypeVar("T")

START_SECONDS: Final = 120.0
SEND_SECONDS: Final = 30.0
WATCH_SECONDS: Final = 0.25
# With what it started: a compiler and its parts, one at a time.
PROCESSES: Final = 32
# Of all of these; each takes a place and kernel memory that no process's own memory shows.
THREADS: Final = 1024
NICE: Final = 10
# Of what a worker says: no text is more than a sentence or two, and only what it prepared, with a
# line for each part of a model, may need a longer frame.
ANSWER_BYTES: Final = 64 << 10
CODE_LETTERS: Final = 80
TEXT_LETTERS: Final = 300
_PAGE: Final = resource.getpagesize()


class WorkerGone(Exception):
    """The worker died, was ended, or spoke out of turn. ``reason`` is for logs: one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _text(said: str) -> str:
    return "".join(c if c.isprintable() else " " for c in said[:TEXT_LETTERS])


def refusal(failed: Failed, phases: Sequence[str]) -> CasemateError:
    """The error that a worker's refusal stands for; only of a phase before any row was read, and
    cut to ``CODE_LETTERS`` and ``TEXT_LETTERS``."""
    kind = FAMILIES.get(failed.code.split(".")[0])
    known = kind is not None and kind is not InternalError and len(failed.code) <= CODE_LETTERS
    if failed.phase in phases and known:
        assert kind is not None
        with contextlib.suppress(ValueError):
            return kind(
                failed.code,
                _text(failed.message),
                mend=_text(failed.mend),
                where=_text(failed.where),
            )
    return JobError(
        "job.worker-failed",
        "The worker that looks at the input has failed.",
        mend="Try again; if it fails again, ask the operator to run `casemate doctor`.",
        status=500,
    )


class Worker:
    """One process, the leader of its group, and its socket. Every wait has a limit in seconds."""

    def __init__(
        self, process: subprocess.Popen[bytes], sock: socket.socket, scratch: Path
    ) -> None:
        self.pid = process.pid
        self.prepared: Prepared | None = None  # what it said of its model, once it is locked
        self._process, self._scratch = process, scratch
        self._sock = sock
        self._over: str | None = None

    async def _read(self, count: int) -> bytes:
        loop = asyncio.get_running_loop()
        parts = bytearray()
        while len(parts) < count:
            part = await loop.sock_recv(self._sock, count - len(parts))
            if not part:
                raise WorkerGone(self._over or "closed")
            parts += part
        return bytes(parts)

    async def expect(self, kinds: Sequence[type[T]], seconds: float) -> T:
        """The next message, which must be one of ``kinds``; ``WorkerGone`` otherwise, and the
        worker is ended."""
        most = MAX_FRAME if Prepared in kinds else ANSWER_BYTES
        try:
            async with asyncio.timeout(seconds):
                size = frames.length(await self._read(frames.HEAD), limit=most)
                return frames.decode(kinds, await self._read(size), limit=most)
        except TimeoutError:
            self.kill("time")
        except CasemateError:
            self.kill("protocol")
        except (OSError, WorkerGone):
            self.kill("closed")
        except asyncio.CancelledError:
            self.kill("cancelled")
            raise
        raise WorkerGone(self._over or "closed")

    async def octets(self, count: int, seconds: float) -> bytes:
        """So many bytes behind a message; ``WorkerGone``, and the worker is ended, otherwise."""
        try:
            async with asyncio.timeout(seconds):
                return await self._read(count)
        except TimeoutError:
            self.kill("time")
        except (OSError, WorkerGone):
            self.kill("closed")
        except asyncio.CancelledError:
            self.kill("cancelled")
            raise
        raise WorkerGone(self._over or "closed")

    async def tell(
        self, message: object, fds: Sequence[int] = (), payload: Sequence[bytes] = ()
    ) -> None:
        """Send a message and the octets that it announces; ``fds`` stay the caller's.
        ``WorkerGone`` when it does not take it."""
        frame = frames.encode(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            async with asyncio.timeout(SEND_SECONDS):
                sent = self._sock.sendmsg([frame[: frames.HEAD]], rights)
                await asyncio.get_running_loop().sock_sendall(self._sock, frame[sent:])
                for part in payload:
                    await asyncio.get_running_loop().sock_sendall(self._sock, part)
        except (OSError, TimeoutError):
            self.kill("closed")
            raise WorkerGone(self._over or "closed") from None

    def resident(self) -> tuple[list[int], int]:
        """Bytes of memory that it holds now, and each process that it started and that is still
        there: all are of its group, whoever their parent is by now. Its own come first. With them
        how many threads these have."""
        held: list[int] = []
        threads = 0
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if os.getpgid(int(name)) == self.pid:
                    # proc_pid_stat(5), from the third field on: the second may hold anything.
                    fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                    threads += int(fields[17])
                    held.insert(0 if int(name) == self.pid else len(held), int(fields[21]) * _PAGE)
        return held, threads

    @property
    def alive(self) -> bool:
        if self._over is not None or self._process.returncode is not None:
            return False
        # The kernel keeps the process's id, which names its group, until :meth:`end`.
        try:
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, how) is None
        except ChildProcessError:
            return False

    def kill(self, reason: str) -> None:
        """End it now (SIGKILL), and all that it started: they cannot leave its process group
        (``worker.seccomp``). The first reason stays."""
        if self._over is None:
            self._over = reason
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Until :meth:`go_on` neither it nor what it started computes anything."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def end(self, reason: str = "done") -> None:
        """Kill, wait until the kernel has taken it away; nothing that it wrote stays."""
        self.kill(reason)
        await asyncio.to_thread(self._process.wait)
        self._sock.close()
        await asyncio.to_thread(_remove, self._scratch)


@contextlib.contextmanager
def _folder(name: Path | str, within: int | None = None) -> Iterator[int]:
    """A folder, not a link to one, that may be listed and changed from here on: a descriptor."""
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    try:
        Path(f"/proc/self/fd/{fd}").chmod(0o700)
        yield fd
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    """Remove what a worker leaves. It may have nested folders deeper than a stack or the table of
    descriptors goes, or made some that nobody may list: each is moved to the top, then emptied."""
    with contextlib.suppress(OSError), _folder(folder) as top:
        names = _empty(top, top)
        while names:
            name = names.pop()
            with contextlib.suppress(OSError), _folder(name, top) as at:
                names += _empty(at, top)
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=top)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _empty(at: int, top: int) -> list[str]:
    """Remove the files of a folder, and move its folders to the top: their names there."""
    folders = []
    with os.scandir(f"/proc/self/fd/{at}") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                name = entry.name
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(name, dir_fd=at)
                    continue
                if at != top:
                    with _folder(name, at):  # its entry ".." changes
                        name = secrets.token_hex(16)
                        os.rename(entry.name, name, src_dir_fd=at, dst_dir_fd=top)
                folders.append(name)
    return folders


def _environment(threads: int, scratch: Path) -> dict[str, str]:
    """All that a worker inherits: no path, no home, no locale, nothing an operator set but where
    temporary files lie; ``scratch`` is its own folder there."""
    count = str(threads)
    return {
        "TMPDIR": str(scratch),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        # Pages once had are kept (mallopt(3)): a step takes and gives back the same blocks, and
        # a fresh page costs more than most of what is computed into it.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 26),
    }


def command(what: int | str) -> list[str]:
    """The worker's program, told its end of the socket pair."""
    return [sys.executable, "-I", "-B", "-m", "casemate.worker", str(what)]


def layers() -> tuple[str, ...]:
    """The layers of the sandbox that hold on this machine, as a worker finds them."""
    with tempfile.TemporaryDirectory(prefix="casemate-worker-") as scratch:
        done = subprocess.run(
            command("layers"), env=_environment(1, Path(scratch)), cwd="/", capture_output=True,
            timeout=START_SECONDS, check=False,
        )  # fmt: skip
    return tuple(sorted(json.loads(done.stdout))) if done.returncode == 0 else ()


def spawn(threads: int, file_bytes: int, nice: int = NICE) -> Worker:
    """Start :func:`command` with nothing but one end of a socket pair and an empty folder.

    Its standard streams are /dev/null: a traceback could hold rows. No file of its, the result's
    memfd included, can grow past ``file_bytes``.
    """
    scratch = Path(tempfile.mkdtemp(prefix="casemate-worker-"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        ours.setblocking(False)
        fd = theirs.fileno()
        process = subprocess.Popen(
            command(fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(threads, scratch),
            cwd="/",
            pass_fds=(fd,),
            start_new_session=True,
        )
    # No core file, which would hold keys; and the kernel, short of memory, takes it first.
    with contextlib.suppress(OSError):
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        # The server answers first: its own session would else have as large a part as the server's
        # (sched(7), autogrouping).
        os.setpriority(os.PRIO_PROCESS, process.pid, nice)
        Path(f"/proc/{process.pid}/autogroup").write_text(str(nice))
    return Worker(process, ours, scratch)


class Pool:
    """Keeps ``config.spares`` workers ready, and a few that have prepared a quoted model."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ready: deque[asyncio.Task[Worker]] = deque()
        self._prepared: dict[str, Worker] = {}
        self._live: set[Worker] = set()
        self._watches: dict[Worker, asyncio.Task[None]] = {}
        self._closed = False

    def top_up(self) -> None:
        """Start spares until there are enough."""
        while not self._closed and len(self._ready) < self._config.spares:
            self._ready.append(asyncio.create_task(self._start()))

    async def _start(self, nice: int = NICE) -> Worker:
        limits, threads = self._config.limits, self._config.threads
        thread = asyncio.to_thread(spawn, threads, limits.result_bytes, nice)
        starting = asyncio.create_task(thread)
        try:
            worker = await asyncio.shield(starting)
        except asyncio.CancelledError:  # the thread goes on
            await (await starting).end("cancelled")
            raise
        self._live.add(worker)
        self._watches[worker] = asyncio.create_task(self._watch(worker))
        try:
            if self._closed:
                raise WorkerGone("closed")
            await worker.expect([Ready], START_SECONDS)
        except BaseException:
            await self.release(worker, "start")
            raise
        return worker

    async def _take(self) -> Worker:
        while self._ready:
            task = self._ready.popleft()
            with contextlib.suppress(WorkerGone, OSError):
                worker = await task
                if worker.alive:
                    self.top_up()
                    return worker
                await self.release(worker, "closed")
        return await self._start()

    async def release(self, worker: Worker, reason: str = "done") -> None:
        """End a worker for good."""
        await worker.end(reason)
        self._live.discard(worker)
        if (watch := self._watches.pop(worker, None)) is not None:
            watch.cancel()

    @contextlib.asynccontextmanager
    async def worker(
        self, prepared: str | None = None, *, prompt: bool = False
    ) -> AsyncIterator[tuple[Worker, bool]]:
        """A worker for one job, ended afterwards unless :meth:`keep` took it.

        Yields it, and whether it is the one that prepared the quote ``prepared``. prompt: people
        wait for its answers, so that it has the server's own priority.
        """
        kept = self._prepared.pop(prepared, None) if prepared is not None else None
        if kept is not None and not kept.alive:
            await self.release(kept, "closed")
            kept = None
        if kept is not None:
            kept.go_on()
            worker = kept
        else:
            worker = await (self._start(0) if prompt else self._take())
        try:
            yield worker, kept is not None
        finally:
            if worker not in self._prepared.values():
                await asyncio.shield(self.release(worker))
            self.top_up()

    async def keep(self, quote: str, worker: Worker) -> None:
        """Let a worker that has prepared a quote's model wait for the job, without computing; the
        oldest goes."""
        worker.pause()
        old = self._prepared.pop(quote, None)
        self._prepared[quote] = worker
        while len(self._prepared) > max(1, self._config.spares):
            first = next(iter(self._prepared))
            await self.release(self._prepared.pop(first), "idle")
        if old is not None:
            await self.release(old, "idle")

    async def _watch(self, worker: Worker) -> None:
        """End a worker that holds too much memory, or that with what it started does; who waits
        for it gets ``WorkerGone``. What it started is ended as soon as it is gone itself."""
        most, above = self._config.worker_memory, 0
        while worker.alive:
            held, threads = await asyncio.to_thread(worker.resident)
            # Until it runs its own program, a child counts its parent's memory a second time: what
            # is above the limit at one look alone may be that.
            above = above + 1 if sum(held) > most else 0
            if above > 1 or held[:1] > [most]:
                worker.kill("memory")
            if len(held) > PROCESSES or threads > THREADS:
                worker.kill("processes")
            await asyncio.sleep(WATCH_SECONDS)
        worker.kill("closed")

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        for task in self._ready:
            task.cancel()
        await asyncio.gather(*self._ready, return_exceptions=True)
        for worker in list(self._live):
            await self.release(worker, "stop")

"""Workers that lie, hang, die, grow or speak out of turn: real processes, without torch."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from casemate.server import pool
from casemate.server.config import Config, Limits
from casemate.server.pool import Pool, Worker, WorkerGone, refusal
from casemate.spec.messages import Checked, Done, Failed, Ready
from support.desk import run_async

HEAD = "import os, socket, sys, time\ns = socket.socket(fileno=int(sys.argv[1]))\n"
READY = b'{"pid":1,"type":"w-ready/v1"}'


def _script(body: str) -> Callable[[int], list[str]]:
    """A ``pool.command`` that runs ``body`` in place of the worker."""
    return lambda fd: [sys.executable, "-I", "-c", HEAD + body, str(fd)]


def _frame(data: bytes) -> str:
    return f"s.sendall({len(data).to_bytes(4, 'big') + data!r})\n"


def _pool(**limits: object) -> Pool:
    config = Config(state=Path("unused"), spares=0, threads=1, limits=Limits(**limits))  # type: ignore[arg-type]
    return Pool(config)


async def _ended(worker: pool.Worker) -> str:
    """Why the server ended a worker that says nothing."""
    with pytest.raises(WorkerGone) as gone:
        await worker.expect([Done], 30.0)
    return gone.value.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "closed"),
        ("s.sendall(b'\\xff\\xff\\xff\\xff')\ntime.sleep(60)", "protocol"),
        ("s.sendall(b'\\0\\0\\0\\0')\ntime.sleep(60)", "protocol"),
        # One byte more than any answer beside what is prepared may have.
        ("s.sendall((65537).to_bytes(4, 'big'))\ntime.sleep(60)", "protocol"),
        (_frame(b"not json at all") + "time.sleep(60)", "protocol"),
        (_frame(b'{"bytes":1,"type":"w-done/v1"}') + "time.sleep(60)", "protocol"),
        (_frame(b'{"pid":1,"type":"w-ready/v1","x":1}') + "time.sleep(60)", "protocol"),
        (_frame(b'{"pid":true,"type":"w-ready/v1"}') + "time.sleep(60)", "protocol"),
        ("s.sendall(b'\\0\\0')\ntime.sleep(60)", "time"),
        ("time.sleep(60)", "time"),
        ("os._exit(3)", "closed"),
        ("os.kill(os.getpid(), 9)", "closed"),
    ],
)
def test_whatever_it_says_out_of_turn_ends_it(
    monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        with pytest.raises(WorkerGone) as gone:
            await worker.expect([Ready], 1.0)
        assert gone.value.reason == reason
        await worker.end()
        assert not Path(f"/proc/{worker.pid}/exe").exists()

    run_async(work())


def test_a_message_too_many_or_a_descriptor_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors that a worker attaches never reach the parent's table."""
    body = (
        "import array\n"
        f"d = {len(READY).to_bytes(4, 'big') + READY!r}\n"
        "r = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 20))]\n"
        "s.sendmsg([d], r)\ns.sendmsg([d], r)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        before = len(os.listdir("/proc/self/fd"))
        await worker.expect([Ready], 10.0)
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(WorkerGone) as gone:
            await worker.expect([Done, Failed], 10.0)
        assert gone.value.reason == "protocol"
        await worker.end()

    run_async(work())


def test_one_that_does_not_read_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "command", _script("time.sleep(60)"))
    monkeypatch.setattr(pool, "SEND_SECONDS", 0.3)

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        big = Failed(phase="run", code="x.y", message="m" * 900_000, mend="", where="")
        with pytest.raises(WorkerGone):
            await worker.tell(big)
        await worker.end()

    run_async(work())


def test_one_that_grows_past_its_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    body = _frame(READY) + "hoard = b'x' * (300 << 20)\ntime.sleep(60)\n"
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        made = _pool(worker_bytes=100 << 20)
        async with made.worker() as (worker, _):
            assert await _ended(worker) == "memory"
        await made.close()

    run_async(work())


HIDES = {
    # Each less than the limit, all together more; by a grandchild whose parent is gone.
    "memory": (
        "for _ in range(4):\n"
        " if not os.fork():\n"
        "  if os.fork(): os._exit(0)\n"
        "  hoard = b'x' * (60 << 20)\n"
        "  time.sleep(60)\n"
    ),
    "processes": "for _ in range(40):\n if not os.fork(): time.sleep(60)\n",
    # Which hold next to no memory of their own, and keep the server from starting one.
    "threads": (
        "import threading\n"
        "threading.stack_size(32768)\n"
        "for _ in range(1200): threading.Thread(target=time.sleep, args=(60,)).start()\n"
    ),
}


@pytest.mark.parametrize("reason", HIDES)
def test_one_whose_children_take_the_machine_is_ended(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(
        pool, "command", _script(_frame(READY) + HIDES[reason] + "time.sleep(60)\n")
    )

    async def work() -> None:
        made = _pool(worker_bytes=(150 << 20) if reason == "memory" else 4 << 30)
        async with made.worker() as (worker, _):
            assert await _ended(worker) == ("memory" if reason == "memory" else "processes")
            while any(worker.resident()[0]):  # all but what is not reaped yet
                await asyncio.sleep(0.01)
        await made.close()

    run_async(work())


def test_children_of_one_that_is_gone_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when somebody asks for its answer: they hold its socket, so none is cut short."""
    body = _frame(READY) + "if not os.fork(): time.sleep(60)\nos._exit(0)\n"
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        made = _pool()
        async with made.worker() as (worker, _):
            assert await _ended(worker) == "closed"
        await made.close()

    run_async(work())


def test_one_that_waits_for_its_job_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that took itself over while it prepared a quote had the processor for nothing, for as
    long as it was kept; and so had what it started."""
    body = _frame(READY) + "os.fork()\nwhile True: pass\n"
    monkeypatch.setattr(pool, "command", _script(body))

    def states(worker: Worker) -> set[str]:
        stats = [p.read_text() for p in Path("/proc").glob("[0-9]*/stat")]
        fields = [s.rpartition(")")[2].split() for s in stats]  # state, parent, group, ...
        return {f[0] for f in fields if f[2] == str(worker.pid)}

    async def work() -> None:
        made = _pool()
        async with made.worker() as (worker, _):
            while len(worker.resident()[0]) < 2:
                await asyncio.sleep(0.01)
            await made.keep("quote", worker)
        while states(worker) != {"T"}:
            await asyncio.sleep(0.01)
        async with made.worker("quote") as (taken, prepared):
            assert prepared and taken is worker
            while states(worker) != {"R"}:
                await asyncio.sleep(0.01)
            await made.keep("quote", worker)
        await made.close()
        while not states(worker) <= {"Z"}:
            await asyncio.sleep(0.01)

    run_async(work())


def test_what_it_hides_deep_or_unlisted_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders nested past any stack made the removal itself fail: the disk kept them, and whoever's
    turn it was to have the worker ended got the error."""
    body = (
        "os.chdir(os.environ['TMPDIR'])\nos.symlink('/etc', 'link')\n"
        "os.mkdir('unlisted')\nopen('unlisted/f', 'w').close()\nos.chmod('unlisted', 0o300)\n"
        "for _ in range(3000):\n os.mkdir('d')\n open('f', 'w').close()\n os.chdir('d')\n"
    ) + _frame(READY)
    monkeypatch.setattr(pool, "command", _script(body + "time.sleep(60)\n"))

    async def work() -> None:
        made = _pool()
        async with made.worker() as (worker, _):
            folder = worker._scratch
            assert len(list(folder.iterdir())) == 4
        assert not folder.exists() and not made._live
        assert Path("/etc/passwd").exists()
        await made.close()

    run_async(work())


def test_its_files_cannot_grow_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result's memfd included, by write and by ftruncate."""
    body = (
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ntime.sleep(0.3)\n"
        "f = os.memfd_create('r')\nfailed = 0\n"
        "try: os.ftruncate(f, 2 << 20)\nexcept OSError: failed += 1\n"
        "n = 0\ntry:\n while n < (2 << 20): n += os.write(f, bytes(65536))\n"
        "except OSError: failed += 1\n"
        'm = (\'{"bytes":%d,"type":"w-done/v1"}\' % (failed * 10**9 + n)).encode()\n'
        "s.sendall(len(m).to_bytes(4, 'big') + m)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        assert (await worker.expect([Done], 30.0)).bytes == 2 * 10**9 + (1 << 20)
        await worker.end()

    run_async(work())


def test_it_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment, descriptors, folder, session, core limit."""
    monkeypatch.setenv("SECRET_OF_THE_OPERATOR", "x")
    body = (
        "import resource\n"
        "e = sorted(os.environ)\nn = sorted(int(f) for f in os.listdir('/proc/self/fd'))\n"
        "time.sleep(0.3)\n"
        "t = repr((e, len(n), os.getcwd(), os.getsid(0) == os.getpid(),"
        " resource.getrlimit(resource.RLIMIT_CORE), os.readlink('/proc/self/fd/2')))\n"
        'm = (\'{"dataset":"\' + t.replace(\'"\', \'\') + \'","type":"w-checked/v1"}\').encode()\n'
        "s.sendall(len(m).to_bytes(4, 'big') + m)\n"
    )
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        secret = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(secret, True)
        worker = pool.spawn(1, 1 << 20)
        told = (await worker.expect([Checked], 30.0)).dataset
        os.close(secret)
        # LC_CTYPE is the interpreter's own doing (PEP 538).
        names = [n for n in told.split("]")[0].strip("([").split(", ") if "LC_CTYPE" not in n]
        assert names == [f"'{name}'" for name in (
            "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_",
            "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TMPDIR",
        )]  # fmt: skip
        rest = told.split("], ")[1]
        assert rest == "5, '/', True, (0, 0), '/dev/null')"  # three streams, socket, listing
        await worker.end()

    run_async(work())


def test_it_yields_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a job would make every other client wait: by priority, and as a session of its own."""
    monkeypatch.setattr(pool, "command", _script(_frame(READY) + "time.sleep(60)\n"))

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) > os.getpriority(os.PRIO_PROCESS, 0)
        group = Path(f"/proc/{worker.pid}/autogroup")  # where the kernel has that
        assert not group.exists() or group.read_text().endswith(f"nice {pool.NICE}\n")
        await worker.end()

    run_async(work())


def test_a_spare_that_died_is_replaced_and_all_end_at_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "command", _script(_frame(READY) + "time.sleep(60)\n"))

    async def work() -> None:
        config = Config(state=Path("unused"), spares=2, threads=1)
        made = Pool(config)
        made.top_up()
        first = await asyncio.shield(made._ready[0])
        os.kill(first.pid, 9)
        first._process.wait()
        async with made.worker() as (worker, prepared):
            assert worker.pid != first.pid and worker.alive and not prepared
            await made.keep("q", worker)
        assert worker.alive
        async with made.worker("q") as (again, prepared):
            assert again is worker and prepared
        assert not worker.alive
        await asyncio.gather(*made._ready)
        pids = [w.pid for w in made._live]
        assert len(pids) == 2
        await made.close()
        assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)

    run_async(work())


@pytest.mark.parametrize("phase", ["check", "prepare", "lock", "run"])
def test_a_refusal_counts_only_for_the_phase_that_is_due(phase: str) -> None:
    failed = Failed(phase=phase, code="model.op", message="m", mend="n", where="w")  # type: ignore[arg-type]
    assert refusal(failed, (phase,)).code == "model.op"
    assert refusal(failed, ()).code == "job.worker-failed"
    odd = Failed(phase=phase, code="BAD CODE", message="m", mend="n", where="w")  # type: ignore[arg-type]
    assert refusal(odd, (phase,)).code == "job.worker-failed"
    inner = Failed(phase=phase, code="internal.x", message="m", mend="n", where="w")  # type: ignore[arg-type]
    assert refusal(inner, (phase,)).code == "job.worker-failed"


def test_what_a_worker_says_is_short_and_printable() -> None:
    long = Failed(phase="check", code="data.x", message="\x1b[2J" + "7" * 900, mend="\n" * 900,
                  where="w\0" * 900)  # fmt: skip
    error = refusal(long, ("check",))
    for said in (error.message, error.mend, error.where):
        assert len(said) == pool.TEXT_LETTERS and said.isprintable()
    for code in ("data." + "a" * 76, "data.a\n", "data.A", "data.a b", "data.\u0430", "rows.a"):
        odd = Failed(phase="check", code=code, message="m", mend="", where="")
        assert refusal(odd, ("check",)).code == "job.worker-failed", code


CHILDREN = {
    "a child": "pid = os.fork()\nif not pid: time.sleep(60)\n",
    "a grandchild whose parent is gone": (
        "r, w = os.pipe()\n"
        "if not os.fork():\n"
        " pid = os.fork()\n"
        " if pid: os.write(w, b'%d' % pid); os._exit(0)\n"
        " time.sleep(60)\n"
        "pid = int(os.read(r, 20))\n"
    ),
}


@pytest.mark.parametrize("which", CHILDREN)
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
def test_what_a_worker_started_ends_with_it(
    monkeypatch: pytest.MonkeyPatch, which: str, dead: bool
) -> None:
    """Also where the worker itself is already gone. That none leaves its group: seccomp."""
    body = CHILDREN[which] + (
        'm = b\'{"pid":%d,"type":"w-ready/v1"}\' % pid\n'
        "s.sendall(len(m).to_bytes(4, 'big') + m)\n"
    )
    body += "os._exit(0)\n" if dead else "time.sleep(60)\n"
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        child = (await worker.expect([Ready], 10.0)).pid
        assert Path(f"/proc/{child}/exe").exists()
        while dead and worker.alive:
            await asyncio.sleep(0.01)
        await worker.end()
        for _ in range(200):
            if not Path(f"/proc/{child}/exe").exists():
                break
            await asyncio.sleep(0.01)
        assert not Path(f"/proc/{child}/exe").exists()

    run_async(work())


def test_what_a_worker_wrote_is_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "f = os.environ['TMPDIR'] + '/left'\nopen(f, 'w').write('x')\n"
        'm = (\'{"dataset":"\' + f + \'","type":"w-checked/v1"}\').encode()\n'
        "s.sendall(len(m).to_bytes(4, 'big') + m)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(pool, "command", _script(body))

    async def work() -> None:
        worker = pool.spawn(1, 1 << 20)
        left = Path((await worker.expect([Checked], 30.0)).dataset)
        assert left.exists()
        await worker.end()
        assert not left.parent.exists()

    run_async(work())


def test_the_watched_numbers_are_the_kernels(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    worker = Worker(process, socket.socket(), tmp_path)
    try:
        held, threads = worker.resident()
        assert len(held) == threads == 1
        assert 0 < held[0] < 1 << 30
        assert resource.getpagesize() == pool._PAGE
    finally:
        worker.kill("done")
        worker._process.wait()
        process.communicate()
        worker._sock.close()
    assert worker.resident() == ([], 0)


def test_one_that_nobody_waits_for_any_more_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever asks for a worker may go while a thread starts it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pool, "command", _script("time.sleep(60)"))
    plain, started, go = pool.spawn, threading.Event(), threading.Event()
    made: list[Worker] = []

    def spawn(*given: int) -> Worker:
        made.append(plain(*given))
        started.set()
        go.wait(30)
        return made[0]

    monkeypatch.setattr(pool, "spawn", spawn)

    async def work() -> None:
        one = _pool()
        task = asyncio.create_task(one._start())
        await asyncio.to_thread(started.wait, 30)
        task.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not made[0].alive and not list(tmp_path.iterdir())
        await one.close()

    run_async(work())

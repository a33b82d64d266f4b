"""A worker that an attacker has taken over: what the kernel still refuses it.

Here the attacker's code runs in the worker's own process, with Python's hook gone: it makes system
calls by number. Before the lock it may load code and run a compiler, so there it is told what it
may not reach; after it, every call that is not on the list is tried.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from casemate.server import pool
from casemate.spec.evidence import SANDBOX
from casemate.worker import landlock, seccomp
from support import worker_lab
from support.worker_lab import Done, Locked, Prepared, ask, job, lab, run_of

ARCH = platform.machine()
NUMBERS = {c.name: getattr(c, ARCH, -1) for c in (*seccomp.ALLOWED, *seccomp.REFUSED)}
HELD = pool.layers()
pytestmark = [
    pytest.mark.skipif("seccomp" not in HELD, reason="no seccomp filters on this machine"),
    pytest.mark.skipif(ARCH not in ("x86_64", "aarch64"), reason="another architecture"),
]
needs_landlock = pytest.mark.skipif("landlock" not in HELD, reason="no landlock on this machine")

BEGIN = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path
from casemate.worker import lock as sandbox
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    long = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    return libc.syscall(ctypes.c_long(number), *long), ctypes.get_errno()
def refused(what, *arguments, **named):
    try:
        what(*arguments, **named)
    except OSError as e:
        return errno.errorcode[e.errno]
    return ""
scratch = Path(sys.argv[1])
sandbox._REFUSED = frozenset()  # Python's own hook: the attacker has no use for Python
"""
ENTER = "entered = sandbox.enter(scratch)\n"
LOCK = "sandbox.lock([1, *keep], entered, memory_bytes=1 << 28, file_bytes=1 << 20)\n"


def told(tmp_path: Path, before: str, after: str, *, locked: bool = True) -> object:
    """What ``after`` leaves in ``out``, run once the process is shut in."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    steps = [BEGIN, "keep = []\n", textwrap.dedent(before), ENTER, LOCK if locked else ""]
    code = "".join(steps) + textwrap.dedent(after) + "\nprint(json.dumps(out))\n"
    done = subprocess.run(
        [sys.executable, "-c", code, str(scratch)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr.decode()[-2000:])
    return json.loads(done.stdout)


def test_one_does_not_outlive_its_server(tmp_path: Path) -> None:
    """Which is killed: nothing tells the worker, and it need not look at its socket."""
    read, write = os.pipe()
    starts = f"""
        import os, subprocess, sys, time
        one = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], pass_fds=[{write}])
        print(one.pid, flush=True)
        time.sleep(60)
    """
    busy = BEGIN + f"keep = [{write}]\n" + ENTER + LOCK
    busy += f"os.write({write}, b'1')\nwhile True: pass\n"
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(starts), busy, str(tmp_path)],
        stdout=subprocess.PIPE, pass_fds=[write],
    )  # fmt: skip
    os.close(write)
    try:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert os.read(read, 1) == b"1"
        server.kill()
        server.wait()
        ended, _, _ = select.select([read], [], [], 10.0)  # its descriptor is closed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert ended
    finally:
        server.kill()
        server.communicate()
        os.close(read)


# Once it is locked.

FREE = {NUMBERS[c.name] for c in seccomp.ALLOWED}
# x86-64's uretprobe and uprobe: no filter sees them (Linux 6.14), and they end whoever makes them.
PROBES = {335, 336} if ARCH == "x86_64" else set()


def tried(tmp_path: Path, numbers: list[int], before: str = "") -> dict[int, list[int]]:
    """What the kernel answers to each of these calls."""
    after = f"out = [(n, *call(n, -1, 0, 0, 0, 0, 0)) for n in {numbers}]"
    found = told(tmp_path, before, after)
    assert isinstance(found, list)
    return {number: answer for number, *answer in found}


def test_no_call_beside_the_list_reaches_the_kernel(tmp_path: Path) -> None:
    """No socket, exec, open, fork, kill, ptrace, mount, io_uring, ... : by number, all of them."""
    numbers = [n for n in range(480) if n not in FREE | PROBES]
    found = tried(tmp_path, numbers)
    assert len(found) > 400
    assert {n: a for n, a in found.items() if a != [-1, errno.EPERM]} == {}


def test_a_seeded_bug_lets_calls_through(tmp_path: Path) -> None:
    """Harmless ones alone: getuid and geteuid."""
    harmless = [102, 107] if ARCH == "x86_64" else [174, 175]
    assert tried(tmp_path, harmless) == {n: [-1, errno.EPERM] for n in harmless}
    found = tried(tmp_path, harmless, "sandbox.seccomp.allow = lambda: True\n")
    assert found == {n: [os.getuid(), 0] for n in harmless}


def test_the_list_is_short_and_has_no_way_out() -> None:
    names = {c.name for c in seccomp.ALLOWED}
    assert len(names) == len(seccomp.ALLOWED) < 45
    ways_out = (
        "open exec socket connect fork clone kill ptrace mount link rename prctl ioctl dup pipe"
        " memfd io_ key"
    )
    for word in ways_out.split():
        assert not [n for n in names if word in n], word


def test_no_memory_becomes_code(tmp_path: Path) -> None:
    mmap, mprotect = NUMBERS["mmap"], NUMBERS["mprotect"]
    after = f"""
    out = [call({mmap}, 0, 4096, prot, 0x22, -1, 0)[1] for prot in (5, 7, 4, 1 << 32 | 7)]
    page = call({mmap}, 0, 4096, 3, 0x22, -1, 0)
    out.append(page[1])
    for prot in (5, 7, 4, 1):
        out.append(call({mprotect}, page[0], 4096, prot)[1])
    """
    assert told(tmp_path, "", after) == [errno.EPERM] * 4 + [0] + [errno.EPERM] * 3 + [0]


def test_files_are_looked_at_by_descriptor_only(tmp_path: Path) -> None:
    """newfstatat answers for a path whatever its flags are: AT_EMPTY_PATH forbids none."""
    number = 262 if ARCH == "x86_64" else 79
    after = f"""
    room = ctypes.create_string_buffer(256)
    out = [call({number}, -100, path, room, flags)[1]
           for path in (b"/etc/hostname", b"/nowhere", b"") for flags in (0, 0x100, 0x1000)]
    out.append(call({NUMBERS["fstat"]}, 1, room)[1])
    """
    assert told(tmp_path, "", after) == [errno.EPERM] * 9 + [0]


def test_threads_that_were_there_are_shut_in_too(tmp_path: Path) -> None:
    before = """
    go, seen = threading.Event(), []
    def later():
        go.wait()
        seen.append(refused(os.open, "/etc/passwd", os.O_RDONLY))
        seen.append(refused(socket.socket))
    thread = threading.Thread(target=later)
    thread.start()
    """
    after = "go.set(); thread.join(); out = seen"
    assert told(tmp_path, before, after) == ["EPERM", "EPERM"]


@pytest.mark.skipif(ARCH != "x86_64", reason="x86-64 only")
@pytest.mark.parametrize("locked", [False, True])
def test_calls_by_another_architectures_table_end_the_process(tmp_path: Path, locked: bool) -> None:
    """int 0x80 is the 32-bit entry; there 20 is getpid, and 11 would be execve."""
    before = r"""
    import mmap
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    enter = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    """
    with pytest.raises(AssertionError, match=r"\(-31, "):  # SIGSYS
        told(tmp_path, before, "out = enter()", locked=locked)


@needs_landlock
def test_files_are_gone_at_the_lock_without_the_list_too(tmp_path: Path) -> None:
    """Landlock's second domain holds by itself."""
    before = "sandbox.seccomp.allow = lambda: True\n"
    after = """
    out = [refused(os.open, p, os.O_RDONLY) for p in ("/etc/passwd", "/usr/bin", "/proc/self/maps")]
    """
    assert told(tmp_path, before, after) == ["EACCES"] * 3


def test_limits_hold_at_the_lock(tmp_path: Path) -> None:
    """No larger file than the result's, few descriptors, no core file, no process."""
    before = """
    held = os.memfd_create("held")
    keep.append(held)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    """
    after = """
    out = [refused(os.pwrite, held, b"x", at) for at in ((1 << 20) - 1, 1 << 20)]
    """
    assert told(tmp_path, before, after) == ["", "EFBIG"]
    told_limits = """
    import resource
    sandbox.seccomp.allow = lambda: True
    """
    names = ("FSIZE", "NOFILE", "CORE", "NPROC")
    after = f"out = [list(resource.getrlimit(getattr(resource, 'RLIMIT_' + n))) for n in {names}]"
    found = told(tmp_path, told_limits, after)
    assert found == [[1 << 20] * 2, [256] * 2, [0, 0], [0, 0]]


@pytest.mark.skipif(ARCH != "x86_64", reason="x86-64 only")
def test_calls_by_another_table_end_the_process(tmp_path: Path) -> None:
    """x32's numbers name other calls: the process is killed."""
    with pytest.raises(AssertionError, match=r"\(-31, "):  # SIGSYS
        told(tmp_path, "", "out = call(0x40000000 | 41, 2, 1, 0)")


def test_what_is_left_of_it(tmp_path: Path) -> None:
    """Descriptors that were handed over, memory, time, randomness."""
    before = """
    held = os.memfd_create("held")
    keep.append(held)
    """
    after = """
    os.pwrite(held, b"result", 0)
    time.sleep(0.01)
    out = [os.pread(held, 6, 0).decode(), len(os.getrandom(16)), len(bytearray(1 << 20))]
    """
    assert told(tmp_path, before, after) == ["result", 16, 1 << 20]


# Before: while code is still loaded and models are parsed.


def entered(tmp_path: Path, before: str, after: str) -> object:
    return told(tmp_path, before, after, locked=False)


def test_the_network_is_gone_from_the_start(tmp_path: Path) -> None:
    after = """
    kinds = [(f, k) for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK,
                              40) for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM, 3)]
    out = sorted({refused(socket.socket, *kind) for kind in kinds})
    """
    assert entered(tmp_path, "", after) == ["EPERM"]


FROM_THE_START = """
    socket connect bind listen ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp bpf
    perf_event_open userfaultfd io_uring_setup add_key request_key keyctl init_module finit_module
    kexec_load kexec_file_load open_by_handle_at mount umount2 pivot_root chroot unshare setns
    fsopen move_mount open_tree swapon reboot settimeofday clock_settime sethostname
    kill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal setsid setpgid
    setpriority sched_setaffinity sched_setscheduler sched_setparam sched_setattr ioprio_set
    migrate_pages move_pages personality
    shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semctl semtimedop mq_open mq_unlink
    inotify_init inotify_init1 fanotify_init
    chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat utime utimes futimesat utimensat
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat
    file_setattr
"""


def test_every_call_that_is_refused_from_the_start(tmp_path: Path) -> None:
    """Each by its number. The list stands here too, so that none is dropped unseen."""
    whole = {c.name for c in seccomp.REFUSED if not c.mask and not c.absent}
    assert whole == set(FROM_THE_START.split())
    numbers = [NUMBERS[name] for name in sorted(whole) if NUMBERS[name] >= 0]
    after = f"out = [(n, *call(n, -1, 0, 0, 0, 0, 0)) for n in {numbers}]"
    found = entered(tmp_path, "", after)
    assert isinstance(found, list) and len(found) == len(numbers) > 70
    assert [answer for answer in found if answer[1:] != [-1, errno.EPERM]] == []


def test_the_numbers_are_the_kernels() -> None:
    """By the system's own header, where there is one; it may be older than a call."""
    for path in ("/usr/include/asm-generic/unistd.h",
                 "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"):  # fmt: skip
        if not Path(path).exists():
            continue
        arch = "x86_64" if path.endswith("_64.h") else "aarch64"
        text = Path(path).read_text()
        numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
        for made in (*seccomp.ALLOWED, *seccomp.REFUSED):
            if made.name in numbers:
                assert getattr(made, arch) == int(numbers[made.name]), made.name


def test_no_process_gets_a_namespace_or_another_parent(tmp_path: Path) -> None:
    """In a user namespace of its own a child would hold every capability."""
    clone, clone3 = NUMBERS["clone"], NUMBERS["clone3"]
    flags = [1 << bit for bit in (15, 17, 25, 26, 27, 28, 29, 30)]
    after = f"""
    out = [call({clone}, flag | signal.SIGCHLD, 0, 0, 0, 0)[1] for flag in {flags}]
    out.append(call({clone3}, 0, 0)[1])
    plain = os.fork() or os._exit(0)
    out.append(os.waitpid(plain, 0)[1])
    """
    assert entered(tmp_path, "", after) == [errno.EPERM] * 8 + [errno.ENOSYS, 0]


def test_others_keep_their_limits_and_are_sent_no_signal(tmp_path: Path) -> None:
    after = f"""
    parent, room = os.getppid(), ctypes.create_string_buffer(16)
    a, b = socket.socketpair()
    tgkill, prlimit = {234 if ARCH == "x86_64" else 131}, {NUMBERS["prlimit64"]}
    fcntl, ioctl = {NUMBERS["fcntl"]}, {NUMBERS["ioctl"]}
    fd, pid = a.fileno(), ctypes.byref(ctypes.c_int(parent))
    out = [call(prlimit, parent, 7, None, room), call(tgkill, parent, parent, 0),
           call(fcntl, fd, 8, parent), call(fcntl, fd, 15, room),
           call(ioctl, fd, 0x8901, pid), call(ioctl, fd, 0x8902, pid)]
    own = os.getpid(), threading.get_native_id()
    out += [call(prlimit, 0, 7, None, room), call(tgkill, *own, 0), call(fcntl, fd, 3, 0)[1:]]
    """
    refused_ = [[-1, errno.EPERM]] * 6
    assert entered(tmp_path, "", after) == [*refused_, [0, 0], [0, 0], [0]]


def test_the_servers_files_keep_owner_mode_times_and_attributes(tmp_path: Path) -> None:
    """Landlock looks at none of them."""
    mine = tmp_path / "secret"
    mine.write_text("sealed")
    before = mine.stat()
    after = f"""
    secret = {str(mine)!r}
    out = [refused(os.chmod, secret, 0o666), refused(os.chown, secret, -1, -1),
           refused(os.utime, secret, (1, 2)), refused(os.setxattr, secret, b"user.row", b"1")]
    """
    assert entered(tmp_path, "", after) == ["EPERM"] * 4
    assert mine.stat() == before


@needs_landlock
def test_it_writes_in_its_own_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "secret").write_text("sealed")
    after = f"""
    state = Path({str(tmp_path / "state")!r})
    out = [refused(Path(p).write_text, "x") for p in
           ("/tmp/planted", "/dev/shm/planted", state / "planted", state / "secret",
            Path(sys.prefix) / "planted", Path.home() / ".cache" / "planted")]
    out += [refused((state / "secret").read_text), refused(os.listdir, state),
            refused((state / "secret").unlink), refused(os.mkfifo, "/tmp/planted")]
    out += [refused((scratch / "mine").write_text, "x"), refused((scratch / "mine").unlink)]
    """
    found = entered(tmp_path, "", after)
    assert isinstance(found, list)
    assert set(found[:10]) == {"EACCES"} and found[10:] == ["", ""]


def test_it_cannot_become_more(tmp_path: Path) -> None:
    """No capability, none by a program that is started; no other user, mount or kernel part."""
    after = f"""
    status = Path("/proc/self/status").read_text()
    child = subprocess.run(["/bin/cat", "/proc/self/status"], capture_output=True).stdout.decode()
    out = [[line.split()[1] for line in text.splitlines() if line.startswith(("Cap", "NoNew"))]
           for text in (status, child)]
    out.append(sorted({{refused(os.setuid, 12345), refused(os.chroot, "/"),
                       refused(os.nice, -5)}} - {{"EPERM", "EACCES"}}))
    numbers = {[NUMBERS[n] for n in ("mount", "unshare", "bpf", "ptrace", "io_uring_setup")]!r}
    out.append([call(n, 0, 0, 0, 0, 0)[1] for n in numbers])
    """
    found = entered(tmp_path, "", after)
    assert isinstance(found, list)
    own, child, slips, calls = found
    assert own == child
    assert {int(word, 16) for word in own[:5]} == {0} and own[5] == "1"
    assert (slips, calls) == ([], [errno.EPERM] * 5)


def test_it_reads_nothing_of_its_parent(tmp_path: Path) -> None:
    """The server's memory and environment, by /proc or by signal."""
    after = """
    parent = os.getppid()
    out = [refused(open, f"/proc/{parent}/{name}", "rb") for name in ("mem", "environ", "maps")]
    out.append(refused(os.kill, parent, 0))
    """
    found = entered(tmp_path, "", after)
    assert isinstance(found, list)
    assert "" not in found[:3]
    if landlock.version() >= 6:
        assert found[3] == "EPERM"


def test_a_compiler_still_runs(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler")
    after = f"""
    done = subprocess.run(
        [{compiler!r}, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(scratch / "made.so")],
        input=b'extern "C" int seven() {{ return 7; }}', capture_output=True)
    out = done.stderr.decode() or ctypes.CDLL(str(scratch / "made.so")).seven()
    """
    assert entered(tmp_path, "", after) == 7


# What is told of it.


def test_layers_that_do_not_hold_are_not_named(tmp_path: Path) -> None:
    broken = """
    sandbox.landlock.restrict = lambda rights: False
    sandbox.seccomp.refuse = lambda: False
    sandbox._drop_capabilities = lambda: False
    """
    after = "out = list(entered.layers)"
    found = entered(tmp_path, broken, after)
    assert isinstance(found, list)
    assert not {"landlock", "seccomp", "capabilities"} & set(found)
    assert "no-new-privileges" in found
    lock = LOCK.replace("sandbox.lock", "out = sandbox.lock")
    found = entered(tmp_path, broken, lock + "out = list(out)")
    assert isinstance(found, list)
    assert not {"landlock", "seccomp", "capabilities"} & set(found)
    assert {"environment", "rlimits", "no-import"} <= set(found)


def test_the_names_are_those_that_owners_may_demand() -> None:
    assert set(HELD) <= set(SANDBOX) and {"seccomp", "no-new-privileges"} <= set(HELD)


# A real worker.


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_job_makes_no_call_beside_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    """From its lock on, by strace; and none that is refused: an honest job needs no more."""
    trace = tmp_path / "trace"
    real = subprocess.Popen
    traced = ["strace", "-ff", "-qq", "-o", str(trace)]
    monkeypatch.setattr(
        worker_lab.subprocess, "Popen", lambda args, **named: real([*traced, *args], **named)
    )
    made = job(6)
    with worker_lab.worker(threads) as (sock, process):
        prepared = ask(sock, made.prepare, lab.sealed_fd(worker_lab.KEY, made.model))
        assert isinstance(prepared, Prepared), prepared
        locked, _ = worker_lab.frames.receive(sock, (Locked,), timeout=60)
        assert set(locked.layers) >= {"seccomp", "no-new-privileges"}
        memfd = os.memfd_create("result")
        wire = lab.sealed_fd(worker_lab.KEY, made.wire)
        done = ask(sock, run_of(made, prepared), wire, os.dup(memfd))
        assert isinstance(done, Done), done
        os.close(memfd)
        process.wait(timeout=30)
    after = _after_the_lock(tmp_path)
    assert len(after) > 20
    names = {re.match(r"\w+", line)[0] for line in after}  # type: ignore[index]
    assert {"recvmsg", "sendto", "pread64", "exit_group"} <= names
    assert names <= {c.name for c in seccomp.ALLOWED}
    assert not [line for line in after if " EPERM " in line]


def _after_the_lock(folder: Path) -> list[str]:
    """Calls of the thread that locked the worker, after its second filter."""
    for path in folder.glob("trace.*"):
        lines = path.read_text(errors="replace").splitlines()
        filters = [i for i, line in enumerate(lines) if line.startswith("seccomp(")]
        if len(filters) == 2:
            return [line for line in lines[filters[1] + 1 :] if re.match(r"\w+\(", line)]
    raise AssertionError("no worker locked itself")

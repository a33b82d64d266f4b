"""Which system calls a worker may make: seccomp filters (seccomp(2), Linux's
Documentation/userspace-api/seccomp_filter.rst) from one table, for x86-64 and 64-bit ARM.

``ALLOWED`` is all that a locked worker may do: compute, take and give memory that never becomes
code, speak on its socket, read and write descriptors that it was handed, end. ``REFUSED`` is what a
worker may not do from its start on, while it still loads libraries and may run a compiler. A call
that is refused fails with EPERM; one of another architecture's ends the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from casemate.worker import syscall

_PROT_EXEC: Final = 4
_INT: Final = 0xFFFFFFFF
# Every CLONE_NEW* flag, since a process is given all capabilities in a namespace of its own, and
# CLONE_PARENT, whose child would be the server's.
_CLONE: Final = 0x7E028000
# fcntl(2): the process that is sent a descriptor's signals, which may be any of the same user.
_F_SETOWN, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 15, 0x8901, 0x8902


@dataclass(frozen=True, slots=True)
class Call:
    """A system call by number on both architectures, -1 where there is none; with ``mask``, only
    where argument ``arg`` under it is ``equals``, or with ``unless`` is not. absent: refused as
    if the kernel had none, for which libraries have another way."""

    name: str
    x86_64: int
    aarch64: int
    arg: int = 0
    mask: int = 0
    equals: int = 0
    unless: bool = False
    absent: bool = False


ALLOWED: Final = (
    # Descriptors that it has.
    Call("close", 3, 57),
    Call("fstat", 5, 80),
    Call("lseek", 8, 62),
    Call("pread64", 17, 67),
    Call("pwrite64", 18, 68),
    Call("read", 0, 63),
    Call("recvmsg", 47, 212),
    Call("sendmsg", 46, 211),
    Call("sendto", 44, 206),
    Call("write", 1, 64),
    Call("poll", 7, -1),
    Call("ppoll", 271, 73),
    # Memory; none of it becomes code.
    Call("brk", 12, 214),
    Call("madvise", 28, 233),
    Call("mmap", 9, 222, 2, _PROT_EXEC),
    Call("mprotect", 10, 226, 2, _PROT_EXEC),
    Call("mremap", 25, 216),
    Call("munmap", 11, 215),
    # Threads that there are; time; randomness.
    Call("alarm", 37, -1),
    Call("clock_getres", 229, 114),
    Call("clock_gettime", 228, 113),
    Call("clock_nanosleep", 230, 115),
    Call("futex", 202, 98),
    Call("getcpu", 309, 168),
    Call("getpid", 39, 172),
    Call("getrandom", 318, 278),
    Call("gettid", 186, 178),
    Call("gettimeofday", 96, 169),
    Call("nanosleep", 35, 101),
    Call("sched_getaffinity", 204, 123),
    Call("sched_yield", 24, 124),
    Call("setitimer", 38, 103),
    # Signals to itself, and its end.
    Call("exit", 60, 93),
    Call("exit_group", 231, 94),
    Call("restart_syscall", 219, 128),
    Call("rt_sigaction", 13, 134),
    Call("rt_sigprocmask", 14, 135),
    Call("rt_sigreturn", 15, 139),
    Call("sigaltstack", 131, 132),
)

REFUSED: Final = (
    *(Call(name, x86_64, aarch64) for name, x86_64, aarch64 in (
        # Ways out: the network, other processes, the kernel.
        ("socket", 41, 198), ("connect", 42, 203), ("bind", 49, 200), ("listen", 50, 201),
        ("ptrace", 101, 117), ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271),
        ("pidfd_getfd", 438, 438), ("kcmp", 312, 272), ("bpf", 321, 280),
        ("perf_event_open", 298, 241), ("userfaultfd", 323, 282), ("io_uring_setup", 425, 425),
        ("add_key", 248, 217), ("request_key", 249, 218), ("keyctl", 250, 219),
        ("init_module", 175, 105), ("finit_module", 313, 273), ("kexec_load", 246, 104),
        ("kexec_file_load", 320, 294), ("open_by_handle_at", 304, 265),
        # Other views of the machine.
        ("mount", 165, 40), ("umount2", 166, 39), ("pivot_root", 155, 41), ("chroot", 161, 51),
        ("unshare", 272, 97), ("setns", 308, 268), ("fsopen", 430, 430), ("move_mount", 429, 429),
        ("open_tree", 428, 428), ("swapon", 167, 224), ("reboot", 169, 142),
        ("settimeofday", 164, 170), ("clock_settime", 227, 112), ("sethostname", 170, 161),
        # Signals to others, their priorities and processors; leaving the group that the server
        # ends as one.
        ("kill", 62, 129), ("tkill", 200, 130), ("rt_sigqueueinfo", 129, 138),
        ("rt_tgsigqueueinfo", 297, 240), ("pidfd_open", 434, 434), ("pidfd_send_signal", 424, 424),
        ("setsid", 112, 157), ("setpgid", 109, 154), ("setpriority", 141, 140),
        ("sched_setaffinity", 203, 122), ("sched_setscheduler", 144, 119),
        ("sched_setparam", 142, 118), ("sched_setattr", 314, 274), ("ioprio_set", 251, 30),
        ("migrate_pages", 256, 238), ("move_pages", 279, 239), ("personality", 135, 92),
        # What outlives a process: System V's memory, queues and semaphores, POSIX's queues.
        ("shmget", 29, 194), ("shmat", 30, 196), ("shmctl", 31, 195), ("msgget", 68, 186),
        ("msgsnd", 69, 189), ("msgrcv", 70, 188), ("msgctl", 71, 187), ("semget", 64, 190),
        ("semop", 65, 193), ("semctl", 66, 191), ("semtimedop", 220, 192), ("mq_open", 240, 180),
        ("mq_unlink", 241, 181),
        # Of files, what landlock does not look at: who does what with them; owner, mode, times and
        # attributes.
        ("inotify_init", 253, -1), ("inotify_init1", 294, 26), ("fanotify_init", 300, 262),
        ("chmod", 90, -1), ("fchmod", 91, 52), ("fchmodat", 268, 53), ("fchmodat2", 452, 452),
        ("chown", 92, -1), ("lchown", 94, -1), ("fchown", 93, 55), ("fchownat", 260, 54),
        ("utime", 132, -1), ("utimes", 235, -1), ("futimesat", 261, -1), ("utimensat", 280, 88),
        ("setxattr", 188, 5), ("lsetxattr", 189, 6), ("fsetxattr", 190, 7),
        ("removexattr", 197, 14), ("lremovexattr", 198, 15), ("fremovexattr", 199, 16),
        ("setxattrat", 463, 463), ("removexattrat", 466, 466), ("file_setattr", 469, 469),
    )),
    Call("prlimit64", 302, 261, 0, _INT, 0, unless=True),  # of others
    Call("fcntl", 72, 25, 1, _INT, _F_SETOWN),
    Call("fcntl", 72, 25, 1, _INT, _F_SETOWN_EX),
    Call("ioctl", 16, 29, 1, _INT, _FIOSETOWN),
    Call("ioctl", 16, 29, 1, _INT, _SIOCSPGRP),
    Call("clone", 56, 220, 0, _CLONE, 0, unless=True),
    # Its flags lie in memory, where no filter sees them; libc then takes clone.
    Call("clone3", 435, 435, absent=True),
)  # fmt: skip

# AUDIT_ARCH_* of linux/audit.h and seccomp's own number.
_ARCHES: Final = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}
_X32: Final = 0x40000000
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data
_SET_MODE_FILTER, _TSYNC = 1, 1


def _one(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def program(calls: Iterable[Call], arch: str, *, hit: int, miss: int) -> bytes:
    """The filter's instructions: ``hit`` for the calls, ``miss`` for all others."""
    out = [
        _one(_LOAD, _ARCH),
        _one(_EQUAL, _ARCHES[arch][0], 1, 0),
        _one(_RETURN, _KILL),
        _one(_LOAD, _NR),
    ]
    if arch == "x86_64":
        out += [_one(_AT_LEAST, _X32, 0, 1), _one(_RETURN, _KILL)]
    for call in calls:
        number = getattr(call, arch)
        if number < 0:
            continue
        end = _one(_RETURN, _ERRNO | errno.ENOSYS if call.absent else hit)
        if not call.mask:
            out += [_one(_EQUAL, number, 0, 1), end]
            continue
        out += [
            _one(_EQUAL, number, 0, 5),
            _one(_LOAD, _ARGS + 8 * call.arg),  # the low half, little endian
            _one(_AND, call.mask),
            _one(_EQUAL, call.equals, *((1, 0) if call.unless else (0, 1))),
            end,
            _one(_LOAD, _NR),  # the next may be the same call
        ]
    out.append(_one(_RETURN, miss))
    return b"".join(out)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _install(instructions: bytes, number: int) -> bool:
    held = ctypes.create_string_buffer(instructions, len(instructions))
    made = _Program(len(instructions) // 8, ctypes.cast(held, ctypes.c_void_p))
    try:  # a number above 0 is a thread that could not be shut in
        return syscall.call(number, _SET_MODE_FILTER, _TSYNC, ctypes.byref(made)) == 0
    except OSError:
        return False


def _apply(calls: Sequence[Call], hit: int, miss: int) -> bool:
    arch = platform.machine()
    if arch not in _ARCHES:
        return False
    return _install(program(calls, arch, hit=hit, miss=miss), _ARCHES[arch][1])


def refuse() -> bool:
    """Refuse ``REFUSED`` in all threads and in programs that they start, and signals to the threads
    of any process but this one; whether it holds. Needs no_new_privs."""
    others = Call("tgkill", 234, 131, 0, _INT, os.getpid(), unless=True)
    return _apply((*REFUSED, others), _ERRNO | errno.EPERM, _ALLOW)


def allow() -> bool:
    """Allow ``ALLOWED`` alone, in all threads; whether it holds. Needs no_new_privs."""
    return _apply(ALLOWED, _ALLOW, _ERRNO | errno.EPERM)

"""What a locked worker can no longer do, and what a hostile or failing one says."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from casemate.spec.errors import DataError, ModelError
from casemate.worker import session
from support import engine_lab as lab

LOCK = """
import os, sys
import ctypes, pickle, socket, resource, subprocess, tempfile
from pathlib import Path
from casemate.worker.lock import enter, lock
os.environ["SECRET"] = "x"
spare = os.open("/etc/hostname", os.O_RDONLY)
out = os.dup(1)
keep = [out]
def say(text):
    os.write(out, text.encode())
entered = enter(Path(tempfile.mkdtemp()))
layers = lock(keep, entered, memory_bytes=1 << 28, file_bytes=4096)
try:
    {attempt}
except {refusal} as e:
    say("refused")
else:
    say("done")
"""

ATTEMPTS = {
    "import": ("import wave", "PermissionError"),
    "unpickle a class": (
        "pickle.loads(b'cbuiltins\\neval\\n(S\"1\"\\ntR.')",
        "PermissionError",
    ),
    "compile": ("eval('1+1')", "PermissionError"),
    "open a file": ("open('/etc/passwd')", "PermissionError"),
    "run a program": ("subprocess.run(['/bin/true'])", "(PermissionError, OSError)"),
    "system": ("os.system('true')", "PermissionError"),
    "fork": ("os.fork()", "(PermissionError, OSError)"),
    "make a socket": ("socket.socket()", "PermissionError"),
    "load a library": ("ctypes.CDLL('libc.so.6')", "PermissionError"),
    "use an old descriptor": ("os.read(spare, 1)", "OSError"),
    "take more memory": ("bytearray(1 << 30)", "MemoryError"),
}


def run(attempt, refusal):
    code = LOCK.format(attempt=attempt, refusal=refusal)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=60
    )
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_refused_once_locked(attempt):
    said, errors = run(*ATTEMPTS[attempt])
    assert said == "refused", errors


@pytest.mark.parametrize(
    "attempt",
    [
        "assert not os.environ",
        "assert LIMITS['core file'] == LIMITS['processes'] == ['0', '0']",
        "assert b'NoNewPrivs:\\t1' in STATUS",
        "assert {'environment', 'rlimits', 'descriptors', 'no-import'} <= set(layers)",
        "print('secrets'); sys.stderr.write('secrets')",
    ],
)
def test_what_holds_once_locked(attempt):
    opened = "files = [os.open('/proc/self/' + n, os.O_RDONLY) for n in ('status', 'limits')]\n"
    read = (
        "STATUS, lines = (os.pread(f, 1 << 16, 0) for f in files)\n"
        "LIMITS = {{x[4:26].strip().removesuffix(' size'): x[26:].split()[:2]"
        " for x in lines.decode().splitlines()}}\n"
    )
    code = LOCK.replace("def say", opened + "keep += files\ndef say", 1)
    code = code.replace("try:", read + "try:", 1)
    done = subprocess.run(
        [sys.executable, "-c", code.format(attempt=attempt, refusal="ZeroDivisionError")],
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == b"done", done.stderr
    assert b"secrets" not in done.stderr


def test_in_phase_run_a_failure_says_nothing_of_rows():
    """P6: whatever went wrong, the words are the same."""
    errors = [
        DataError("data.bounds", "Row 17 holds 3.2.", mend="", where="x"),
        ModelError("model.run", "Index 9 is out of range.", mend="", where="h"),
        MemoryError("row 4"),
        RuntimeError("row 5"),
    ]
    assert len({session._failed("run", e) for e in errors}) == 1
    shown = session._failed("prepare", errors[1])
    assert (shown.code, shown.where) == ("model.run", "h")
    assert "row 5" not in session._failed("check", errors[3]).message


def test_a_run_for_another_model_or_other_schemas_is_refused():
    from casemate.spec.errors import InternalError
    from casemate.spec.job import Execution
    from casemate.spec.messages import Prepare, Run, RunDataset

    schema = lab.schema(4, 2, 10)
    train = lab.spec_of(4, 2)
    message = Prepare(
        key=b"k" * 32,
        model_digest="sha256:" + "1" * 64,
        schemas=(schema,),
        inputs=lab.BINDINGS,
        train=train,
        memory_bytes=1 << 30,
        threads=1,
    )
    plan = dataclasses.replace(lab.plan_of(train, 10, 8), model_digest=message.model_digest)
    part = RunDataset(dataset="ds_" + "0" * 40, schema=schema, key=b"k" * 32, salt=b"s" * 32)
    right = Run(plan=plan, execution=Execution(), datasets=(part,))
    other = dataclasses.replace(part, schema=lab.schema(4, 2, 11))
    wrong = [
        (dataclasses.replace(right, plan=dataclasses.replace(plan, model_digest="x")), 2),
        (dataclasses.replace(right, datasets=(other,)), 2),
        (right, 1),
        (right, 3),
    ]
    for run_message, count in wrong:
        fds = [os.memfd_create("x") for _ in range(count)]
        with pytest.raises(InternalError):
            session._run(None, message, None, run_message, fds)
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("arguments", [[], ["x"], ["-1"], ["3", "4"]])
def test_a_worker_started_by_hand_explains_itself(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "casemate.worker", *arguments], capture_output=True, timeout=60
    )
    assert done.returncode == 2
    assert b"usage" in done.stderr


def test_a_peer_that_hangs_up_ends_the_worker():
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "casemate.worker", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    ours.recv(1)
    ours.close()
    assert process.wait(timeout=60) != 0

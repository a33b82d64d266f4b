"""A worker for the killing tests: the true protocol, no training. Run as a program by itself:
``python -I -S stub.py FD JOURNAL PREPARED RESULT SECONDS``.

Before it reads the first byte of a run's rows it writes the run's request digest to JOURNAL, which
no server touches: so that what was read without a debit is seen, whoever is killed when.
"""

import array
import ctypes
import json
import os
import random
import signal
import socket
import sys
import time

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    fd, journal, prepared, result, seconds = sys.argv[1:]
    # As a worker does: one that is stopped while it waits for its job would not see a server's end.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sock = socket.socket(fileno=int(fd))
    fds: list[int] = []

    def read(count: int, *, rights: bool = False) -> bytes:
        out = b""
        while len(out) < count:
            part, extra, _, _ = sock.recvmsg(count - len(out), 4096 if rights else 0)
            for _, _, data in extra:
                fds.extend(array.array("i", data))
            if not part:
                sys.exit(0)
            out += part
        return out

    def say(kind: str, **fields: object) -> None:
        body = json.dumps({"type": kind, **fields}, sort_keys=True, separators=(",", ":")).encode()
        sock.sendall(len(body).to_bytes(4, "big") + body)

    say("w-ready/v1", pid=os.getpid())
    while True:
        size = int.from_bytes(read(4, rights=True), "big")
        message = json.loads(read(size))
        kind = message["type"]
        if kind == "w-run/v1":
            line = message["plan"]["request_digest"] + "\n"
            out = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(out, line.encode())
            os.close(out)
        for held in fds[: -1 if kind == "w-run/v1" else None]:
            size = os.fstat(held).st_size
            if not size or len(os.pread(held, size, 0)) != size:
                sys.exit(1)
        time.sleep(random.random() * float(seconds))
        if kind == "w-check/v1":
            say("w-checked/v1", dataset=message["dataset"])
        elif kind == "w-prepare/v1":
            about = json.loads(prepared)
            say("w-prepared/v1", model_digest=message["model_digest"], **about)
            say("w-locked/v1", layers=["rlimits"])
        else:
            weights = bytes.fromhex(result)
            os.write(fds[-1], weights)
            say("w-done/v1", bytes=len(weights))
        for held in fds:
            os.close(held)
        fds.clear()


if __name__ == "__main__":
    main()

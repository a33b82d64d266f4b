"""A firmware (OVMF) that boots under QEMU's emulator with a software TPM, and is then switched off;
the TPM stays, with what was measured into it."""

from __future__ import annotations

import array
import contextlib
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casemate.attest.tpm import eventlog
from casemate.attest.verdict import Refused
from support import tees

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
MEMORY = 256 << 20
SECONDS = 240.0
_SPEC_ID = b"Spec ID Event03\0"
_BEFORE_SPEC_ID = 32  # the first event's head
_TABLE = 1 << 16
_SET_DATA_FD = 0x10  # swtpm's control protocol


def lacks_firmware() -> str:
    """Why no firmware can be booted here, or ""."""
    if shutil.which("qemu-system-x86_64") is None or not CODE.exists() or not VARS.exists():
        return "no QEMU or OVMF (apt-get install qemu-system-x86 ovmf)"
    return tees.lacks_tpm()


class _Monitor:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> None:
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while "return" not in (answer := json.loads(self._file.readline())):
            assert "error" not in answer, answer


def _log(memory: bytes) -> bytes:
    """The longest event log in memory."""
    best, at = b"", memory.find(_SPEC_ID)
    while at >= 0:
        table = memory[at - _BEFORE_SPEC_ID : at - _BEFORE_SPEC_ID + _TABLE]
        with contextlib.suppress(Refused):
            found = eventlog.parse(table)
            if len(found.events) > 1:
                best = max(best, table[: len(table) - found.padding], key=len)
        at = memory.find(_SPEC_ID, at + 1)
    return best


def _settled(monitor: _Monitor, dump: Path) -> bytes:
    """The event log once it has stopped growing."""
    end, last = time.monotonic() + SECONDS, b""
    while time.monotonic() < end:
        time.sleep(5)
        monitor.command("pmemsave", val=0, size=MEMORY, filename=str(dump))
        found = _log(dump.read_bytes())
        if found and found == last:
            return found
        last = found
    raise RuntimeError("the firmware made no event log")


def _message(stream: socket.socket) -> bytes:
    """One TPM command or response: its length stands in bytes 2 to 5."""
    data, wanted = b"", 6
    while len(data) < wanted:
        part = stream.recv(wanted - len(data))
        if not part:
            raise EOFError
        data += part
        if len(data) == 6:
            wanted = struct.unpack(">I", data[2:])[0]
    return data


def _serve(data: socket.socket, listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(EOFError):
                while True:
                    data.sendall(_message(client))
                    client.sendall(_message(data))


def _agree(listener: socket.socket) -> None:
    """The control port: every order is obeyed, none matters here."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client:
                while client.recv(64):
                    client.sendall(bytes(4))


@contextlib.contextmanager
def _connected(control: Path) -> Iterator[str]:
    """A TCTI to a TPM of which only the control socket is there."""
    order = socket.socket(socket.AF_UNIX)
    order.connect(str(control))
    mine, theirs = socket.socketpair()
    passed = array.array("i", [theirs.fileno()])
    order.sendmsg(
        [struct.pack(">I", _SET_DATA_FD)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
    )
    assert order.recv(64) == bytes(4)
    port = tees._free_ports()
    listeners = [socket.create_server(("127.0.0.1", port + i)) for i in (0, 1)]
    threading.Thread(target=_serve, args=(mine, listeners[0]), daemon=True).start()
    threading.Thread(target=_agree, args=(listeners[1],), daemon=True).start()
    try:
        yield f"swtpm:host=127.0.0.1,port={port}"
    finally:
        for one in (*listeners, mine, theirs, order):
            one.close()


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[tuple[str, bytes]]:
    """A TPM's TCTI and the event log of the boot that it has seen."""
    state, control, qmp = (folder / name for name in ("state", "ctrl", "qmp"))
    state.mkdir()
    shutil.copy(VARS, folder / "vars.fd")
    subprocess.run(
        ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--pcr-banks", "sha256"],
        check=True, capture_output=True,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:

        def run(*command: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(lambda: (process.kill(), process.wait()))
            return process

        run("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl",
            f"type=unixio,path={control}", "--flags", "startup-clear")  # fmt: skip
        _appears(control)
        machine = run(
            "qemu-system-x86_64", "-machine", "q35,smm=off", "-m", str(MEMORY >> 20),
            "-display", "none", "-nodefaults", "-net", "none",
            "-drive", f"if=pflash,format=raw,readonly=on,file={CODE}",
            "-drive", f"if=pflash,format=raw,file={folder / 'vars.fd'}",
            "-chardev", f"socket,id=c,path={control}", "-tpmdev", "emulator,id=t,chardev=c",
            "-device", "tpm-tis,tpmdev=t", "-qmp", f"unix:{qmp},server=on,wait=off",
        )  # fmt: skip
        _appears(qmp)
        log = _settled(_Monitor(qmp), folder / "memory")
        machine.kill()  # with no word to the TPM, which therefore stays
        machine.wait()
        yield stack.enter_context(_connected(control)), log


def _appears(path: Path) -> None:
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.02)
    raise RuntimeError(f"{path} does not appear")

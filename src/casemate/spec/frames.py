"""Frames between the server and a worker, over a connected Unix stream socket.

A frame is 4 bytes of length (big endian) and the canonical JSON of one value of
:mod:`casemate.spec.messages`. Descriptors travel with the length (SCM_RIGHTS, unix(7)); any that a
peer attaches elsewhere, or that were not awaited, are closed by the kernel or by us.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import TypeVar

from casemate.spec import canonical, codec
from casemate.spec.errors import FormatError, LimitError, NetError
from casemate.spec.messages import MAX_FRAME

T = TypeVar("T")

HEAD = 4


def _refuse(message: str) -> FormatError:
    return FormatError(
        "format.frame", message, mend="Use a server and a worker of the same version."
    )


def encode(value: object, *, limit: int = MAX_FRAME) -> bytes:
    """One frame: length and canonical bytes. Raises ``LimitError`` past ``limit`` bytes."""
    body = codec.encode(value)
    if len(body) > limit:
        raise LimitError(
            "limit.frame",
            f"A {type(value).__name__} message has {len(body)} bytes, {limit} are allowed.",
            mend="Use fewer or smaller schemas.",
        )
    return len(body).to_bytes(HEAD, "big") + body


def length(head: bytes, *, limit: int = MAX_FRAME) -> int:
    """The body's length from a frame's first 4 bytes; ``FormatError`` past ``limit``."""
    size = int.from_bytes(head, "big")
    if len(head) != HEAD or not 2 <= size <= limit:
        raise _refuse(f"A frame of {size} bytes came where at most {limit} are allowed.")
    return size


def decode(kinds: Sequence[type[T]], body: bytes, *, limit: int = MAX_FRAME) -> T:
    """The value in a frame's body, which must be of one of ``kinds``."""
    data = canonical.decode(body, limit=limit)
    name = data.get("type") if isinstance(data, dict) else None
    for kind in kinds:
        if getattr(kind, "__casemate_type__", None) == name:
            return codec.from_json(kind, data)
    raise _refuse(f"A message {str(name)[:40]!r} came out of order.")


def send(sock: socket.socket, value: object, fds: Sequence[int] = ()) -> None:
    """Send one frame with descriptors. Raises ``NetError`` when the peer is gone."""
    frame = encode(value)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sent = sock.sendmsg([frame[:HEAD]], rights)
        sock.sendall(frame[sent:])
    except OSError as e:
        raise _gone(e) from e


def send_bytes(sock: socket.socket, parts: Sequence[bytes]) -> None:
    """Send octets that a frame before them announced. Raises ``NetError`` when the peer is gone."""
    try:
        for part in parts:
            sock.sendall(part)
    except OSError as e:
        raise _gone(e) from e


def receive_bytes(sock: socket.socket, count: int) -> bytes:
    """So many octets, that a frame before them announced. Raises ``NetError``."""
    out = bytearray(count)
    view = memoryview(out)
    while view:
        try:
            got = sock.recvmsg_into([view])[0]
        except OSError as e:
            raise _gone(e) from e
        if not got:
            raise _gone("it has closed")
        view = view[got:]
    return bytes(out)


def _gone(why: object) -> NetError:
    return NetError("net.closed", f"The peer is gone: {why}.", mend="Start the job again.")


def receive(
    sock: socket.socket,
    kinds: Sequence[type[T]],
    *,
    limit: int = MAX_FRAME,
    max_fds: int = 0,
    timeout: float | None = None,
) -> tuple[T, list[int]]:
    """The next frame, one of ``kinds``, and its descriptors (close-on-exec), at most ``max_fds``.

    ``timeout``: seconds for the whole frame. Raises ``NetError`` (``net.closed``, ``net.timeout``)
    or ``FormatError``; no descriptor is left open then.
    """
    end = None if timeout is None else time.monotonic() + timeout
    fds: list[int] = []

    def wait() -> None:
        if end is not None:
            sock.settimeout(max(1e-3, end - time.monotonic()))

    def read(count: int, room: int = 0) -> bytes:
        out = b""
        while len(out) < count:
            wait()
            flags = socket.MSG_CMSG_CLOEXEC
            space = socket.CMSG_SPACE(4 * room) if room else 0
            part, rights, got, _ = sock.recvmsg(count - len(out), space, flags)
            for level, kind, data in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.extend(array.array("i", data[: len(data) - len(data) % 4]))
            if room and got & socket.MSG_CTRUNC:
                raise _refuse("A frame brings more descriptors than it may.")
            if not part:
                raise _gone("it has closed")
            out += part
        return out

    try:
        size = length(read(HEAD, max_fds), limit=limit)
        value = decode(kinds, read(size), limit=limit)
        if len(fds) > max_fds:
            raise _refuse("A frame brings more descriptors than it may.")
    except BaseException as e:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        if isinstance(e, TimeoutError):
            raise NetError(
                "net.timeout", "The peer did not answer in time.", mend="Start the job again."
            ) from e
        if isinstance(e, OSError):
            raise _gone(e) from e
        raise
    return value, fds

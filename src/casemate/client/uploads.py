"""Sealing and resumable upload.

Plaintext is encrypted once, chunk by chunk, into an unnamed temporary file that only ever holds
ciphertext; pieces of it are then appended on the server at the offset that the server states, so
that a lost connection costs at most one piece.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Final

from casemate.client.connection import Connection
from casemate.seal import stream
from casemate.seams import OsRng
from casemate.spec.errors import CasemateError, NetError

PIECE: Final = 4 << 20
LOST_PIECES: Final = 8
Progress = Callable[[int, int], None]


@contextmanager
def sealed_file(key: bytes, plaintext: Iterable[bytes]) -> Iterator[tuple[IO[bytes], int]]:
    """An open temporary file with the sealed stream of ``plaintext``, and its size in bytes."""
    with tempfile.TemporaryFile(prefix="casemate-") as file:
        for part in stream.encrypt(key, plaintext):
            file.write(part)
        size = file.tell()
        yield file, size


def new_key() -> bytes:
    """A fresh 32-byte stream key."""
    return OsRng().bytes(stream.KEY_BYTES)


def upload(
    connection: Connection, file: IO[bytes], size: int, progress: Progress | None = None
) -> str:
    """Upload ``size`` bytes of ``file``; the upload's id.

    ``progress`` is called with (bytes done, bytes in all) after each piece.
    """
    made = connection.request("POST", "/v1/uploads", {"size": size}).json()
    name = made.get("upload") if isinstance(made, dict) else None
    if not isinstance(name, str) or not name.isascii() or not 1 <= len(name) <= 120:
        raise _broken("no name for an upload")
    path = f"/v1/uploads/{name}"
    done, lost = 0, 0
    while done < size:
        file.seek(done)
        piece = file.read(min(PIECE, size - done))
        try:
            answer = connection.request(
                "PATCH",
                path,
                piece,
                headers={
                    "upload-offset": str(done),
                    "content-type": "application/octet-stream",
                },
            )
            done = _offset(answer.headers, size, least=done + 1)
        except CasemateError as e:
            # A piece may have arrived though its answer did not: ask where the server stands.
            lost += 1
            if not (isinstance(e, NetError) or e.code == "limit.offset") or lost > LOST_PIECES:
                raise
            done = _offset(connection.request("HEAD", path).headers, size)
        if progress is not None:
            progress(done, size)
    return name


def _offset(headers: object, size: int, least: int = 0) -> int:
    value = headers.get("upload-offset") if hasattr(headers, "get") else None
    if value is None or not value.isdecimal() or not least <= int(value) <= size:
        raise _broken(f"the offset {str(value)[:30]!r}")
    return int(value)


def _broken(what: str) -> NetError:
    return NetError(
        "net.protocol",
        f"The server answered an upload with {what}.",
        mend="Check that client and server have matching versions.",
    )

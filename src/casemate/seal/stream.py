"""Streaming AES-256-GCM: large things in chunks, with their order and their end bound.

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption
and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015), laid out like Tink's AES-GCM-HKDF streaming::

    header   8 bytes magic, 4 bytes chunk size (big endian), 32 bytes random salt
    key, prefix (7 bytes)  <- HKDF-SHA-256(stream key, salt, info = the whole header), 39 bytes
    chunk i  AES-256-GCM(key, nonce = prefix || i (4 bytes, big endian) || 1 if last else 0)

All chunks but the last are full; the last is empty only when the whole stream is. So a stream's
length says how many chunks it has, and any cut, swap, repetition or addition moves a chunk to a
nonce for which it was not made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from casemate.seams import OsRng, Rng
from casemate.spec.errors import FormatError

MAGIC: Final = b"CMSTRM1\n"
KEY_BYTES: Final = 32
HEADER_BYTES: Final = len(MAGIC) + 4 + 32
TAG_BYTES: Final = 16
CHUNK: Final = 1 << 20
MIN_CHUNK: Final = 64
MAX_CHUNK: Final = 16 << 20
MAX_CHUNKS: Final = 2**32


def _refuse(reason: str, message: str) -> FormatError:
    return FormatError(
        f"format.stream-{reason}",
        message,
        mend="Seal it again with casemate and send it whole.",
    )


def new_header(rng: Rng | None = None, *, chunk: int = CHUNK) -> bytes:
    """The 44 bytes that start a new stream with ``chunk`` plaintext bytes in each chunk."""
    if not MIN_CHUNK <= chunk <= MAX_CHUNK:
        raise ValueError(f"a chunk has {MIN_CHUNK} to {MAX_CHUNK} bytes, not {chunk}")
    return MAGIC + chunk.to_bytes(4, "big") + (rng or OsRng()).bytes(32)


def chunk_size(header: bytes) -> int:
    """Plaintext bytes of each full chunk; FormatError ``format.stream-header`` for another form."""
    if len(header) < HEADER_BYTES:
        raise _refuse("truncated", "The stream ends within its header.")
    size = int.from_bytes(header[len(MAGIC) : len(MAGIC) + 4], "big")
    if not header.startswith(MAGIC) or not MIN_CHUNK <= size <= MAX_CHUNK:
        raise _refuse("header", "The bytes do not start as a casemate stream of this version.")
    return size


def sealed_size(count: int, *, chunk: int = CHUNK) -> int:
    """Bytes of the stream that holds ``count`` plaintext bytes."""
    return HEADER_BYTES + count + TAG_BYTES * max(1, -(-count // chunk))


def plain_size(total: int, *, chunk: int = CHUNK) -> int:
    """Plaintext bytes in a stream of ``total`` bytes; FormatError ``format.stream-truncated``."""
    body = total - HEADER_BYTES
    chunks = -(-body // (chunk + TAG_BYTES))
    count = body - TAG_BYTES * chunks
    if body < TAG_BYTES or sealed_size(count, chunk=chunk) != total:
        raise _refuse("truncated", f"A stream cannot be {total} bytes long: its end is missing.")
    return count


def opening(key: bytes, header: bytes) -> tuple[bytes, bytes]:
    """The AES key, 32 bytes, and the nonces' prefix, 7, of the chunks of one stream."""
    salt = header[len(MAGIC) + 4 : HEADER_BYTES]
    made = HKDF(SHA256(), KEY_BYTES + 7, salt, header[:HEADER_BYTES]).derive(key)
    return made[:KEY_BYTES], made[KEY_BYTES:]


@dataclass(frozen=True, slots=True)
class _Cipher:
    """The chunk cipher of one stream."""

    gcm: AESGCM
    prefix: bytes
    chunk: int

    @staticmethod
    def of(key: bytes, header: bytes) -> _Cipher:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a stream key has {KEY_BYTES} bytes, not {len(key)}")
        chunk = chunk_size(header)
        made = b"".join(opening(key, header))
        return _Cipher(AESGCM(made[:KEY_BYTES]), made[KEY_BYTES:], chunk)

    def nonce(self, index: int, last: bool) -> bytes:
        if not 0 <= index < MAX_CHUNKS:
            raise _refuse("too-long", f"A stream has at most {MAX_CHUNKS} chunks.")
        return self.prefix + index.to_bytes(4, "big") + bytes([last])

    def encrypt(self, index: int, last: bool, data: bytes | memoryview) -> bytes:
        full = len(data) == self.chunk
        if not (full or (last and len(data) < self.chunk and (len(data) > 0 or index == 0))):
            raise ValueError(f"chunk {index} has {len(data)} bytes where {self.chunk} are due")
        return self.gcm.encrypt(self.nonce(index, last), data, None)

    def decrypt(self, index: int, last: bool, data: bytes | memoryview) -> bytes:
        if last and len(data) == TAG_BYTES and index > 0:
            raise _refuse("truncated", "The stream ends with an empty chunk.")
        try:
            return self.gcm.decrypt(self.nonce(index, last), data, None)
        except (InvalidTag, ValueError):
            raise _refuse(
                "tampered",
                f"Chunk {index} does not open: other key, or the stream was changed or cut.",
            ) from None


def encrypt_chunk(key: bytes, header: bytes, index: int, last: bool, data: bytes) -> bytes:
    """Chunk ``index`` of the stream that ``header`` started, to resume an interrupted upload.

    The plaintext of a chunk must be the same each time: two plaintexts under one header and index
    share a nonce. If the source may have changed, start a new stream. Raises ValueError unless
    every chunk but the last is full.
    """
    return _Cipher.of(key, header).encrypt(index, last, data)


def _chunks(source: Iterable[bytes], size: int) -> Iterator[tuple[bytes | memoryview, bool]]:
    """(chunk, whether it is the last) of ``size`` bytes, the last one shorter or equal."""
    pending = bytearray()
    for part in source:
        view = memoryview(part)
        if pending:
            take = size - len(pending)
            pending += view[:take]
            view = view[take:]
            if len(view):  # more follows, so the full one is not the last
                yield bytes(pending), False
                pending.clear()
        while len(view) > size:
            yield view[:size], False
            view = view[size:]
        pending += view
    yield bytes(pending), True


def encrypt(
    key: bytes, source: Iterable[bytes], *, rng: Rng | None = None, chunk: int = CHUNK
) -> Iterator[bytes]:
    """The stream, header first, then one item per chunk; ``source`` may come in any pieces.

    ``key``: 32 bytes. Each call takes a fresh salt, so that one key may seal several streams.
    """
    header = new_header(rng, chunk=chunk)
    yield header
    yield from encrypt_with(key, header, source)


def encrypt_with(key: bytes, header: bytes, source: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks of the stream that ``header``, made by :func:`new_header` for it alone, starts."""
    cipher = _Cipher.of(key, header)
    for index, (data, last) in enumerate(_chunks(source, cipher.chunk)):
        yield cipher.encrypt(index, last, data)


def decrypt(key: bytes, source: Iterable[bytes]) -> Iterator[bytes]:
    """Plaintext chunks of a stream in any pieces, each yielded once it is authenticated.

    What was yielded counts only when the iterator ends without error: until then the end may be
    missing. Raises FormatError ``format.stream-header``, ``-truncated`` or ``-tampered``.
    """
    parts = iter(source)
    head = bytearray()
    for part in parts:
        head += part
        if len(head) >= HEADER_BYTES:
            break
    cipher = _Cipher.of(key, bytes(head[:HEADER_BYTES]))

    def body() -> Iterator[bytes]:
        yield bytes(head[HEADER_BYTES:])
        yield from parts

    for index, (data, last) in enumerate(_chunks(body(), cipher.chunk + TAG_BYTES)):
        if len(data) < TAG_BYTES:
            raise _refuse("truncated", f"The stream ends within chunk {index}.")
        yield cipher.decrypt(index, last, data)


class Reader:
    """Random access to the plaintext of a stream in a file descriptor, which it does not close.

    Opening it authenticates the last chunk, and so the length: ``size`` is the plaintext's. Each
    chunk is authenticated when it is read; the file may lie with someone hostile.
    Raises FormatError as :func:`decrypt`.
    """

    def __init__(self, key: bytes, fd: int) -> None:
        self._fd = fd
        # Not os.fstat: libc may make it a call that takes paths, which no locked worker has.
        total = os.lseek(fd, 0, os.SEEK_END)
        header = self._pread(0, min(HEADER_BYTES, total))
        self._cipher = _Cipher.of(key, header)
        self.size: Final = plain_size(total, chunk=self._cipher.chunk)
        self._count = max(1, -(-self.size // self._cipher.chunk))
        self._held = -1, b""
        self._chunk(self._count - 1)

    def _pread(self, offset: int, count: int) -> bytes:
        parts = []
        while count > 0:
            part = os.pread(self._fd, count, offset)
            if not part:
                raise _refuse("truncated", "The stream became shorter while it was read.")
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def _chunk(self, index: int) -> bytes:
        held, data = self._held
        if held != index:
            size = self._cipher.chunk
            length = min(size, self.size - index * size)
            at = HEADER_BYTES + index * (size + TAG_BYTES)
            sealed = self._pread(at, length + TAG_BYTES)
            data = self._cipher.decrypt(index, index == self._count - 1, sealed)
            self._held = index, data
        return data

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` from plaintext ``offset``; returns the count, less only at the end."""
        if offset < 0:
            raise ValueError("offset is below 0")
        view = memoryview(buffer).cast("B")
        size = self._cipher.chunk
        end = min(self.size, offset + len(view))
        at = offset
        while at < end:
            data = self._chunk(at // size)
            start = at % size
            part = memoryview(data)[start : start + end - at]
            view[at - offset : at - offset + len(part)] = part
            at += len(part)
        return max(0, at - offset)

    def read(self, offset: int, count: int) -> bytes:
        """Up to ``count`` plaintext bytes from ``offset``; fewer only at the end."""
        out = bytearray(max(0, min(count, self.size - offset)))
        self.readinto(offset, out)
        return bytes(out)

    def __iter__(self) -> Iterator[bytes]:
        """The plaintext, chunk by chunk."""
        return (self._chunk(i) for i in range(self._count))

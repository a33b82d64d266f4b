"""The stream: whole, in order and to its end, or not at all."""

import itertools
import os
import tempfile

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import stream
from casemate.spec.errors import FormatError

KEY = bytes(range(32))
SMALL = 64
SEALED_CHUNK = SMALL + stream.TAG_BYTES


def seal(data, key=KEY, chunk=SMALL):
    return b"".join(stream.encrypt(key, [data], chunk=chunk))


def open_(sealed, key=KEY):
    return b"".join(stream.decrypt(key, [sealed]))


def read(sealed, key=KEY):
    with tempfile.TemporaryFile() as file:
        file.write(sealed)
        file.flush()
        return b"".join(stream.Reader(key, file.fileno()))


def split(data, cuts):
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def refused(sealed, key=KEY):
    """Both ways of reading refuse; the error's code."""
    with pytest.raises(FormatError) as e:
        open_(sealed, key)
    with pytest.raises(FormatError):
        read(sealed, key)
    return e.value.code


@given(st.binary(max_size=400), st.lists(st.integers(0)), st.lists(st.integers(0)))
def test_what_was_sealed_opens_in_any_pieces(data, cuts, more_cuts):
    sealed = b"".join(stream.encrypt(KEY, split(data, cuts), chunk=SMALL))
    assert len(sealed) == stream.sealed_size(len(data), chunk=SMALL)
    assert stream.plain_size(len(sealed), chunk=SMALL) == len(data)
    assert b"".join(stream.decrypt(KEY, split(sealed, more_cuts))) == data
    assert read(sealed) == data


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129, 192])
def test_the_layout_is_the_documented_one(length):
    """Written again from the module's words, with the primitives alone."""
    data = os.urandom(length)
    sealed = seal(data)
    header, body = sealed[:44], sealed[44:]
    assert header[:12] == b"CMSTRM1\n" + (64).to_bytes(4, "big")
    made = HKDF(SHA256(), 39, header[12:], header).derive(KEY)
    count = max(1, -(-length // 64))
    for i in range(count):
        nonce = made[32:] + i.to_bytes(4, "big") + bytes([i == count - 1])
        chunk = AESGCM(made[:32]).decrypt(nonce, body[i * 80 : (i + 1) * 80], None)
        assert chunk == data[i * 64 : (i + 1) * 64]
    assert len(body) == length + 16 * count


def test_two_streams_share_no_bytes_of_ciphertext():
    one, two = seal(b"a" * 300), seal(b"a" * 300)
    assert one[12:44] != two[12:44] and one[44:60] != two[44:60]


@pytest.mark.parametrize("length", [0, 1, 64, 130])
def test_every_flipped_bit_is_refused(length):
    sealed = seal(os.urandom(length))
    for bit in range(len(sealed) * 8):
        bad = bytearray(sealed)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            open_(bytes(bad))
        if bit % 61 == 0:
            with pytest.raises(FormatError):
                read(bytes(bad))


@pytest.mark.parametrize("length", [0, 1, 64, 65, 128, 200])
def test_every_cut_is_refused(length):
    sealed = seal(os.urandom(length))
    for end in range(len(sealed)):
        with pytest.raises(FormatError):
            open_(sealed[:end])
        if end % 7 == 0 or (end - 44) % SEALED_CHUNK == 0:
            with pytest.raises(FormatError):
                read(sealed[:end])


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 4), st.integers(0, 63))
def test_order_repetition_and_removal_are_refused(full, i, j, tail):
    sealed = seal(os.urandom(full * SMALL + tail))
    header, body = sealed[:44], sealed[44:]
    chunks = [body[k : k + SEALED_CHUNK] for k in range(0, len(body), SEALED_CHUNK)]
    i, j = i % len(chunks), j % len(chunks)
    swapped = list(chunks)
    swapped[i], swapped[j] = chunks[j], chunks[i]
    repeated = [*chunks[: i + 1], *chunks[i:]]
    without = chunks[:i] + chunks[i + 1 :]
    for changed in (swapped, repeated, without):
        if changed != chunks:
            refused(header + b"".join(changed))


def test_what_follows_the_end_is_refused():
    sealed = seal(b"x" * 100)
    for tail in (b"\0", b"\0" * 16, b"\0" * 80, sealed[44:], sealed):
        refused(sealed + tail)


def test_chunks_of_another_stream_are_refused():
    one, two = seal(b"a" * 128), seal(b"b" * 128)
    assert refused(one[: 44 + SEALED_CHUNK] + two[44 + SEALED_CHUNK :]) == "format.stream-tampered"
    assert refused(two[:44] + one[44:]) == "format.stream-tampered"


def test_a_stream_that_ends_with_an_empty_chunk_is_refused():
    """Two forms of one plaintext would exist: only casemate's own is admitted."""
    header = stream.new_header(chunk=SMALL)
    cipher = stream._Cipher.of(KEY, header)
    first = cipher.encrypt(0, False, b"a" * SMALL)
    empty = cipher.gcm.encrypt(cipher.nonce(1, True), b"", None)
    assert refused(header + first + empty) == "format.stream-truncated"
    with pytest.raises(ValueError):
        cipher.encrypt(1, True, b"")


def test_another_key_is_refused():
    assert refused(seal(b"x" * 70), bytes(32)) == "format.stream-tampered"
    with pytest.raises(ValueError):
        list(stream.encrypt(b"short", [b""]))


@pytest.mark.parametrize(
    "header",
    [b"", b"CMSTRM1\n", b"CMSTRM2\n" + bytes(100), b"\0" * 100]
    + [
        stream.MAGIC + n.to_bytes(4, "big") + bytes(100)
        for n in (0, 1, 63, (16 << 20) + 1, 2**32 - 1)
    ],
)
def test_other_headers_are_refused(header):
    assert refused(header) in ("format.stream-header", "format.stream-truncated")


def test_the_last_chunk_is_not_given_out_before_the_end_is_known():
    sealed = seal(b"a" * 128)
    given_out = []
    with pytest.raises(FormatError):
        for part in stream.decrypt(KEY, [sealed[:-1]]):
            given_out.append(part)
    assert given_out == [b"a" * SMALL]


@given(st.binary(max_size=500), st.integers(0, 600), st.integers(0, 600))
def test_random_access(data, offset, count):
    with tempfile.TemporaryFile() as file:
        file.write(seal(data))
        file.flush()
        reader = stream.Reader(KEY, file.fileno())
        assert reader.size == len(data)
        assert reader.read(offset, count) == data[offset : offset + count]
        buffer = bytearray(count)
        done = reader.readinto(offset, buffer)
        assert buffer[:done] == data[offset : offset + count]
        with pytest.raises(ValueError):
            reader.read(-1, 1)


def test_a_file_that_changes_while_it_is_read_is_refused():
    with tempfile.TemporaryFile() as file:
        file.write(seal(b"a" * 1000))
        file.flush()
        reader = stream.Reader(KEY, file.fileno())
        os.pwrite(file.fileno(), b"\xff", 44 + 5)
        with pytest.raises(FormatError, match="Chunk 0"):
            reader.read(0, 10)
        os.ftruncate(file.fileno(), 100)
        with pytest.raises(FormatError):
            reader.read(500, 10)


def test_an_interrupted_stream_resumes_with_the_same_bytes():
    data = os.urandom(SMALL * 3 + 5)
    header = stream.new_header(chunk=SMALL)
    parts = [data[i : i + SMALL] for i in range(0, len(data), SMALL)]
    first = [stream.encrypt_chunk(KEY, header, i, i == 3, p) for i, p in enumerate(parts)]
    again = [stream.encrypt_chunk(KEY, header, i, i == 3, p) for i, p in enumerate(parts)]
    assert first == again
    assert open_(header + b"".join(first)) == data
    with pytest.raises(ValueError):
        stream.encrypt_chunk(KEY, header, 0, False, b"short")
    with pytest.raises(FormatError):
        stream.encrypt_chunk(KEY, header, 2**32, True, b"x")


@pytest.mark.parametrize("seeded", ["no-counter", "no-end"])
def test_a_seeded_bug_is_caught(monkeypatch, seeded):
    """Without the counter or the last flag in the nonce, the checks above must fail."""

    def nonce(self, index, last):
        index, last = (0, last) if seeded == "no-counter" else (index, False)
        return self.prefix + index.to_bytes(4, "big") + bytes([last])

    monkeypatch.setattr(stream._Cipher, "nonce", nonce)
    sealed = seal(bytes(SMALL) + b"b" * SMALL + b"c" * SMALL)
    a, b, rest = sealed[44:124], sealed[124:204], sealed[204:]
    forged = b + a + rest if seeded == "no-counter" else a + b
    assert open_(sealed[:44] + forged)  # accepted: the bug is one that the tests above would see

"""Uploads go on where the server stands, whatever was lost; only ciphertext leaves."""

from __future__ import annotations

import pytest

from casemate.client import uploads
from casemate.client.connection import Connection
from casemate.seal import stream
from casemate.spec.errors import LimitError, NetError

PLAIN = bytes(range(256)) * 2000


class Store:
    """The server's side of one upload; ``faults`` maps the count of a piece to what happens."""

    def __init__(self, fake, faults=None):
        self.data = b""
        self.pieces = 0
        self.faults = faults or {}
        fake.answers["POST", "/v1/uploads"] = (201, {}, {"upload": "up_1"})
        fake.answers["PATCH", "/v1/uploads/up_1"] = self.append
        fake.answers["HEAD", "/v1/uploads/up_1"] = lambda _: (200, self.offset(), b"")

    def offset(self):
        return {"upload-offset": str(len(self.data))}

    def append(self, request):
        self.pieces += 1
        fault = self.faults.get(self.pieces)
        if fault == "lost before":
            raise ConnectionResetError
        if int(request.headers["upload-offset"]) != len(self.data):
            error = LimitError("limit.offset", "Elsewhere.", mend="Ask.")
            return 409, {}, error.to_wire()
        self.data += request.body
        if fault == "lost after":
            raise ConnectionResetError
        return 204, self.offset() if fault != "wrong offset" else {"upload-offset": "7"}, b""


@pytest.fixture
def start(fakes, keys, trust, someone, monkeypatch):
    monkeypatch.setattr(uploads, "PIECE", 100_000)

    def make(faults=None):
        fake = fakes(keys)
        store = Store(fake, faults)
        connection = Connection(fake.url, trust=trust, identity=someone, pause=lambda _: None)
        return fake, store, connection

    return make


def send(connection, progress=None):
    key = uploads.new_key()
    with uploads.sealed_file(key, [PLAIN]) as (file, size):
        name = uploads.upload(connection, file, size, progress)
    return key, name


@pytest.mark.parametrize(
    "faults",
    [
        {},
        {1: "lost before"},
        {2: "lost after"},
        {1: "lost after", 3: "lost before", 4: "lost after"},
    ],
)
def test_what_arrives_is_the_sealed_stream(start, faults):
    _, store, connection = start(faults)
    seen = []
    key, name = send(connection, lambda done, total: seen.append((done, total)))
    assert name == "up_1"
    assert b"".join(stream.decrypt(key, [store.data])) == PLAIN
    assert PLAIN[:64] not in store.data
    assert seen[-1] == (len(store.data), len(store.data))


def test_a_server_that_keeps_losing_pieces_is_given_up(start):
    _, store, connection = start(dict.fromkeys(range(1, 100), "lost before"))
    with pytest.raises(NetError):
        send(connection)
    assert store.pieces == uploads.LOST_PIECES + 1


def test_an_offset_that_does_not_advance_is_a_broken_protocol(start):
    _, _, connection = start({2: "wrong offset"})
    key, _ = send(connection)  # asked again with HEAD, and gone on from there
    assert key
    fake, store, connection = start()
    fake.answers["HEAD", "/v1/uploads/up_1"] = (200, {"upload-offset": "-3"}, b"")
    store.faults = {1: "lost before"}
    with pytest.raises(NetError) as caught:
        send(connection)
    assert caught.value.code == "net.protocol"


def test_other_refusals_end_it(start):
    fake, store, connection = start()
    error = LimitError("limit.upload", "Too large.", mend="Split it.")
    fake.answers["PATCH", "/v1/uploads/up_1"] = (413, {}, error.to_wire())
    with pytest.raises(LimitError) as caught:
        send(connection)
    assert caught.value.code == "limit.upload"
    assert store.data == b""


@pytest.mark.parametrize("answer", [{"upload": 3}, {"upload": ""}, {}, [], {"upload": "x" * 200}])
def test_an_upload_without_a_name_is_a_broken_protocol(start, answer):
    fake, _, connection = start()
    fake.answers["POST", "/v1/uploads"] = (201, {}, answer)
    with pytest.raises(NetError) as caught:
        send(connection)
    assert caught.value.code == "net.protocol"

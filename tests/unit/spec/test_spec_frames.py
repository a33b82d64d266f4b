"""Frames: values and descriptors over a socket pair, strictly."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from casemate.spec import frames
from casemate.spec.errors import FormatError, LimitError, NetError
from casemate.spec.messages import MAX_FRAME, Checked, Done, Locked, Ready


@pytest.fixture
def pair():
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_value_and_its_descriptors_arrive_in_order(pair):
    a, b = pair
    files = [os.memfd_create(str(i)) for i in range(3)]
    for i, fd in enumerate(files):
        os.write(fd, bytes([i]) * 8)
    frames.send(a, Done(bytes=7), files)
    frames.send(a, Ready(pid=3))
    value, fds = frames.receive(b, (Done, Ready), max_fds=3)
    assert value == Done(bytes=7)
    assert [os.pread(fd, 8, 0) for fd in fds] == [bytes([i]) * 8 for i in range(3)]
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert frames.receive(b, (Done, Ready)) == (Ready(pid=3), [])
    for fd in files + fds:
        os.close(fd)


def test_a_large_frame_arrives_whole(pair):
    a, b = pair
    value = Locked(layers=tuple("x" * 900 for _ in range(1000)))
    sender = threading.Thread(target=frames.send, args=(a, value))
    sender.start()
    assert frames.receive(b, (Locked,), timeout=10)[0] == value
    sender.join()


@pytest.mark.parametrize("count", [2, 5, 200])
def test_more_descriptors_than_awaited_are_refused_and_closed(pair, count):
    a, b = pair
    fd = os.memfd_create("x")
    before = open_fds()
    frames.send(a, Ready(pid=3), [fd] * count)
    with pytest.raises(FormatError):
        frames.receive(b, (Ready,), max_fds=1)
    assert open_fds() == before
    os.close(fd)


def test_descriptors_where_none_are_awaited_never_open(pair):
    a, b = pair
    fd = os.memfd_create("x")
    before = open_fds()
    frames.send(a, Ready(pid=3), [fd])
    assert frames.receive(b, (Ready,)) == (Ready(pid=3), [])
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x02[]",
        b"\x00\x00\x00\x02{}",
        b'\x00\x00\x00\x14{"type":"w-nope/v1"}',
        b'\x00\x00\x00\x0b{"pid":1.0}',
    ],
)
def test_bytes_that_are_no_awaited_frame_are_refused(pair, raw):
    a, b = pair
    a.sendall(raw)
    with pytest.raises(FormatError):
        frames.receive(b, (Ready,), timeout=2)


def test_a_message_out_of_order_is_refused(pair):
    a, b = pair
    frames.send(a, Ready(pid=3))
    with pytest.raises(FormatError, match="w-ready"):
        frames.receive(b, (Checked, Done))


def test_a_closed_peer_and_a_slow_one_are_told_apart(pair):
    a, b = pair
    a.sendall(b"\x00\x00")
    with pytest.raises(NetError) as slow:
        frames.receive(b, (Ready,), timeout=0.05)
    assert slow.value.code == "net.timeout"
    a.close()
    with pytest.raises(NetError) as gone:
        frames.receive(b, (Ready,), timeout=5)
    assert gone.value.code == "net.closed"
    with pytest.raises(NetError):
        for _ in range(2):
            frames.send(b, Ready(pid=1))


def test_a_frame_past_the_limit_is_not_sent(pair):
    with pytest.raises(LimitError):
        frames.send(pair[0], Locked(layers=("x" * (MAX_FRAME + 1),)))

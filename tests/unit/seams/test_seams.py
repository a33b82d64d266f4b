"""The real clock, disk and generator."""

import asyncio
import os
import stat

import pytest

from casemate.seams import OsDisk, OsRng, SystemClock


@pytest.fixture
def disk(tmp_path):
    return OsDisk(tmp_path / "state")


def test_the_folder_and_files_are_private(disk):
    assert stat.S_IMODE(disk.root.stat().st_mode) == 0o700
    disk.make_folder("a")
    disk.open("a/f", create=True).close()
    assert stat.S_IMODE((disk.root / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((disk.root / "a/f").stat().st_mode) == 0o600


def test_what_is_written_is_read(disk):
    file = disk.open("f", create=True)
    file.write(0, b"hello world")
    file.write(6, b"there")
    assert file.read(0, 100) == b"hello there" and file.read(6, 3) == b"the"
    assert file.read(11, 1) == b"" and file.size() == 11
    file.write(20, b"x")  # a hole reads as zeros
    assert file.read(11, 9) == bytes(9)
    file.truncate(5)
    file.truncate(7)
    assert file.read(0, 100) == b"hello\0\0"
    file.sync()
    file.close()
    assert disk.open("f").read(0, 5) == b"hello"


def test_a_large_write_is_whole(disk):
    data = os.urandom(3 << 20)
    file = disk.open("f", create=True)
    file.write(1, data)
    assert file.read(1, len(data)) == data


def test_names(disk):
    with pytest.raises(FileNotFoundError):
        disk.open("f")
    disk.open("f", create=True, exclusive=True).close()
    with pytest.raises(FileExistsError):
        disk.open("f", create=True, exclusive=True)
    disk.open("f", create=True).write(0, b"new")
    disk.open("g", create=True).write(0, b"old")
    disk.rename("f", "g")
    assert disk.open("g").read(0, 9) == b"new" and not disk.exists("f")
    disk.make_folder("a/b")
    disk.make_folder("a/b")
    assert disk.list(".") == ["a", "g"]
    disk.sync_folder(".")
    disk.sync_folder("a")
    disk.remove("g")
    assert not disk.exists("g")
    with pytest.raises(FileNotFoundError):
        disk.remove("g")


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "..", "a/../../b", "a//b", "../state2/f", "a/"]
)
def test_no_path_leaves_the_folder(disk, path):
    for call in (disk.exists, disk.remove, disk.list, disk.make_folder, disk.sync_folder):
        with pytest.raises(ValueError):
            call(path)
    with pytest.raises(ValueError):
        disk.open(path, create=True)


def test_a_link_is_not_followed(disk, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    (disk.root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        disk.open("link")


def test_a_descriptor_outlives_the_file_and_cannot_write(disk):
    file = disk.open("f", create=True)
    file.write(0, b"content")
    fd = file.descriptor()
    file.close()
    try:
        assert os.pread(fd, 9, 0) == b"content"
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_the_clock():
    clock = SystemClock()
    before = clock.monotonic()
    asyncio.run(clock.sleep(0.001))
    assert clock.monotonic() >= before + 0.001
    assert clock.wall() > 1.7e9


def test_the_generator():
    rng = OsRng()
    assert len(rng.bytes(0)) == 0 and len(rng.bytes(33)) == 33
    assert rng.bytes(32) != rng.bytes(32)

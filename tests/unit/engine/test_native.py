"""The builder of native helpers: what it builds, what it refuses, and that it never raises."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest

from casemate.engine import native

HELLO = 'extern "C" int hello(int x) { return x + 1; }'
OTHER = 'extern "C" int hello(int x) { return x + 2; }'

load = native._load.__wrapped__  # without the memory

try:
    native.compiler()
except OSError as e:
    pytestmark = pytest.mark.skip(reason=str(e))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources and a cache of the test's own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setattr(native, "_SOURCES", folder)
    monkeypatch.delenv("CASEMATE_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "hello.cpp").write_text(HELLO)
    return folder


@pytest.fixture
def builds(monkeypatch):
    """The compiler's runs that wrote a file."""
    seen = []
    right = native._run

    def run(command, source, scratch):
        if "-o" in command:
            seen.append(source)
        return right(command, source, scratch)

    monkeypatch.setattr(native, "_run", run)
    return seen


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "casemate" / "native"


def test_a_helper_is_built_once_and_then_loaded(sources, builds, cache):
    library, reason = load("hello")
    assert library.hello(41) == 42 and reason == ""
    assert load("hello")[0].hello(41) == 42
    assert len(builds) == 1
    (built,) = cache.iterdir()
    assert built.stat().st_mode & 0o777 == 0o600 and cache.stat().st_mode & 0o777 == 0o700


def test_helpers_are_not_taken_for_each_other(sources, builds):
    """The loader knows libraries by path: a path that came again would give the first one."""
    (sources / "other.cpp").write_text(OTHER)
    assert [load(name)[0].hello(0) for name in ("hello", "other", "hello")] == [1, 2, 1]
    assert len(builds) == 2


def test_another_source_or_other_flags_are_another_file(sources, builds, cache, monkeypatch):
    load("hello")
    (sources / "hello.cpp").write_text(OTHER)
    assert load("hello")[0].hello(0) == 2
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS))
    load("hello")
    monkeypatch.setattr(native, "_cpu", lambda: "another")
    load("hello")
    assert len(builds) == 4 and len(list(cache.iterdir())) == 4


def test_parts_are_of_the_helper(sources, builds):
    (sources / "hello.cpp").write_text('#include <cstdint>\n#include "hello_part.cpp"\n')
    assert "FileNotFoundError" in load("hello")[1]
    for part, found in ((HELLO, 1), (OTHER, 2)):  # what changes in a part is built anew
        (sources / "hello_part.cpp").write_text(part)
        assert load("hello")[0].hello(0) == found
    assert len(builds) == 2
    (sources / "hello_part.cpp").write_text('// "\\1"\n' + HELLO)  # put in as it is
    assert native._source("hello").endswith(HELLO.encode() + b"\n")
    (sources / "hello.cpp").write_text('#include "../hello_part.cpp"\n')
    assert "the build failed" in load("hello")[1]


def test_two_at_once(sources, cache):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert [f[0].hello(1) for f in pool.map(load, ["hello", "hello"])] == [2, 2]
    assert len(list(cache.iterdir())) == 1


def test_no_fast_math():
    """The error bounds of the helpers rest on IEEE 754."""
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & set(native.FLAGS)


def test_what_a_failed_build_says(sources, cache):
    (sources / "bad.cpp").write_text("nonsense")
    library, reason = load("bad")
    assert library is None and "nonsense" in reason
    assert not list(cache.iterdir())


def refused(name="hello"):
    library, reason = load(name)
    assert library is None
    return reason


def test_without_it(sources, monkeypatch):
    assert "FileNotFoundError" in refused("absent")
    monkeypatch.setenv("CXX", "/nowhere/c++ -x")
    assert "no C++ compiler (/nowhere/c++ -x)" in refused()
    monkeypatch.setenv("CXX", sys.executable)  # starts, and is no compiler
    assert "the build failed" in refused()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler" in refused()
    monkeypatch.setenv("CASEMATE_NATIVE", "0")
    assert refused() == "CASEMATE_NATIVE=0"


def test_the_doors_agree(sources):
    native._load.cache_clear()
    try:
        assert native.library("hello") is native.library("hello") is not None
        assert native.reason("hello") == ""
        assert native.library("absent") is None and native.reason("absent")
    finally:
        native._load.cache_clear()


def test_a_folder_that_others_can_enter_is_refused(sources, builds, cache):
    cache.mkdir(parents=True, mode=0o700)
    for mode in (0o750, 0o770, 0o777, 0o701):
        cache.chmod(mode)
        assert "not ours alone" in refused()
    assert not builds


def test_a_folder_that_is_a_link_is_refused(sources, cache, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir(parents=True)
    cache.symlink_to(tmp_path / "elsewhere")
    assert refused()


def test_a_file_that_others_can_write_is_refused(sources, cache, tmp_path):
    load("hello")
    (built,) = cache.iterdir()
    for mode in (0o620, 0o602, 0o666):
        built.chmod(mode)
        assert "not ours alone" in refused()
    built.chmod(0o600)
    assert load("hello")[0] is not None
    built.rename(tmp_path / "moved")
    built.symlink_to(tmp_path / "moved")
    assert "OSError" in refused()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_is_refused(sources, cache):
    load("hello")
    (built,) = cache.iterdir()
    os.chown(built, 1, 1)
    assert "not ours alone" in refused()
    os.chown(built, 0, 0)
    os.chown(cache, 1, 1)
    assert "not ours alone" in refused()


def test_a_file_that_is_no_library_is_refused(sources, cache):
    (sources / "never.cpp").write_text("int never_loaded;")
    folder, path = native._cache()
    name = native._built(folder, native.compiler(), (sources / "never.cpp").read_bytes())
    os.close(folder)
    (path / name).write_bytes(b"")
    assert "OSError" in refused("never")


def test_without_environment_the_home_folder_is_used(sources, cache, tmp_path, monkeypatch):
    """As in a worker, which inherits neither home nor path."""
    for name in ("XDG_CACHE_HOME", "HOME", "PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()

    class Entry:
        pw_dir = str(tmp_path / "home")

    monkeypatch.setattr(native.pwd, "getpwuid", lambda uid: Entry)
    assert load("hello")[0].hello(0) == 1
    assert len(list((tmp_path / "home/.cache/casemate/native").iterdir())) == 1


LOCKED = """
import os, sys
from pathlib import Path
from casemate.engine import native, noise
from casemate.worker.lock import enter, lock
before = noise.gaussian(bytes(32), 0, 1001, 1e6).tolist()
had = (native.library("noise") is not None)
lock([], enter(Path(sys.argv[1])), memory_bytes=1 << 30, file_bytes=0)
same = noise.gaussian(bytes(32), 0, 1001, 1e6).tolist() == before
kept = (native.library("noise") is not None) == had
os._exit(0 if same and kept and native.library("absent") is None else 9)
"""


def test_a_locked_worker_keeps_what_it_has_and_gets_no_more(tmp_path):
    command = [sys.executable, "-c", LOCKED, str(tmp_path)]
    done = subprocess.run(command, cwd=Path.cwd(), check=False)
    assert done.returncode == 0

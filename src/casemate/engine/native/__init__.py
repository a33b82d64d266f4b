"""Small C++ helpers, built on the machine they run on and loaded by ctypes (docs/adr/0006).

Each helper is one file, ``<name>.cpp``, with a plain C ABI and no header but the compiler's own, so
that it builds in seconds; a line ``#include "part.cpp"`` stands for that file of this folder. Its
Python twin is always there and is what it is tested against; where :func:`library` returns None,
for whatever reason, the twin does the work.

Built files are kept in ``$XDG_CACHE_HOME/casemate/native`` (default ``~/.cache``), a folder of
mode 0700 that is ours, else they are not used. A file's name is the SHA-256 of all that decides its
content: source, flags, compiler version and CPU. A worker builds or loads in its phase ``prepare``:
once locked it can neither start a compiler nor load a library, and gets what it had before.
``CASEMATE_NATIVE=0`` turns all helpers off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import pwd
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

# Never -ffast-math: the helpers' error bounds rest on IEEE 754 arithmetic.
FLAGS: Final = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno"),
    *("-pipe", "-x", "c++", "-"),
)
HELPERS: Final = ("noise", "norms", "step")
COMPILERS: Final = ("c++", "g++", "clang++")
_SOURCES: Final = Path(__file__).parent
_BUILD_SECONDS: Final = 120
_PART: Final = re.compile(rb'^#include "(\w+\.cpp)"$', re.MULTILINE)


def library(name: str) -> ctypes.CDLL | None:
    """The helper ``name``, built if need be; None where it cannot be had. Never raises.

    The first answer stands for the life of the process.
    """
    return _load(name)[0]


def reason(name: str) -> str:
    """Why :func:`library` gives none, for people; empty when it does."""
    return _load(name)[1]


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("CASEMATE_NATIVE") == "0":
        return None, "CASEMATE_NATIVE=0"
    try:
        words, source = compiler(), _source(name)
        folder, path = _cache()
        try:
            return _open(folder, path, _built(folder, words, source)), ""
        finally:
            os.close(folder)
    except subprocess.CalledProcessError as e:
        return None, f"the build failed: {e.stderr.decode(errors='replace')[-2000:]}"
    except (OSError, KeyError, ValueError, subprocess.SubprocessError) as e:
        return None, f"{type(e).__name__}: {e}"


def version(compiler: list[str]) -> bytes:
    """What a compiler (a command's words) says of itself."""
    return _run([*compiler, "--version"], b"", tempfile.gettempdir())


def cpu_digest() -> str:
    """SHA-256 of what ``-march=native`` looks at, hex."""
    return hashlib.sha256(_cpu().encode()).hexdigest()


def _source(name: str) -> bytes:
    """The helper's file, with its parts in their places."""
    whole = (_SOURCES / f"{name}.cpp").read_bytes()
    return _PART.sub(lambda found: (_SOURCES / found[1].decode()).read_bytes(), whole)


def compiler() -> list[str]:
    """The C++ compiler's command, ``CXX`` or the first of :data:`COMPILERS`. Raises
    ``FileNotFoundError``."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for first, *others in [wanted] if wanted else [[name] for name in COMPILERS]:
        found = shutil.which(first)
        if found:
            return [str(Path(found).absolute()), *others]
    raise FileNotFoundError(f"no C++ compiler ({' '.join(wanted) or ', '.join(COMPILERS)})")


def _run(command: list[str], source: bytes, scratch: str, seconds: float = _BUILD_SECONDS) -> bytes:
    """Standard output of a run in ``scratch``. Of the environment only the path, so that nothing
    unhashed has a say."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TMPDIR": scratch}
    done = subprocess.run(
        command, input=source, cwd=scratch, env=environment, capture_output=True, check=True,
        timeout=seconds,
    )  # fmt: skip
    return done.stdout


def _cpu() -> str:
    """What ``-march=native`` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kept = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(kept))])


def _cache() -> tuple[int, Path]:
    """The cache folder, made if need be: a descriptor and its path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # noqa: PTH117
        # A worker's environment is empty.
        base = os.path.join(  # noqa: PTH118
            os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir, ".cache"
        )
    path = Path(base, "casemate", "native")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _ours(folder, 0o077, str(path))
    except BaseException:
        os.close(folder)
        raise
    return folder, path


def _ours(fd: int, forbidden: int, what: str) -> None:
    state = os.fstat(fd)
    if state.st_uid != os.geteuid() or stat.S_IMODE(state.st_mode) & forbidden:
        raise PermissionError(f"{what} is not ours alone")


def _built(folder: int, compiler: list[str], source: bytes) -> str:
    """The built file's name in ``folder``."""
    with tempfile.TemporaryDirectory(prefix="casemate-") as scratch:
        flags = "\0".join([*compiler, *FLAGS]).encode()
        parts = [source, flags, version(compiler), _cpu().encode()]
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        name = hashlib.sha256(digests).hexdigest() + ".so"
        if name in os.listdir(folder):
            return name
        made = Path(scratch, "made.so")
        _run([*compiler, *FLAGS, "-o", str(made)], source, scratch)
        # Named only when whole; two processes that build at once write the same.
        part = f"{name}.{secrets.token_hex(8)}"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        try:
            with open(fd, "wb") as out:  # noqa: PTH123
                out.write(made.read_bytes())
                out.flush()
                os.fsync(fd)
            os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(part, dir_fd=folder)
            raise
    return name


def _open(folder: int, path: Path, name: str) -> ctypes.CDLL:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        _ours(fd, 0o022, name)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise PermissionError(f"{name} is no file")
    finally:
        os.close(fd)
    # In the very folder that was looked at, whatever its path means by then. Not by the file's
    # descriptor: the loader takes a path that it has seen before for the same library.
    held = Path(f"/proc/self/fd/{folder}")
    return ctypes.CDLL(str((held if held.exists() else path) / name))

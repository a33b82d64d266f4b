"""The wheel, built twice from the last commit in folders of different names:
``python deploy/wheel.py FOLDER [COMMIT]``. Exit status 1 unless both have the same bytes; its
SHA-256 is printed.

Times in it are the commit's (SOURCE_DATE_EPOCH, reproducible-builds.org), modes of files are
everybody's. The build uses the setuptools of this environment, which constraints.txt fixes, and no
network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(commit: str, folder: Path) -> Path:
    """The wheel of a commit, built in ``folder``."""
    source = folder / "source"
    source.mkdir(parents=True)
    epoch = subprocess.check_output(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct", commit], text=True
    )
    with subprocess.Popen(
        ["git", "-C", ROOT, "archive", commit], stdout=subprocess.PIPE
    ) as archive, tarfile.open(fileobj=archive.stdout, mode="r|") as tar:  # fmt: skip
        tar.extractall(source, filter=_plain)
    if archive.returncode:
        raise SystemExit(f"{commit} is no commit")
    uv = Path(sys.executable).with_name("uv")
    subprocess.run(
        [uv, "build", "--quiet", "--wheel", "--offline", "--no-build-isolation", "--python",
         sys.executable, "--out-dir", folder / "made", source],
        check=True, umask=0o022, env={**os.environ, "SOURCE_DATE_EPOCH": epoch.strip()},
    )  # fmt: skip
    (made,) = (folder / "made").glob("*.whl")
    return made


def _plain(info: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """Modes and owners as they are for everybody."""
    info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
    return tarfile.data_filter(info, path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(out: Path, commit: str = "HEAD") -> int:
    with tempfile.TemporaryDirectory() as folder:
        one = build(commit, Path(folder) / "one")
        two = build(commit, Path(folder) / "another" / "deeper")
        if digest(one) != digest(two):
            print(f"{one.name}: {digest(one)} and {digest(two)}")
            return 1
        out.mkdir(exist_ok=True)
        shutil.copy(one, out / one.name)
        print(f"{digest(one)}  {out / one.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

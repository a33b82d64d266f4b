"""Marks of several processes on one clock, and a job's time shared out."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks import marks, overhead  # noqa: E402
from benchmarks.marks import Mark, Marks  # noqa: E402


def test_a_process_without_files_still_marks(tmp_path: Path):
    child = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom benchmarks.marks import Marks\n"
        f"marks = Marks(Path({str(tmp_path)!r}))\n"
        "os.closerange(0, 64)\n"
        "with marks.stage('inner'): pass\n"
    )
    with Marks(tmp_path).stage("outer"):
        subprocess.run([sys.executable, "-c", child], check=True)
    outer, inner = marks.read(tmp_path)
    assert (outer.name, inner.name) == ("outer", "inner")
    assert outer.start < inner.start <= inner.end < outer.end


def test_wrapped_calls_answer_and_fail_as_before(tmp_path: Path):
    async def later(value: int) -> int:
        await asyncio.sleep(0.01)
        return value

    def fail() -> None:
        raise KeyError("x")

    owner = SimpleNamespace(later=later, fail=fail)
    mine = Marks(tmp_path)
    mine.wrap(owner, "later", "later")
    mine.wrap(owner, "fail", "fail")
    assert asyncio.run(owner.later(3)) == 3
    with pytest.raises(KeyError):
        owner.fail()
    found = marks.read(tmp_path)
    assert [m.name for m in found] == ["later", "fail"]
    assert found[0].wall >= 0.009


JOB = (
    ("client.export", -20.0, -14.0), ("client.first-quote", -20.0, -10.0),
    ("client.connect", -25.0, -24.0),
    ("client.job", 0.0, 100.0), ("client.quote", 0.0, 5.0), ("client.export", 0.5, 2.0),
    ("client.upload", 2.0, 2.5), ("server.prepare", 3.0, 4.0), ("server.price", 4.0, 4.5),
    ("client.submit", 5.0, 5.5), ("server.run", 6.0, 91.0), ("engine", 10.0, 90.0),
    ("server.seal", 91.5, 92.0), ("server.commit", 93.0, 93.5), ("client.watch", 5.5, 94.0),
    ("client.receipt", 94.0, 96.0), ("client.pull", 96.0, 99.0), ("client.receipt", 99.0, 100.0),
    ("bare", 200.0, 280.0),
)  # fmt: skip


def test_every_second_of_a_job_is_counted_once():
    result = overhead.stages([Mark(n, a, b, b - a) for n, a, b in JOB], 10)
    assert result["outside"] == 20.0
    assert result["outside_share"] == 0.2
    assert result["whole_over_bare"] == 1.25
    assert abs(sum(result["stages"].values()) - result["job"]) < 1e-6
    assert result["unnamed"] == 0.0
    # The first export of a process took 6 s where this job's took 1.5.
    assert result["outside_share_first"] == round(24.5 / 104.5, 4)

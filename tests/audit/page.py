"""Figures of an audit: lines for the terminal, and the part of docs/audit.md that is generated."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from audit import bugs, canary, law

BEGIN: Final = "<!-- written by python -m audit --page -->"
END: Final = "<!-- end -->"
Done = Mapping[str, Sequence[Any]]


def line(done: Done) -> str:
    """All in one line."""
    parts = []
    for made, _ in done["battery"]:
        parts.append(f"battery of {sum(made.values())} comparisons ({made['chance']} of chance)")
    if done["clean"]:
        parts.append(f"{sum(done['clean'])} clean runs")
    if done["bugs"]:
        parts.append(
            f"{sum(f is not None for _, f in done['bugs'])} of {len(done['bugs'])} bugs caught"
        )
    for path in ("record", "graph"):
        shown = sorted((s for s in done["canaries"] if s.path == path), key=lambda s: s.claimed)
        if shown:
            ratios = ", ".join(f"{s.ratio:.3f} of {s.claimed:.0f}" for s in shown)
            parts.append(f"canaries on {path} prove {ratios}")
    if done["one run"]:
        low = max(r.low for r in done["one run"])
        parts.append(f"{len(done['one run'])} runs of {canary.CANARIES} canaries prove {low:.2f}")
    made = [c for some in done["settings"] for c in some]
    if made:
        parts.append(
            f"{len(made)} settings within {max(c.over for c in made):.2f} of the tolerance"
        )
    for found in done["jobs"]:
        parts.append(f"{2 * found.each} jobs prove {found.low:.2f} of {found.claimed:.2f}")
    return "; ".join(parts)


def lines(done: Done) -> list[str]:
    """A line for each bug and each canary."""
    out = [f"{name}: {found.check if found else 'NOT CAUGHT'}" for name, found in _bugs(done)]
    for s in sorted(done["canaries"], key=lambda s: (s.path, s.claimed)):
        out.append(
            f"canaries, {s.path}: epsilon {s.claimed:.4f}, at least {s.low:.4f} ({s.ratio:.4f})"
        )
    return out


def _bugs(done: Done) -> list[tuple[str, Any]]:
    order = list(bugs.BUGS)
    return sorted(done["bugs"], key=lambda b: order.index(b[0]))


def command(arguments: Sequence[str]) -> str:
    return " ".join(("python -m audit", *arguments))


def machine() -> str:
    """The processor's name and how many there are."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def generated(done: Done, said: str, seconds: float, wrong: int) -> str:
    """The generated part of the page."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = [f"`{said}`, {today}, {machine()}: {seconds / 60:.1f} minutes, {wrong} violations.", ""]
    for made, seconds_of in done["battery"]:
        alarm = made["chance"] * law.LEVEL
        out += [
            f"The battery made {made['certain']} comparisons without chance and {made['chance']} of"
            f" chance: a false alarm with probability {alarm:.1e} at most. Seconds by check: "
            + ", ".join(f"{name} {s:.1f}" for name, s in seconds_of.items())
            + ".",
            "",
        ]
    if done["clean"]:
        out += [f"Clean runs: {sum(done['clean'])}.", ""]
    if done["canaries"]:
        out += [
            "| path | draws a side | claimed | proven | share |",
            "| --- | --- | --- | --- | --- |",
        ]
        for s in sorted(done["canaries"], key=lambda s: (s.path, s.claimed)):
            out.append(f"| {s.path} | {s.draws} | {s.claimed:.4f} | {s.low:.4f} | {s.ratio:.4f} |")
        out.append("")
    for r in sorted(done["one run"], key=lambda r: r.low)[-1:]:
        out += [
            f"One run, the best of {len(done['one run'])}: {r.right} of {r.guesses} guesses right,"
            f" epsilon {r.low:.2f} proven at delta {canary.RUN_DELTA:g}, {r.claimed:.2f} claimed.",
            "",
        ]
    made = [c for some in done["settings"] for c in some]
    if made:
        worst = max(made, key=lambda c: c.over)
        wide = max(c.high - c.low for c in made)
        out += [
            f"Accountants: {len(made)} settings. The shown epsilon is above the certified lower"
            f" bound by at most {worst.over:.2f} of what is allowed (1% or 0.01); the second"
            f" accountant's bounds are at most {wide:.4f} apart. The charge by RDP is"
            f" {min(c.charged / c.low for c in made if c.low > 0.05):.3f} to"
            f" {max(c.charged / c.low for c in made if c.low > 0.05):.3f} times the lower bound,"
            " where that is above 0.05.",
            "",
        ]
    for j in done["jobs"]:
        out += [
            f"Complete jobs: {j.each} a side, {j.seconds:.1f} s of wall clock a job; epsilon"
            f" {j.low:.2f} proven, {j.claimed:.2f} quoted.",
            "",
        ]
    if done["bugs"]:
        out += ["| seeded bug | caught by | in what words |", "| --- | --- | --- |"]
        for name, found in _bugs(done):
            words = found.what.split(": ", 1)[-1].replace("|", "\\|")[:110] if found else ""
            out.append(f"| {name} | {found.check if found else 'not caught'} | {words} |")
        out.append("")
    return "\n".join(out)


def write(path: Path, done: Done, said: str, seconds: float, wrong: int) -> None:
    """Put the generated part between its marks."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{generated(done, said, seconds, wrong)}\n{END}{after}")

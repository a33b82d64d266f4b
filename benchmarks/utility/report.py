"""Results as tables, a page of the docs and a chart."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from benchmarks.utility import fashion

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "benchmarks-utility.md"
CHART: Final = ROOT / "docs" / "images" / "benchmarks-utility.svg"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def machine() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": metadata.version("torch"),
        "threads": 1,
    }


def _asked(epsilon: float | None) -> str:
    return "no privacy" if epsilon is None else f"{epsilon:g}"


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['date']}, {found['machine']}, {found['cores']} cores, one thread,"
        f" torch {found['torch']}."
        + (" **Judged on held-out training data.**" if found["validate"] else ""),
    ]
    if "fashion" in found:
        lines += [
            "",
            "Fashion-MNIST, delta 1e-5, one job a line; published for hand-crafted features at"
            f" (2.7, 1e-5): {fashion.PUBLISHED:.1%}.",
            "",
            "| epsilon | accuracy | noise multiplier | seconds | trained parameters | path |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {_asked(r['epsilon'])} | {r['accuracy']:.2%} | {r['noise_multiplier']:.2f} |"
            f" {r['seconds']:.0f} | {r['dimension']} | {', '.join(r['path'])} |"
            for r in found["fashion"]
        ]
    if "sms" in found:
        lines += [
            "",
            f"SMS spam, {found['messages']} different messages, one fifth held out.",
            "",
            "| epsilon | mean accuracy | lowest | highest | splits | seconds a job |",
            "|---|---|---|---|---|---|",
        ]
        for epsilon in dict.fromkeys(r["epsilon"] for r in found["sms"]):
            of = [r for r in found["sms"] if r["epsilon"] == epsilon]
            right = [r["accuracy"] for r in of]
            seconds = statistics.median(r["seconds"] for r in of)
            lines.append(
                f"| {_asked(epsilon)} | {statistics.fmean(right):.2%} | {min(right):.2%} |"
                f" {max(right):.2%} | {len(of)} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def splice(page: str, text: str) -> str:
    """``page`` with ``text`` between its two marks. Raises ``ValueError`` when they are absent."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN} and {END} once each")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{text}\n{END}", page, flags=re.DOTALL)


def write(found: dict[str, Any]) -> None:
    """Into the page and its chart."""
    text = f"![Accuracy over epsilon](images/{CHART.name})\n\n{tables(found)}"
    PAGE.write_text(splice(PAGE.read_text("utf-8"), text), encoding="utf-8")
    draw(found, CHART)


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy over epsilon, with what no privacy gives and the published figure, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "casemate"
    from matplotlib import pyplot

    private = [r for r in found["fashion"] if r["epsilon"] is not None]
    plain = [r["accuracy"] for r in found["fashion"] if r["epsilon"] is None]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    axes.plot(
        [r["epsilon"] for r in private],
        [r["accuracy"] for r in private],
        "o-", color="#0b7a75", linewidth=2, label="casemate",
    )  # fmt: skip
    for r in private:
        axes.annotate(
            f"{r['accuracy']:.1%}", (r["epsilon"], r["accuracy"]), (0, -16),
            textcoords="offset points", ha="center", fontsize=9, color="#0b7a75",
        )  # fmt: skip
    for value in plain:
        axes.axhline(value, color="#9aa5b1", linestyle="--", linewidth=1.4)
        axes.text(
            private[0]["epsilon"], value, f"the same without privacy {value:.1%}",
            va="bottom", fontsize=9, color="#52606d",
        )  # fmt: skip
    axes.plot(
        [fashion.HEADLINE], [fashion.PUBLISHED], "D", color="#c0392b",
        label=f"hand-crafted features, Tramer and Boneh 2021: {fashion.PUBLISHED:.1%}",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [r["epsilon"] for r in private], [f"{r['epsilon']:g}" for r in private], minor=False
    )
    low = min([fashion.PUBLISHED, *(r["accuracy"] for r in found["fashion"])])
    high = max(r["accuracy"] for r in found["fashion"])
    axes.set_ylim(low - 0.012, high + 0.008)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("epsilon, delta 1e-5")
    axes.set_title("Fashion-MNIST: what privacy costs in accuracy", loc="left", fontsize=12)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)

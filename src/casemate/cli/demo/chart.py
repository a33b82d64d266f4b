"""The results as a picture: PNG with matplotlib, else a self-contained SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from casemate.cli.demo.show import ROWS, interval

if TYPE_CHECKING:
    from casemate.cli.demo.story import Figures

COLOURS: Final = {"both": "#0b7a75", "oracle": "#9aa5b1"}
OTHER: Final = "#4a6fa5"


@dataclass(frozen=True, slots=True)
class Point:
    name: str
    mean: float
    half: float
    colour: str


def points(figures: Figures) -> list[Point]:
    made = []
    for key, name in ROWS:
        mean, half = interval(figures.accuracy[key])
        made.append(Point(name, mean, 0.0 if math.isnan(half) else half, COLOURS.get(key, OTHER)))
    return made


def caption(figures: Figures) -> tuple[str, str]:
    count = len(figures.accuracy["both"])
    return (
        "Two hospitals, one model",
        f"Accuracy on {figures.held_out} held-out patients, mean and 95% interval of {count} jobs;"
        f" each private job at epsilon {figures.epsilon:g}. Simulated TEE.",
    )


def draw(figures: Figures, folder: Path) -> Path:
    """Write the chart into ``folder``; its path."""
    try:
        import matplotlib
    except ImportError:
        path = folder / "chart.svg"
        path.write_text(svg(figures), encoding="utf-8")
        return path
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = points(figures)[::-1]
    title, text = caption(figures)
    figure, axes = pyplot.subplots(figsize=(9, 3.9), dpi=150)
    places = range(len(made))
    # Dots, not bars: the axis does not start at zero.
    for place, bar in zip(places, made, strict=True):
        axes.errorbar(
            bar.mean, place, xerr=bar.half, fmt="o", color=bar.colour, markersize=10,
            capsize=5, linewidth=2.2, capthick=2.2,
        )  # fmt: skip
        axes.text(
            bar.mean, place + 0.22, f"{bar.mean:.1%}", ha="center", fontsize=10.5,
            fontweight="bold", color=bar.colour,
        )  # fmt: skip
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    low = min(figures.majority, *(b.mean - b.half for b in made)) - 0.05
    axes.axvline(figures.majority, color="#c0392b", linestyle="--", linewidth=1.2)
    axes.text(
        figures.majority + 0.004, len(made) - 0.52, f"majority class {figures.majority:.1%}",
        color="#c0392b", fontsize=9, va="bottom",
    )  # fmt: skip
    axes.set_xlim(max(0.0, low), 1.012)
    axes.set_ylim(-0.5, len(made) - 0.1)
    axes.set_yticks(list(places), [b.name for b in made], fontsize=10)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}" if x <= 1.0001 else "")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.suptitle(title, x=0.02, y=0.97, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.02, 0.865, text, fontsize=8.5, color="#52606d")
    figure.subplots_adjust(left=0.27, right=0.97, top=0.83, bottom=0.1)
    path = folder / "chart.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def svg(figures: Figures) -> str:
    """The same chart without matplotlib."""
    made = points(figures)
    title, text = caption(figures)
    left, right, top, step = 250.0, 860.0, 90.0, 46.0
    low = max(0.0, min(figures.majority, *(b.mean - b.half for b in made)) - 0.05)

    def x(value: float) -> float:
        return left + (value - low) / (1.0 - low) * (right - left)

    parts = [
        _text(20, 34, title, size=20, weight="bold"),
        _text(20, 58, text, size=12, fill="#52606d"),
    ]
    for i, bar in enumerate(made):
        y = top + i * step
        parts += [
            _text(left - 12, y + 19, bar.name, size=13, anchor="end"),
            f'<line x1="{x(bar.mean - bar.half):.1f}" x2="{x(min(1, bar.mean + bar.half)):.1f}"'
            f' y1="{y + 14}" y2="{y + 14}" stroke="{bar.colour}" stroke-width="3"/>',
            f'<circle cx="{x(bar.mean):.1f}" cy="{y + 14}" r="7" fill="{bar.colour}"/>',
            _text(
                x(bar.mean),
                y,
                f"{bar.mean:.1%}",
                size=13,
                weight="bold",
                fill=bar.colour,
                anchor="middle",
            ),
        ]
    at, bottom = x(figures.majority), top + len(made) * step
    parts += [
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{bottom}" stroke="#c0392b"'
        ' stroke-dasharray="6 4"/>',
        _text(at + 4, bottom + 14, f"majority class {figures.majority:.1%}", fill="#c0392b"),
    ]
    return _document(parts, 960, bottom + 30)


def _text(
    x: float, y: float, text: str, *, size: int = 12, fill: str = "#1f2933", weight: str = "normal",
    anchor: str = "start",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" font-weight="{weight}"'
        f' text-anchor="{anchor}">{html.escape(text)}</text>'
    )


def _document(parts: Sequence[str], width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        ' font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )

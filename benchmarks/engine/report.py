"""What a run found, as one object a workload, a table and a chart."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

ORDER: Final = (
    "logreg", "mlp", "vgg9", "resnet18", "efficientnet_b0", "minilm", "distilbert",
    "distilbert_lora", "distilbert_last",
)  # fmt: skip
RATIOS: Final = (
    "step_over_eager", "step_over_n", "opacus_best_over_step", "n_over_eager",
    "opacus_best_over_eager",
)  # fmt: skip
NOT_MEASURED: Final = "not measured"
BEGIN: Final = "<!-- figures: written by make bench-engine -->"
END: Final = "<!-- end of figures -->"


def machine() -> str:
    """The processor's name and count of cores."""
    model = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as f:
        lines = dict(line.split(":", 1) for line in f if ":" in line)
    named = {k.strip(): v.strip() for k, v in lines.items()}
    cores = int(named.get("processor", "0")) + 1
    name = f"{named.get('model name', model)} (family {named.get('cpu family', '?')}"
    return f"{name}, model {named.get('model', '?')}), {cores} cores"


def summary(workload: str, found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One object of the JSON list; a ratio that was not measured is null."""
    from benchmarks.engine.workloads import BY_ID

    made: dict[str, Any] = {
        "workload": workload, "title": BY_ID[workload].title, "batch": BY_ID[workload].batch,
        "precision": options.precision, "allocator": options.allocator, "quick": options.quick,
        "machine": machine(), "date": datetime.date.today().isoformat(),
        "torch": metadata.version("torch"), "opacus": _version("opacus"), "threads": 1,
    }  # fmt: skip
    if "error" in found:
        return made | dict.fromkeys((*RATIOS, "memory_over_eager")) | {"error": found["error"]}
    ratios, variants = found["ratios"], found["variants"]
    made |= {key: _rounded(ratios[key]["median"]) if ratios[key] else None for key in RATIOS}
    used = {name: v["megabytes"] for name, v in variants.items() if v["megabytes"] is not None}
    ours, eager = used.get("casemate"), used.get("eager")
    made["memory_over_eager"] = _rounded(ours / eager) if ours is not None and eager else None
    made["spread"] = {k: _kept(ratios[k], ("low", "high", "rounds")) for k in RATIOS if ratios[k]}
    made |= {"n": found["n"], "opacus_best": found["opacus_best"]}
    made["opacus_modes_over"] = found["opacus_modes_over"]
    made["opacus_modes"] = {k: _rounded(v["median"]) for k, v in found["opacus_modes"].items()}
    made["compile_seconds"] = variants.get("casemate", {}).get("build_seconds")
    made["variants"] = variants
    return made


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _kept(values: dict[str, float], keys: Sequence[str]) -> dict[str, float]:
    return {k: _rounded(values[k]) for k in keys}


def _cell(result: dict[str, Any], key: str) -> str:
    value = result.get(key)
    if value is None:
        return NOT_MEASURED
    spread = result.get("spread", {}).get(key)
    tail = f" ({spread['low']:.2f} to {spread['high']:.2f})" if spread else ""
    return f"{value:.2f}{tail}"


def _variant(result: dict[str, Any], name: str, key: str, form: str = "{:.4g}") -> str:
    value = result.get("variants", {}).get(name, {}).get(key)
    return NOT_MEASURED if value is None else form.format(value)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the ratios, then every variant of every workload."""
    if not results:
        return "nothing was measured"
    first = results[0]
    lines = [
        f"{first['machine']}; {first['date']}; torch {first['torch']}, Opacus {first['opacus']};",
        f"precision '{first['precision']}', allocator {first['allocator']}, one thread, CPU time.",
        "Ratios: medians of paired rounds, with quartiles.",
        "",
    ]
    lines += _rows(
        ("workload (batch)", "step / eager", "step / N", "memory / eager", "Opacus's best / step",
         "N / eager", "Opacus's best / eager", "N is", "Opacus's best is"),
        [(f"{r['title']} ({r['batch']})", _cell(r, "step_over_eager"), _cell(r, "step_over_n"),
          _cell(r, "memory_over_eager"), _cell(r, "opacus_best_over_step"),
          _cell(r, "n_over_eager"), _cell(r, "opacus_best_over_eager"),
          str(r.get("n") or NOT_MEASURED), str(r.get("opacus_best") or NOT_MEASURED))
         for r in results],
    )  # fmt: skip
    for r in results:
        lines += ["", f"### {r['title']}, batch {r['batch']}", ""]
        if "error" in r:
            lines += ["not measured:", "", *(f"    {x}" for x in r["error"].splitlines())]
            continue
        lines += _rows(
            ("step", "CPU ms", "ms by the clock", "over eager", "MB", "build s", "note"),
            [(name, _milliseconds(v), _variant(r, name, "wall_ms"), _over(v),
              _variant(r, name, "megabytes"), _variant(r, name, "build_seconds", "{:.1f}"),
              v["missing"] or ("" if v["ms"] else "one step: far behind"))
             for name, v in r["variants"].items()],
        )  # fmt: skip
    return "\n".join(lines)


def put(page: Path, text: str) -> None:
    """``text`` between the two marks of ``page``, in place of what stood there."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _milliseconds(variant: dict[str, Any]) -> str:
    value = variant["ms"] if variant["ms"] is not None else variant["one_step_ms"]
    return NOT_MEASURED if value is None else f"{value:.4g}"


def _over(variant: dict[str, Any]) -> str:
    found = variant["over_eager"]
    if not found:
        return "-"
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def chart(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Steps over eager as bars on a logarithmic axis: N, casemate, each mode of Opacus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    shown = [r for r in results if "variants" in r]
    kinds = ["N", "casemate", "opacus ghost", "opacus functorch", "opacus hooks", "opacus ew"]
    colours = ["#4d4d4d", "#0a7f5a", "#c9d6ea", "#9db4d6", "#6f8fbf", "#43699f"]
    figure, axes = pyplot.subplots(figsize=(9, 0.85 * len(shown) + 1.2))
    height = 0.8 / len(kinds)
    for k, (kind, colour) in enumerate(zip(kinds, colours, strict=True)):
        for i, r in enumerate(shown):
            v = r["variants"].get(r["n"] if kind == "N" else kind)
            eager = r["variants"]["eager"]["ms"]
            took = v and (v["ms"] or v["one_step_ms"])
            if took:
                over = v["over_eager"]["median"] if v["over_eager"] else took / eager
                place = i + (k - (len(kinds) - 1) / 2) * height
                axes.barh(place, over, height, color=colour, label=None if i else kind)
                axes.text(over * 1.02, place, f"{over:.2f}", va="center", fontsize=6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [f"{r['title']} ({r['batch']})" for r in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step over plain eager PyTorch (logarithmic)")
    handles = [patches.Patch(color=c) for c in colours]
    axes.legend(handles, kinds, fontsize=7, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})

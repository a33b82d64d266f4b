"""What a terminal and a notebook show of a value: a title and rows of plain text.

Names come from other parties, so every cell is escaped; control characters never reach a terminal.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from casemate.spec.data import ANYONE, DatasetInfo, Policy
from casemate.spec.sale import SaleInfo
from casemate.spec.serving import ModelInfo, TensorSpec

T = TypeVar("T")
Rows = Sequence[Sequence[object]]


def plain(cell: object) -> str:
    """A cell as one printable line."""
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_text(title: str, head: Sequence[str], rows: Rows) -> str:
    """Aligned columns."""
    cells = [[*head], *[[plain(c) for c in row] for row in rows]]
    cells = [row for row in cells if row]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(([plain(title)] if title else []) + [line.rstrip() for line in lines])


def as_html(title: str, head: Sequence[str], rows: Rows) -> str:
    """A table for a notebook."""

    def line(tag: str, row: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(plain(c))}</{tag}>" for c in row) + "</tr>"

    top = f"<thead>{line('th', head)}</thead>" if head else ""
    body = "".join(line("td", row) for row in rows)
    caption = f"<strong>{html.escape(plain(title))}</strong>" if title else ""
    return f"{caption}<table>{top}<tbody>{body}</tbody></table>"


@dataclass(frozen=True, slots=True)
class Listing(Sequence[T], Generic[T]):
    """A tuple of values with a table to show; index, iterate and compare it as a sequence."""

    items: tuple[T, ...]
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        return self.items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __str__(self) -> str:
        return as_text(self.title, self.head, self.rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.title, self.head, self.rows)


DATASET_HEAD = ("dataset", "name", "units", "columns", "state", "epsilon left", "approval", "owner")


def dataset_row(info: DatasetInfo) -> tuple[object, ...]:
    budget = info.budget
    return (
        info.dataset,
        info.schema.name,
        info.schema.units,
        len(info.schema.columns),
        info.state if info.error is None else f"{info.state}: {info.error}",
        "-" if budget is None else f"{budget.left_epsilon:.3f} of {budget.budget.epsilon:g}",
        info.policy.approval,
        info.owner,
    )


def datasets(infos: Sequence[DatasetInfo]) -> Listing[DatasetInfo]:
    rows = tuple(dataset_row(i) for i in infos)
    return Listing(tuple(infos), f"{len(infos)} dataset(s)", DATASET_HEAD, rows)


def dataset(info: DatasetInfo) -> tuple[str, Rows]:
    """Title and rows that show one dataset whole."""
    policy, budget = info.policy, info.budget
    who = "any enrolled identity" if ANYONE in policy.scientists else ", ".join(policy.scientists)
    cap, names = policy.scientist_budget, [w.partition("+")[0] for w in policy.witnesses]
    rows: list[tuple[str, object]] = [
        ("dataset", info.dataset),
        ("owner", info.owner),
        ("state", info.state if info.error is None else f"{info.state}: {info.error}"),
        ("rows, units", f"{info.schema.rows}, {info.schema.units}"),
        ("epoch", info.epoch),
        ("scientists", who),
        ("approval", policy.approval),
        ("most epsilon of a job", "-" if policy.max_epsilon is None else policy.max_epsilon),
        ("without privacy", policy.nonprivate or "never"),
        ("for", f"evaluation, {policy.evaluations} exact" if policy.evaluation else "training"),
        *contest(policy),
        ("last epoch", "-" if policy.last_epoch is None else policy.last_epoch),
        ("budget of a scientist", "-" if cap is None else f"{cap.epsilon:g} at {cap.delta:g}"),
        ("witnesses", f"{policy.cosignatures} of {', '.join(names)}" if names else "none"),
        ("resumes", policy.resumes),
        ("policy digest", info.policy_digest),
    ]
    if budget is not None:
        rows += [
            ("budget", f"epsilon {budget.budget.epsilon:g} at delta {budget.budget.delta:g}"),
            ("spent", f"{budget.spent_epsilon:.4f} in {budget.jobs} job(s)"),
            ("left", f"{budget.left_epsilon:.4f}"),
        ]
    for column in info.schema.columns:
        shape = "x".join(map(str, column.shape)) or "scalar"
        bounds = "" if column.low is None else f" in [{column.low}, {column.high}]"
        scale = "" if column.scale == "none" else f", scaled {column.scale}"
        rows.append((f"{column.role} {column.name}", f"{column.dtype} {shape}{bounds}{scale}"))
    return info.schema.name, rows


def contest(policy: Policy) -> list[tuple[str, object]]:
    """Rows that show what a dataset's contest is, if it holds one."""
    held = policy.contest
    if held is None:
        return []
    names = ", ".join(f"{m.name} to {m.limit:g}" for m in held.metrics)
    how = "exact" if held.epsilon is None else f"at epsilon {held.epsilon:g}, delta {held.delta:g}"
    return [("contest", f"{held.target} by {names}; {how}; {held.entries} of each participant")]


MODEL_HEAD = ("model", "name", "takes", "gives", "state", "calls left", "owner")


def told(spec: TensorSpec) -> str:
    """A tensor of a call or an answer in words."""
    bounds = "" if spec.low is None else f" in [{spec.low}, {spec.high}]"
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, ('records', *spec.shape)))}]{bounds}"


def model_row(info: ModelInfo) -> tuple[object, ...]:
    return (
        info.model,
        info.name,
        ", ".join(map(told, info.inputs)),
        ", ".join(map(told, info.outputs)),
        info.state,
        "not counted" if info.left is None else info.left,
        info.owner,
    )


def models(infos: Sequence[ModelInfo]) -> Listing[ModelInfo]:
    rows = tuple(model_row(i) for i in infos)
    return Listing(tuple(infos), f"{len(infos)} model(s)", MODEL_HEAD, rows)


def model(info: ModelInfo) -> Rows:
    """Rows that show one deployed model whole."""
    policy = info.policy
    callers = "any enrolled identity" if ANYONE in policy.callers else ", ".join(policy.callers)
    counted = "not counted" if policy.calls is None else f"{policy.calls} of each caller"
    return [
        ("model", info.model),
        ("name", info.name),
        ("owner", info.owner),
        ("state", info.state),
        ("takes", ", ".join(map(told, info.inputs))),
        ("gives", ", ".join(map(told, info.outputs))),
        ("parameters", info.parameters),
        ("callers", callers or "nobody"),
        ("epoch", policy.epoch),
        ("calls", counted + ("" if info.left is None else f"; {info.left} of yours left")),
        ("one call", f"at most {policy.records} records"),
        ("at once", f"{policy.at_once} calls of one caller"),
        ("one pass", f"{info.slots} records of any callers" if info.slots > 1 else "one call"),
        ("policy digest", info.policy_digest),
    ]


SALE_HEAD = ("sale", "model", "seller", "buyer", "state", "terms")


def sales(infos: Sequence[SaleInfo]) -> Listing[SaleInfo]:
    rows = tuple(
        (i.id, i.sale.model, i.sale.seller, i.sale.buyer, i.state, i.sale.terms) for i in infos
    )
    return Listing(tuple(infos), f"{len(infos)} sale(s)", SALE_HEAD, rows)


def sale(info: SaleInfo) -> Rows:
    """Rows that show one sale whole."""
    found = info.sale
    return [
        ("sale", info.id),
        ("model", found.model),
        ("digest", found.model_digest),
        ("seller", found.seller),
        ("buyer", found.buyer),
        ("terms", found.terms or "-"),
        ("state", info.state),
    ]

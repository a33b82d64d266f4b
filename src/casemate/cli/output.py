"""One way out for every command: a table for people, or one JSON document with ``--format json``.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, Final, ParamSpec, TypeVar

import click

from casemate.spec.errors import CasemateError, UsageError

# A pipe has no width; ids should stand on one line there.
PIPE_WIDTH: Final = 160

P = ParamSpec("P")
R = TypeVar("R")


def debug() -> bool:
    return bool(os.environ.get("CASEMATE_DEBUG"))


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether ``--format json`` stands in the arguments: needed before they are parsed."""
    if ("--format", "json") in pairwise(arguments) or "--format=json" in arguments:
        return True
    return os.environ.get("CASEMATE_FORMAT") == "json"


def format_option(command: Callable[P, R]) -> Callable[P, R]:
    """Adds ``--format table|json`` as the parameter ``form``."""
    option = click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        envvar="CASEMATE_FORMAT",
        help="Table for people, or one JSON document.",
    )

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return command(*args, **kwargs)

    return option(run)


def usage_error(e: click.ClickException) -> UsageError:
    """Click's own refusals in casemate's shape."""
    message = " ".join(e.format_message().split())
    context = getattr(e, "ctx", None)
    path = context.command_path if context is not None else "casemate"
    text = message if message.endswith((".", "?")) else message + "."
    return UsageError("usage.arguments", text, mend=f"See `{path} --help`.")


def show_error(e: CasemateError, as_json: bool) -> None:
    """``error CODE: sentence`` and ``mend: …`` on stderr, or the wire's JSON shape."""
    if as_json:
        click.echo(json.dumps(e.to_wire(), sort_keys=True), err=True)
        return
    place = f" [{clean(e.where)}]" if e.where else ""
    click.echo(
        click.style(f"error {e.code}", fg="red", bold=True) + f"{place}: {clean(e.message)}",
        err=True,
    )
    if e.mend:
        click.echo(click.style("mend", bold=True) + f": {clean(e.mend)}", err=True)


def clean(text: object) -> str:
    """One printable line: what other parties named must not drive a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def emit(form: str, data: object, table: Callable[[], Any] | None = None) -> None:
    """Print ``data`` as JSON, or what ``table`` makes: a rich renderable or a string."""
    if form == "json" or table is None:
        click.echo(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False))
        return
    shown = table()
    if isinstance(shown, str):
        click.echo(shown)
        return
    console().print(shown)


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPE_WIDTH
    return made


def rows_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """A rich table; cells are plain text, never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=clean(title) or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        show_header=bool(head),
    )
    for i, name in enumerate(head or [""] * max((len(r) for r in rows), default=0)):
        # An id is copied from here, so it stays in one piece.
        ids = bool(head) and i == 0
        table.add_column(
            name, overflow="fold", no_wrap=ids, style="bold" if i == 0 and not head else None
        )
    for row in rows:
        cells = [f"{c:.4g}" if isinstance(c, float) else clean(c) for c in row]
        table.add_row(*[Text(c) for c in cells])
    return table


def say(text: str) -> None:
    """A note to the person, on stderr."""
    click.echo(clean(text), err=True)

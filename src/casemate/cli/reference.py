"""The command reference in docs/cli.md, made from the commands themselves.

``python -m casemate.cli.reference docs/cli.md`` writes it anew between its two marks; a test
compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from casemate.cli.main import cli

BEGIN: Final = "<!-- reference: made by python -m casemate.cli.reference -->\n"
END: Final = "<!-- end of reference -->\n"
# The options that name enclave, trust, identity and form; described once, above the reference.
COMMON: Final = frozenset({"enclave", "trust", "identity", "form"})


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _commands(found, f"{path} {name}")


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{n}`" for n in (*option.opts, *option.secondary_opts))
    if not option.is_flag:
        kind = option.metavar or "|".join(getattr(option.type, "choices", ()))
        names += f" {kind or option.type.name.upper()}".replace("|", "\\|")
    words = (option.help or "").rstrip(".")
    if option.envvar:
        words += f" (`{option.envvar}`)"
    if option.required:
        words += "; required"
    elif option.show_default and not option.is_flag and option.default is not None:
        words += f"; default {option.default}"
    return f"| {names} | {words.lstrip('; ')} |\n"


def markdown() -> str:
    """Every command: its usage, what it does, and its own options."""
    parts = []
    for path, command in _commands(cli, "casemate"):
        if path == "casemate":
            continue
        context = click.Context(command, info_name=path)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        text = " ".join((command.help or "").split())
        level = "###" if path.count(" ") == 1 else "####"
        parts.append(f"{level} `{path}`\n\n{text}\n\n    {usage}\n\n")
        own = [p for p in command.params if isinstance(p, click.Option) and p.name not in COMMON]
        if own:
            parts.append("| option | |\n| --- | --- |\n" + "".join(_row(p) for p in own) + "\n")
    return "".join(parts)


def rewritten(text: str) -> str:
    """``text`` with the reference between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewritten(target.read_text(encoding="utf-8")), encoding="utf-8")

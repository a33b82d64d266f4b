"""``casemate serve``: run a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from casemate.cli import output
from casemate.spec.errors import UsageError


def state_folder() -> Path:
    """Where a server keeps its state unless told otherwise."""
    import os

    if named := os.environ.get("CASEMATE_STATE"):
        return Path(named)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "casemate"


def _web_addresses(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """One that cannot be asked would keep jobs waiting for ever."""
    from urllib.parse import urlsplit

    for url in given:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise click.BadParameter(f"{url!r} is no address like http://host:port.")
    return given


@click.command()
@click.option(
    "--state",
    type=click.Path(file_okay=False),
    envvar="CASEMATE_STATE",
    help="State folder (default: ~/.local/state/casemate).",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="CASEMATE_HOST",
    help="Address to listen on.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8443,
    show_default=True,
    envvar="CASEMATE_PORT",
    help="Port; 0 takes a free one.",
)
@click.option(
    "--tee",
    envvar="CASEMATE_TEE",
    default="auto",
    show_default=True,
    help="Kind of TEE, or auto for this machine's own; auto never simulates.",
)
@click.option(
    "--release-owner",
    default="",
    envvar="CASEMATE_RELEASE_OWNER",
    metavar="HEX",
    help="Ed25519 key of who releases the sealing key, where no hardware holds one.",
)
@click.option(
    "--witness",
    "witnesses",
    multiple=True,
    envvar="CASEMATE_WITNESSES",
    metavar="URL",
    callback=_web_addresses,
    help="Witness that is asked to cosign the log; repeatable.",
)
@click.option(
    "--anchor",
    default="auto",
    show_default=True,
    envvar="CASEMATE_ANCHOR",
    metavar="auto|none|INDEX",
    help="NV index of the TPM that tells an older state.",
)
@click.option("--dev", is_flag=True, help="Development: a simulated TEE, said loudly.")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    envvar="CASEMATE_WORKERS",
    help="Jobs that run at once.",
)
@click.option(
    "--models",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    envvar="CASEMATE_MODELS",
    help="Deployed models that are loaded at once.",
)
@click.option(
    "--spares",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    envvar="CASEMATE_SPARES",
    help="Workers that wait with their imports done.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    envvar="CASEMATE_THREADS",
    help="Threads of one worker.",
)
@click.option(
    "--drain",
    "drain_seconds",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    envvar="CASEMATE_DRAIN",
    metavar="SECONDS",
    help="Once stopped, wait so long for jobs that run; a second signal ends the wait.",
)
@output.format_option  # fmt: skip
def serve(
    state: str | None, tee: str, dev: bool, threads: int | None, form: str, **settings: Any
) -> None:
    """Run a server until it is stopped; logs go to stderr as JSON lines.

    With --dev it needs no configuration. Needs the extra `server`.
    """
    try:
        from casemate.server.config import Config
        from casemate.server.serve import serve as run
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            f"A server needs packages that are not installed ({e.name}).",
            mend="Run pip install 'casemate[server]'.",
        ) from None
    if threads is not None:
        settings["threads"] = threads
    run(
        Config(
            state=Path(state) if state is not None else state_folder(),
            tee=tee,
            dev=dev,
            **settings,
        ),
        say=(lambda _: None) if form == "json" else None,
    )

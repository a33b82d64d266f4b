"""``casemate enclave``: verify an enclave's evidence, give enclaves names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casemate.cli import config, output

if TYPE_CHECKING:
    from casemate.attest.verify import Verdict


@click.group()
def enclave() -> None:
    """Verify an enclave's evidence over a live connection; name enclaves in config.toml."""


def verdict_json(url: str, verdict: Verdict) -> dict[str, object]:
    from casemate.spec import codec

    binding = codec.to_json(verdict.binding)
    return {"url": url, "verdict": verdict.to_json(), "binding": binding}


def verdict_table(url: str, verdict: Verdict) -> object:
    from rich.console import Group
    from rich.text import Text

    table = output.rows_table(
        "", ("check", "outcome", "found"), [(c.name, c.outcome, c.detail) for c in verdict.checks]
    )
    if not verdict.simulated:
        return Group(Text(f"{url} is accepted as {verdict.tee} ({verdict.product})"), table)
    loud = Text(
        f"SIMULATED {verdict.tee}: {url} runs in no TEE; its operator can see everything.",
        style="bold white on red",
    )
    pin = Text(f"root of this simulation: {verdict.root}")
    return Group(loud, table, pin)


@enclave.command()
@config.target_options
@output.format_option
def verify(target: config.Target, form: str) -> None:
    """Attest the enclave now and show every check. Exit code 10 and the check when refused."""
    from casemate.client.connection import Connection

    place = target.place()
    line = Connection(place.url, trust=config.load_trust(place.trust)).line()
    line.http.close()
    output.emit(
        form,
        verdict_json(place.url, line.verdict),
        lambda: verdict_table(place.url, line.verdict),
    )


@enclave.command()
@output.format_option
def show(form: str) -> None:
    """The named enclaves of config.toml."""
    found = config.read()
    enclaves = found.get("enclaves", {})
    rows = [
        (
            name + (" *" if name == found.get("default") else ""),
            entry["url"],
            entry.get("trust", "-"),
        )
        for name, entry in enclaves.items()
    ]
    output.emit(
        form,
        {"default": found.get("default"), "enclaves": enclaves},
        lambda: output.rows_table("", ("name", "url", "trust"), rows),
    )


@enclave.command()
@click.argument("name")
@click.argument("url")
@click.option(
    "--trust", required=True, metavar="FILE|simulated[:ROOT]", help="What evidence to ask for."
)
@click.option("--default", is_flag=True, help="Use it where no enclave is named.")
@output.format_option
def add(name: str, url: str, trust: str, default: bool, form: str) -> None:
    """Verify the enclave at URL and remember it as NAME."""
    from casemate.client.connection import Connection

    connection = Connection(url, trust=config.load_trust(trust))
    verdict = connection.line().verdict
    connection.close()
    if trust == config.SIMULATED:
        trust = f"{trust}:{verdict.root}"
    path = config.add_enclave(name, config.Place(connection.url, trust), default=default)
    output.emit(
        form,
        verdict_json(connection.url, verdict),
        lambda: f"{name} is {connection.url}, written to {path}",
    )

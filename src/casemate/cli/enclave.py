"""``casemate enclave``: verify evidence, of a live enclave or in a folder; give enclaves names."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casemate.cli import config, output
from casemate.spec.canonical import Json
from casemate.spec.errors import UsageError

if TYPE_CHECKING:
    from casemate.attest.folder import Judgement
    from casemate.attest.verify import Verdict

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def enclave() -> None:
    """Verify evidence, of a live enclave or in a folder; name enclaves in config.toml."""


def _at(given: str | None) -> float:
    """Unix seconds of a time on the command line; now where none is given."""
    if given is None:
        return time.time()
    try:
        if re.fullmatch(r"\d{1,11}(\.\d+)?", given):
            return float(given)
        found = datetime.fromisoformat(given)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            "usage.time",
            f"{given[:40]!r} is no time.",
            mend="Write it as 2026-05-31T12:00:00Z, or as Unix seconds.",
            where="--at",
        ) from None


def _nonce(given: str) -> bytes:
    try:
        if found := bytes.fromhex(given):
            return found
    except ValueError:
        pass
    raise UsageError(
        "usage.nonce",
        "The nonce is empty or no hex.",
        mend="Give the bytes that the evidence was asked with, in hex; without --nonce freshness"
        " stays unchecked.",
        where="--nonce",
    )


def judged(folder: Path, at: str | None, trust: str | None, nonce: str | None) -> Judgement:
    """The judgement on the evidence in a folder, by the command line's words."""
    from casemate.attest import folder as folders
    from casemate.attest.verdict import Refused

    policy = None if trust is None else config.load_trust(trust)
    asked = folders.NOT_ASKED if nonce is None else _nonce(nonce)
    now = _at(at)
    try:
        files = folders.read(folder)
    except Refused as e:
        return folders.unread(e)
    return folders.judge(files, now=now, trust=policy, nonce=asked)


def judgement_table(folder: Path, found: Judgement) -> object:
    from rich.console import Group
    from rich.text import Text

    colour = "bold green" if found.decision.startswith("accept") else "bold red"
    head = "SIMULATED, its operator can see everything: " if found.simulated else ""
    head += f"{found.decision}: {folder} ({found.tee or 'unknown kind'}); signatures {found.crypto}"
    if found.tcb_status:
        head += f"; TCB {found.tcb_status} {' '.join(found.advisories)}"
    table = output.rows_table(
        "", ("check", "outcome", "found"), [(c.name, c.outcome, c.detail) for c in found.checks]
    )
    lines = [Text(output.clean(head), style=colour), table]
    if found.code:
        lines.append(Text(output.clean(f"{found.code} [{found.where}]: {found.message}")))
        lines.append(Text(output.clean(f"mend: {found.mend}")))
    return Group(*lines)


def _flat(fields: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(x, Mapping | list) for x in value):
            yield from _flat({str(n): x for n, x in enumerate(value)}, f"{prefix}{name}.")
        else:
            yield prefix + name, output.clean(value)


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
@click.option(
    "--evidence", type=_FOLDER, metavar="DIR", help="Judge a folder of evidence, offline."
)
@click.option(
    "--at", metavar="TIME", help="With --evidence: the time to verify at; now if not given."
)
@click.option("--nonce", metavar="HEX", help="With --evidence: what it was asked with.")
@config.target_options
@output.format_option
@click.pass_context
def verify(
    ctx: click.Context,
    evidence: Path | None,
    at: str | None,
    nonce: str | None,
    target: config.Target,
    form: str,
) -> None:
    """Attest the enclave now, or judge a folder of evidence, and show every check.

    Exit code 10 when a live enclave is refused. With --evidence: 0 when accepted, else 11 to 19 by
    the stage that failed (docs/evidence.md), 10 for none of them. Without --trust a folder is
    judged by the default of its kind, which pins nothing.
    """
    if evidence is not None:
        from casemate.attest.verdict import EXITS

        found = judged(evidence, at, target.trust, nonce)
        output.emit(form, found.to_json(), lambda: judgement_table(evidence, found))
        if not found.decision.startswith("accept"):
            ctx.exit(EXITS.get(found.stage, 10))
        return
    if at is not None or nonce is not None:
        raise UsageError(
            "usage.arguments",
            "--at and --nonce are for --evidence.",
            mend="A live enclave is verified now, with a nonce of its own.",
        )
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
@click.argument("folder", type=_FOLDER)
@output.format_option
def show(folder: Path, form: str) -> None:
    """The evidence in FOLDER field by field, believed or not."""
    from casemate.attest import folder as folders
    from casemate.attest import kinds

    files = folders.read(folder)
    kind = kinds.recognise(files)
    fields = dict(kind.fields(files))
    output.emit(
        form,
        {"tee": kind.tee, "fields": fields},
        lambda: output.rows_table(kind.tee, ("field", "value"), list(_flat(fields))),
    )


@enclave.command()
@output.format_option
def ls(form: str) -> None:
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

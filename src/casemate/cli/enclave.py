"""``casemate enclave``: verify evidence, of a live enclave or in a folder; give enclaves names."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casemate.cli import config, output
from casemate.spec.canonical import Json
from casemate.spec.errors import NetError, UsageError

if TYPE_CHECKING:
    from casemate.attest.folder import Judgement
    from casemate.attest.verify import Verdict
    from casemate.tee.collateral import Outcome, Stored

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
    with target.line() as connection:
        url, verdict = connection.url, connection.line().verdict
    output.emit(form, verdict_json(url, verdict), lambda: verdict_table(url, verdict))


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
    from casemate.client.memory import Memory

    connection = Connection(url, trust=config.load_trust(trust), memory=Memory())
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


@enclave.command()
@click.argument("name", metavar="NAME|URL")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.format_option
def forget(name: str, yes: bool, form: str) -> None:
    """Forget an enclave and what was seen of its log: the next connection begins anew.

    For an enclave that goes on with another log because its owners consented to that. A rollback
    that you do not know of is exactly what this would make you overlook. What was kept of the log
    is put aside, not deleted.
    """
    from casemate.client.connection import address
    from casemate.client.memory import Memory

    url = address(config.place(name, None).url)
    if not yes:
        click.confirm(f"Forget {url} and what was seen of its log?", abort=True, err=True)
    memory = Memory()
    logs = memory.forget(url)
    known = config.forget_enclave(name)
    output.emit(
        form,
        {"url": url, "logs": list(logs), "named": known},
        lambda: f"{url} is forgotten ({len(logs)} log(s), put aside in {memory.folder}/forgotten).",
    )


@enclave.command()
@click.argument("request", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@config.target_options
@output.format_option
def release(request: Path, out: Path, target: config.Target, form: str) -> None:
    """As the owner: release the sealing secret to an enclave that waits for it at its start.

    REQUEST is the server's tee/release-request.json; the answer goes back to it as
    tee/release-grant.json. The evidence in it is verified by --trust first. The secret follows from
    your identity: with another identity the enclave cannot read its state.
    """
    from casemate.tee import release as releases

    identity = config.load_identity(target.identity)
    grant = releases.grant(
        request.read_bytes(),
        identity.derive(releases.TAG),
        config.load_trust(target.place().trust if target.trust is None else target.trust),
        identity.public.sign_key,
        identity.sign,
        now=time.time(),
    )
    out.write_bytes(grant)
    output.emit(form, {"file": str(out)}, lambda: f"Released; give {out} to the server.")


@enclave.command()
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="CASEMATE_STATE",
    help="The server's state folder; the one of `casemate serve` if not given.",
)
@click.option("--tee", envvar="CASEMATE_TEE", default="auto", show_default=True)
@click.option("--list", "only_list", is_flag=True, help="Ask nobody; show what is kept.")
@output.format_option
@click.pass_context
def collateral(
    ctx: click.Context, state: Path | None, tee: str, only_list: bool, form: str
) -> None:
    """On the server: fetch what its evidence needs from the vendors, and show its age.

    A client needs no network: the server carries this with its evidence, and nothing is trusted
    for having been fetched. Exit code 23 when a vendor's answer could not be had; what was kept
    before stays.
    """
    from casemate.cli.serve import state_folder
    from casemate.seams import OsDisk, OsRng, SystemClock
    from casemate.tee import collateral as kept
    from casemate.tee import fetch
    from casemate.tee import open as open_tee

    disk, clock = OsDisk(state or state_folder()), SystemClock()
    outcomes: tuple[kept.Outcome, ...] = ()
    if not only_list:
        made = open_tee(tee, disk=disk, rng=OsRng(), clock=clock)
        outcomes = kept.refresh(made, disk, fetch.https, clock.wall())
    stored = kept.stored(disk, clock.wall())
    failed = [o for o in outcomes if o.error]
    output.emit(
        form,
        {
            "asked": [dataclasses.asdict(o) for o in outcomes],
            "kept": [dataclasses.asdict(row) for row in stored],
        },
        lambda: _collateral_table(stored, failed),
    )
    if failed:
        ctx.exit(NetError.exit_code)


def _collateral_table(stored: Sequence[Stored], failed: Sequence[Outcome]) -> object:
    from rich.console import Group
    from rich.text import Text

    rows = [(f"{s.part}/{s.file}", f"{s.age / 86400:.1f} days", s.size, s.url) for s in stored]
    lines = [
        Text(output.clean(f"not had: {o.part} {o.what}: {o.error}"), style="red") for o in failed
    ]
    if not rows:
        return Group(*lines, Text("No collateral is kept."))
    return Group(*lines, output.rows_table("", ("file", "age", "bytes", "from"), rows))

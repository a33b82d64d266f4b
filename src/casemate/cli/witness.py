"""``casemate witness``: cosign logs, so that none of them can be rolled back or forked unseen."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casemate.cli import config, output
from casemate.spec.errors import AuthError, UsageError

if TYPE_CHECKING:
    from casemate.seal.identity import Identity
    from casemate.seal.note import Verifier

_folder = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.group()
def witness() -> None:
    """Cosign the logs of enclaves (owner or third party): C2SP tlog-witness.

    A witness answers only what extends all that it cosigned before. Back up its folder only as a
    whole and never run a copy: a witness that forgets can cosign a fork.
    """


def _key(folder: Path) -> Path:
    from casemate.witness import state

    path = folder / state.KEY
    if not path.exists():
        raise state.missing(state.KEY)
    return path


def _load(folder: Path) -> Identity:
    from casemate.seal.identity import Identity

    path, passphrase = _key(folder), os.environ.get("CASEMATE_PASSPHRASE")
    try:
        return Identity.load(path, passphrase)
    except AuthError as e:
        if e.code != "auth.passphrase" or passphrase is not None or not sys.stdin.isatty():
            raise
    return Identity.load(path, click.prompt("Passphrase", hide_input=True, err=True))


@witness.command()
@_folder
@click.option(
    "--name",
    required=True,
    help="Its name in cosignatures, without spaces: its address without https://, say.",
)
@click.option("--passphrase/--no-passphrase", default=False, help="Ask for one to encrypt the key.")
@output.format_option
def init(folder: Path, name: str, passphrase: bool, form: str) -> None:
    """Make a witness with a new key in FOLDER; owners name its vkey in their policies."""
    from casemate.seal import note
    from casemate.seal.identity import Identity
    from casemate.seams import OsDisk
    from casemate.witness import service, state
    from casemate.witness.alone import alone

    note.check_name(name)
    secret = os.environ.get("CASEMATE_PASSPHRASE")
    if passphrase and secret is None:
        secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    with alone(folder):
        if (folder / state.KEY).exists():
            raise UsageError(
                "usage.witness-exists",
                f"There is a witness in {folder}.",
                mend="Name another folder; a witness's key and state are never overwritten.",
                where=str(folder),
            )
        made = Identity.generate(name)
        state.create(OsDisk(folder), service.verifier(made))
        made.save(folder / state.KEY, secret)  # from here on it may cosign, so it is last
    vkey = str(service.verifier(made))
    output.emit(
        form,
        {"name": name, "vkey": vkey, "folder": str(folder)},
        lambda: f"{vkey}\nkey and state in {folder}; run `casemate witness add`, then `serve`",
    )


def _log_of(enclave: str, trust: str | None) -> Verifier:
    """The key of an enclave's log, as its evidence binds it and its newest checkpoint names it."""
    from casemate.client.connection import Connection
    from casemate.seal import checkpoint, note
    from casemate.seal.identity import Identity

    place = config.place(enclave, trust)
    # Nobody needs to know who asks for a public file.
    nobody = Identity.generate("nobody")
    connection = Connection(place.url, trust=config.load_trust(place.trust), identity=nobody)
    try:
        signed = note.parse(connection.request("GET", "/log/checkpoint").body)
        line = connection.line()
    finally:
        connection.close()
    if line.verdict.simulated:
        output.say(f"SIMULATED {line.verdict.tee}: {place.url} runs in no TEE")
    log = checkpoint.log_key(checkpoint.read(signed.text).origin, line.attestation.binding.log_key)
    checkpoint.verify(signed, log)
    return log


@witness.command()
@_folder
@click.argument("vkey", required=False)
@click.option(
    "--from",
    "enclave",
    metavar="NAME|URL",
    help="Instead of VKEY: the log of this enclave, whose evidence is verified.",
)
@click.option(
    "--trust",
    envvar="CASEMATE_TRUST",
    metavar="FILE|simulated[:ROOT]",
    help="With --from: what evidence to ask for.",
)
@output.format_option  # fmt: skip
def add(folder: Path, vkey: str | None, enclave: str | None, trust: str | None, form: str) -> None:
    """Watch the log with this VKEY (name+id+key, as its enclave's evidence binds it).

    A running witness reads its logs when it starts: stop it first.
    """
    from casemate.seal import note
    from casemate.seams import OsDisk
    from casemate.witness import state
    from casemate.witness.alone import alone

    if (vkey is None) == (enclave is None):
        raise click.UsageError("Give either VKEY or --from.")
    disk = OsDisk(_key(folder).parent)
    log = note.verifier(vkey) if vkey is not None else _log_of(str(enclave), trust)
    with alone(folder):
        new = state.add(disk, state.witness(disk), log)
    output.emit(
        form,
        {"origin": log.name, "vkey": str(log), "new": new},
        lambda: f"{output.clean(log.name)} is {'now' if new else 'already'} watched\n{log}",
    )


@witness.command()
@_folder
@output.format_option
def show(folder: Path, form: str) -> None:
    """Its vkey, the logs it watches, how far it cosigned each, and what stands against them."""
    from casemate.seams import OsDisk
    from casemate.witness import state

    disk = OsDisk(_key(folder).parent)
    whose = state.witness(disk)
    about = state.about(disk, whose, state.load(disk, whose))
    rows = [
        (log["origin"], "none" if log["size"] is None else log["size"], log["forks"],
         log["unproven"])
        for log in about["logs"]
    ]  # fmt: skip
    head = ("log", "cosigned", "forks", "unproven")
    if form != "json":
        click.echo(output.clean(about["vkey"]))  # in one piece, to be copied
    output.emit(form, about, lambda: output.rows_table("", head, rows))
    if form != "json" and any(log["forks"] for log in about["logs"]):
        output.say(f"a log signed two histories: see {folder / state.EVIDENCE}")


@witness.command()
@_folder
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
    default=7380,
    show_default=True,
    envvar="CASEMATE_PORT",
    help="Port; 0 takes a free one.",
)
@output.format_option  # fmt: skip
def serve(folder: Path, host: str, port: int, form: str) -> None:
    """Run the witness until it is stopped; logs go to stderr as JSON lines.

    Needs the extra `witness`.
    """
    try:
        from casemate.witness.serve import serve as run
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            f"A witness needs packages that are not installed ({e.name}).",
            mend="Run pip install 'casemate[witness]'.",
        ) from None

    def ready(url: str, found: Any) -> None:
        about = {"url": url, "name": found.key.name, "vkey": str(found.key)}
        text = f"witness {output.clean(found.key.name)} serves at {url}\n  vkey  {found.key}"
        click.echo(json.dumps(about, sort_keys=True) if form == "json" else text)
        sys.stdout.flush()

    def event(what: dict[str, Any]) -> None:
        print(json.dumps(what, sort_keys=True), file=sys.stderr, flush=True)

    run(folder, _load(folder), host, port, ready=ready, event=event)

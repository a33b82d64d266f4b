"""``casemate identity``: one's keys."""

from __future__ import annotations

import getpass
import os

import click

from casemate.cli import config, output


@click.group()
def identity() -> None:
    """Make and show one's keys: Ed25519 to sign, ML-KEM-768+X25519 to receive results."""


def _as_json(public: object, identity_id: str, path: object) -> dict[str, object]:
    from casemate.spec import codec

    return {"id": identity_id, "file": str(path), "public": codec.to_json(public)}


@identity.command()
@click.argument("name", default=getpass.getuser)
@click.option("--file", "path", type=click.Path(dir_okay=False), help="Where to keep the keys.")
@click.option(
    "--passphrase/--no-passphrase", default=False, help="Ask for one to encrypt the file."
)
@output.format_option
def new(name: str, path: str | None, passphrase: bool, form: str) -> None:
    """Make an identity called NAME (shown to others; proves nothing)."""
    from casemate.seal.identity import Identity

    secret = os.environ.get("CASEMATE_PASSPHRASE")
    if passphrase and secret is None:
        secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    target = config.identity_path(path)
    made = Identity.generate(name)
    made.save(target, secret)
    output.emit(
        form,
        _as_json(made.public, made.id, target),
        lambda: f"{made.id}\n{output.clean(name)}, keys in {target}; keep the file to yourself",
    )


@identity.command()
@click.option("--file", "path", type=click.Path(dir_okay=False), help="The keys' file.")
@output.format_option
def show(path: str | None, form: str) -> None:
    """Show one's public identity; owners admit scientists by this id."""
    target = config.identity_path(path)
    found = config.load_identity(path)
    output.emit(
        form,
        _as_json(found.public, found.id, target),
        lambda: f"{found.id}\n{output.clean(found.name)}, keys in {target}",
    )

"""``casemate state``: what an operator does with a server's state while it does not run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from casemate.cli import output
from casemate.cli.serve import state_folder
from casemate.spec.errors import UsageError

if TYPE_CHECKING:
    from casemate.server.backup import Backup
    from casemate.server.config import Config

_IN = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT = click.Path(dir_okay=False, path_type=Path)


@click.group()
def state() -> None:
    """Back up, restore, upgrade and recover a server's state; no server may run on it."""


_OPTIONS: Final = (
    click.option("--state", "folder", type=click.Path(file_okay=False, path_type=Path),
                 envvar="CASEMATE_STATE", help="State folder (default: ~/.local/state/casemate)."),
    click.option("--tee", envvar="CASEMATE_TEE", default="auto", show_default=True,
                 help="Kind of TEE, or auto for this machine's own."),
    click.option("--dev", is_flag=True, help="The simulated TEE, as `serve --dev`."),
    click.option("--release-owner", default="", envvar="CASEMATE_RELEASE_OWNER", metavar="HEX",
                 help="As the server's."),
)  # fmt: skip


def _folder(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that name the folder and the TEE, as one ``config`` argument."""

    @wraps(command)
    def run(
        *args: Any, folder: Path | None, tee: str, dev: bool, release_owner: str, **kwargs: Any
    ) -> Any:
        config = _config(folder or state_folder(), tee, dev, release_owner)
        return command(*args, config=config, **kwargs)

    made: Callable[..., Any] = run
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def _config(folder: Path, tee: str, dev: bool, release_owner: str) -> Config:
    try:
        import apsw  # noqa: F401

        from casemate.server import state as _  # noqa: F401
        from casemate.server.config import Config
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            f"A server's state needs packages that are not installed ({e.name}).",
            mend="Run pip install 'casemate[server]'.",
        ) from None
    return Config(state=folder, tee=tee, dev=dev, release_owner=release_owner)


def _existing(config: Config) -> None:
    from casemate.spec.errors import LedgerError

    if not (config.state / "ledger").is_dir():
        raise LedgerError(
            "ledger.missing",
            f"There is no store in {config.state}.",
            mend="Name the state folder.",
            where=str(config.state),
        )


def _text(path: Path) -> str:
    """What is no UTF-8 is refused for its form, by who reads it."""
    return path.read_text("utf-8", errors="replace")


def _describe(found: Backup) -> tuple[dict[str, Any], list[tuple[str, object]]]:
    from casemate.seal import checkpoint, note

    head = None
    if found.checkpoint is not None:
        head = checkpoint.read(note.parse(found.checkpoint).text)
    size = sum(f.size for f in found.files)
    shape = {
        "files": len(found.files),
        "bytes": size,
        "software": found.software,
        "checkpoint": found.checkpoint,
    }
    rows: list[tuple[str, object]] = [
        ("files", len(found.files)), ("bytes", size), ("software", found.software),
        ("log", "not opened" if head is None else head.origin),
        ("entries", "not known" if head is None else head.size),
    ]  # fmt: skip
    return shape, rows


@state.command()
@click.argument("file", type=_OUT)
@click.option(
    "--unopened", is_flag=True, help="Copy without opening the store: needs no TEE, checks nothing."
)
@_folder
@output.format_option  # fmt: skip
def backup(file: Path, unopened: bool, config: Config, form: str) -> None:
    """Back up the state into FILE, sealed as it lies there. No key is in it."""
    from casemate.server import state as states

    _existing(config)
    shape, rows = _describe(states.save(config, file, opened=not unopened))
    output.emit(form, {"file": str(file), **shape}, lambda: output.rows_table(str(file), (), rows))


@state.command()
@click.argument("file", type=_IN)
@click.option("--check", is_flag=True, help="Only compare FILE with its manifest, and show it.")
@_folder
@output.format_option
def restore(file: Path, check: bool, config: Config, form: str) -> None:
    """Restore FILE into an empty state folder.

    A server starts on it only after `state confirm`, or `state recover` with the owners' consent.
    """
    from casemate.server import state as states

    found = states.inspect(file) if check else states.put_back(config, file)
    shape, rows = _describe(found)
    output.emit(form, {"file": str(file), **shape}, lambda: output.rows_table(str(file), (), rows))
    if not check:
        output.say("Next: casemate state confirm --witness URL, or casemate state recover.")


@state.command()
@click.option(
    "--witness",
    "urls",
    multiple=True,
    required=True,
    metavar="URL",
    help="A witness's submission prefix; repeatable.",
)
@_folder
@output.format_option  # fmt: skip
def confirm(urls: tuple[str, ...], config: Config, form: str) -> None:
    """After a restore: ask the witnesses whether they know a newer head of the log."""
    import asyncio

    from casemate.seams import HttpNet
    from casemate.server import state as states

    _existing(config)
    with states.at(config) as place:
        names = asyncio.run(states.confirm(place, HttpNet(), lambda _: None, urls))
    output.emit(
        form, {"witnesses": list(names)}, lambda: f"No newer head is known to {', '.join(names)}."
    )


@state.command()
@click.argument("request", type=_OUT)
@click.option("--newest", type=_IN, help="A later checkpoint of the log that someone has seen.")
@click.option(
    "--consent",
    "consents",
    type=_IN,
    multiple=True,
    help="An owner's consents (casemate dataset consent --recovery); repeatable.",
)
@_folder
@output.format_option  # fmt: skip
def recover(
    request: Path, newest: Path | None, consents: tuple[Path, ...], config: Config, form: str
) -> None:
    """Go on from a restored state, by its owners' consent.

    First without --consent: writes REQUEST, which goes to every owner. Then with their answers: the
    log goes on under a new name; datasets without consent stay frozen until it comes.
    """
    from casemate.client.consents import load_request
    from casemate.server import state as states
    from casemate.spec import codec

    _existing(config)
    with states.at(config) as place:
        if not consents:
            text = _text(newest) if newest is not None else None
            asked = states.ask_owners(place, text)
            request.write_bytes(codec.encode(asked) + b"\n")
        else:
            asked = load_request(request)
            lines = [x for path in consents for x in _text(path).split("\n") if x]
            if states.show(place)["origin"] == asked.next:
                states.consents(place, lines)
            else:
                states.recover(place, asked, lines)
        waiting = states.show(place)["frozen"] if consents else {}
    shape = {
        "origin": asked.head.origin,
        "entries": asked.head.size,
        "next": asked.next,
        "datasets": [codec.to_json(d) for d in asked.datasets],
        "recovered": bool(consents),
        "frozen": sorted(waiting),
    }
    rows = [(d.dataset, d.owner, d.budget.jobs, d.budget.spent_epsilon) for d in asked.datasets]
    title = f"{asked.head.size} entries of {asked.head.origin}; then {asked.next}"
    head = ("dataset", "owner", "jobs", "spent epsilon")
    output.emit(form, shape, lambda: output.rows_table(title, head, rows))
    if not consents:
        output.say(f"Give {request} to each owner: casemate dataset consent --recovery {request}")


@state.command()
@_folder
@output.format_option
def rotate(config: Config, form: str) -> None:
    """Put the store under the next generation of the sealing key."""
    from casemate.server import state as states

    _existing(config)
    with states.at(config) as place:
        found = states.rotate(place)
    output.emit(form, {"generation": found}, lambda: f"The store's key is of generation {found}.")


@state.command("hand-over")
@click.argument("request", type=_IN)
@click.option(
    "--drop",
    is_flag=True,
    help="Hand over without the datasets whose owners did not sign; their keys go.",
)
@_folder
@output.format_option  # fmt: skip
def hand_over(request: Path, drop: bool, config: Config, form: str) -> None:
    """As the old software: hand the state over to the enclave that made REQUEST.

    Its evidence is verified under what each owner signed. This state never starts again.
    """
    from casemate.server import handover
    from casemate.server import state as states

    _existing(config)
    with states.at(config) as place:
        done = handover.give(place, request.read_bytes(), drop=drop)
    shape = {
        "measurement": done.body.measurement,
        "request": done.body.request,
        "dropped": list(done.body.dropped),
        "refused": done.refused,
    }
    rows: list[tuple[str, object]] = [("measurement", done.body.measurement)]
    rows += [("dropped", f"{name}: {done.refused.get(name, 'its owner did not sign')}")
             for name in done.body.dropped]  # fmt: skip
    output.emit(form, shape, lambda: output.rows_table("Handed over to", (), rows))


@state.command("take-over")
@click.option(
    "--request",
    type=_OUT,
    metavar="FILE",
    help="Write the request for the old software, and take over nothing yet.",
)
@_folder
@output.format_option  # fmt: skip
def take_over(request: Path | None, config: Config, form: str) -> None:
    """As the new software: ask for the state, then take over what was handed.

    The folder is the old one, or a copy of it, on the machine where the new software runs.
    """
    from casemate.server import handover
    from casemate.server import state as states

    with states.at(config) as place:
        measurement = place.tee.measurement
        if request is not None:
            request.write_bytes(handover.request(place))
        else:
            handover.take(place)
    words = f"Asked for a state, as {measurement}." if request else "Taken over; start the server."
    output.emit(form, {"measurement": measurement, "taken": request is None}, lambda: words)


@state.command()
@_folder
@output.format_option
def show(config: Config, form: str) -> None:
    """What a state is: its log's head, what waits, for what it was marked. Nothing is written."""
    from casemate.server import state as states

    _existing(config)
    with states.at(config) as place:
        found = states.show(place)
    rows = [
        ("log", found["origin"]), ("entries", found["entries"]), ("root", found["root"]),
        ("measurement", found["measurement"]), ("key's generation", found["generation"]),
        ("restored", "yes: confirm or recover" if found["restored"] else "no"),
        ("handed over", found["handed_over"] or "no"),
        *(("frozen", name) for name in found["frozen"]),
        *(("consents", f"{name} to {m}") for name, m in found["consents"].items()),
    ]  # fmt: skip
    output.emit(form, found, lambda: output.rows_table("", (), rows))

"""``casemate dataset``: what a data owner does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casemate.cli import config, output

if TYPE_CHECKING:
    from casemate.client.datasets import DatasetView
    from casemate.spec.data import Policy


@click.group()
def dataset() -> None:
    """Push, list and govern datasets. Bounds are declared by the owner, never computed."""


def _scores(ctx: click.Context, _: click.Parameter, given: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for item in given:
        name, limit = [*item.split(":", 1), "1"][:2]
        try:
            found[name] = float(limit)
        except ValueError:
            raise click.BadParameter(f"{item!r} is not NAME or NAME:LIMIT", ctx=ctx) from None
    return found


def _policy_options(command: Any) -> Any:
    options = (
        click.option("--scientist", "scientists", multiple=True, metavar="ID",
                     help="Identity that may train, or '*' for any enrolled one; repeatable."),
        click.option("--approval", is_flag=True, help="Each quote needs the owner's approval."),
        click.option("--max-epsilon", type=float, help="The most that one job may charge."),
        click.option("--nonprivate", metavar="WORDS",
                     help="Permit training without privacy, in your own words."),
        click.option("--last-epoch", type=int, help="Serve while the epoch is at most this."),
        click.option("--evaluation", is_flag=True,
                     help="For evaluation, for ever; nobody trains on it."),
        click.option("--evaluations", type=int, default=0,
                     help="How many evaluations of it may be exact, in all."),
        click.option("--contest", metavar="LABEL",
                     help="Hold a contest: with --evaluation, models are scored on this label."),
        click.option("--score", "scores", multiple=True, callback=_scores, metavar="NAME[:LIMIT]",
                     help="Metric of the contest, such as accuracy or mse:25; the first ranks."),
        click.option("--entries", type=int, default=1, show_default=True,
                     help="How many entries each participant may make, in all."),
        click.option("--score-privacy", type=float, nargs=2, metavar="EPSILON DELTA",
                     help="Of each entry's scores; without, scores are exact."),
        click.option("--scientist-budget", type=float, nargs=2, metavar="EPSILON DELTA",
                     help="The most that the jobs of one scientist may take together."),
        click.option("--witness", "witnesses", multiple=True, metavar="VKEY",
                     help="Witness that must cosign the log before rows are used; repeatable."),
        click.option("--cosignatures", type=int,
                     help="How many of the witnesses must (default: more than half)."),
        click.option("--resumes", type=click.IntRange(0, 3), default=3, show_default=True,
                     help="How often a job cut short may be gone on with, with new noise."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _policy(given: dict[str, Any]) -> Policy:
    from casemate.client import values

    names = ("scientists", "approval", "max_epsilon", "nonprivate", "last_epoch", "evaluation",
             "scientist_budget", "witnesses", "cosignatures", "resumes", "evaluations")  # fmt: skip
    fields = {name: given.pop(name) for name in names}
    target, scores, entries, privacy = (
        given.pop(name) for name in ("contest", "scores", "entries", "score_privacy")
    )
    if target is not None:
        epsilon, delta = privacy or (None, None)
        fields["contest"] = values.Contest(
            target, scores or "accuracy", entries=entries, epsilon=epsilon, delta=delta
        )
    if fields["scientist_budget"] is not None:
        fields["scientist_budget"] = values.Budget(*fields["scientist_budget"])
    if fields["scientist_budget"] is not None and "*" in fields["scientists"]:
        output.say(
            "Anyone can enrol many identities, so that --scientist-budget binds nobody where"
            " --scientist is '*'. Name the scientists."
        )
    if not fields["scientists"]:
        raise click.UsageError("Give --scientist ID (repeatable), or --scientist '*' for anyone.")
    return values.Policy(fields.pop("scientists"), **fields)


def _show(form: str, view: DatasetView) -> None:
    from casemate.client import views
    from casemate.spec import codec

    title, rows = views.dataset(view.info)
    output.emit(form, codec.to_json(view.info), lambda: output.rows_table(title, (), rows))


@dataset.command()
@click.argument("file", type=click.Path(exists=True))
@click.option(
    "--schema",
    type=click.Path(exists=True, dir_okay=False),
    help="Columns and bounds: a file that `dataset template` wrote, filled in.",
)
@click.option("--name", help="Name that others see (default: the schema's, or the file's).")
@click.option("--epsilon", type=float, required=True, help="Total budget, for ever.")
@click.option("--delta", type=float, required=True, help="Total delta of the budget.")
@click.option("--previous", metavar="ID", help="New version of this dataset; inherits its ledger.")
@_policy_options
@config.target_options
@output.format_option  # fmt: skip
def push(
    file: str,
    schema: str | None,
    name: str | None,
    epsilon: float,
    delta: float,
    previous: str | None,
    target: config.Target,
    form: str,
    **given: Any,
) -> None:
    """Encode, encrypt and push the CSV or Parquet FILE; wait until the enclave has checked it."""
    from casemate.client import data, values

    policy, budget = _policy(given), values.Budget(epsilon, delta)
    columns = data.load_schema(schema) if schema is not None else None
    called = name or (columns.name if columns is not None else None) or Path(file).stem
    with target.connect() as enclave:
        view = enclave.datasets.push(
            Path(file),
            name=called,
            columns=columns,
            policy=policy,
            budget=budget,
            previous=previous,
            progress=_bar() if form == "table" else None,
        )
    _show(form, view)


def _bar() -> Any:
    from tqdm import tqdm

    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar  # made when bytes flow: a table that is refused shows no bar
        if bar is None:
            bar = tqdm(desc="upload", unit="B", unit_scale=True, total=total)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return progress


@dataset.command()
@click.argument("file", type=click.Path(exists=True))
@click.option("--label", multiple=True, help="Label column; repeatable.")
@click.option("--unit", help="Column that says whose row it is.")
@click.option("--name", help="Name that others see.")
@click.option("--out", type=click.Path(dir_okay=False), help="Where to write it (default: stdout).")
def template(
    file: str, label: tuple[str, ...], unit: str | None, name: str | None, out: str | None
) -> None:
    """Write a schema for FILE with the bounds left for you to fill in. No value is looked at."""
    from casemate.client import data

    text = data.template(Path(file), name=name or Path(file).stem, label=label, unit=unit)
    if out is None:
        click.echo(text, nl=False)
    else:
        Path(out).write_text(text, encoding="utf-8")
        output.say(f"Wrote {out}: fill in low and high of every column, then push with --schema.")


@dataset.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--schema",
    type=click.Path(exists=True, dir_okay=False),
    help="A file that `dataset template` wrote, filled in; for a .safetensors FILE the schema in"
    " JSON, as `dataset show --format json` prints it.",
)
@output.format_option
def check(file: str, schema: str | None, form: str) -> None:
    """Check FILE on this machine: as `push` will, and then as the enclave will.

    FILE: a CSV or Parquet table, or the wire form (.safetensors). Refused with the same codes.
    """
    from casemate.cli.model import read_schema
    from casemate.client import data
    from casemate.client.data.sources import require_file
    from casemate.spec import table

    path, dropped = Path(file), 0
    if path.suffix == ".safetensors":
        if schema is None:
            raise click.UsageError("Give --schema FILE: a wire form says nothing of its bounds.")
        declared = read_schema(schema)
        require_file(path)
        wire = path.read_bytes()
    else:
        columns = None if schema is None else data.load_schema(schema)
        name = (columns.name if columns is not None else None) or path.stem
        encoded = data.encode(path, columns=columns, name=name)
        declared, wire, dropped = encoded.schema, b"".join(encoded.chunks()), encoded.dropped
    table.check(declared, wire)
    shape = {
        "name": declared.name,
        "rows": declared.rows,
        "units": declared.units,
        "dropped": dropped,
        "bytes": len(wire),
        "columns": {c.name: c.dtype for c in declared.columns},
    }
    rows = [
        ("rows", f"{declared.rows:,} of {declared.units:,} units, {dropped:,} left out"),
        ("size", f"{len(wire) / 2**20:.2f} MiB"),
        ("columns", ", ".join(f"{c.name} ({c.dtype})" for c in declared.columns[:40])),
    ]
    output.emit(form, shape, lambda: output.rows_table(f"{declared.name}: admitted", (), rows))


@dataset.command()
@config.target_options
@output.format_option
def ls(target: config.Target, form: str) -> None:
    """The datasets that one owns or may train on."""
    from casemate.spec import codec

    with target.connect() as enclave:
        found = enclave.datasets.list()
    output.emit(
        form,
        {"datasets": [codec.to_json(i) for i in found]},
        lambda: output.rows_table(found.title, found.head, found.rows),
    )


@dataset.command()
@click.argument("dataset_id", metavar="DATASET")
@config.target_options
@output.format_option
def show(dataset_id: str, target: config.Target, form: str) -> None:
    """One dataset: schema, policy, budget, state."""
    with target.connect() as enclave:
        view = enclave.datasets.show(dataset_id)
    _show(form, view)


@dataset.command()
@click.argument("dataset_id", metavar="DATASET")
@config.target_options
@output.format_option
def budget(dataset_id: str, target: config.Target, form: str) -> None:
    """What is spent and left of a dataset's budget."""
    from casemate.spec import codec

    with target.connect() as enclave:
        state = enclave.datasets.show(dataset_id).info.budget
    rows = [] if state is None else [
        ("budget", f"epsilon {state.budget.epsilon:g} at delta {state.budget.delta:g}"),
        ("spent", f"epsilon {state.spent_epsilon:.4f} in {state.jobs} job(s)"),
        ("left", f"epsilon {state.left_epsilon:.4f} for one more job (jobs compose, so that spent"
                 " and left may come to more than the budget)"),
    ]  # fmt: skip
    output.emit(
        form,
        {"dataset": dataset_id, "budget": codec.to_json(state)},
        lambda: output.rows_table(dataset_id, (), rows),
    )


@dataset.command()
@click.argument("dataset_id", metavar="DATASET")
@_policy_options
@config.target_options
@output.format_option
def policy(dataset_id: str, target: config.Target, form: str, **given: Any) -> None:
    """Replace a dataset's policy; approvals and quotes under the old one are void."""
    made = _policy(given)
    with target.connect() as enclave:
        view = enclave.datasets.set_policy(dataset_id, made)
    _show(form, view)


@dataset.command()
@click.argument("dataset_id", metavar="DATASET")
@click.argument("number", type=int, metavar="EPOCH")
@config.target_options
@output.format_option
def epoch(dataset_id: str, number: int, target: config.Target, form: str) -> None:
    """Move a dataset's epoch forward to EPOCH; it never goes back."""
    with target.connect() as enclave:
        view = enclave.datasets.advance_epoch(dataset_id, number)
    _show(form, view)


@dataset.command()
@click.argument("dataset_id", metavar="[DATASET]", required=False)
@click.option("--measurement", metavar="HEX", help="The software that the state may pass to.")
@click.option(
    "--under",
    metavar="FILE|simulated[:ROOT]",
    help="Trust policy that its evidence must meet (default: --trust, where that is simulated).",
)
@click.option("--withdraw", is_flag=True, help="Take an earlier consent to software back.")
@click.option(
    "--recovery",
    type=click.Path(exists=True, dir_okay=False),
    metavar="REQUEST",
    help="The operator's request to go on from a backup.",
)
@click.option(
    "--assume",
    type=click.Choice(["none", "rest"]),
    help="With --recovery: what to charge for jobs that the backup does not know; rest: all that"
    " is left, which is right also where the operator still has the lost state.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    help="With --recovery: sign only, into this file for the operator.",
)
@config.target_options
@output.format_option
def consent(
    dataset_id: str | None,
    measurement: str | None,
    under: str | None,
    withdraw: bool,
    recovery: str | None,
    assume: str | None,
    out: str | None,
    target: config.Target,
    form: str,
) -> None:
    """Let a dataset's state pass on: to other software, or out of a backup.

    With --measurement and --under: to an upgrade that the operator announced, before it or after.
    With --recovery and --assume: for DATASET, or for all of one's own that the request names.
    """
    if (measurement is not None) + withdraw + (recovery is not None) != 1:
        raise click.UsageError("Give one of --measurement, --withdraw and --recovery.")
    if recovery is not None:
        _recovery(recovery, dataset_id, assume, out, target, form)
        return
    if dataset_id is None or assume is not None or out is not None:
        raise click.UsageError("Name a DATASET; --assume and --out are for --recovery.")
    trust = "" if withdraw else _under(under, target)
    with target.connect() as enclave:
        view = enclave.datasets.consent(dataset_id, measurement or "", trust)
    _show(form, view)


def _under(given: str | None, target: config.Target) -> str:
    """The text of a trust policy."""
    found = given or target.place().trust or ""
    if found.partition(":")[0] == config.SIMULATED:
        return found
    if given is None:
        raise click.UsageError("Give --under FILE: the trust policy for the new measurement.")
    config.load_trust(given)
    return Path(given).expanduser().read_text(encoding="utf-8")


def _recovery(
    path: str,
    dataset_id: str | None,
    assume: str | None,
    out: str | None,
    target: config.Target,
    form: str,
) -> None:
    from casemate.client import consents
    from casemate.client.memory import Memory
    from casemate.spec.errors import UsageError

    if assume is None:
        raise click.UsageError("Give --assume rest or --assume none.")
    asked, identity, memory = consents.load_request(path), None, Memory()
    identity = config.load_identity(target.identity)
    mine = [d.dataset for d in asked.datasets if d.owner == identity.id]
    chosen = mine if dataset_id is None else [d for d in mine if d == dataset_id]
    if not chosen:
        raise UsageError(
            "usage.datasets",
            "The request names no such dataset of this identity.",
            mend="Use the identity that pushed it, or another request.",
            where=path,
        )
    seen = consents.compare(asked, memory)
    signed = {
        d: consents.to_recovery(asked, d, identity, newest=seen.newest, rest=assume == "rest")
        for d in chosen
    }
    if out is not None:
        Path(out).write_text("".join(f"{e}\n" for e in signed.values()), encoding="utf-8")
    else:
        with consents.met(asked, target.place().url, config.load_trust(target.place().trust),
                          identity, memory) as enclave:  # fmt: skip
            for name, envelope in signed.items():
                enclave.datasets.give(name, envelope)
    shape = {
        "datasets": chosen,
        "entries": asked.head.size,
        "lost": seen.lost,
        "compared": seen.compared,
        "next": asked.next,
        "file": out,
    }
    words = "as you have seen it" if seen.compared else "which you have not seen before"
    rows = [
        ("restored head", f"{asked.head.size} entries, {words}"),
        ("known to be lost", f"{seen.lost} entries"),
        ("goes on as", asked.next),
        ("charged for it", "all that is left" if assume == "rest" else "nothing"),
        *(("dataset", d) for d in chosen),
        *([] if out is None else [("file", out)]),
    ]
    output.emit(form, shape, lambda: output.rows_table("Consented", (), rows))


@dataset.command()
@click.argument("dataset_id", metavar="DATASET")
@click.option("--yes", is_flag=True, help="Do not ask.")
@config.target_options
@output.format_option
def revoke(dataset_id: str, yes: bool, target: config.Target, form: str) -> None:
    """Destroy a dataset's key in the enclave. It cannot be undone."""
    if not yes:
        click.confirm(f"Destroy the key of {dataset_id} for ever?", abort=True, err=True)
    with target.connect() as enclave:
        enclave.datasets.revoke(dataset_id)
    output.emit(form, {"dataset": dataset_id, "state": "revoked"}, lambda: f"revoked {dataset_id}")

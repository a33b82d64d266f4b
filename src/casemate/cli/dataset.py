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


def _policy_options(command: Any) -> Any:
    options = (
        click.option("--scientist", "scientists", multiple=True, metavar="ID",
                     help="Identity that may train, or '*' for any enrolled one; repeatable."),
        click.option("--approval", is_flag=True, help="Each quote needs the owner's approval."),
        click.option("--max-epsilon", type=float, help="The most that one job may charge."),
        click.option("--nonprivate", metavar="WORDS",
                     help="Permit training without privacy, in your own words."),
        click.option("--last-epoch", type=int, help="Serve while the epoch is at most this."),
        click.option("--evaluation", is_flag=True, help="For evaluation; nobody trains on it."),
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
             "scientist_budget", "witnesses", "cosignatures", "resumes")  # fmt: skip
    fields = {name: given.pop(name) for name in names}
    if fields["scientist_budget"] is not None:
        fields["scientist_budget"] = values.Budget(*fields["scientist_budget"])
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

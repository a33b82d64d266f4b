"""``casemate job``: quotes, approvals, runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from casemate.cli import config, output

if TYPE_CHECKING:
    from casemate.client.jobs import QuoteView
    from casemate.client.views import Listing
    from casemate.spec.job import Clipping


@click.group()
def job() -> None:
    """Quote and submit jobs (scientist), approve or reject quotes (owner), watch them."""


def _quote_json(view: QuoteView) -> dict[str, object]:
    from casemate.spec import codec

    return {
        "digest": view.digest,
        "job": view.job,
        "allowed": view.allowed,
        "approval_needed": list(view.approval_needed),
        "quote": codec.to_json(view.quote),
    }


def _show_quote(view: QuoteView, form: str) -> None:
    output.emit(form, _quote_json(view), lambda: output.rows_table("Quote", (), view.summary()))


def _inputs(ctx: click.Context, _: click.Parameter, given: tuple[str, ...]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for item in given:
        name, mark, columns = item.partition("=")
        if not mark or not name or not columns:
            raise click.BadParameter(f"{item!r} is not INPUT=COLUMN[,COLUMN…]", ctx=ctx)
        out[name] = columns.split(",")
    return out


_datasets_option = click.option(
    "--dataset", "datasets", required=True, multiple=True, help="Dataset id; repeatable."
)
inputs_option = click.option(
    "--input",
    "inputs",
    multiple=True,
    callback=_inputs,
    metavar="INPUT=COLUMN[,…]",
    help="Columns that feed a model input, where names do not tell; repeatable.",
)


@job.command()
@click.option(
    "--model",
    required=True,
    metavar="FILE.cmm|FILE.py:NAME",
    help="A packed model, or NAME in your own Python file: a torch.nn.Module or a "
    "function that returns one. It runs on this machine only.",
)
@_datasets_option
@click.option("--epsilon", type=float, help="Privacy of this job; with --delta.")
@click.option("--delta", type=float, help="Probability that the bound fails.")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Gradient norm bound.")
@click.option(
    "--clipping",
    type=click.Choice(["flat", "per-layer", "automatic"]),
    default="flat",
    show_default=True,
    help="How a gradient is brought to that norm.",
)
@click.option(
    "--gamma", type=float, default=0.01, show_default=True, help="Of --clipping automatic."
)
@click.option("--nonprivate", metavar="WORDS", help="No privacy: the owners' own words.")
@click.option("--loss", help="Such as cross_entropy; for a Python model.")
@click.option(
    "--optimizer", type=click.Choice(["sgd", "adam", "adamw"]), default="adam", show_default=True
)
@click.option("--lr", type=float, required=True, help="Learning rate.")
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine", "step"]),
    default="constant",
    show_default=True,
    help="Of the learning rate.",
)
@click.option("--warmup", type=int, default=0, help="Steps of linear rise to --lr, before it.")
@click.option("--final", type=float, default=0.0, help="What linear and cosine fall to, of --lr.")
@click.option(
    "--every", type=int, default=1, help="Steps after which a step schedule multiplies by --factor."
)
@click.option("--factor", type=float, default=1.0, help="See --every.")
@click.option(
    "--ema", type=float, default=0.0, help="Release the weights' average with this decay; 0: none."
)
@click.option(
    "--views", type=int, default=1, help="Random views of a row whose gradients are averaged."
)
@click.option("--flip", is_flag=True, help="Views are mirrored half of the time.")
@click.option("--crop", type=int, default=0, help="Views are cut from the image padded by so many.")
@click.option(
    "--pad", type=click.Choice(["reflect", "zeros"]), default="reflect", help="What --crop pads by."
)
@click.option(
    "--dropout/--no-dropout",
    default=True,
    help="Whether layers in training mode drop out; for a Python model.",
)
@click.option(
    "--runtime",
    type=click.Choice(["torch", "native"]),
    default="torch",
    show_default=True,
    help="What trains: the engine, or a program made for this quote (docs/native.md).",
)
@click.option("--batch-size", type=int, required=True, help="Expected units in a step.")
@click.option("--epochs", type=float, help="Passes over all units of all datasets.")
@click.option("--steps", type=int, help="Or: the number of steps.")
@inputs_option
@config.target_options
@output.format_option  # fmt: skip
def quote(
    model: str,
    datasets: tuple[str, ...],
    epsilon: float | None,
    delta: float | None,
    clip: float,
    clipping: Clipping,
    gamma: float,
    nonprivate: str | None,
    schedule: Any,
    warmup: int,
    final: float,
    every: int,
    factor: float,
    views: int,
    flip: bool,
    crop: int,
    pad: Any,
    target: config.Target,
    form: str,
    **job: Any,
) -> None:
    """What a job would cost: privacy, time, memory, and each dataset's answer. Spends nothing."""
    from casemate.cli.model import load_model
    from casemate.client import values

    privacy = _privacy(epsilon, delta, clip, clipping, gamma, nonprivate)
    rate = values.Schedule(schedule, warmup, final, factor, every)
    seen = values.Views(views, flip=flip, crop=crop, pad=pad)
    found = load_model(model)
    with target.connect() as enclave:
        view = enclave.quote(found, list(datasets), dp=privacy, schedule=rate, views=seen, **job)
    _show_quote(view, form)


def _metrics(
    ctx: click.Context, _: click.Parameter, given: tuple[str, ...]
) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for item in given:
        name, mark, limit = item.partition("=")
        try:
            out[name] = float(limit) if mark else None
        except ValueError:
            raise click.BadParameter(f"{item!r} is not METRIC[=LIMIT]", ctx=ctx) from None
    return out


@job.command("quote-metrics")
@click.option(
    "--model",
    required=True,
    metavar="FILE.py:NAME",
    help="A torch.nn.Module with its weights, or a function that returns one, in your own file.",
)
@_datasets_option
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    callback=_metrics,
    default=["accuracy"],
    show_default=True,
    metavar="METRIC[=LIMIT]",
    help="accuracy, or a loss such as mse with the limit at which a row's value is cut; "
    "repeatable.",
)
@click.option("--epsilon", type=float, help="Privacy of the metrics; with --delta. None: exact.")
@click.option("--delta", type=float, help="Probability that the bound fails.")
@inputs_option
@config.target_options
@output.format_option  # fmt: skip
def quote_metrics(
    model: str,
    datasets: tuple[str, ...],
    metrics: dict[str, float | None],
    target: config.Target,
    form: str,
    **job: Any,
) -> None:
    """What a model's metrics on the rows would cost; submit starts it, metrics shows them.

    With --epsilon and --delta they are private, and the datasets' budgets pay. Without they are
    exact, on datasets registered for evaluation alone."""
    from casemate.cli.model import load_model

    found, limits = load_model(model), {n: x for n, x in metrics.items() if x is not None}
    with target.connect() as enclave:
        view = enclave.quote_metrics(
            found, list(datasets), metrics=list(metrics), limits=limits, **job
        )
    _show_quote(view, form)


@job.command()
@click.argument("job_id", metavar="JOB")
@config.target_options
@output.format_option
def metrics(job_id: str, target: config.Target, form: str) -> None:
    """The metrics that the evaluation JOB measured, its receipt verified."""
    with target.connect() as enclave:
        found = enclave.job(job_id).metrics()
    shape = {name: {"value": m.value, "noise": m.noise} for name, m in found.items()}
    rows = [(name, f"{m.value:.6g}", f"{m.noise:.2g}") for name, m in found.items()]
    output.emit(
        form, shape, lambda: output.rows_table("", ("metric", "mean over rows", "noise"), rows)
    )


def _privacy(
    epsilon: float | None,
    delta: float | None,
    clip: float,
    clipping: Clipping,
    gamma: float,
    nonprivate: str | None,
) -> Any:
    from casemate.client import values

    if nonprivate is not None and epsilon is None and delta is None:
        return values.NonPrivate(nonprivate)
    if nonprivate is not None or epsilon is None or delta is None:
        raise click.UsageError("Give --epsilon and --delta, or --nonprivate with words.")
    return values.DP(epsilon, delta, clip, clipping=clipping, gamma=gamma)


@job.command()
@click.argument("digest")
@click.option("--watch/--no-watch", "watching", default=True, help="Wait with a progress bar.")
@click.option("--max-epsilon", type=float, help="Refuse when the quote charges more.")
@config.target_options
@output.format_option
def submit(
    digest: str, watching: bool, max_epsilon: float | None, target: config.Target, form: str
) -> None:
    """Start the job of the quote DIGEST."""
    from casemate.client.jobs import refuse_above
    from casemate.spec import codec

    with target.connect() as enclave:
        view = enclave.jobs.quote(digest)
        refuse_above(view, max_epsilon)
        run = enclave.submit(view)
        if watching:
            run.watch(progress=form == "table")
        status = run.status
    output.emit(form, codec.to_json(status), lambda: f"{status.job} {status.state}")


@job.command()
@click.argument("digest")
@config.target_options
@output.format_option
def approve(digest: str, target: config.Target, form: str) -> None:
    """Approve exactly the quote DIGEST, as an owner."""
    with target.connect() as enclave:
        enclave.jobs.approve(digest)
    output.emit(form, {"quote": digest, "approved": True}, lambda: f"approved {digest}")


@job.command()
@click.argument("digest")
@config.target_options
@output.format_option
def reject(digest: str, target: config.Target, form: str) -> None:
    """Reject the quote DIGEST, as an owner."""
    with target.connect() as enclave:
        enclave.jobs.reject(digest)
    output.emit(form, {"quote": digest, "approved": False}, lambda: f"rejected {digest}")


@job.command()
@config.target_options
@output.format_option
def ls(target: config.Target, form: str) -> None:
    """One's jobs and quotes, and those on one's datasets."""
    from casemate.spec import codec

    with target.connect() as enclave:
        jobs, quotes = enclave.jobs.list(), enclave.jobs.quotes()
    shape = {
        "jobs": [codec.to_json(s) for s in jobs],
        "quotes": [{"digest": codec.digest(q), "quote": codec.to_json(q)} for q in quotes],
    }
    output.emit(form, shape, lambda: _tables(jobs, quotes))


def _tables(*listings: Listing[Any]) -> object:
    from rich.console import Group

    return Group(*[output.rows_table(x.title, x.head, x.rows) for x in listings])


@job.command()
@click.argument("digest")
@config.target_options
@output.format_option
def show(digest: str, target: config.Target, form: str) -> None:
    """The quote DIGEST: what an owner looks at before approving."""
    with target.connect() as enclave:
        view = enclave.jobs.quote(digest)
    _show_quote(view, form)


@job.command()
@click.argument("job_id", metavar="JOB")
@config.target_options
@output.format_option
def watch(job_id: str, target: config.Target, form: str) -> None:
    """Wait for JOB with a progress bar of public ticks; exit code 22 when it failed."""
    from casemate.spec import codec

    with target.connect() as enclave:
        run = enclave.job(job_id).watch(progress=form == "table")
        status = run.status
    output.emit(form, codec.to_json(status), lambda: f"{status.job} {status.state}")


@job.command()
@click.argument("job_id", metavar="JOB")
@config.target_options
@output.format_option
def cancel(job_id: str, target: config.Target, form: str) -> None:
    """Stop JOB; one that has ended stays as it is. What was charged of the budgets stays spent."""
    with target.connect() as enclave:
        run = enclave.job(job_id)
        run.cancel()
        state = run.status.state
    shape = {"job": job_id, "cancelled": state == "cancelled", "state": state}
    output.emit(form, shape, lambda: f"{job_id} {state}")


@job.command()
@click.argument("job_id", metavar="JOB")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the weights (safetensors).")
@click.option("--receipt", type=click.Path(dir_okay=False), help="Write the receipt's bundle.")
@config.target_options
@output.format_option
def result(
    job_id: str, out: str | None, receipt: str | None, target: config.Target, form: str
) -> None:
    """Pull JOB's weights and receipt, verified before anything is written."""
    from pathlib import Path

    from casemate.client import receipts
    from casemate.spec import codec

    with target.connect() as enclave:
        run = enclave.job(job_id)
        if out is not None:
            run.result()
        verified = run.receipt
        if out is not None:
            run.save(out)
        if receipt is not None:
            Path(receipt).write_bytes(codec.encode(run.bundle) + b"\n")
    shape = {**receipts.as_json(verified), "weights_file": out, "receipt_file": receipt}
    output.emit(form, shape, lambda: str(verified))

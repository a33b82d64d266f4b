"""``casemate model deploy`` and what follows, ``casemate predict``: deployed models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casemate.cli import config, output
from casemate.spec.errors import CasemateError, UsageError

if TYPE_CHECKING:
    from casemate.client.served import ModelView
    from casemate.spec.serving import ServePolicy

SHOWN = 20


def _inputs(
    ctx: click.Context, _: click.Parameter, given: tuple[str, ...]
) -> dict[str, tuple[str, tuple[int, ...], tuple[int, int] | None]]:
    """Of each input its dtype, the shape of one record, and bounds."""
    out: dict[str, tuple[str, tuple[int, ...], tuple[int, int] | None]] = {}
    for item in given:
        name, *rest = item.split(":")
        try:
            dtype, shape, *bounds = rest
            sizes = tuple(int(d) for d in shape.split("x") if d)
            low_high = (int(bounds[0]), int(bounds[1])) if bounds else None
            if len(bounds) not in (0, 2) or dtype not in ("bool", "u8", "i32", "i64", "f32"):
                raise ValueError
        except (ValueError, IndexError):
            raise click.BadParameter(
                f"{item!r} is not NAME:DTYPE:SHAPE[:LOW:HIGH], such as x:f32:3x32x32 or"
                " tokens:i64:128:0:30521",
                ctx=ctx,
            ) from None
        out[name] = (dtype, sizes, low_high)
    return out


input_option = click.option(
    "--input",
    "inputs",
    multiple=True,
    callback=_inputs,
    metavar="NAME:DTYPE:SHAPE[:LOW:HIGH]",
    help="An input of a Python model: the shape of one record, bounds of integers; repeatable.",
)


def pack(named: str, inputs: dict[str, Any]) -> Any:
    """A model for prediction: ``FILE.cmm``, ``FILE.onnx``, or one's own Python with its inputs."""
    from casemate.cli.model import load_model
    from casemate.client import models

    model = named if named.endswith((".cmm", ".onnx")) else load_model(named)
    example = {name: (dtype, shape) for name, (dtype, shape, _) in inputs.items()} or None
    bounds = {name: found[2] for name, found in inputs.items() if found[2] is not None}
    return models.export_outputs(model, example, bounds)


def policy_options(command: Any) -> Any:
    options = (
        click.option("--caller", "callers", multiple=True, metavar="ID",
                     help="Identity that may call, or '*' for any enrolled one; repeatable."),
        click.option("--calls", type=int, help="Of each caller in one epoch; not counted without."),
        click.option("--records", type=int, default=64, show_default=True,
                     help="The most in one call."),
        click.option("--at-once", type=int, default=8, show_default=True,
                     help="The most calls of one caller that wait or run."),
        click.option("--slots", type=int, default=1, show_default=True,
                     help="Records of one forward pass that several callers' calls may share."),
        click.option("--epoch", type=int, default=0, show_default=True,
                     help="Goes forward alone; counts begin anew with it."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _policy(given: dict[str, Any]) -> ServePolicy:
    from casemate.client import values

    callers = given.pop("callers")
    if not callers:
        raise click.UsageError("Give --caller ID (repeatable), or --caller '*' for anyone.")
    return values.ServePolicy(callers, **given)


def _show(view: ModelView, form: str) -> None:
    from casemate.client import views
    from casemate.spec import codec

    output.emit(
        form,
        codec.to_json(view.info),
        lambda: output.rows_table(view.info.name, (), views.model(view.info)),
    )


@click.command()
@click.argument("named", metavar="FILE.cmm|FILE.onnx|FILE.py:NAME")
@click.option("--name", help="Shown to callers; the file's name if not given.")
@input_option
@policy_options
@config.target_options
@output.format_option
def deploy(
    named: str, name: str | None, inputs: dict[str, Any], target: config.Target, form: str,
    **policy: Any,
) -> None:  # fmt: skip
    """Deploy a model, sealed: it answers the callers that you name, and nobody sees its weights."""
    wanted = _policy(policy)
    packed = pack(named, inputs)
    with target.connect() as enclave:
        shown = name or Path(named.rpartition(":")[2]).stem
        _show(enclave.deploy(packed, wanted, name=shown), form)


@click.command("ls")
@config.target_options
@output.format_option
def ls(target: config.Target, form: str) -> None:
    """The deployed models that you own or may call."""
    from casemate.spec import codec

    with target.connect() as enclave:
        found = enclave.models.list()
    data = {"models": [codec.to_json(i) for i in found]}
    output.emit(form, data, lambda: output.rows_table(found.title, found.head, found.rows))


@click.command()
@click.argument("model", metavar="MODEL")
@config.target_options
@output.format_option
def show(model: str, target: config.Target, form: str) -> None:
    """One deployed model: what it takes and gives, who may call it, how many calls are left."""
    with target.connect() as enclave:
        _show(enclave.models.show(model), form)


@click.command()
@click.argument("model", metavar="MODEL")
@policy_options
@config.target_options
@output.format_option
def policy(model: str, target: config.Target, form: str, **given: Any) -> None:
    """Replace a deployed model's policy, whole. Another --calls goes with a later --epoch. It also
    lets the model run under the software whose evidence was just checked."""
    wanted = _policy(given)
    with target.connect() as enclave:
        _show(enclave.models.set_policy(model, wanted), form)


@click.command()
@click.argument("model", metavar="MODEL")
@config.target_options
@output.format_option
def undeploy(model: str, target: config.Target, form: str) -> None:
    """Destroy a deployed model's key: nobody calls it again."""
    with target.connect() as enclave:
        enclave.models.undeploy(model)
    output.emit(form, {"undeployed": model}, lambda: f"undeployed {model}")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--to", required=True, metavar="ID", help="The buyer, an enrolled identity.")
@click.option("--terms", default="", help="The parties' words, at most 2000 characters.")
@config.target_options
@output.format_option
def grant(model: str, to: str, terms: str, target: config.Target, form: str) -> None:
    """Sell a deployed model of one's own: sign that the buyer gets it whole. It cannot be taken
    back."""
    from casemate.client import views
    from casemate.spec import codec

    with target.connect() as enclave:
        info = enclave.models.grant(model, to, terms).info
    output.emit(form, codec.to_json(info), lambda: output.rows_table("Sold", (), views.sale(info)))


@click.command("sales")
@config.target_options
@output.format_option
def sales(target: config.Target, form: str) -> None:
    """What one sold and bought."""
    from casemate.spec import codec

    with target.connect() as enclave:
        found = enclave.models.sales()
    data = {"sales": [codec.to_json(i) for i in found]}
    output.emit(form, data, lambda: output.rows_table(found.title, found.head, found.rows))


@click.command()
@click.argument("sale", metavar="SALE")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="Write the model (FILE.cmm), as its buyer."
)
@click.option(
    "--receipt",
    type=click.Path(dir_okay=False),
    help="Write the receipt's bundle, as either party.",
)
@config.target_options
@output.format_option
def pull(sale: str, out: str | None, receipt: str | None, target: config.Target, form: str) -> None:
    """Pull a sale's model and receipt, verified before anything is written."""
    from casemate.client import receipts
    from casemate.spec import codec

    with target.connect() as enclave:
        packed = None if out is None else enclave.models.pull(sale)
        verified = enclave.models.receipt(sale, packed)
    if out is not None and packed is not None:
        Path(out).write_bytes(packed.data)
    if receipt is not None:
        Path(receipt).write_bytes(codec.encode(verified.bundle) + b"\n")
    shape = {**receipts.as_json(verified), "model_file": out, "receipt_file": receipt}
    output.emit(form, shape, lambda: str(verified))


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--input",
    "file",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Inputs by name, records along axis 0: lists in JSON, or .safetensors.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False), help="Write the outputs: .json or .safetensors."
)
@config.target_options
@output.format_option
def predict(model: str, file: str, out: str | None, target: config.Target, form: str) -> None:
    """Call a deployed model; inputs and outputs are sealed end to end. Needs numpy."""
    inputs = _read(Path(file))
    with target.connect() as enclave:
        found = enclave.predict(model, inputs)
        names = [s.name for s in enclave.models.show(model).outputs]
    outputs = found if isinstance(found, dict) else {names[0]: found}
    if out is not None:
        _write(Path(out), outputs)
    data = {"model": model, "outputs": {n: a.tolist() for n, a in outputs.items()}, "file": out}
    if out is not None:
        data["outputs"] = {n: list(a.shape) for n, a in outputs.items()}

    def table() -> Any:
        rows = [
            (i, *(str(a[i].tolist())[:120] for a in outputs.values()))
            for i in range(min(SHOWN, len(next(iter(outputs.values())))))
        ]
        return output.rows_table(out or model, ("record", *outputs), rows)

    output.emit(form, data, table)


def _read(path: Path) -> Any:
    """Arrays by name, or of JSON a single one. Nothing in the file is run."""
    from casemate.client import weights

    np = weights.numpy()
    try:
        if path.suffix == ".safetensors":
            return weights.load(path.read_bytes())
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {name: np.asarray(values) for name, values in found.items()}
        return np.asarray(found)
    except (OSError, ValueError, RecursionError, CasemateError) as e:
        raise UsageError(
            "usage.file",
            f"The inputs {path} cannot be read: {str(e)[:160]}.",
            mend="Give lists of numbers by input in JSON, or a .safetensors of casemate's form.",
            where=str(path),
        ) from None


def _write(path: Path, outputs: dict[str, Any]) -> None:
    from casemate.client import weights
    from casemate.spec import tensors

    if path.suffix != ".safetensors":
        path.write_text(json.dumps({n: a.tolist() for n, a in outputs.items()}) + "\n")
        return
    names = {weights.numpy().dtype(wire): name for name, wire in weights.NUMPY.items()}
    path.write_bytes(
        tensors.dump({n: (names[a.dtype], a.shape, a.tobytes()) for n, a in outputs.items()})
    )

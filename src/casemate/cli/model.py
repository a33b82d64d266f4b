"""``casemate model``: check and pack a model on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from casemate.cli import output, served
from casemate.spec.errors import CasemateError, UsageError


@click.group()
def model() -> None:
    """Check a packed model as the enclave will, and pack one's own, on this machine; deploy one for
    prediction."""


for _command in (served.deploy, served.ls, served.show, served.policy, served.undeploy,
                 served.grant, served.sales, served.pull):  # fmt: skip
    model.add_command(_command)


def load_model(named: str) -> Any:
    """``FILE.cmm`` as a packed model; ``FILE.py:NAME`` by running one's own Python here.

    NAME is a module, or a function without arguments that returns one. No code travels.
    """
    from casemate.client import models

    path, mark, name = named.rpartition(":")
    if not mark or not path.endswith(".py"):
        return models.load(named)
    found = getattr(run_file(Path(path)), name, None)
    if found is None:
        raise UsageError(
            "usage.model", f"{path} defines no {name!r}.", mend="Name a module or a function."
        )
    # A class and a function are both called; an instance of a module is taken as it is.
    if isinstance(found, type) or not hasattr(found, "state_dict"):
        with _own_code(
            path, f"{path}:{name}", "Mend it, so that it can be called without arguments."
        ):
            found = found()
    return found


@contextmanager
def _own_code(path: str | Path, what: str, mend: str) -> Iterator[None]:
    """What the scientist's own file raises is a fault of that file."""
    try:
        yield
    except CasemateError:
        raise
    except Exception as e:
        raise UsageError(
            "usage.model",
            f"{what} fails: {type(e).__name__}: {str(e)[:200]}.",
            mend=mend,
            where=str(path),
        ) from e


def run_file(path: Path) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(f"casemate_model_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(
            "usage.file", f"{path} is no Python file.", mend="Give FILE.py:NAME.", where=str(path)
        )
    found = module_from_spec(spec)
    sys.modules[spec.name] = found
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _own_code(path, str(path), "Mend your file; python FILE.py should run."):
            spec.loader.exec_module(found)
    finally:
        sys.path.pop(0)
    return found


def _summary(
    packed: Any, schemas: Sequence[Any] = ()
) -> tuple[dict[str, object], list[tuple[str, object]]]:
    """JSON and rows of an admitted model, with ``schemas`` by all that the enclave asks of it
    before it tries it. Raises ``FormatError``, ``ModelError`` or ``PlanError`` otherwise."""
    from casemate.client.bind import bind
    from casemate.graph import check, pack
    from casemate.plan.check import check_inputs

    graph, weights = pack.unpack(packed.data)
    bounds = check.known_bounds(graph, weights, (), ()) if graph.outputs else None
    if schemas:
        bindings = bind(graph, schemas[0], None)
        check_inputs(graph.inputs, bindings, schemas)
        bounds = check.known_bounds(graph, weights, bindings, schemas)
    found = check.check(graph, {n: info for n, (info, _) in weights.items()}, bounds=bounds)
    check.require_bools(weights)
    trained = {i.tensor for i in graph.inputs if i.kind == "param"}
    parameters = sum(_size(info.shape) for name, (info, _) in weights.items() if name in trained)
    ops = sorted({n.op for n in graph.nodes})
    shape: dict[str, object] = {
        "digest": packed.digest,
        "bytes": len(packed.data),
        "nodes": len(graph.nodes),
        "trained_scalars": parameters,
        "inputs": {i.name: i.dtype for i in graph.inputs if i.kind == "data"},
        "ops": ops,
        "flops": found.flops,
        "record_bytes": found.saved_bytes + found.workspace_bytes,
    }
    proved = "in range: proved from the schemas" if schemas else "give --schema to prove"
    if graph.outputs:
        proved = "in range: proved from the inputs' bounds"
        shape["outputs"] = {o.name: found.values[o.value].dtype for o in graph.outputs}
    rows: list[tuple[str, object]] = [
        ("digest", packed.digest),
        ("size", f"{len(packed.data) / 2**20:.2f} MiB, {len(graph.nodes)} nodes"),
        ("trained scalars", f"{parameters:,}"),
        ("inputs", ", ".join(i.name for i in graph.inputs if i.kind == "data")),
        ("operations", ", ".join(ops)),
        (
            "one record",
            f"{found.flops:,} operations{'' if graph.outputs else ' forward and backward'},"
            f" {(found.saved_bytes + found.workspace_bytes) / 2**20:.2f} MiB",
        ),
        ("records", "independent: proved on the graph"),
        ("indices", proved),
    ]
    return shape, rows


def _size(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


@model.command()
@click.argument("file", metavar="FILE.cmm")
@click.option(
    "--schema",
    "schemas",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="JSON of `casemate dataset show ID --format json`: check inputs and indices too.",
)
@output.format_option
def check(file: str, schemas: tuple[str, ...], form: str) -> None:
    """Check the packed model in FILE.cmm as the enclave will: operations, shapes, costs,
    independence. Refused with the enclave's codes."""
    from casemate.client import models

    shape, rows = _summary(models.load(file), [read_schema(s) for s in schemas])
    output.emit(form, shape, lambda: output.rows_table("Admitted", (), rows))


@model.command()
@click.argument("named", metavar="FILE.py:NAME|FILE.onnx")
@click.option(
    "--schema",
    type=click.Path(dir_okay=False),
    help="For training: JSON of `casemate dataset show ID --format json`.",
)
@click.option("--loss", help="For training: such as cross_entropy.")
@served.input_option
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="FILE.cmm to write.")
@output.format_option  # fmt: skip
def export(
    named: str, schema: str | None, loss: str | None, inputs: dict[str, Any], out: str, form: str
) -> None:
    """Pack NAME of your own FILE.py, run here, into a FILE.cmm: for training on a --schema, or for
    prediction from --input (of a FILE.onnx they are known). Needs the extra `torch`."""
    from casemate.client import models

    if schema is not None and not inputs:
        packed = models.export(load_model(named), [read_schema(schema)], loss=loss).packed
    elif schema is None and loss is None and (inputs or named.endswith(".onnx")):
        packed = served.pack(named, inputs)
    else:
        raise click.UsageError("Give --schema with --loss for training, or --input for prediction.")
    Path(out).write_bytes(packed.data)
    shape, rows = _summary(packed)
    output.emit(form, {**shape, "file": out}, lambda: output.rows_table(out, (), rows))


def read_schema(path: str) -> Any:
    """A ``DatasetSchema`` in JSON: alone, or as ``dataset show --format json`` prints it."""
    import json

    from casemate.spec import codec
    from casemate.spec.data import DatasetSchema

    try:
        if not Path(path).is_file():  # a pipe or a device has no end
            raise FileNotFoundError("there is no such file")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(
            "usage.file",
            f"The schema {path} cannot be read: {str(e)[:160]}.",
            mend="Save one with `casemate dataset show ID --format json`.",
            where=path,
        ) from None
    if isinstance(found, dict) and "schema" in found:
        found = found["schema"]
    return codec.from_json(DatasetSchema, found)

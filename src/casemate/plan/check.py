"""Checks of a request from what is declared: schemas, policies, the graph's inputs. Never rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from casemate.graph.model import InputSpec, Size
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import PlanError
from casemate.spec.job import Dp, InputBinding, JobRequest, TrainSpec, Views, longest


def _refuse(reason: str, message: str, mend: str, where: str = "") -> NoReturn:
    raise PlanError(f"plan.{reason}", message, mend=mend, where=where)


def check_request(request: JobRequest, schemas: Sequence[DatasetSchema]) -> None:
    """The request against the declared schemas, in its order. Raises PlanError naming the field."""
    if len(schemas) != len(request.datasets) or not schemas:
        _refuse("datasets", "The schemas are not those of the job's datasets.", "Report it.")
    if not request.inputs or len({b.input for b in request.inputs}) != len(request.inputs):
        _refuse(
            "inputs",
            "The job binds no input, or one input twice.",
            "Bind every input of the model once.",
        )
    units = sum(s.units for s in schemas)
    if request.train.batch_size > units:
        _refuse(
            "batch-size",
            f"The batch size {request.train.batch_size} is above the {units} privacy units.",
            f"Use a batch size of at most {units}.",
            "train.batch_size",
        )
    if request.metrics and request.train.batch_size != units:
        _refuse(
            "evaluation",
            f"An evaluation looks at all {units} privacy units, not {request.train.batch_size}.",
            f"Use a batch size of {units}.",
            "train.batch_size",
        )
    if request.target:
        _check_entry(request, schemas[0])
    if request.train.runtime == "native":
        _check_native(request.train)
    check_schemas(schemas, request.inputs)


def _check_entry(request: JobRequest, schema: DatasetSchema) -> None:
    """An entry of a contest sees features alone, and its scores have the noise that others' have:
    what would be cut by a smaller clip counts otherwise than what would not."""
    for binding in request.inputs:
        for name in binding.columns:
            column = schema.column(name)
            if column is not None and column.role != "feature":
                _refuse(
                    "entry-inputs",
                    f"Input {binding.input!r} of an entry is fed by {name!r}, a {column.role}.",
                    "Feed the model features alone.",
                    binding.input,
                )
    found = schema.column(request.target)
    if found is None or found.role != "label":
        _refuse(
            "entry-target",
            f"The dataset {schema.name!r} has no label column {request.target!r}.",
            "Name the contest's target.",
            "target",
        )
    privacy = request.train.privacy
    if isinstance(privacy, Dp):
        clip = longest(len(request.metrics), schema.rows_per_unit)
        if privacy != Dp(epsilon=privacy.epsilon, delta=privacy.delta, clip=clip):
            _refuse(
                "entry-clip",
                f"Scores are clipped to {clip:.6g}, flat; the job has another clip.",
                "Enter with casemate: enclave.enter, casemate contest enter.",
                "train.privacy",
            )


def _check_native(train: TrainSpec) -> None:
    """What no native step has, whatever the model (docs/native.md)."""
    asked = train.privacy
    for field, has, lacks in (
        ("privacy", isinstance(asked, Dp), "trains with privacy alone"),
        ("privacy", isinstance(asked, Dp) and asked.clipping == "flat", "has the flat clip alone"),
        ("views", train.views == Views(), "has no views"),
    ):
        if not has:
            _refuse(
                "native",
                f"The native step {lacks}.",
                'Change that, or let the engine train: runtime="torch".',
                f"train.{field}",
            )


def check_schemas(schemas: Sequence[DatasetSchema], bindings: Sequence[InputBinding]) -> None:
    """Bound columns exist in each dataset, are no unit columns, and agree over all datasets in
    dtype, shape, declared bounds, scaling and role. Raises PlanError."""
    for binding in bindings:
        if not binding.columns:
            _refuse(
                "input-columns",
                f"Input {binding.input!r} is bound to no column.",
                "Name the columns that feed it.",
                binding.input,
            )
        for name in binding.columns:
            found = [_column(schema, name, binding.input) for schema in schemas]
            for schema, column in zip(schemas, found, strict=True):
                if column != found[0]:
                    _refuse(
                        "schemas-differ",
                        f"Column {name!r} is declared as {_words(found[0])} in {schemas[0].name!r}"
                        f" and as {_words(column)} in {schema.name!r}.",
                        "Let the owners push both with the same declaration.",
                        name,
                    )


def _column(schema: DatasetSchema, name: str, where: str) -> Column:
    column = schema.column(name)
    if column is None or column.role == "unit":
        known = ", ".join(c.name for c in schema.columns if c.role != "unit")
        _refuse(
            "unknown-column",
            f"The dataset {schema.name!r} has no column {name!r} to feed a model.",
            f"Choose among: {known[:400]}.",
            where,
        )
    return column


def _words(column: Column) -> str:
    shape = "x".join(map(str, column.shape)) or "scalar"
    bounds = "" if column.low is None else f" in [{column.low}, {column.high}]"
    scale = "" if column.scale == "none" else f", scaled {column.scale}"
    return f"{column.role} {column.dtype} {shape}{bounds}{scale}"


def check_inputs(
    inputs: Sequence[InputSpec], bindings: Sequence[InputBinding], schemas: Sequence[DatasetSchema]
) -> None:
    """The graph's data inputs against the bindings and the declared columns.

    Every data input is bound, nothing else is; dtype and per-record shape agree. Several scalar
    columns of one dtype are stacked to shape (n,). Raises PlanError naming the input, what it
    expects, what it got and the mend.
    """
    check_schemas(schemas, bindings)
    data = {i.name: i for i in inputs if i.kind == "data"}
    bound = {b.input: b for b in bindings}
    if len(bound) != len(bindings):
        _refuse("inputs", "The job binds one input twice.", "Bind every input of the model once.")
    for name in bound:
        if name not in data:
            _refuse(
                "unknown-input",
                f"The model has no data input {name!r}.",
                f"Its data inputs are: {', '.join(data)[:400]}.",
                name,
            )
    for name, spec in data.items():
        if name not in bound:
            _refuse(
                "unbound-input",
                f"The model's data input {name!r} is bound to no column.",
                "Name the columns that feed it.",
                name,
            )
        columns = [_column(schemas[0], c, name) for c in bound[name].columns]
        _check_input(spec, columns)


def _check_input(spec: InputSpec, columns: Sequence[Column]) -> None:
    wanted = tuple(d.c if isinstance(d, Size) and d.a == 0 else d for d in spec.shape[1:])
    if len(columns) == 1:
        shape: tuple[int, ...] = columns[0].shape
    else:
        mixed = [c for c in columns if c.shape or c.dtype != columns[0].dtype]
        if mixed:
            _refuse(
                "stacking",
                f"Input {spec.name!r} is bound to several columns, and {mixed[0].name!r} is"
                f" {_words(mixed[0])}.",
                "Several columns are stacked only if all are scalars of one dtype.",
                spec.name,
            )
        shape = (len(columns),)
    dtype = columns[0].dtype
    if spec.dtype != dtype:
        _refuse(
            "dtype",
            f"Input {spec.name!r} expects {spec.dtype} and its columns give {dtype}.",
            f"Export the model with an example input of {dtype}, or bind other columns.",
            spec.name,
        )
    if wanted != shape:
        _refuse(
            "shape",
            f"Input {spec.name!r} expects shape {wanted} for a record, its columns give {shape}.",
            "Change the model's input size, or bind other columns.",
            spec.name,
        )

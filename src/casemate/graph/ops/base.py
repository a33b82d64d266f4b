"""Values, ATen schemas and bound calls: what the rules of the operations are written with.

A value is R (the same whatever the batch holds), B (one slice per record) or, in the joint graph of
forward and backward alone, S (a linear image of a sum over records). A B value has one
batch axis; where the batch was folded with other axes that axis is ``outer * B * inner`` long, and
record b owns the places ``(o * B + b) * inner + i``. No other axis depends on B, so a rule sees
plain ints: ``dims`` holds, at the batch axis, ``outer * inner``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeAlias

from casemate.graph.model import DtypeArg, Size
from casemate.spec.data import ITEM_BYTES
from casemate.spec.errors import ModelError

INDEPENDENT: Final = "Let every operation act on each record by itself."


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the records of a B value lie: the axis, and how the batch is folded in it."""

    axis: int
    outer: int = 1
    inner: int = 1


INTEGER_RANGE: Final = {
    "bool": (0, 1),
    "u8": (0, 255),
    "i32": (-(2**31), 2**31 - 1),
    "i64": (-(2**63), 2**63 - 1),
}


def held(dtype: str, found: tuple[int, int] | None) -> tuple[int, int] | None:
    """Bounds that the dtype holds; ``None`` for others, since what leaves the dtype wraps."""
    limits = INTEGER_RANGE.get(dtype)
    if found is None or limits is None or found[0] < limits[0] or found[1] > limits[1]:
        return None
    return found


@dataclass(frozen=True, slots=True)
class Value:
    """Dtype, extents (per record along the batch axis), and the batch; ``None`` for R.

    bounds: inclusive bounds of an integer value where they are proved, else ``None``.
    data: the value depends on a record, so that an index made of it must be proved in range: an
        error at run time would tell of the record.
    slot: the value is the record's own place in the batch, as ``arange(B)`` makes it.
    summed: the value is S.
    """

    dtype: str
    dims: tuple[int, ...]
    batch: Batch | None = None
    bounds: tuple[int, int] | None = None
    data: bool = False
    slot: bool = False
    summed: bool = False

    @property
    def shape(self) -> tuple[int | Size, ...]:
        """The shape with the batch as a symbol."""
        return tuple(
            Size(a=d) if self.batch is not None and i == self.batch.axis else d
            for i, d in enumerate(self.dims)
        )

    def sizes(self, batch: int) -> tuple[int, ...]:
        """The shape at one batch size."""
        return tuple(d.a * batch + d.c if isinstance(d, Size) else d for d in self.shape)

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def numel(self) -> int:
        """Elements per record (B) or in all (R)."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def floating(self) -> bool:
        return self.dtype == "f32"

    @property
    def rows(self) -> tuple[int, int]:
        """(before, after): row-major memory is ``before * B * after`` elements long (B values)."""
        assert self.batch is not None
        k, b = self.batch.axis, self.batch
        return math.prod(self.dims[:k]) * b.outer, b.inner * math.prod(self.dims[k + 1 :])

    @property
    def range(self) -> tuple[int, int] | None:
        """Proved bounds, or those of a small integer dtype; ``None`` where nothing is known."""
        if self.bounds is None and self.dtype in ("bool", "u8"):
            return INTEGER_RANGE[self.dtype]
        return self.bounds

    def view(self, dims: tuple[int, ...], batch: Batch | None) -> Value:
        """The same elements, or some of them, in another shape."""
        return dataclasses.replace(self, dims=dims, batch=batch)


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    kind: str
    default: Any
    required: bool


@dataclass(frozen=True, slots=True)
class Schema:
    """A parsed ATen schema: ``name`` as graphs write it, parameters, number of outputs.

    ``outputs`` is ``None`` where the op returns a list.
    """

    name: str
    params: tuple[Param, ...]
    positional: int
    outputs: int | None
    text: str


# What a graph never says: where tensors lie and how their memory is laid out.
_PLACE: Final = ("Layout", "Device", "MemoryFormat", "Generator")
PLACE_NAMES: Final = frozenset(
    {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator"}
)
_ATEN: Final = re.compile(r"(\w+)::(\w+)(?:\.(\w+))?\((.*)\) -> (.*)\Z")


def _default(text: str) -> Any:
    words = {"None": None, "True": True, "False": False, "Mean": 1}
    if text in words:
        return words[text]
    if text.startswith("["):
        return tuple(int(x) for x in text[1:-1].split(",") if x.strip())
    if text[0] in "\"'":
        return text[1:-1]
    return float(text) if "." in text or "e" in text else int(text)


def _split(text: str) -> list[str]:
    parts: list[str] = []
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in [*parts, text[start:].strip()] if p]


def parse_schema(text: str) -> Schema:
    """The schema of an overload as torch prints it: ``aten::relu(Tensor self) -> Tensor``."""
    match = _ATEN.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no ATen schema")
    space, name, overload, inside, returns = match.groups()
    params: list[Param] = []
    positional: int | None = None
    for part in _split(inside):
        if part == "*":
            positional = len(params)
            continue
        head, _, default = part.partition("=")
        kind, _, name_ = head.rpartition(" ")
        kind = re.sub(r"\([a-z](!)?( -> \*)?\)", "", kind).replace("SymInt", "int")
        kind = re.sub(r"\[\d\]", "[]", kind)
        if kind.rstrip("?") in _PLACE or name_ in PLACE_NAMES:
            continue
        value = _default(default) if default else None
        if kind.endswith("[]") and isinstance(value, int):
            value = (value,)
        params.append(Param(name_, kind, value, not default))
    outputs = None if returns.endswith("[]") else len(_split(returns.strip("()")))
    return Schema(
        f"{space}.{name}.{overload or 'default'}",
        tuple(params),
        len(params) if positional is None else positional,
        outputs,
        text,
    )


Outputs: TypeAlias = "Value | tuple[Value, ...]"


class Call:
    """One node with its arguments bound to the op's schema; rules read it and refuse through it."""

    __slots__ = ("args", "name", "op", "source")

    def __init__(self, op: str, name: str, source: str, args: Mapping[str, Any]) -> None:
        self.op, self.name, self.source, self.args = op, name, source, args

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def value(self, name: str) -> Value:
        item = self.args[name]
        if not isinstance(item, Value):
            self.refuse("model.argument", f"needs a tensor as {name}", "Give it a tensor.")
        return item

    def tensors(self) -> list[Value]:
        """Every tensor argument, those in lists too."""
        out: list[Value] = []
        for item in self.args.values():
            for x in item if isinstance(item, tuple) else (item,):
                if isinstance(x, Value):
                    out.append(x)
        return out

    def refuse(self, code: str, what: str, mend: str) -> NoReturn:
        """Raise ``ModelError``: "Node 'x' (op[, in module]) <what>."."""
        place = f", in {self.source}" if self.source else ""
        message = f"Node {self.name!r} ({self.op}{place}) {what}."
        raise ModelError(code, message, mend=mend, where=self.name)

    def mixes(self, how: str, mend: str = INDEPENDENT) -> NoReturn:
        self.refuse("model.mixes-records", f"mixes records: it {how}", mend)

    def shape(self, what: str) -> NoReturn:
        self.refuse("model.shape", what, "Export the model again with matching shapes.")

    def argument(self, what: str, mend: str = "Export the model again with casemate.") -> NoReturn:
        self.refuse("model.argument", what, mend)

    def axis(self, dim: object, rank: int) -> int:
        """``dim`` counted from the front; refused when there is no such axis."""
        rank = max(rank, 1)
        if type(dim) is not int or not -rank <= dim < rank:
            self.argument(f"names axis {dim!r} of a value with {rank} axes")
        return dim % rank

    def axes(self, dims: object, rank: int) -> tuple[int, ...]:
        """Several axes, none twice; all of them for ``None`` or an empty list."""
        if dims is None or dims == ():
            return tuple(range(rank))
        items = dims if isinstance(dims, tuple) else (dims,)
        out = tuple(self.axis(d, rank) for d in items)
        if len(set(out)) != len(out):
            self.argument("names an axis twice")
        return out


Rule: TypeAlias = Callable[[Call], Outputs]
Count: TypeAlias = "Callable[[Call, tuple[Value, ...]], int]"


def _zero(call: Call, out: tuple[Value, ...]) -> int:
    return 0


def per_element(flops: int) -> Count:
    """So many operations for each element that comes out."""
    return lambda call, out: flops * sum(v.numel for v in out)


def per_input(flops: int) -> Count:
    """So many operations for each element that goes in."""
    return lambda call, out: flops * sum(v.numel for v in call.tensors())


def temporaries(count: int) -> Count:
    """Bytes of so many float32 values as large as the largest, alive at once in backward."""
    return lambda call, out: 4 * count * max(v.numel for v in (*call.tensors(), *out))


@dataclass(frozen=True, slots=True)
class Op:
    """One entry of the table.

    rule: dtype, shape and batch of the outputs from the bound arguments; refuses what it cannot
        prove. flops: of the forward, per record (B) or in all (R). backward: its FLOPs over the
        forward's. view: no new memory is needed. workspace: extra bytes while it runs, forward and
        backward. slots: it only moves elements, so that it may take ``arange(B)``.

    For the joint graph of forward and backward (:mod:`casemate.graph.joint`):
    contract: the outputs when this call sums over the batch, those sums as S, or ``None`` when it
        does not; asked before ``rule``. site: the kind of such a sum, by which the engine knows how
        to have the norm of each record's term (:mod:`casemate.engine.sites`: outer, sum,
        convolution, embedding, norm); "" where that is had one record at a time.
    linear: how the op takes S values: ``add`` (linear in all its tensors together, all of them S),
        ``each`` (linear in each of them, one S and the others R), ``first`` (linear in the first
        alone, the others R), "" (not at all).
    isometric: as a map of one S value, and of nothing else that may change, it moves entries to
        places of their own, with their signs or all with others, and puts zeros beside them: the
        Euclidean norm stays.
    scatters: as a map of one S value it sends each entry to one place or none, where the other
        operands say, as it is, or added to others that land there.
    """

    schema: Schema
    rule: Rule
    flops: Count = _zero
    backward: int = 2
    view: bool = False
    workspace: Count = _zero
    slots: bool = False
    contract: Callable[[Call], Outputs | None] | None = None
    site: str = ""
    linear: Literal["", "add", "each", "first"] = ""
    isometric: bool = False
    scatters: bool = False


def op(schema: str, rule: Rule, **more: Any) -> Op:
    return Op(parse_schema(schema), rule, **more)


# Tensor arguments that may be given as a Python number.
_NUMBERS: Final = frozenset({"other", "exponent", "value"})


def _check_kind(call: Call, param: Param, item: Any) -> Any:
    kind = param.kind
    if item is None and kind.endswith("?"):
        return None
    kind = kind.removesuffix("?")
    if kind.endswith("[]"):
        if not isinstance(item, tuple):
            if kind != "int[]":
                call.argument(f"needs a list as {param.name}")
            item = (item,)
        inner = dataclasses.replace(param, kind=kind[:-2])
        return tuple(_check_kind(call, inner, x) for x in item)
    number = kind in ("float", "Scalar") or (kind == "Tensor" and param.name in _NUMBERS)
    if number and item in ("inf", "-inf"):
        return float(item)
    if number and isinstance(item, Size):
        if call.op.startswith("aten.arange.") and param.name == "end":
            return item
        call.refuse(
            "model.batch-size",
            f"computes with the number of records in the batch ({param.name})",
            "Use a constant: the batch's size is secret under Poisson sampling.",
        )
    # Python numbers stand for 0-d tensors, as torch wraps them.
    if kind == "Tensor" and number and type(item) in (int, float, bool):
        return item
    good = {
        "Tensor": isinstance(item, Value),
        "int": type(item) is int or isinstance(item, Size),
        "float": type(item) in (int, float),
        "bool": type(item) is bool,
        "Scalar": type(item) in (int, float, bool),
        "ScalarType": isinstance(item, DtypeArg) and item.dtype in ITEM_BYTES,
        "str": type(item) is str,
    }.get(kind, False)
    if not good:
        call.argument(f"was given {type(item).__name__} as {param.name}, which is {param.kind}")
    return item.dtype if isinstance(item, DtypeArg) else item


def bind(
    schema: Schema, name: str, source: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call:
    """The arguments by name, defaults filled in, each of the kind that the schema says.

    ``args`` and ``kwargs`` hold :class:`Value` for references and tuples for lists.
    """
    call = Call(schema.name, name, source, {})
    given: dict[str, Any] = {}
    if len(args) > schema.positional:
        call.argument(f"has {len(args)} positional arguments where {schema.positional} are known")
    for param, item in zip(schema.params, args, strict=False):
        given[param.name] = item
    known = {p.name for p in schema.params}
    for key, item in kwargs.items():
        if key not in known or key in given:
            call.argument(f"has an unknown or repeated argument {key!r}")
        given[key] = item
    bound: dict[str, Any] = {}
    for param in schema.params:
        if param.name not in given:
            if param.required:
                call.argument(f"lacks its argument {param.name}")
            bound[param.name] = param.default
        else:
            bound[param.name] = _check_kind(call, param, given[param.name])
    call.args = bound
    return call

"""The native kernels as operations of a graph, so that a compiler calls them by name.

Each door of :mod:`casemate.engine.kernels.compiled` is one operation ``casemate::norms_NAME`` that
makes what the door fills. It has shapes alone: what computes is its C form,
``aoti_torch_cpu_norms_NAME`` (:func:`declaration`, :func:`definition`), over tensors' handles as
AOTInductor's C interface has them (torch/csrc/inductor/aoti_torch/c/shim.h).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from casemate.engine.kernels import compiled

# By letter of DOORS: what it makes.
_MADE: Final = {"f": torch.float32, "e": torch.float64, "q": torch.int64}
_C: Final = {"f": "float", "e": "double", "q": "int64_t"}
# What each tensor of a door must hold at least, in entries; a convolution's are as its shape says.
_HOLDS: Final = {
    "row_squares": ("a1 * a2",),
    "gram_pair": ("a2 * a3 * a4", "a2 * a3 * a5"),
    "formed_outer": ("a2 * a3 * a4", "a2 * a3 * a5"),
    "formed_sum": ("a1 * a2 * a3",),
    "embedding": ("a2 * a3", "a2 * a3 * a4"),
    "weighted_sum": ("a1 * a2", "a1"),
    "contract": ("a2 * a3", "a2 * a4", "a2 / a7", "a2 / a7"),
    "embedding_add": ("a2 * a3", "a2 * a3 * a4", "a2", "a2"),
    "channel_affine": ("a4 * a5 * a6", "a4 * a5 * a6", "a4 * a7", "a4 * a7"),
    "token_affine": (*("a4 * a5 * a6",) * 2, *("a4 * (a7 > 0 ? a7 : a5)",) * 2),
}
# Of the results, in entries; rows of an embedding are bounded by what admission proved of indices.
_MAKES: Final = {
    "row_squares": ("a1",),
    "gram_pair": ("a2", "a2"),
    "formed_outer": ("a2 * a4 * a5",),
    "formed_sum": ("a1 * a3",),
    "embedding": ("a2", "a2"),
    "weighted_sum": ("a2",),
    "contract": ("a3 * a4",),
    "channel_affine": ("a4 * a5", "a4 * a5"),
    "token_affine": ("a4 * a6", "a4 * a6"),
}
# So that no product of sizes wraps.
_WIDE: Final = "__int128(1)"
# Doors that the loop around the step calls, not the step.
_OUTSIDE: Final = ("accumulate", "finish")
STEP: Final = {name: takes for name, (takes, _) in compiled.DOORS.items() if name not in _OUTSIDE}


def _schema(name: str, takes: str) -> str:
    kinds = {"t": "Tensor?", "i": "int", "d": "float", "s": "int[]"}
    given = [f"{kinds.get(kind, 'int[]?')} a{i}" for i, kind in enumerate(takes)]
    made = sum(kind in _MADE for kind in takes)
    return f"norms_{name}({', '.join(given)}) -> ({', '.join(['Tensor'] * made)})"


@functools.cache
def operations() -> dict[str, Any]:
    """The operations by door's name, registered once."""
    library: Any = torch.library.Library("casemate", "DEF")  # type: ignore[no-untyped-call]
    _kept.append(library)
    for name, takes in STEP.items():
        library.define(_schema(name, takes), tags=(torch.Tag.needs_exact_strides,))
        library.impl(f"norms_{name}", functools.partial(_shapes, takes), "Meta")
    return {name: getattr(torch.ops.casemate, f"norms_{name}").default for name in STEP}


_kept: list[Any] = []


def _shapes(takes: str, *given: Any) -> Any:
    made = [
        torch.empty(a if a is not None else [0], dtype=_MADE[kind], device="meta")
        for kind, a in zip(takes, given, strict=True)
        if kind in _MADE
    ]
    return made[0] if len(made) == 1 else tuple(made)


@contextmanager
def noted() -> Iterator[None]:
    """While it holds, kernels are called as operations of a graph."""
    ops = operations()

    def call(name: str, *arguments: Any) -> None:
        takes = STEP[name]
        given = [
            (list(a.shape) if a is not None else None) if kind in _MADE
            else list(a) if kind == "s" else a
            for kind, a in zip(takes, arguments, strict=True)
        ]  # fmt: skip
        made = ops[name](*given)
        made = made if isinstance(made, tuple | list) else (made,)
        outs = [a for kind, a in zip(takes, arguments, strict=True) if kind in _MADE]
        for out, new in zip(outs, made, strict=True):
            if out is not None:
                out.copy_(new)

    with compiled.routed(call):
        yield


# --- in C ---


def _parameters(takes: str) -> list[str]:
    found: list[str] = []
    for i, kind in enumerate(takes):
        if kind == "t":
            found.append(f"AtenTensorHandle* a{i}")
        elif kind in "id":
            found.append(f"{'int64_t' if kind == 'i' else 'double'} a{i}")
        elif kind == "s":
            found += [f"const int64_t* a{i}", f"int64_t n{i}"]
        else:
            found += [f"const int64_t** a{i}", f"int64_t n{i}"]
    made = sum(kind in _MADE for kind in takes)
    return found + [f"AtenTensorHandle* r{i}" for i in range(made)]


def declaration(name: str) -> str:
    """The C form of an operation, as AOTInductor wants it declared."""
    parameters = ", ".join(_parameters(STEP[name]))
    return f"AOTITorchError aoti_torch_cpu_norms_{name}({parameters})"


def _result(name: str, kind: str) -> str:
    return {"conv_contract": "q.weights()", "embedding_add": "0"}.get(name, f"q.result('{kind}')")


def definition(name: str) -> str:
    """C++ that makes the results and calls ``norms_NAME``, once operands hold what it reads
    (runtime/doors.cpp has the helpers)."""
    takes, status = compiled.DOORS[name]
    lines, given, made, read = [], [], 0, 0
    if "s" in takes:
        lines.append("    const Window q = window_of(a2, n2, a0, a1);")
    for i, kind in enumerate(takes):
        if kind == "t":
            holds = _HOLDS[name][read] if name in _HOLDS else None
            got = f"operand(a{i}, {_WIDE} * {holds})" if holds else f"q.operand(a{i})"
            lines.append(f"    const Operand t{i} = {got};")
            given.append(f"t{i}")
            read += 1
        elif kind in "ids":
            given.append(f"a{i}")
        else:
            size = f"{_WIDE} * {_MAKES[name][made]}" if name in _MAKES else _result(name, kind)
            lines.append(f"    {_C[kind]} *o{i} = result<{_C[kind]}>(a{i}, n{i}, {size}, r{made});")
            given.append(f"o{i}")
            made += 1
    if name == "embedding_add":
        lines.append("    inside_table(t0, a2 * a3, a5, a4, (*r0)->count());")
    call = f"norms_{name}({', '.join(given)})"
    lines.append(f"    return {call} ? 1 : 0;" if status else f"    {call};\n    return 0;")
    return "\n".join([f"{declaration(name)} {{", *lines, "}"])

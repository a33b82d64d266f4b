"""Random nodes: each is admitted with a shape, or refused by name; no other exception comes out."""

from __future__ import annotations

import random

import pytest

from casemate.graph import check
from casemate.graph.model import DtypeArg, Node, Size
from casemate.graph.ops import TABLE
from casemate.spec.errors import ModelError
from support.rawgraph import B, graph, infos, ls, r

NAMES = ("x", "t", "i", "im", "w", "m", "k", "e", "c", "h", "f")
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    -5,
    2**31,
    2**53 - 1,
    0.0,
    0.5,
    -1e308,
    1e308,
    5e-324,
    "inf",
    True,
    False,
)
SIZES = (
    0,
    1,
    2,
    3,
    4,
    12,
    -1,
    -2,
    2**40,
    B,
    Size(a=2),
    Size(a=0),
    Size(a=-1),
    Size(a=1, c=1),
    Size(a=12),
)


def argument(rng: random.Random, kind: str) -> object:
    kind = kind.removesuffix("?")
    if rng.random() < 0.05:
        return rng.choice((None, "x", r("x"), ls(), 1, B, DtypeArg(dtype="f16"), "", 1.5))
    if kind.endswith("[]"):
        return ls(*(argument(rng, kind[:-2]) for _ in range(rng.randrange(5))))
    if kind == "Tensor":
        return r(rng.choice(NAMES)) if rng.random() < 0.95 else rng.choice(NUMBERS)
    return {
        "int": lambda: rng.choice(SIZES),
        "float": lambda: rng.choice(NUMBERS),
        "Scalar": lambda: rng.choice((*NUMBERS, B)),
        "bool": lambda: rng.random() < 0.5,
        "ScalarType": lambda: DtypeArg(dtype=rng.choice(("f32", "i64", "bool", "u8", "i32"))),
        "str": lambda: rng.choice(("same", "valid", "floor", "tanh", "none", "?")),
    }[kind]()


@pytest.mark.parametrize("seed", range(2))
def test_only_model_errors_come_out(seed: int) -> None:
    rng = random.Random(seed)
    first = (
        Node(name="h", op="aten.zeros.default", args=(ls(0, 3),), kwargs={}),
        Node(name="f", op="aten.reshape.default", args=(r("t"), ls(Size(a=3), 4)), kwargs={}),
    )
    admitted = 0
    for _ in range(30):
        for entry in TABLE.values():
            params = entry.schema.params
            given = [p for p in params if p.required or rng.random() < 0.7]
            kwargs = {p.name: argument(rng, p.kind) for p in given}
            bad = Node(name="bad", op=entry.schema.name, args=(), kwargs=kwargs)  # type: ignore[arg-type]
            try:
                g = graph(*first, bad)
                check.check(g, infos(g), bounds={"i": (0, 2)})
                admitted += 1
            except ModelError as e:
                assert e.where == "bad" and e.mend
    assert admitted > 200

"""Every shared format of the source tree, with one sample value of each.

``python tests/support/formats.py`` writes the golden files that are missing; one that is there is
never overwritten, since a change of a format needs a new version of its name.
"""

from __future__ import annotations

import ast
import functools
import importlib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import casemate
from casemate.spec import codec, data, job

SOURCE = Path(casemate.__file__).parent
GOLDEN = Path(__file__).parents[1] / "unit" / "spec" / "golden"

DIGEST = "sha256:" + "ab" * 32
DATASET = "ds_" + "0123456789abcdef0123" * 2
JOB = "job_" + "0123456789abcdef" * 2
MODEL = "model_" + "0123456789abcdef" * 2
IDENTITY = "id_" + "0123456789abcdef0123" * 2

_AGE = data.Column(name="age", dtype="f32", low=0, high=120, scale="unit")
_PIXELS = data.Column(name="pixels", dtype="u8", shape=(3, 8, 8), low=0, high=255)
_WHO = data.Column(name="who", dtype="i64", low=0, high=9, role="unit")

#: Fields whose values a format's own checks constrain, by format and by field name.
FIELDS: dict[str, dict[str, Any]] = {
    "column/v1": {"name": "mean radius", "dtype": "f32", "shape": (2, 3), "low": -1, "high": 2.5},
    "schema/v1": {
        "columns": (_AGE, _PIXELS, _WHO), "rows": 17, "units": 10, "rows_per_unit": 2
    },
    "policy/v1": {"scientists": (IDENTITY,), "nonprivate": "I permit training without privacy"},
    "budget/v1": {"delta": 1e-5},
    "release-request/v1": {"owner": b"o" * 32, "hpke_key": b"h" * 1216},
    "handover-request/v2": {"hpke_key": b"h" * 1216},
    "backup-file/v1": {"path": "ledger/store.db", "sha256": bytes(range(32))},
    "head/v1": {"root": bytes(range(32))},
    "consent-software/v1": {"measurement": "ab" * 48},
    "consent-recovery/v1": {"rest": False},
    "log-consent/v1": {"sign_key": b"s" * 32, "seal_key": b"h" * 1216},
    "receipt-proof/v1": {"receipt": DIGEST, "salt": bytes(range(32)), "key": b"k" * 32},
    "dp/v1": {"delta": 1e-5},
    "registration/v1": {"dataset": DATASET, "previous": DATASET},
    "dataset-use/v1": {"dataset": DATASET},
    "job/v1": {"job": JOB},
    "metric/v1": {"name": "cross_entropy"},
    "contest/v1": {
        "metrics": (job.Metric(name="accuracy"),), "entries": 3, "epsilon": None, "delta": None,
    },
    "identity/v1": {"sign_key": bytes(range(32)), "seal_key": bytes(i % 256 for i in range(1216))},
    "identity-file/v1": {"salt": bytes(16), "log_n": 17, "secret": bytes(range(156))},
    "train/v1": {"batch_size": 64},
    "serve-policy/v1": {"callers": (IDENTITY,), "calls": 1000},
    "tensor-spec/v1": {"name": "tokens", "dtype": "i64", "low": 0, "high": 99},
    "deployment/v1": {"model": MODEL, "model_digest": DIGEST},
    "sale/v1": {"model": MODEL, "model_digest": DIGEST, "seller": IDENTITY, "buyer": IDENTITY},
    "sale-receipt/v1": {"sign_key": b"s" * 32, "seal_key": b"h" * 1216},
}  # fmt: skip


@functools.cache
def formats() -> dict[str, type]:
    """Every class marked with ``@value`` anywhere in the source, by its name."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        marked = any(
            isinstance(call, ast.Call)
            and ast.unparse(call.func).split(".")[-1] == "value"
            and isinstance(node, ast.ClassDef)
            for node in ast.walk(tree)
            for call in getattr(node, "decorator_list", ())
        )
        if marked:
            parts = path.relative_to(SOURCE.parent).with_suffix("").parts
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
    found = codec.registered().items()
    return {name: kind for name, kind in found if kind.__module__.startswith("casemate.")}


def sample(kind: type) -> Any:
    """The sample value of a format; what joined it later is at its default."""
    fixed = FIELDS.get(kind.__casemate_type__, {})
    hints = typing.get_type_hints(kind)
    names = [
        name for name in hints
        if name in kind.__dataclass_fields__ and name not in codec.later_fields(kind)
    ]  # fmt: skip
    return kind(**{n: fixed[n] if n in fixed else _sample(hints[n], n) for n in names})


def _sample(hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return args[0]
    if origin in (Union, types.UnionType):
        return _sample(next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        # One item of each admitted type, so that the golden file shows them all.
        item = args[0]
        if typing.get_origin(item) in (Union, types.UnionType):
            return tuple(
                None if a is type(None) else _sample(a, name) for a in typing.get_args(item)
            )
        return (_sample(item, name),)
    if origin is dict:
        return {"a": _sample(args[1], name)}
    if hasattr(hint, "__casemate_type__"):
        return sample(hint)
    scalars = {bool: True, int: 3, float: math.pi / 4, str: f"{name} é", bytes: b"\x00\xfb\xff"}
    return scalars[hint]


def golden(name: str) -> Path:
    return GOLDEN / (name.replace("/", "-") + ".json")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, kind in formats().items():
        if not golden(name).exists():
            golden(name).write_bytes(codec.encode(sample(kind)))
            print("wrote", golden(name).name)

"""The native step's runtime as a library, so that its parts are tried one by one."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from casemate.engine import native
from casemate.engine.aot import build, doors
from support.native_lab import kept

TYPES = {v: k for k, v in build._TYPES.items()}
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# Of one dummy input and sum: the step itself is not there.
TABLE = """
struct Input { int32_t type; int64_t dims, sizes[8], strides[8]; };
struct Sum { int64_t tensor, entries; int32_t type; };
"""
PARTS = ("tensors", "products", "convolutions", "attention", "doors", "gcm", "account", "exact")
LAB = """
extern "C" {
int lab_open(const uint8_t *key, const uint8_t *nonce, uint8_t *data, uint64_t size) {
    return opened(cipher(key), nonce, data, size);
}
double lab_epsilon(double rate, double noise, double delta, double steps) {
    return Account(rate, noise, delta).epsilon(steps);
}
void lab_noise(const uint8_t *main, const uint8_t *more, uint64_t step, double scale,
               int64_t *total, uint64_t count) {
    add_noise(main, more, step, scale, total, count);
}
void lab_pair(const uint8_t *main, const uint8_t *more, uint64_t step, uint64_t pair, double scale,
              int64_t *out) {
    exact_pair(main, more, step, pair, scale, out);
}
}
"""


@functools.cache
def library() -> ctypes.CDLL:
    text = build.runtime(TABLE, list(doors.STEP), PARTS) + LAB
    flags = [f for f in build.FLAGS if f not in ("-fPIE", "-O3")]

    def made() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            for name, code in (("runtime", text), ("noise", native._source("noise").decode())):
                subprocess.run(
                    ["g++", *flags, "-O2", "-fPIC", *build.headers(), "-x", "c++", "-", "-c", "-o",
                     f"{folder}/{name}.o"],
                    input=code.encode(), check=True,
                )  # fmt: skip
            subprocess.run(
                ["g++", "-shared", f"{folder}/runtime.o", f"{folder}/noise.o", "-lquadmath", "-o",
                 f"{folder}/lab.so"],
                check=True,
            )  # fmt: skip
            return Path(folder, "lab.so").read_bytes()

    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(kept("runtime", made))
        file.flush()
        found = ctypes.CDLL(file.name)
    found.lab_epsilon.restype = _D
    found.lab_epsilon.argtypes = [_D] * 4
    found.lab_noise.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_uint64, _D, _P, ctypes.c_uint64]
    found.lab_pair.argtypes = [ctypes.c_char_p] * 2 + [ctypes.c_uint64] * 2 + [_D, _P]
    return found


def ints(values: Any) -> Any:
    values = list(values)
    return (_I * max(1, len(values)))(*values)


def handle(t: torch.Tensor) -> Any:
    """A tensor of the runtime with the entries and strides of ``t``."""
    made = _P()
    library().aoti_torch_empty_strided(
        _I(t.dim()), ints(t.shape), ints(t.stride()), build._TYPES[t.dtype], 0, 0,
        ctypes.byref(made),
    )  # fmt: skip
    view(made).copy_(t)
    return made


def view(h: Any) -> torch.Tensor:
    """The runtime's tensor where it lies."""
    lib = library()
    kind, data, dims = ctypes.c_int32(), _P(), _I()
    sizes, strides = ctypes.POINTER(_I)(), ctypes.POINTER(_I)()
    lib.aoti_torch_get_dtype(h, ctypes.byref(kind))
    lib.aoti_torch_get_data_ptr(h, ctypes.byref(data))
    lib.aoti_torch_get_dim(h, ctypes.byref(dims))
    lib.aoti_torch_get_sizes(h, ctypes.byref(sizes))
    lib.aoti_torch_get_strides(h, ctypes.byref(strides))
    dtype = TYPES[kind.value]
    shape, steps = sizes[: dims.value], strides[: dims.value]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True))
    raw = (ctypes.c_uint8 * (extent * dtype.itemsize)).from_address(data.value or 0)
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, steps)


def call(name: str, *arguments: Any) -> None:
    assert getattr(library(), f"aoti_torch_cpu_{name}")(*arguments) == 0


def ends(f: Callable[[], object]) -> bool:
    """Whether a child that calls ``f`` is stopped by a check of the runtime."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        f()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 70

"""Trained weights as arrays, or into a module."""

from __future__ import annotations

from typing import Any, Final

from casemate.spec import tensors
from casemate.spec.errors import UsageError

NUMPY: Final = {"bool": "?", "u8": "u1", "i32": "<i4", "i64": "<i8", "f32": "<f4"}


def numpy() -> Any:
    """The package. Raises ``UsageError`` (``usage.extra``) without it."""
    try:
        import numpy as np
    except ImportError:
        raise UsageError(
            "usage.extra",
            "Arrays need numpy, which is not installed.",
            mend="Run pip install 'casemate[torch]'; weights can also be saved as a file.",
        ) from None
    return np


def load(data: bytes, into: Any = None) -> dict[str, Any]:
    """Name to numpy array of a safetensors file; also loaded into the module ``into``, if given.

    Raises ``UsageError`` (``usage.extra``) without numpy, ``FormatError`` for another file.
    """
    np = numpy()
    arrays = {
        name: np.frombuffer(view, dtype=NUMPY[info.dtype]).reshape(info.shape).copy()
        for name, (info, view) in tensors.load(data).items()
    }
    if into is not None:
        from casemate.client import torch as bridge

        bridge.load_weights(into, arrays)
    return arrays

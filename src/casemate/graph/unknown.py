"""Why an operation outside the table is refused, and what to write in its place."""

from __future__ import annotations

import re
from typing import Final

_INDEPENDENT: Final = "Write it with the operations listed in docs/models.md."

# (pattern of the op's name, code, what it does, mend); the first that matches speaks.
REASONS: Final[tuple[tuple[re.Pattern[str], str, str, str], ...]] = tuple(
    (re.compile(pattern), code, what, mend)
    for pattern, code, what, mend in (
        (
            r"aten\..*batch_norm|aten\.sync_batch_norm",
            "model.batchnorm",
            "averages over the batch, so that records mix",
            "Replace it by GroupNorm (casemate.client.torch.groupnorm), or freeze it with .eval().",
        ),
        (
            r"aten\.(bernoulli|dropout|native_dropout|feature_dropout|alpha_dropout|rand|randn|"
            r"randint|randperm|normal|multinomial|poisson|exponential|uniform|rrelu|cauchy|"
            r"log_normal|geometric)(_like|_functional|_with_noise)*_?\.",
            "model.random",
            "draws at random, and randomness is the server's alone",
            "Leave it out; layers that drop out are exported with draws of the server's.",
        ),
        (
            r"aten\.(item|_local_scalar_dense|nonzero|nonzero_static|masked_select|_unique2|"
            r"unique_dim|unique_consecutive|bincount|equal|allclose|is_nonzero|repeat_interleave|"
            r"histc|_assert_async|_assert_scalar|sym_size|sym_numel)\b",
            "model.data-dependent",
            "makes control flow or shapes depend on the data",
            "Use masks (torch.where) and fixed shapes.",
        ),
        (
            r"aten\.[a-z0-9_]*[a-z0-9]_\.",
            "model.op-unknown",
            "changes a value in place, and graphs are functional",
            "Use the form without the underscore.",
        ),
        (
            r"aten\.(empty|new_empty|empty_like|resize|as_strided|set|from_file|storage)",
            "model.op-unknown",
            "reaches for memory that is not its own",
            "Use zeros, reshape or slices.",
        ),
        (
            r"aten\.(binary_cross_entropy)\.",
            "model.op-unknown",
            "raises an error where a score is outside [0, 1]",
            "Use binary_cross_entropy_with_logits.",
        ),
        (
            r"aten\.(_embedding_bag|embedding_bag)",
            "model.op-unknown",
            "lays all records' indices in one list",
            "Use Embedding, then mean or sum over axis 1.",
        ),
        (
            r"aten\.(_fft|fft_|view_as_complex|view_as_real|_?complex|polar)",
            "model.op-unknown",
            "computes with complex numbers",
            "Keep real and imaginary parts apart: a transform is a product with a matrix of cosines"
            " and one of sines.",
        ),
        (
            r"aten\.(_unsafe_)?(index_put|masked_scatter|index_copy|index_fill)",
            "model.op-unknown",
            "assigns to the entries that a mask or an index names",
            "Use torch.where(mask, new, old), masked_fill or scatter.",
        ),
        (r"aten\.", "model.op-unknown", "is not in the table of operations", _INDEPENDENT),
        (r"", "model.op-unknown", "is no ATen operation", _INDEPENDENT),
    )
)


def reason(op: str) -> tuple[str, str, str]:
    """(code, what it does, mend) of an op that is not in the table."""
    for pattern, code, what, mend in REASONS:
        if pattern.match(op):
            return code, what, mend
    raise AssertionError("the last pattern matches everything")

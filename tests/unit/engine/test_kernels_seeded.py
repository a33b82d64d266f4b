"""Seeded bugs: each check of the kernels must fail on a broken copy of what it checks."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import support.kernel_checks as checks
from casemate.engine import native
from casemate.engine.kernels import Window, bounds, compiled, twins
from support.kernel_checks import Convolution

needs_compiler = pytest.mark.skipif(
    compiled.library() is None or shutil.which("c++") is None, reason="no compiler"
)
Check = Callable[[ModuleType], object]
PADDED = Convolution(5, 6, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
DEPTHWISE = Convolution(20, 20, (6, 6), (3, 3), (2, 2), (1, 1), (1, 1), groups=20)


def dense(m: ModuleType) -> None:
    checks.dense(m, 2, 37, 20, 33)


def conv(m: ModuleType) -> None:
    checks.convolution(m, PADDED)


def depthwise(m: ModuleType) -> None:
    checks.convolution(m, DEPTHWISE)


def many_taps(m: ModuleType) -> None:
    checks.convolution(m, checks.WIDE[5])


def grouped(m: ModuleType) -> None:
    checks.convolution(m, Convolution(6, 9, (7,), (2,), (1,), (0,), (2,), groups=3))


def embedding(m: ModuleType) -> None:
    checks.embedding(m, 2, 12, 5, 4, 1)


def contraction(m: ModuleType) -> None:
    for columns in (17, 80):  # part of a vector, whole ones
        checks.contraction(m, 4, 100, 33, columns, 64)


def conv_sum(m: ModuleType) -> None:
    checks.convolution_sum(m, PADDED, 64)


def cancelling(m: ModuleType) -> None:
    checks.sound(m, 0, 48, 33, 20)


# what is in the source, what stands there instead, the check that must see it
NATIVE: list[tuple[str, str, Check]] = [
    ("rows(t, 0, P, 0, 2);", "rows(t, 0, P, 0, 1);", dense),
    ("first * total(one) + 2 * total(others)", "first * total(one) + total(others)", dense),
    ("!(top <= 0x1p60)", "false", checks.extremes),
    ("FLOOR = 0x1p-125", "FLOOR = 0x1p-400", checks.extremes),
    ("CHUNK = 256", "CHUNK = 1 << 20", checks.chunks),
    ("SHORT = 32", "SHORT = 1 << 20", checks.chunks),
    ("LONG || end - k < RUN ? end - k", "true ? end - k", checks.chunks),
    ("count - k < RUN * RUNS ? count", "true ? count", checks.chunks),
    ("const i64 here = count - k < most ? count - k : most;", "const i64 here = count - k;",
     checks.chunks),
    ("sum[j] += part[j];", "sum[j] = part[j];", checks.chunks),
    ("if (c[i] == 0) continue;", "", checks.weighting),
    ("w[k++] = c[i];", "w[k++] = c[i - i % 4];", checks.weighting),
    ("std::rint(", "std::floor(", checks.summing),
    ("std::fabs(v) < 0x1p62 ? v : 0.0", "v", checks.summing),
    ("static_cast<double>(total[j]) * factor", "static_cast<float>(total[j]) * factor",
     checks.summing),
    ("if (at[t] != padding)", "", embedding),
    ("at[a] < at[c] ||", "", embedding),
    ("sum += 2 * total(a);", "sum += total(a);", conv),
    ("sum += one[diagonal] * b[diagonal];", "", conv),
    ("if (i < 0) continue;", "if (i < 0) break;", conv),
    ("double norm = 0;\n        Want", "double norm = 1e-9 * i;\n        Want", checks.slots),
    ("for (; j < n; j++) s += static_cast<double>(x[j]) * x[j];",
     "for (; j < n; j++) s += static_cast<double>(x[j] * x[j]);", checks.extremes),
    ("all += s[l] * s[l];", "all += s[l];", depthwise),
    ("k += r;\n        }\n    }\n    return 0;", "k += r + 1;\n        }\n    }\n    return 0;",
     many_taps),
    ("(group * o + first) * c * K", "first * c * K", grouped),
    ("const i64 width = up(n, W), some = chunk",
     "chunk = N; const i64 width = up(n, W), some = chunk",
     checks.long_contraction),
    ("const i64 records = T < chunk", "chunk = 1 << 20; const i64 records = T < chunk",
     checks.long_contraction),
    ("load<V>(p + j) * weight[t]", "load<V>(p + j)", contraction),
    ("if (kept[t] && limit", "if (limit", contraction),
    ("if (kept[t] && from + size", "if (from + size", contraction),
    ("add ? load<V>(p) + s[r][n] : s[r][n]", "s[r][n]", contraction),
    ("block += count * size + W;", "block += count * size;", contraction),
    ("start == 0 && t == 0", "t == 0", conv_sum),
    ("std::rint(sum[j] * w)", "std::floor(sum[j] * w)", checks.embedding_sum),
    ("if (!keep[i]) continue;\n        const i64 *at", "const i64 *at", checks.embedding_sum),
    ("load<vf>(q + j + k * W) - mean", "load<vf>(q + j + k * W)", checks.affine),
    ("(column + l) / size", "(column + l) % size", checks.affine),
]  # fmt: skip
QUICK = {13}


def built(source: str, folder: Path) -> ctypes.CDLL:
    flags = ["-O1" if flag == "-O3" else flag for flag in native.FLAGS]
    made = folder / "broken.so"
    subprocess.run(["c++", *flags, "-o", str(made)], input=source, text=True, check=True)
    return ctypes.CDLL(str(made))


@needs_compiler
@pytest.mark.parametrize(
    "bug",
    [pytest.param(i, marks=() if i in QUICK else pytest.mark.full) for i in range(len(NATIVE))],
)
def test_compiled(bug: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = NATIVE[bug]
    source = native._source("norms").decode()
    assert old in source
    broken = built(source.replace(old, new), tmp_path)
    check(compiled)
    with monkeypatch.context() as patch:
        compiled.library.cache_clear()
        patch.setattr(native, "library", lambda name: broken)
        try:
            with pytest.raises(AssertionError):
                check(compiled)
        finally:
            compiled.library.cache_clear()


def half_pairs(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    half = x.shape[1] // 2
    parts = (x[:, :half], g[:, :half]), (x[:, half:], g[:, half:])
    return sum((twins._pair(a, c, a, c) for a, c in parts), torch.zeros(x.shape[0]))


def plain_windows(x: torch.Tensor, out: torch.Size, w: Window) -> torch.Tensor:
    return WINDOWS(x, out, w._replace(stride=(1,) * (x.dim() - 2)))


def one_by_one(g: torch.Tensor, x: torch.Tensor, c: torch.Tensor, *rest: object) -> torch.Tensor:
    """As if there were no chunks, and the sum went token by token."""
    total = torch.zeros(())
    for t in (g * x * c).flatten():
        total = total + t
    return total.view(1, 1)


WINDOWS, EMBEDDING, AFFINE = twins.windows, twins.embedding_add, twins.token_affine
TWINS: list[tuple[str, object, Check]] = [
    ("_pairs", half_pairs, dense),
    ("_finite", lambda n2, scale: torch.nan_to_num(n2), checks.not_finite),
    ("floored", lambda scale, *rest: scale, checks.extremes),
    ("windows", plain_windows, lambda m: checks.convolution(m, checks.WIDE[2])),
    ("row_squares", lambda x: x.square().flatten(1).sum(1).double(), checks.extremes),
    ("formed_sum", lambda g: g.half().sum(1).float(), dense),
    ("weighted_sum", lambda formed, c: c @ formed, checks.weighting),
    ("accumulate", lambda total, part, step: total.add_((part * step).long()), checks.summing),
    ("_scaled", lambda g, c, keep: g * (c * keep).view(-1, 1), contraction),
    ("contract", one_by_one, checks.long_contraction),
    (
        "embedding_add",
        lambda total, index, g, *rest: EMBEDDING(total, index, g.half(), *rest),
        checks.embedding_sum,
    ),
    ("token_affine", lambda g, x, mean, rstd: AFFINE(g, x, mean, rstd.square()), checks.affine),
]


@pytest.mark.parametrize("bug", range(len(TWINS)), ids=[name for name, _, _ in TWINS])
def test_twin(bug: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, broken, check = TWINS[bug]
    check(twins)
    monkeypatch.setattr(twins, name, broken)
    with pytest.raises(AssertionError):
        check(twins)


def test_a_gamma_of_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelling(twins)
    monkeypatch.setattr(bounds, "gram_pair", lambda *a, **k: 0.0)
    with pytest.raises(AssertionError):
        cancelling(twins)


def test_a_gamma_without_its_sums_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """u for one product, as if adding were free."""
    checks.chunks(twins)
    cancelling(twins)
    monkeypatch.setattr(bounds, "_dot", lambda terms, native, chunk=0: bounds.U32 / 8)
    with pytest.raises(AssertionError):
        checks.chunks(twins)
        cancelling(twins)

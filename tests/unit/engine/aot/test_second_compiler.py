"""The native step by a second compiler, IREE: both agree with the engine and with each other."""

import numpy as np
import pytest
import torch

from casemate.engine.aot import check
from casemate.engine.joint import SEED
from support import native_lab as native
from support import stablehlo

if not stablehlo.PYTHON.exists():
    pytestmark = pytest.mark.skip(reason="no IREE: make build/iree/.ready")

CLOSE = 1e-6


def off(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("hostile", [False, True], ids=["finite", "a row of NaN"])
@pytest.mark.parametrize("kind", ["logistic", "mlp", "vgg"])
def test_two_compilers_and_the_engine_make_the_same_sums(kind, hostile):
    of = native.built(kind)
    step, path = of.artifact.step, of.lab.path
    rows = check.subset(of.rows, np.arange(step.rows))
    if hostile:
        rows.inputs["input"] = rows.inputs["input"].clone()
        rows.inputs["input"][5] = torch.nan
    records = {name: t[: step.rows] for name, t in rows.inputs.items()}
    parts, factors = path.parts(path.operands_of(records), native.CLIP)
    assert int((factors < 1).sum()) > 0  # something is clipped
    engine = of.lab.flat(parts).numpy()
    data = [records[spec.name] for spec in path.program.data]
    given = step.inputs | dict(zip(path.data, data, strict=True)) | {SEED: torch.ones(step.rows)}
    made = stablehlo.run(stablehlo.graph(step), list(given.values()))
    other = torch.cat([t.reshape(-1) for t in made]).double().numpy()
    ours = check.clipped(of.artifact, path, rows, bytes(32)) * step.grid
    assert off(other, engine) <= CLOSE
    assert off(ours, engine) <= CLOSE
    assert off(ours, other) <= CLOSE


def test_what_it_cannot_do_is_named():
    _, step = native.stepped("images")  # a convolution of stride 2
    with pytest.raises(NotImplementedError, match="convolution"):
        stablehlo.text(stablehlo.graph(step))

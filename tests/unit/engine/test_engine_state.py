"""A run's vectors out and in."""

from __future__ import annotations

import math

import pytest
import torch

from casemate.engine import optim, state
from casemate.plan import state as form
from casemate.spec import tensors
from casemate.spec.errors import FormatError
from support import resume_lab as resume
from support.resume_lab import Case, Held

D = 37


def vectors_of(case: Case, fill: float | None = None) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    update = optim.optimizer(case.spec.optimizer, case.spec.schedule, case.steps, D)
    out = {"weights": torch.zeros(D), **update.state}
    if case.spec.ema:
        out["average"] = optim.Average(case.spec.ema, D).value
    for vector in out.values():
        if fill is None:
            vector.copy_(torch.randn(D, generator=made, dtype=torch.float64))
        else:
            vector.fill_(fill)
    return out


CASES = [Case(optimizer=o, ema=e) for o in resume.OPTIMIZERS for e in (0.0, 0.6)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.optimizer}-{c.ema}")
def test_what_goes_out_comes_in(case):
    """Bit by bit, of the names and the size that the form says."""
    plan, held = resume.plan_of(case), vectors_of(case)
    held["weights"][:3] = torch.tensor([-0.0, 1e-45, math.inf])
    data = b"".join(state.write(plan, case.spec, 3, held))
    assert held.keys() == form.vectors(case.spec).keys()
    assert len(data) == form.size(case.spec, D)
    taken = vectors_of(case, 7.0)
    assert state.read(Held(data), plan, case.spec, taken) == 3
    for name, vector in held.items():
        assert bytes(vector.numpy()) == bytes(taken[name].numpy())
        body = tensors.load(data)["vector." + name][1]
        assert bytes(body) == vector.numpy().tobytes()


def test_parts_are_the_vectors_themselves():
    """A state takes no memory of its own."""
    case = Case(optimizer="sgd", ema=0.0)
    held = vectors_of(case)
    *_, last = state.write(resume.plan_of(case), case.spec, 1, held)
    held["weights"].fill_(2.0)
    assert bytes(last) == torch.full((D,), 2.0).numpy().tobytes()


def test_nothing_is_filled_before_the_form_is_right():
    case = Case()
    plan, held = resume.plan_of(case), vectors_of(case)
    data = b"".join(state.write(plan, case.spec, 3, held))
    taken = vectors_of(case, 7.0)
    with pytest.raises(FormatError):
        state.read(Held(data[:-1]), plan, case.spec, taken)
    smaller = {n: v[:-1] for n, v in taken.items()}
    with pytest.raises(FormatError) as found:
        state.read(Held(data), plan, case.spec, smaller)
    assert found.value.code == "format.state"
    assert all(bool((v == 7.0).all()) for v in taken.values())


def test_moments_have_their_own_names():
    """After one step of Adam: (1 - b1) g and (1 - b2) g^2; of SGD with momentum: g."""
    gradient = torch.tensor([3.0, -0.5])
    for name, wanted in (
        ("adamw", {"mean": gradient * 0.1, "square": gradient**2 * 0.001}),
        ("nesterov", {"velocity": gradient}),
        ("sgd", {}),
    ):
        spec = Case(optimizer=name).spec
        update = optim.optimizer(spec.optimizer, spec.schedule, 9, 2)
        update(torch.zeros(2), gradient.clone(), 0)
        assert update.state.keys() == wanted.keys()
        for n, vector in wanted.items():
            assert torch.allclose(update.state[n], vector, rtol=1e-5)

"""The engine as a library: the same engine, its accountant, what is refused."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import casemate.engine as ce
from casemate.accounting import pld, rdp
from casemate.engine.private import Private
from casemate.spec.errors import CasemateError, UsageError
from casemate.spec.job import DpEvent, Sgd

ROWS = 240


def data(rows: int = ROWS, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=made).clamp(-4, 4)
    return {"input": x, "target": (x[:, 0] > 0).long()}


def model() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def sgd(module: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), **{"lr": 0.5, **settings})


def make(module: nn.Module | None = None, **changed: Any) -> Private:
    module = module or model()
    given: dict[str, Any] = {
        "loss": "cross_entropy", "optimizer": None, "data": data(), "batch_size": 24, "steps": 6,
        "epsilon": 2.0, "delta": 1e-4,
    }  # fmt: skip
    given |= changed
    if given["optimizer"] is None:
        given["optimizer"] = sgd(module)
    return Private(module, **given)


def test_it_learns_within_its_epsilon() -> None:
    module = model()
    private = make(module, optimizer=sgd(module, momentum=0.9), steps=30, epsilon=8.0)
    before = module[0].weight.clone()
    assert private.epsilon == 0.0
    spent = []
    for done in private:
        spent.append(private.epsilon)
        assert private.done == done
        if done == 3:
            assert torch.equal(module[0].weight, before), "weights come by pull, or at the end"
            private.pull()
            assert not torch.equal(module[0].weight, before)
    assert len(spent) == private.steps == 30
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert 7.98 <= spent[-1] <= 8.0
    test = data(2000, seed=1)
    assert (module(test["input"]).argmax(1) == test["target"]).float().mean() > 0.8


def test_it_is_the_servers_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same key, the same bits as the loop of a job."""
    from casemate.engine import rows, train
    from casemate.seams import OsRng

    key = bytes(range(32))
    monkeypatch.setattr(OsRng, "bytes", lambda self, n: key[:n])
    seen: dict[str, Any] = {}
    real = rows.assemble

    def assemble(*given: Any) -> Any:
        seen["rows"] = real(*given)
        return seen["rows"]

    monkeypatch.setattr("casemate.engine.private.assemble", assemble)
    module, twin = make(), make()
    got = module.train().state_dict()
    wanted = train.train(
        twin.plan, twin.execution, twin.spec, twin.ready.program, seen["rows"], key,
        keep=twin.ready.keep, fast=twin.ready.fast,
    )  # fmt: skip
    assert set(wanted) == set(got)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_the_key_is_fresh() -> None:
    one, two = (make().train().state_dict() for _ in range(2))
    assert not torch.equal(one["0.weight"], two["0.weight"])


def test_epsilon_is_the_accountants() -> None:
    private = make(epsilon=None, noise_multiplier=1.25, steps=9)
    assert private.plan.noise_multiplier == 1.25
    extra = private.plan.delta_truncation + private.plan.delta_sampler
    private.step()
    private.step()
    events = [DpEvent(rate=0.1, noise_multiplier=1.25, steps=2)]
    assert private.epsilon == rdp.epsilon(rdp.curve(events[0]), 1e-4 - extra)
    pytest.importorskip("dp_accounting")
    assert private.spent(2, "pld") == pld.epsilon(events, 1e-4 - extra) < private.epsilon


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_calibration_is_tight(accountant: Any) -> None:
    if accountant == "pld":
        pytest.importorskip("dp_accounting")
    private = make(accountant=accountant, steps=50)
    cost = private.quote()
    assert cost.epsilon <= 2.0 and cost.accountant == accountant
    more = ce.noise_for(0.1, 50, cost.epsilon * 1.01, 1e-4, accountant)
    assert more < cost.noise_multiplier
    less = DpEvent(rate=0.1, noise_multiplier=cost.noise_multiplier * (1 - 2**-9), steps=50)
    at = 1e-4 * (1 - 2e-4)
    found = rdp.epsilon(rdp.curve(less), at) if accountant == "rdp" else pld.epsilon([less], at)
    assert found > 2.0


def test_quote_says_all_before_any_step() -> None:
    private = make(epochs=2, steps=None)
    cost = private.quote()
    assert (cost.steps, cost.units, cost.rate) == (20, ROWS, 0.1)
    assert cost.parameters == 44
    assert cost.sigma >= cost.noise_multiplier * cost.clip
    assert cost.seconds > 0 and cost.bytes > 0 and cost.path
    text = str(cost)
    assert "epsilon 2 at delta 0.0001" in text and "20 steps" in text and cost.path[0] in text
    assert private.done == 0 and "0 of 20" in repr(private)


def test_no_step_after_the_last() -> None:
    private = make(steps=1)
    private.step()
    with pytest.raises(UsageError) as e:
        private.step()
    assert e.value.code == "usage.steps"
    assert list(private) == []


def test_a_step_that_fails_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    private = make()

    def broken(step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(private, "_run", broken)
    with pytest.raises(KeyboardInterrupt):
        private.step()
    assert private.done == 1 and private.epsilon > 0


def test_one_thread_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    try:
        private = make(steps=1)
        assert torch.get_num_threads() == 2
        seen = []
        run = private._run
        take = run._take

        def counted(step: int) -> None:
            seen.append(torch.get_num_threads())
            take(step)

        monkeypatch.setattr(run, "_take", counted)
        private.train()
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_of_each_person_the_first_rows() -> None:
    who = torch.arange(ROWS).flip(0) // 3 * 7  # ids need be neither sorted nor small
    private = make(unit=who, rows_per_unit=2, batch_size=8)
    schema = private.schema
    assert (schema.units, schema.rows, schema.rows_per_unit) == (80, 160, 2)
    assert private.quote().rate == 0.1 and private.quote().units == 80
    kept = private.rows
    everything = data()["input"]
    for unit in range(80):
        mine = torch.nonzero(who == 7 * unit)[:2, 0]
        assert torch.equal(kept.inputs["input"][kept.of_unit(unit)], everything[mine])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no price": ({"epsilon": None}, "usage.value"),
    "two prices": ({"noise_multiplier": 1.0}, "usage.value"),
    "delta": ({"delta": 0.5}, "usage.value"),
    "clip": ({"clip": 0.0}, "usage.value"),
    "accountant": ({"accountant": "prv"}, "usage.value"),
    "no steps": ({"steps": 0}, "usage.steps"),
    "steps and epochs": ({"epochs": 1}, "usage.steps"),
    "batch": ({"batch_size": ROWS + 1}, "usage.value"),
    "batch of none": ({"batch_size": 0}, "usage.value"),
    "optimizer": ({"optimizer": "sgd"}, "usage.optimizer"),
    "other optimizer": ({"optimizer": torch.optim.Adagrad([nn.Parameter(torch.ones(1))])},
                        "usage.optimizer"),
    "others' parameters": ({"optimizer": sgd(model())}, "usage.optimizer"),
    "loss": ({"loss": "hinge"}, "model.loss"),
    "no rows": ({"data": {"input": torch.zeros(0, 4)}}, "usage.value"),
    "loader": ({"data": [1, 2]}, "usage.value"),
    "ragged": ({"data": {**data(), "target": torch.zeros(3)}}, "usage.value"),
    "doubles": ({"data": {**data(), "input": data()["input"].double()}}, "model.dtype"),
    "large": ({"data": {**data(), "input": data()["input"] * 100}}, "data.bounds"),
    "nan": ({"data": {**data(), "input": data()["input"] * math.nan}}, "data.not-finite"),
    "bounds of nothing": ({"bounds": {"x": (0, 1)}}, "usage.value"),
    "reversed bounds": ({"bounds": {"input": (1, 0)}}, "usage.value"),
    "k alone": ({"rows_per_unit": 2}, "usage.value"),
    "unit": ({"unit": torch.zeros(3)}, "usage.value"),
    "path": ({"path": "fast"}, "usage.value"),
    "memory": ({"memory": 1 << 20}, "limit.memory"),
    "schedule": ({"schedule": torch.optim.lr_scheduler.CyclicLR(sgd(model()), 0.1, 0.2)},
                 "usage.schedule"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_code(name: str) -> None:
    changed, code = REFUSED[name]
    with pytest.raises(CasemateError) as e:
        make(**changed)
    assert e.value.code == code
    assert e.value.message and e.value.mend


def test_models_are_refused_by_name() -> None:
    mixing = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(CasemateError) as e:
        make(mixing)
    assert e.value.code == "model.batchnorm" and e.value.where == "1"
    make(ce.groupnorm(mixing), steps=1).train()


def test_frozen_parameters_stay() -> None:
    module = model()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    trained = [p for p in module.parameters() if p.requires_grad]
    private = make(module, optimizer=torch.optim.AdamW(trained, lr=0.1))
    assert private.quote().parameters == 14
    private.train()
    assert torch.equal(module[0].weight, before)


def test_values_of_a_job_will_do() -> None:
    own = make(optimizer=Sgd(lr=0.1), loss=lambda out, y: (out[:, 0] - y) ** 2,
               data={"input": data()["input"], "target": torch.rand(ROWS)})  # fmt: skip
    own.train()


def test_the_door_is_light() -> None:
    code = "import sys, casemate.engine as ce; dir(ce); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError):
        ce.nothing  # noqa: B018


@pytest.mark.parametrize("path", ["record", "auto"])
def test_the_average_is_what_it_shows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The debiased average of the weights after each step, in float64 by its definition; epsilon
    is as without it."""
    from casemate.seams import OsRng

    monkeypatch.setattr(OsRng, "bytes", lambda self, n: bytes(range(32))[:n])
    plain, private = make(path=path, steps=8), make(path=path, steps=8, ema=0.7)
    seen: list[torch.Tensor] = []
    for _ in plain:
        seen.append(plain.pull().state_dict()["0.weight"].double().clone())
        private.step()
        weights = [0.7 ** (len(seen) - 1 - s) for s in range(len(seen))]
        wanted = sum(w * t for w, t in zip(weights, seen, strict=True)) / sum(weights)
        got = private.pull().state_dict()["0.weight"]
        assert got.dtype == torch.float32 and private.epsilon == plain.epsilon
        assert torch.allclose(got.double(), wanted, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(got, seen[-1].float(), atol=1e-3)


@pytest.mark.parametrize("form", ["per-layer", "automatic"])
def test_a_form_of_the_clip_costs_the_same_and_learns(form: Any) -> None:
    module = model()
    flat = make(steps=30, epsilon=8.0)
    private = make(
        module, optimizer=sgd(module, lr=0.3, momentum=0.9), steps=30, epsilon=8.0, clipping=form
    )
    assert (private.plan.clipping, private.plan.gamma) == (form, 0.01 * (form == "automatic"))
    assert private.plan.sensitivity == flat.plan.sensitivity
    assert private.quote().epsilon == flat.quote().epsilon
    assert form in str(private.quote()) and private.quote().clipping == form
    private.train()
    test = data(2000, seed=1)
    assert (module(test["input"]).argmax(1) == test["target"]).float().mean() > 0.8


@pytest.mark.parametrize(
    "bad", [{"clipping": "ghost"}, {"gamma": 0.0}, {"ema": 1.0}, {"ema": -0.1}, {"ema": math.nan}]
)
def test_what_is_no_choice_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as e:
        make(**bad)
    assert e.value.code == "usage.value"


def public(rows: int = 500) -> nn.Sequential:
    """An encoder and a head, trained without privacy on rows of others."""
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2))
    other = data(rows, seed=7)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(other["input"]), other["target"]).backward()
        optimizer.step()
    return net


def test_a_warm_start_from_public_weights() -> None:
    """They are where the run begins, all of them trained on from there."""
    torch.manual_seed(0)
    net = public()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    make(net, optimizer=sgd(net, lr=0.0)).train()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    test = data(2000, seed=1)

    def accuracy() -> float:
        return float((net(test["input"]).argmax(1) == test["target"]).float().mean())

    warm = accuracy()
    make(net, optimizer=sgd(net, lr=0.02), epsilon=1.0).train()
    assert not any(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert accuracy() > warm - 0.05 > 0.8


@pytest.mark.parametrize("path", ["record", "auto"])
def test_a_warm_start_from_public_features(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen encoder in the model is the head alone on what the encoder makes of the rows, and
    it is evaluated once a row."""
    from casemate.seams import OsRng

    monkeypatch.setattr(OsRng, "bytes", lambda self, n: bytes(range(32))[:n])
    torch.manual_seed(0)
    net = public()
    net[0].requires_grad_(False)
    frozen = {n: t.clone() for n, t in net[0].state_dict().items()}
    head = nn.Linear(6, 2)
    head.load_state_dict(net[1].state_dict())
    given = {"steps": 12, "path": path, "clipping": "per-layer"}
    whole = make(net, optimizer=torch.optim.SGD(net[1].parameters(), lr=0.5), **given)
    assert whole.ready.keep and whole.quote().parameters == 14
    whole.train()
    rows = data()
    alone = make(head, data={"input": net[0](rows["input"]).detach(), "target": rows["target"]},
                 optimizer=sgd(head), **given)  # fmt: skip
    alone.train()
    assert all(torch.equal(t, frozen[n]) for n, t in net[0].state_dict().items())
    # The paths account other sensitivities, so that their noise differs in size.
    near = 1e-5 if whole.ready.path == alone.ready.path else 0.05
    assert torch.allclose(net[1].weight, head.weight, atol=near)
    assert torch.allclose(net[1].bias, head.bias, atol=near)

"""The engine's benchmark: peers compute what they say, and what is measured is what is told."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.engine import __main__ as command  # noqa: E402
from benchmarks.engine import joint, measure, peers, report  # noqa: E402
from benchmarks.engine.measure import Timed  # noqa: E402
from benchmarks.engine.workloads import ALL, BY_ID, Workload  # noqa: E402


def _small(made: list[nn.Module], convolutional: bool = False) -> Workload:
    """A workload of seconds whose modules are put in ``made``."""

    def module() -> nn.Module:
        body: list[nn.Module] = [nn.Linear(6, 64), nn.ReLU()]
        if convolutional:
            body = [nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(2, 64), nn.ReLU()]
            body += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        made.append(nn.Sequential(*body, nn.Linear(64, 3)))
        return made[-1]

    shape = (3, 4, 4) if convolutional else (6,)
    return Workload(
        "small", "small", 5, module, lambda n: (torch.randn(n, *shape),), 3, convolutional
    )


def _change(workload: Workload, made: list[nn.Module], peer: str, steps: int) -> torch.Tensor:
    """How one step of ``peer`` changes the weights, flat."""
    step = next(p for p in peers.ALL if p.id == peer).build(workload)
    for _ in range(steps):
        step()
    before = workload.make()
    pairs = zip(made[-2].parameters(), before.parameters(), strict=True)
    return torch.cat([(a - b).detach().flatten() for a, b in pairs])


PRIVATE = ("opacus ghost", "opacus functorch", "opacus hooks", "opacus ew", "vmap(grad)")


@pytest.mark.parametrize("convolutional", [False, True])
def test_every_peer_takes_the_same_step(monkeypatch: pytest.MonkeyPatch, convolutional: bool):
    monkeypatch.setattr(peers, "NOISE_MULTIPLIER", 0.0)
    monkeypatch.setattr(peers, "CLIP", 1e6)
    made: list[nn.Module] = []
    workload = _small(made, convolutional)
    expected = _change(workload, made, "eager", 1)
    assert expected.norm() > 1e-4
    more = ("eager channels_last", "graph channels_last") if convolutional else ()
    for peer in (*PRIVATE, "graph", *more):
        found = _change(workload, made, peer, 0 if peer.startswith("graph") else 1)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8), peer


def test_private_peers_clip_alike_and_add_noise(monkeypatch: pytest.MonkeyPatch):
    made: list[nn.Module] = []
    workload = _small(made)
    monkeypatch.setattr(peers, "CLIP", 0.1)
    noisy = {p: _change(workload, made, p, 1) for p in PRIVATE}
    monkeypatch.setattr(peers, "NOISE_MULTIPLIER", 0.0)
    clipped = {p: _change(workload, made, p, 1) for p in PRIVATE}
    plain = _change(workload, made, "eager", 1)
    for peer in PRIVATE:
        assert torch.allclose(clipped[peer], clipped["vmap(grad)"], rtol=1e-3, atol=1e-9), peer
        assert clipped[peer].norm() < 0.9 * plain.norm()
        # sigma = 0.1 a coordinate of the sum, over the batch and times the rate
        spread = (noisy[peer] - clipped[peer]).std() * workload.batch / peers.LEARNING_RATE
        assert 0.07 < float(spread) < 0.13, peer


@pytest.mark.full
@pytest.mark.parametrize("convolutional", [False, True])
def test_compiled_peers_take_the_same_step(convolutional: bool):
    made: list[nn.Module] = []
    workload = _small(made, convolutional)
    expected = _change(workload, made, "eager", 1)
    for peer in ("inductor", "torch.compile"):
        found = _change(workload, made, peer, 0)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8), peer


def test_products_by_onednn_are_the_same_products(monkeypatch: pytest.MonkeyPatch):
    made: list[nn.Module] = []
    workload = _small(made)
    module, (inputs, target) = workload.make(), workload.data()
    graph, held = joint.trace(module, inputs, target)
    before = graph(*held, *inputs, target)
    turn = iter(range(1000))
    # the micro-benchmark finds each later way faster: the turned product, or oneDNN with a bias
    monkeypatch.setattr(joint, "_seconds", lambda call: (call(), -next(turn))[1])
    assert joint.choose_products(graph) == {"mkl": 0, "onednn": 5}
    for a, b in zip(before, graph(*held, *inputs, target), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("convolutional", [False, True])
def test_products_in_bf16_are_rounded_and_close(
    monkeypatch: pytest.MonkeyPatch, convolutional: bool
):
    made: list[nn.Module] = []
    workload = _small(made, convolutional)
    module, (inputs, target) = workload.make(), workload.data()
    graph, held = joint.trace(module, inputs, target)
    before = graph(*held, *inputs, target)
    turn = iter(range(1000))
    monkeypatch.setattr(joint, "_seconds", lambda call: (call(), -next(turn))[1])
    assert joint.choose_bf16(graph) == 5
    after = graph(*held, *inputs, target)
    assert {t.dtype for t in after} == {torch.float32}
    head = list(zip(after, before, strict=True))[-2:]  # no ReLU between
    assert 1e-5 < max(float((a - b).norm() / b.norm()) for a, b in head) < 0.02


def test_workloads_are_those_of_the_table():
    assert tuple(w.id for w in ALL) == report.ORDER
    assert set(command.SECONDS) == set(report.ORDER)
    counts = {w: sum(p.numel() for p in BY_ID[w].make().parameters()) for w in report.ORDER[:5]}
    assert counts["mlp"] == 669_706
    assert 11.1e6 < counts["resnet18"] < 11.3e6
    assert 3.9e6 < counts["efficientnet_b0"] < 4.1e6


def test_rounds_fill_the_time_and_slow_ones_take_part_twice():
    costs = {"eager": 1.0, "casemate": 1.0, "slow": 100.0, "quick": 0.001}
    rounds, parts = measure.rounds_of(costs, ["eager", "casemate"], 20.0)
    assert rounds == 6
    assert parts == {"eager": 6, "casemate": 6, "slow": 2, "quick": 6}
    assert measure.rounds_of(costs, ["eager", "casemate"], 0.1)[0] == 3


def test_each_variant_runs_in_its_share_of_the_rounds():
    ran: list[str] = []
    steps = {n: (lambda n=n: ran.append(n)) for n in ("eager", "slow")}
    found = measure.in_rounds(steps, {"eager": 1.0, "slow": 4.0}, ["eager"], 10.0)
    assert ran.count("eager") == 6
    assert ran.count("slow") == 2
    assert len(found["slow"].cpu) == 6
    assert sum(v is not None for v in found["slow"].cpu) == 2


def test_ratios_are_paired_within_rounds():
    a = Timed(cpu=[2.0, None, 40.0, 6.0])
    b = Timed(cpu=[1.0, 5.0, 20.0, 2.0])
    found = measure.ratio(a, b)
    assert found is not None
    assert (found["median"], found["rounds"]) == (2.0, 3)
    assert found["low"] <= 2.0 <= found["high"]
    assert measure.ratio(Timed(cpu=[None]), Timed(cpu=[1.0])) is None


def test_bytes_are_those_of_the_allocator(tmp_path: Path):
    made = command.counter(tmp_path)
    if made is None:
        pytest.skip("no C compiler")
    code = """
import json, torch
from benchmarks.engine.measure import Bytes
b = Bytes()
x = torch.zeros(1_000_000)
start = b.tensors()
y = torch.zeros(2_000_000)
held = b.tensors() - start
peak = b.peak(lambda: (x + 1) * 2)
del y
print(json.dumps([b.there, held, peak, b.tensors() - start]))
"""
    env = command.environment(tmp_path, "raised", made)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    there, held, peak, left = json.loads(done.stdout)
    assert there
    assert abs(held - 8_000_000) < 10_000
    assert abs(peak - 8_000_000) < 100_000
    assert abs(left) < 10_000


@pytest.mark.full
def test_a_run_of_processes():
    options = command.arguments(["--quick", "--only=logreg", "--peers=eager", "--seconds=1"])
    (found,) = command.run(options)
    assert found["workload"] == "logreg"
    assert found["variants"]["eager"]["ms"] > 0
    assert found["variants"]["eager"]["over_eager"]["median"] == 1.0
    for key in ("step_over_eager", "step_over_n", "memory_over_eager", "opacus_best_over_step"):
        assert key in found
    assert "logistic regression" in report.table([found])


def test_what_was_not_measured_is_null_and_says_so():
    options = command.arguments(["--quick"])
    dead = report.summary("mlp", {"error": "killed\nat once"}, options)
    assert dead["step_over_n"] is None
    assert "killed" in report.table([dead])
    assert report.NOT_MEASURED in report.table([dead])


def test_tables_take_the_place_of_older_ones(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for text in ("one", "two"):
        report.put(page, text)
    assert page.read_text() == f"before\n{report.BEGIN}\n\ntwo\n\n{report.END}\nafter\n"
    assert report.BEGIN in command.PAGE.read_text()


def test_unknown_workloads_are_refused():
    with pytest.raises(SystemExit):
        command.arguments(["--only", "resnet50"])


def test_a_step_far_behind_is_told_by_one_step():
    run = measure.Run.__new__(measure.Run)
    run.peers = {p.id: p for p in peers.ALL}
    costs = {"eager": 9.0, "graph": 1.0, "inductor": 1.3, "opacus ew": 1.0, "opacus hooks": 2.0}
    run._drop(costs, ("eager", "n"), measure.DROP_N)
    run._drop(costs, ("opacus",), measure.DROP_OPACUS)
    assert list(costs) == ["eager", "graph", "opacus ew"]
    assert dataclasses.is_dataclass(peers.Peer)

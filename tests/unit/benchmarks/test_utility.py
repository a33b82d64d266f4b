"""The parts of the accuracy benchmark, on made-up records: no data set is needed."""

from __future__ import annotations

import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.utility import __main__ as command  # noqa: E402
from benchmarks.utility import fashion, jobs, report, sms  # noqa: E402
from benchmarks.utility.features import Classifier, Features, Scattering, made_up  # noqa: E402
from benchmarks.utility.jobs import Part, Recipe, Result  # noqa: E402

from casemate.spec.job import Dp  # noqa: E402

WIDTH = 12


@pytest.fixture(scope="module")
def extractor() -> Features:
    torch.set_num_threads(1)
    return Features(WIDTH, 40)


def images(count: int, seed: int) -> Part:
    """Two classes that one can tell apart: what is in the upper half, or in the lower."""
    target = torch.arange(count) % 2
    made = made_up(count, seed)
    made[target == 0, :, 14:] = 0
    made[target == 1, :, :14] = 0
    return Part({"image": made}, target)


def test_wavelets_see_no_constant_and_scattering_no_shift_beyond_its_grid() -> None:
    scattering = Scattering()
    assert scattering.fine.sum((1, 2, 3)).abs().max() < 1e-5
    assert scattering.coarse.sum((1, 2, 3)).abs().max() < 1e-5
    image = torch.zeros(1, 1, 28, 28)
    image[..., 8:16, 8:16] = 1
    here = scattering(image).reshape(81, 7, 7)
    there = scattering(image.roll((4, 4), (2, 3))).reshape(81, 7, 7)
    assert here.shape == (81, 7, 7)
    # Four pixels are one place on the grid, away from the image's border.
    torch.testing.assert_close(here[:, 1:4, 1:4], there[:, 2:5, 2:5], rtol=1e-3, atol=1e-4)


def test_second_order_applies_each_wavelet_to_each_first_modulus() -> None:
    scattering = Scattering()
    image = made_up(3, seed=5).float() / 255
    found = scattering(image).reshape(3, 81, 7, 7)[:, 17:]
    first = nn.functional.conv2d(image, scattering.fine, padding=4)
    first = (first[:, :8].square() + first[:, 8:].square()).sqrt()
    for place in (0, 3, 7):
        deep = nn.functional.conv2d(first[:, place : place + 1], scattering.coarse, None, 2, 6)
        deep = (deep[:, :8].square() + deep[:, 8:].square()).sqrt()
        window = scattering.narrow.repeat(8, 1, 1, 1)
        wanted = nn.functional.conv2d(deep, window, None, 2, 4, groups=8)
        torch.testing.assert_close(found[:, 8 * place : 8 * place + 8], wanted)


def test_whitening_comes_from_made_up_images_alone_and_evens_out_features(
    extractor: Features,
) -> None:
    again = Features(WIDTH, 40)
    assert torch.equal(extractor.whitening, again.whitening)
    with torch.no_grad():
        raw = extractor.raw(made_up(40)) - extractor.mean
        variances = (raw @ extractor.whitening).var(0)
    assert variances.max() / variances.min() < 1.5
    assert raw.var(0).max() / raw.var(0).min() > 5


def test_features_inside_the_engine_are_those_outside(extractor: Features) -> None:
    part = images(70, 3)
    seen = jobs.features(extractor, part)
    assert torch.allclose(seen.inputs["input"].norm(dim=1), torch.ones(70))
    whole = Classifier(extractor, WIDTH, 2)
    nn.init.normal_(whole.head.weight)
    alone = nn.Linear(WIDTH, 2, bias=False)
    alone.load_state_dict(whole.head.state_dict())
    assert jobs.accuracy(whole, part) == jobs.accuracy(alone, seen)


@pytest.mark.parametrize("inside", [True, False])
def test_a_private_job_learns_and_is_charged(extractor: Features, inside: bool) -> None:
    own, held_out = images(80, 1), images(40, 2)
    recipe = Recipe(batch=40, steps=12, clip=0.5, lr=0.2, lr_most=2.0, lr_plain=2.0)
    if inside:
        module: nn.Module = Classifier(extractor, WIDTH, 2)
    else:
        own, held_out = (jobs.features(extractor, p) for p in (own, held_out))
        module = nn.Linear(WIDTH, 2, bias=False)
        nn.init.zeros_(module.weight)
    found = jobs.run(module, own, held_out, recipe, 50.0, fashion.BOUNDS, 2)
    assert found.accuracy > 0.8
    assert found.dimension == 2 * WIDTH
    assert found.spent is not None and 25 < found.spent <= 50
    assert found.noise_multiplier > 0


def test_more_epsilon_is_less_noise_and_a_higher_rate() -> None:
    specs = [fashion.RECIPE.spec(e, 60_000) for e in (0.5, 1.0, 8.0)]
    rates = [s.optimizer.lr for s in specs]
    assert rates == sorted(rates) and rates[-1] == fashion.RECIPE.lr_most
    asked = [s.privacy for s in specs if isinstance(s.privacy, Dp)]
    assert [(p.epsilon, p.delta) for p in asked] == [(0.5, 1e-5), (1.0, 1e-5), (8.0, 1e-5)]
    assert fashion.RECIPE.spec(None, 100).batch_size == 100


def idx(folder: Path, kind: str, count: int) -> None:
    pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
    labels = np.arange(count, dtype=np.uint8)
    for name, header, body in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        path = folder / f"{kind}-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(bytes(header) + body.tobytes()))


def test_validation_leaves_the_test_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "VALIDATION", 3)
    idx(tmp_path, "train", 9)
    own, held_out = fashion.parts(tmp_path, validate=True)  # there are no test images
    assert own.target.tolist() == [0, 1, 2, 3, 4, 5]
    assert held_out.target.tolist() == [6, 7, 8]
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion.parts(tmp_path, validate=False)
    idx(tmp_path, "t10k", 4)
    own, held_out = fashion.parts(tmp_path, validate=False)
    assert (len(own), held_out.inputs["image"].shape) == (9, (4, 1, 28, 28))


def test_splits_of_messages_share_none() -> None:
    part = Part({"input": torch.arange(50.0)[:, None]}, torch.arange(50) % 2)
    own, held_out = (p.inputs["input"].flatten().tolist() for p in sms.split(part, 0, False))
    fitted, judged = (p.inputs["input"].flatten().tolist() for p in sms.split(part, 0, True))
    assert sorted(own + held_out) == list(range(50)) and len(held_out) == 10
    assert sorted(fitted + judged) == sorted(own)
    assert sms.split(part, 1, False)[1].inputs["input"].flatten().tolist() != held_out


def result(epsilon: float | None, right: float) -> dict[str, object]:
    made = Result(epsilon, epsilon, 1.5, right, 12.0, 24, ("record",))
    return dataclasses.asdict(made)


def test_the_page_and_the_chart_say_what_was_found(tmp_path: Path) -> None:
    found = {
        **report.machine(), "validate": False, "messages": 50,
        "fashion": [result(1.0, 0.81), result(2.7, 0.899), result(None, 0.91)],
        "sms": [{"seed": s, **result(1.0, r)} for s, r in enumerate((0.97, 0.99))],
    }  # fmt: skip
    text = report.tables(found)
    assert "| 2.7 | 89.90% |" in text and "| no privacy | 91.00% |" in text
    assert "| 1 | 98.00% | 97.00% | 99.00% | 2 | 12 |" in text
    page = report.splice(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", text)
    assert "old" not in page and text in page and page.endswith("after\n")
    assert report.splice(page, text) == page
    with pytest.raises(ValueError):
        report.splice("no marks", text)
    report.draw(found, tmp_path / "images" / "chart.svg")
    assert "<svg" in (tmp_path / "images" / "chart.svg").read_text("utf-8")


def test_only_a_whole_run_on_test_data_is_written() -> None:
    for argument in ("--quick", "--validate", "--only=sms", "--epsilons=1"):
        with pytest.raises(SystemExit):
            command.options(["--write", argument])
    assert command.options(["--write"]).write

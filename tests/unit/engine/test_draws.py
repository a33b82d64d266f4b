"""What the server draws: its law, what it depends on, and views of images."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from casemate.engine import draws, keystream, views
from casemate.engine.draws import Draws
from casemate.engine.rows import Rows
from casemate.graph.model import InputSpec, Size
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import PlanError
from casemate.spec.job import Crop, Flip, InputBinding, Views

KEY = b"\x05" * 32
FALSE_ALARM = 1e-6


def spec(name: str, rate: float, *shape: int) -> InputSpec:
    return InputSpec(name=name, kind="random", dtype="f32", shape=(Size(a=1), *shape), rate=rate)


def rows(starts: list[int], per_unit: int, order: list[int] | None = None) -> Rows:
    count = starts[-1]
    found = np.arange(count) if order is None else np.array(order)
    return Rows({}, np.ones(count, dtype=bool), found, np.array(starts), per_unit)


def drawn(
    made: Draws, who: list[int], view: list[int] | None = None, step: int = 0
) -> dict[str, torch.Tensor]:
    made.step = step
    buffers = {s.name: torch.full((len(who), *s.shape[1:]), 7.0) for s in made.random}
    made.fill(buffers, np.array(who), np.zeros(len(who), int) if view is None else np.array(view))
    return buffers


def test_scattered_blocks_are_those_of_the_stream() -> None:
    stream = keystream.blocks(KEY, 3, 0, 600)
    numbers = np.array([0, 599, 17, 18], dtype=np.uint64)
    found = keystream.scattered(KEY, 3, numbers)
    for number, block in zip(numbers, found, strict=True):
        assert block.tobytes() == stream[16 * int(number) : 16 * int(number) + 16]
    far = np.array([2**64 - 1], dtype=np.uint64)
    assert keystream.scattered(KEY, 3, far).tobytes() == keystream.blocks(KEY, 3, 2**64 - 1, 1)


def test_long_values_are_of_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made = draws.of_job(
        KEY, rows([0, 1, 2, 3], 1), [spec("a", 0.3, 700), spec("b", 0.3, 9)], Views()
    )
    assert made is not None
    first = drawn(made, [2, 0])
    monkeypatch.setattr(draws, "_LONG", 2)
    monkeypatch.setattr(draws, "_CHUNK", 3)
    again = drawn(made, [2, 0])
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_law_of_a_mask(rate: float) -> None:
    """Each element is kept with probability 1 - p: over all, by element, by record, and pairwise.

    Two-sided at a false alarm of 1e-6 in all, the binomial as a normal of n p (1 - p) >= 10."""
    count, width, steps = 64, 40, 40
    made = draws.of_job(KEY, rows(list(range(count + 1)), 1), [spec("m", rate, width)], Views())
    assert made is not None
    kept = torch.stack([drawn(made, list(range(count)), step=t)["m"] for t in range(steps)])
    gain = np.float32(1 / (1 - rate))
    assert set(kept.unique().tolist()) == {0.0, float(gain)}
    bits = (kept != 0).double()
    shifted = [bits.roll(1, dims=d) for d in range(3)]
    counts = [bits.sum().view(1)]
    if rate > 0.01:
        counts += [bits.sum((0, 1)), bits.sum((0, 2)), bits.sum((1, 2))]
    comparisons = sum(c.numel() for c in counts) + 3
    quantile = NormalDist().inv_cdf(1 - FALSE_ALARM / comparisons / 2)
    for c in counts:
        n = bits.numel() / c.numel()
        assert (c - n * (1 - rate)).abs().max() < quantile * math.sqrt(n * rate * (1 - rate)) + 1
    if rate > 0.01:
        for other in shifted:
            together = ((bits - (1 - rate)) * (other - (1 - rate))).sum()
            assert abs(float(together)) < quantile * math.sqrt(bits.numel()) * rate * (1 - rate) + 1


def test_a_draw_belongs_to_step_unit_place_and_view() -> None:
    of = [spec("a", 0.5, 4, 30), spec("b", 0.5, 64)]
    made = draws.of_job(KEY, rows([0, 2, 3, 5], 3), of, Views(count=2))
    assert made is not None
    seen = {}
    for step in range(2):
        for row in range(-1, 5):
            for view in range(2):
                found = drawn(made, [row], [view], step)
                for name, t in found.items():
                    seen[name, step, row, view] = t.numpy().tobytes()
    assert len(set(seen.values())) == len(seen)
    # The same in any company and in any place.
    company = drawn(made, [4, -1, 0, 3, 0], [1, 0, 1, 0, 0], 1)
    for name, t in company.items():
        for i, (row, view) in enumerate([(4, 1), (-1, 0), (0, 1), (3, 0), (0, 0)]):
            assert t[i].numpy().tobytes() == seen[name, 1, row, view]


def test_a_units_draws_do_not_depend_on_other_units_rows() -> None:
    """Unit 1's rows, before and after unit 0 has lost its own: places count, not rows."""
    of = [spec("a", 0.5, 64)]
    before = draws.of_job(KEY, rows([0, 2, 4], 2), of, Views())
    after = draws.of_job(KEY, rows([0, 0, 2], 2), of, Views())
    assert before is not None and after is not None
    assert torch.equal(drawn(before, [2, 3])["a"], drawn(after, [0, 1])["a"])


def test_another_key_draws_otherwise_and_nothing_asked_is_nothing_drawn() -> None:
    at = rows([0, 1], 1)
    one, other = (draws.of_job(k, at, [spec("a", 0.5, 64)], Views()) for k in (KEY, b"\x06" * 32))
    assert one is not None and other is not None
    assert not torch.equal(drawn(one, [0])["a"], drawn(other, [0])["a"])
    assert draws.of_job(KEY, at, [], Views()) is None


def test_more_than_a_stream_holds_is_refused() -> None:
    many = rows([0, 1], 2**40)
    with pytest.raises(PlanError) as e:
        draws.of_job(KEY, many, [spec("a", 0.5, 2**28)], Views(count=4))
    assert e.value.code == "plan.draws"


# Views.

WORD = 2**32


def words(*shares: float) -> np.ndarray:
    return np.array([[min(int(s * WORD), WORD - 1) for s in shares]], dtype=np.uint32)


def padded(image: torch.Tensor, crop: Crop) -> torch.Tensor:
    mode = "reflect" if crop.pad == "reflect" else "constant"
    return torch.nn.functional.pad(image, [crop.pixels] * 4, mode=mode)


IMAGE = InputSpec(name="x", kind="data", dtype="f32", shape=(Size(a=1), 3, 8, 6))
FLAT = InputSpec(name="v", kind="data", dtype="f32", shape=(Size(a=1), 3))


@pytest.mark.parametrize("pad", ["reflect", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_each_crop_is_torchs(pad: str, dtype: torch.dtype) -> None:
    image = (torch.rand(1, 3, 5, 7) * 250 + 1).to(dtype)
    crop = Crop(pixels=2, pad=pad)  # type: ignore[arg-type]
    want = padded(image.float(), crop).to(dtype)
    for y in range(5):
        for x in range(5):
            found = views.turn(image, (crop,), words((y + 0.5) / 5, (x + 0.5) / 5))
            assert found.dtype == dtype
            assert torch.equal(found, want[:, :, y : y + 5, x : x + 7])


def test_transforms_act_in_their_order_and_image_by_image() -> None:
    images = torch.rand(40, 2, 6, 5)
    both = (Crop(pixels=2, pad="zeros"), Flip(), Crop(pixels=3), Flip(chance=0.2))
    drawn = np.random.default_rng(0).integers(WORD, size=(40, 8), dtype=np.uint32)
    found = views.turn(images, both, drawn)
    for i in range(40):
        w, one = drawn[i].astype(np.uint64), images[i : i + 1]
        for t, at in zip(both, (0, 2, 3, 5), strict=True):
            if isinstance(t, Flip):
                one = one.flip(3) if int(w[at]) < t.chance * WORD else one
            else:
                y, x = (int(w[at + j]) * (2 * t.pixels + 1) >> 32 for j in range(2))
                one = padded(one, t)[:, :, y : y + 6, x : x + 5]
        assert torch.equal(found[i : i + 1], one)


def test_the_law_of_views() -> None:
    """Each of the 2 x 5 x 5 views of a picture is as likely: chi-square with 49 degrees of freedom,
    whose 1 - 1e-6 quantile is 117.1 (Wilson and Hilferty: 49 (1 - 2/441 + 4.753 (2/441)^0.5)^3)."""
    count, asked = 4000, Views(count=2, input="x", transforms=(Flip(), Crop(pixels=2, pad="zeros")))
    made = draws.of_job(KEY, rows(list(range(count + 1)), 1), [IMAGE], asked)
    assert made is not None
    picture = torch.arange(1.0, 36.0).view(1, 1, 5, 7)
    seen: dict[bytes, int] = {}
    for view in range(2):
        x = picture.repeat(count, 1, 1, 1)
        made.fill({"x": x}, np.arange(count), np.full(count, view))
        for one in x:
            key = one.numpy().tobytes()
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 50
    expected = 2 * count / 50
    statistic = sum((n - expected) ** 2 for n in seen.values()) / expected
    assert statistic < 118.0, statistic


def schema(low: float, high: float) -> DatasetSchema:
    column = Column(name="pixels", dtype="f32", shape=(3, 8, 6), low=low, high=high)
    return DatasetSchema(name="d", columns=(column,), rows=4, units=4)


BOUND = (InputBinding(input="x", columns=("pixels",)),)


@pytest.mark.parametrize(
    ("transforms", "name", "low", "said"),
    [
        ((Flip(),), "y", 0.0, "no input of images"),
        ((Flip(),), "v", 0.0, "no input of images"),
        ((Crop(pixels=6),), "x", 0.0, "8 by 6"),
        ((Flip(), Crop(pixels=1, pad="zeros")), "x", 0.5, "outside the declared bounds"),
    ],
)
def test_views_that_cannot_be_are_refused(
    transforms: tuple[Flip | Crop, ...], name: str, low: float, said: str
) -> None:
    asked = Views(count=2, input=name, transforms=transforms)
    with pytest.raises(PlanError, match=said) as e:
        views.check_views(asked, (IMAGE, FLAT), BOUND, (schema(low, 1.0),))
    assert e.value.code == "plan.views"


def test_views_that_can_be() -> None:
    asked = Views(
        count=2, input="x", transforms=(Flip(), Crop(pixels=5), Crop(pixels=2, pad="zeros"))
    )
    views.check_views(asked, (IMAGE, FLAT), BOUND, (schema(0.0, 1.0),))
    views.check_views(Views(count=3), (IMAGE, FLAT), BOUND, (schema(0.0, 1.0),))
    views.check_views(Views(transforms=(Flip(),)), (IMAGE, FLAT), BOUND, (schema(0.0, 1.0),))
    second = replace(IMAGE, name="z")
    with pytest.raises(PlanError, match="or several"):
        views.check_views(Views(transforms=(Flip(),)), (IMAGE, second), BOUND, ())
    with pytest.raises(ValueError, match="input"):
        Views(count=2, input="x")
    with pytest.raises(ValueError, match="count"):
        Views(count=0)

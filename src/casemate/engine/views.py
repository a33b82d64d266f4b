"""Views of an image: transforms drawn anew in each step (De et al. 2022, arXiv:2204.13650).

Every transform of the closed list moves pixels along the two axes of the picture, each axis by
itself, so a list of them is one look-up: for each row and column of the result, whence it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine.rows import bound_columns
from casemate.graph.model import InputSpec
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import PlanError
from casemate.spec.job import Crop, Flip, InputBinding, Views

# 32-bit words that each transform takes.
WORDS: Final[dict[type, int]] = {Flip: 1, Crop: 2}
# For each image, where each place along one axis comes from (n, size), -1: a zero.
Sources: TypeAlias = "npt.NDArray[np.int64]"


def turn(
    images: torch.Tensor, transforms: Sequence[Flip | Crop], words: npt.NDArray[np.uint32]
) -> torch.Tensor:
    """A view of each image (n, C, H, W), by its own words (n, at least those of ``WORDS``)."""
    n, _, height, width = images.shape
    ys = np.tile(np.arange(height), (n, 1))
    xs = np.tile(np.arange(width), (n, 1))
    at = 0
    for transform in transforms:
        taken = words[:, at : at + WORDS[type(transform)]]
        at += taken.shape[1]
        if isinstance(transform, Flip):
            mirrored = taken[:, :1] < np.float64(transform.chance * 2.0**32)
            xs = np.where(mirrored, xs[:, ::-1], xs)
        else:
            ys = _cut(ys, transform, taken[:, 0])
            xs = _cut(xs, transform, taken[:, 1])
    each = torch.arange(n)[:, None, None]
    rows, columns = torch.from_numpy(ys.copy())[:, :, None], torch.from_numpy(xs.copy())[:, None, :]
    made = images.permute(0, 2, 3, 1)[each, rows.clamp(min=0), columns.clamp(min=0)]
    made = made.permute(0, 3, 1, 2)
    if any(isinstance(t, Crop) and t.pad == "zeros" for t in transforms):
        made = made.masked_fill(((rows < 0) | (columns < 0))[:, None], 0)
    return made


def _cut(sources: Sources, crop: Crop, words: npt.NDArray[np.uint32]) -> Sources:
    """Padded and cut along one axis; each of the 2 pixels + 1 places within 2^-32 as likely."""
    size, pad = sources.shape[1], crop.pixels
    # The high half of a product: uniform without a loop, whose time would tell of the draw.
    shift = (words.astype(np.uint64) * np.uint64(2 * pad + 1)) >> np.uint64(32)
    place = np.arange(size) + shift.astype(np.int64)[:, None] - pad
    if crop.pad == "reflect":
        place = np.abs(place)
        return np.take_along_axis(sources, size - 1 - np.abs(size - 1 - place), axis=1)
    inside = (place >= 0) & (place < size)
    return np.where(inside, np.take_along_axis(sources, place.clip(0, size - 1), axis=1), -1)


def image(views: Views, inputs: Sequence[InputSpec]) -> InputSpec | None:
    """The input that the transforms act on: the one named, or the only one of images (C, H, W)."""
    images = [i for i in inputs if i.kind == "data" and len(i.shape) == 4]
    images = [i for i in images if i.dtype in ("f32", "u8") and views.input in ("", i.name)]
    return images[0] if views.transforms and len(images) == 1 else None


def check_views(
    views: Views,
    inputs: Sequence[InputSpec],
    bindings: Sequence[InputBinding],
    schemas: Sequence[DatasetSchema],
) -> None:
    """Refuse transforms of what is no image, or that leave its declared bounds: what is proved of
    the model's indices holds for rows within them. Raises ``PlanError`` ``plan.views``."""
    if not views.transforms:
        return
    found = image(views, inputs)
    if found is None:
        what = f"called {views.input!r}" if views.input else "or several"
        raise _refuse(
            f"The model has no input of images (C, H, W), float32 or uint8, {what}.",
            "Name the input that the images feed.",
        )
    height, width = found.shape[2:]
    for crop in (t for t in views.transforms if isinstance(t, Crop)):
        if not (isinstance(height, int) and isinstance(width, int)) or (
            crop.pixels >= min(height, width)
        ):
            raise _refuse(
                f"Images of {height} by {width} cannot be padded by {crop.pixels} pixels.",
                "Crop by fewer pixels than the image has.",
            )
        for column in bound_columns(schemas[0], found, bindings):
            low, high = column.wire_bounds or (0, 0)
            if crop.pad == "zeros" and not low <= 0 <= high:
                raise _refuse(
                    f"Zeros are outside the declared bounds of {column.name!r}.",
                    "Pad by reflection.",
                )


def _refuse(message: str, mend: str) -> PlanError:
    return PlanError("plan.views", message, mend=mend, where="train.views")

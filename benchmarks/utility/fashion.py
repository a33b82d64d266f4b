"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): a private linear head on hand-crafted features."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from benchmarks.utility import jobs
from benchmarks.utility.features import WIDTH, Classifier, Features
from benchmarks.utility.jobs import Part, Recipe, Result

FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")
HOW: Final = (
    "Fashion-MNIST is not there. On Debian or Ubuntu: apt-get install dataset-fashion-mnist;"
    " elsewhere put its four *-ubyte.gz files into a folder and give --fashion FOLDER."
)
CLASSES: Final = 10
HEADLINE: Final = 2.7
EPSILONS: Final = (0.5, 1.0, 2.0, 2.7, 4.0, 8.0)
# Published for hand-crafted features at (2.7, 1e-5): Tramer and Boneh 2021, arXiv:2011.11660.
PUBLISHED: Final = 0.897
VALIDATION: Final = 10_000
# Chosen with --validate: on the last 10,000 training images, never on the test images.
RECIPE: Final = Recipe(batch=7_500, steps=240, clip=0.3, lr=32.0, lr_most=256.0, lr_plain=128.0)
BOUNDS: Final = {"image": (0, 255), "input": (-1.0, 1.0)}


def read(folder: Path, kind: str) -> Part:
    """``kind``: ``train`` or ``t10k``. Images uint8 (n, 1, 28, 28).

    Raises ``FileNotFoundError``."""
    try:
        images = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    except FileNotFoundError as e:
        raise FileNotFoundError(HOW) from e
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    target = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return Part({"image": torch.from_numpy(pixels.copy())}, torch.from_numpy(target))


def parts(folder: Path, validate: bool) -> tuple[Part, Part]:
    """What is trained on, and what is held out: the test images, or with ``validate`` the last
    10,000 training images, so that the test images are not looked at."""
    own = read(folder, "train")
    if validate:
        places = torch.arange(len(own))
        return own.of(places[:-VALIDATION]), own.of(places[-VALIDATION:])
    return own, read(folder, "t10k")


def head(width: int) -> nn.Module:
    """A linear head alone, which starts at zero."""
    made = nn.Linear(width, CLASSES, bias=False)
    nn.init.zeros_(made.weight)
    return made


def curve(
    folder: Path, epsilons: Sequence[float], *, validate: bool = False, inside: bool = True
) -> Iterator[Result]:
    """One job for each epsilon, and one without privacy. ``inside``: the job at ``HEADLINE`` takes
    images and has the features as its frozen prefix; the others take features, computed once."""
    own, held_out = parts(folder, validate)
    extractor = Features(WIDTH)
    seen, judged = (jobs.features(extractor, part) for part in (own, held_out))
    for epsilon in (*epsilons, None):
        if inside and epsilon == HEADLINE:
            whole = Classifier(extractor, WIDTH, CLASSES)
            yield jobs.run(whole, own, held_out, RECIPE, epsilon, BOUNDS, CLASSES)
        else:
            yield jobs.run(head(WIDTH), seen, judged, RECIPE, epsilon, BOUNDS, CLASSES)

"""What every variant trains: data, model, constants. Needs numpy and torch, not casemate.

Flower's processes import this file too, in a virtual environment of their own.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
# Where Debian's package dataset-fashion-mnist puts its files.
FASHION: Final = Path("/usr/share/datasets/fashion-mnist")
CLASSES: Final = 10
SIDE: Final = 32
SHAPE: Final = (3, SIDE, SIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One epoch over ``images`` records: ``steps`` Poisson samples of ``batch`` records expected.

    ``nodes``: data owners, each with an equal share. ``noise``: noise multiplier; 0 without
    privacy. ``clip``: L2 bound on a record's gradient. ``lr``: of Adam, the same for all variants.
    """

    images: int
    test: int
    batch: int
    nodes: int = 2
    clip: float = 1.0
    noise: float = 0.0
    lr: float = 3e-4
    data: str = "fashion-mnist"
    seed: int = 0

    @property
    def rate(self) -> float:
        return min(1.0, self.batch / self.images)

    @property
    def steps(self) -> int:
        return max(1, -(-self.images // self.batch))

    def of_node(self, noise: float) -> Workload:
        """A node's own epoch: its share of the records, the same batch."""
        return dataclasses.replace(self, images=self.images // self.nodes, noise=noise)


def source(name: str) -> str:
    """``auto`` to what there is: ``fashion-mnist`` or ``synthetic``."""
    if name != "auto":
        return name
    return "fashion-mnist" if FASHION.is_dir() else "synthetic"


def load(work: Workload, part: str) -> tuple[Any, Any]:
    """``train`` or ``test``: images float32 (n, 3, 32, 32) in [-1, 1], labels int64 (n,), numpy."""
    import numpy as np

    count = work.images if part == "train" else work.test
    if work.data == "synthetic":
        return _synthetic(count, 1 if part == "train" else 2)
    stem = "train" if part == "train" else "t10k"
    with gzip.open(FASHION / f"{stem}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION / f"{stem}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    if count > len(pixels):
        raise SystemExit(f"Fashion-MNIST has {len(pixels)} {part} images, not {count}.")
    grey = np.pad(pixels[:count], ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 127.5 - 1.0
    return np.repeat(grey[:, None], 3, axis=1), labels[:count].astype(np.int64)


def _synthetic(count: int, stream: int) -> tuple[Any, Any]:
    """Ten blurred patterns with noise, so that there is something to learn."""
    import numpy as np

    patterns = np.random.default_rng(0).uniform(-1, 1, (CLASSES, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    rng = np.random.default_rng(stream)
    labels = rng.integers(CLASSES, size=count)
    noise = rng.standard_normal((count, *SHAPE), dtype=np.float32)
    images = np.clip(0.3 * patterns[labels].astype(np.float32) + 0.7 * noise, -1, 1)
    return images, labels.astype(np.int64)


def of_owner(images: Any, labels: Any, owner: int, owners: int) -> tuple[Any, Any]:
    """One owner's share: every ``owners``-th record."""
    share = len(images) // owners
    return images[owner::owners][:share], labels[owner::owners][:share]


def model(seed: int) -> Any:
    """EfficientNet-B0 (Tan and Le 2019) with GroupNorm; the same weights for the same seed.

    No activation works in place, which Opacus's hooks cannot have, and there is no dropout: all
    compute the same function.
    """
    import torch

    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    torch.manual_seed(seed)
    module = importlib.import_module("support.models").EfficientNet(CLASSES)
    for child in module.modules():
        if getattr(child, "inplace", False):
            child.inplace = False
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0
    return module


def accuracy(module: Any, work: Workload) -> tuple[float, float]:
    """The share of test images classified right, and the seconds that this took."""
    import torch

    start = time.monotonic()
    images, labels = load(work, "test")
    module.eval()
    right = 0
    with torch.no_grad():
        for at in range(0, len(labels), 256):
            found = module(torch.from_numpy(images[at : at + 256])).argmax(1).numpy()
            right += int((found == labels[at : at + 256]).sum())
    return right / len(labels), time.monotonic() - start

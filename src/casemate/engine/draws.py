"""Randomness of the training itself, which the server owns: dropout's masks, views of images.

Each draw belongs to one (step, unit, row of the unit, view): its blocks of the job's key stream are
numbered by these alone. So a record's draws are the same whatever else is sampled and whichever
slot it sits in (P13), on every path, and anyone who has the key can draw them again. What a unit
adds stays bounded for every value of the draws, and the noise has a key of its own: the guarantee
does not rest on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine import keystream, views
from casemate.engine.program import size_at
from casemate.engine.rows import Rows
from casemate.graph.model import InputSpec
from casemate.spec.errors import PlanError
from casemate.spec.job import Views

PURPOSE: Final = "draws"
_PER_BLOCK: Final = keystream.BLOCK // 4
_CHUNK: Final = 1 << 15
# Blocks of one record from which a stream of its own is quicker than enciphered counters.
_LONG: Final = 512


def of_job(key: bytes, rows: Rows, inputs: Sequence[InputSpec], asked: Views) -> Draws | None:
    """A run's draws, or ``None`` where it has none and one view of each row.

    key: the job's 32 bytes. inputs: the graph's. Raises ``PlanError``.
    """
    if all(i.kind != "random" for i in inputs) and asked == Views():
        return None
    return Draws(keystream.subkey(key, PURPOSE), rows.places(), inputs, asked)


class Draws:
    """What is drawn for the rows of a run in step ``step``, which the loop sets.

    key: the purpose's own. places (rows + 1,): the number of each row's place among all units'
    places, and, last, that of the dummy, ascending where they are those of units.
    """

    def __init__(
        self,
        key: bytes,
        places: npt.NDArray[np.int64],
        inputs: Sequence[InputSpec],
        asked: Views,
    ) -> None:
        self.key, self.step = key, 0
        self.random = [i for i in inputs if i.kind == "random"]
        self.views, self.transforms = asked.count, asked.transforms
        image = views.image(asked, inputs)
        if self.transforms and image is None:
            raise PlanError("plan.views", "The model has no such images.", mend="Name its input.")
        self.image = "" if image is None else image.name
        self._places = places
        words = sum(views.WORDS[type(t)] for t in asked.transforms)
        self._first = [_blocks(words)]  # of each random input; before them those of transforms
        for spec in self.random:
            self._first.append(self._first[-1] + _blocks(elements(spec)))
        self._each = max(1, self._first[-1])
        if (int(places[-1]) + 1) * self.views * self._each > 2**64:
            raise PlanError(
                "plan.draws",
                "A step of the job would draw more than a key stream holds.",
                mend="Ask for fewer views.",
            )

    def fill(
        self,
        buffers: Mapping[str, torch.Tensor],
        rows: npt.NDArray[np.int64],
        view: npt.NDArray[np.int64],
    ) -> None:
        """Write the random inputs, and turn the image, of these rows (n,), -1 being the dummy, in
        these views (n,). buffers: by input, contiguous, the row as axis 0; others stay."""
        place = self._places[rows].astype(np.uint64)
        start = (place * np.uint64(self.views) + view.astype(np.uint64)) * np.uint64(self._each)
        if self.transforms:
            words = self._words(start, self._first[0])
            buffers[self.image].copy_(views.turn(buffers[self.image], self.transforms, words))
        for spec, first in zip(self.random, self._first, strict=False):
            self._mask(spec, start + np.uint64(first), buffers[spec.name].view(len(rows), -1))

    def _mask(self, spec: InputSpec, start: npt.NDArray[np.uint64], out: torch.Tensor) -> None:
        count = elements(spec)
        kept = np.uint32(min(max(round((1 - spec.rate) * 2**32), 1), 2**32 - 1))
        gain = np.float32(1 / (1 - spec.rate))
        blocks = _blocks(count)
        for rows in range(0, len(start), step := max(1, _CHUNK // max(1, blocks))):
            words = self._words(start[rows : rows + step], blocks)[:, :count]
            np.multiply(words < kept, gain, out=out[rows : rows + step].numpy())

    def _words(self, start: npt.NDArray[np.uint64], blocks: int) -> npt.NDArray[np.uint32]:
        """Uniform 32-bit words (n, 4 * blocks) of the blocks that start there."""
        if blocks >= _LONG:
            made = [keystream.blocks(self.key, self.step, int(s), blocks) for s in start]
            flat = np.frombuffer(b"".join(made), dtype="<u4")
        else:
            each = np.arange(blocks, dtype=np.uint64)
            numbers = np.add.outer(start, each).reshape(-1)
            flat = keystream.scattered(self.key, self.step, numbers).view("<u4")
        return flat.reshape(len(start), blocks * _PER_BLOCK)


def elements(spec: InputSpec) -> int:
    """Of one record's value of a random input."""
    return math.prod(size_at(size) for size in spec.shape[1:])


def _blocks(words: int) -> int:
    return -(-words // _PER_BLOCK)


def samples(random: Sequence[InputSpec], count: int) -> dict[str, torch.Tensor]:
    """Made-up values of random inputs for ``count`` records, for the probes of a model."""
    made = Draws(bytes(keystream.KEY_BYTES), np.arange(count + 1), random, Views())
    out = {s.name: torch.empty(count, *(size_at(d) for d in s.shape[1:])) for s in random}
    made.fill(out, np.arange(count), np.zeros(count, dtype=np.int64))
    return out

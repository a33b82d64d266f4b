"""SMS spam (Almeida and Hidalgo 2011): the model of ``casemate demo sms``, several splits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.utility import jobs
from benchmarks.utility.jobs import Part, Recipe, Result
from casemate.cli.demo.party import load_model_names
from casemate.cli.demo.sms import messages
from casemate.client.data import text

EPSILON: Final = 1.0
SEEDS: Final = 5
LENGTH: Final = 64
AIM: Final = 0.975
RECIPE: Final = Recipe(batch=512, steps=300, clip=0.3, lr=4.0, lr_most=4.0, lr_plain=30.0)
BOUNDS: Final = {"input": (-1.0, 1.0)}
VALIDATION: Final = 0.2


def records(data: Path | None, encoder: Path | None) -> Part:
    """Every message once, as the frozen encoder's features. Raises ``UsageError`` for files that
    are absent, with what to install."""
    folder = encoder or messages.within(*messages.ENCODER, "--encoder")
    found = messages.read(data or messages.within(*messages.MESSAGES, "--sms"))
    texts, labels = text.deduplicate(found.texts, found.labels)
    tokens = {k: torch.as_tensor(v) for k, v in text.tokenize(texts, str(folder), LENGTH).items()}
    module = _model(folder)
    module.head = nn.Identity()
    return jobs.features(module, Part(tokens, torch.tensor(labels)))


def _model(folder: Path) -> Any:
    source = resources.files("casemate.cli.demo.sms").joinpath("model.py.txt")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.py"
        path.write_text(source.read_text("utf-8"), encoding="utf-8")
        return load_model_names(path).SpamClassifier(str(folder))


def split(part: Part, seed: int, validate: bool) -> tuple[Part, Part]:
    """The demo's split: four fifths to train on, one fifth held out; with ``validate`` the held-out
    messages stay unseen and a fifth of the others is judged."""
    whole = messages.Messages([str(i) for i in range(len(part))], part.target.tolist())
    own, held_out = messages.split(whole, seed)
    places, judged = ([int(t) for t in m.texts] for m in (own, held_out))
    if validate:
        cut = round(len(places) * (1 - VALIDATION))
        places, judged = places[:cut], places[cut:]
    return part.of(places), part.of(judged)


def head(width: int) -> nn.Module:
    """The demo's head."""
    made = nn.Linear(width, len(messages.CLASSES))
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def seeds(
    part: Part, count: int, epsilons: Sequence[float | None], *, validate: bool = False
) -> Iterator[tuple[int, Result]]:
    """One job for each seed (which messages are held out) and epsilon."""
    for seed in range(count):
        own, held_out = split(part, seed, validate)
        for epsilon in epsilons:
            module = head(part.inputs["input"].shape[1])
            yield (
                seed,
                jobs.run(module, own, held_out, RECIPE, epsilon, BOUNDS, len(messages.CLASSES)),
            )

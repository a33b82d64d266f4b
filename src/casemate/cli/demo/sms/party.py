"""The demo's two parties; each runs in a process of its own (:mod:`casemate.cli.demo.party`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import casemate as cm
from casemate.cli.demo.party import Answer, Party, load_model_names
from casemate.cli.demo.sms import messages
from casemate.client import receipts
from casemate.client.data import text
from casemate.spec import codec

LENGTH: Final = 64
BATCH: Final = 512
STEPS: Final = 300
LEARNING_RATE: Final = 4.0
CLIP: Final = 0.3
DELTA: Final = 1e-5


class Company(Party):
    """The data owner: tokenises the messages on their own machine, then pushes."""

    def push(self, encoder: str, scientist: str, epsilon: float) -> Iterator[Answer]:
        start = time.perf_counter()
        own = messages.read(self.home / "messages.tsv")
        tokens = text.tokenize(own.texts, encoder, LENGTH)
        yield {"stage": "tokenise", "seconds": time.perf_counter() - start}
        import numpy as np

        start = time.perf_counter()
        self.dataset = self.enclave.datasets.push(
            {**tokens, "spam": np.array(own.labels)},
            name="sms",
            label="spam",
            classes=2,
            bounds={"input_ids": (0, text.vocabulary(encoder) - 1), "attention_mask": (0, 1)},
            policy=cm.Policy([scientist]),
            budget=cm.Budget(epsilon, DELTA),
        ).id
        yield {"stage": "push", "dataset": self.dataset, "seconds": time.perf_counter() - start}

    def budget(self) -> Iterator[Answer]:
        state = self.enclave.datasets.show(self.dataset).info.budget
        assert state is not None  # an owner always sees it
        yield {"spent": state.spent_epsilon, "left": state.left_epsilon}


class Scientist(Party):
    """Trains a head on a frozen encoder, inside the enclave."""

    def prepare(self, encoder: str) -> Iterator[Answer]:
        """Load the encoder while the owner pushes."""
        self.encoder = encoder
        self.own = load_model_names(self.home / "model.py")
        self.model = self.own.SpamClassifier(encoder)
        yield {"parameters": sum(p.numel() for p in self.model.parameters())}

    def train(self, dataset: str, epsilon: float, progress: bool) -> Iterator[Answer]:
        marks = [time.perf_counter()]

        def mark() -> float:
            marks.append(time.perf_counter())
            return marks[-1] - marks[-2]

        units = self.enclave.datasets.show(dataset).info.schema.units
        quote = self.enclave.quote(
            self.model,
            [dataset],
            loss="cross_entropy",
            optimizer=cm.SGD(LEARNING_RATE, momentum=0.9),
            schedule=cm.Schedule("linear"),
            batch_size=max(1, min(BATCH, units // 4)),
            steps=STEPS,
            dp=cm.DP(epsilon, DELTA, clip=CLIP),
        )
        yield {"stage": "quote", "quote": dict(quote.summary()), "seconds": mark()}
        run = self.enclave.submit(quote).watch(progress=progress)
        yield {"stage": "train", "seconds": mark()}
        run.weights(into=self.model)
        run.save(self.home / "weights.safetensors")
        (self.home / "receipt.json").write_bytes(codec.encode(run.bundle) + b"\n")
        verified = receipts.verify_receipt(
            receipts.load_bundle(self.home / "receipt.json"),
            trust=cm.Trust.simulated(self.root),
            weights=self.home / "weights.safetensors",
            memory=cm.Memory(),
        )
        yield {
            "stage": "weights and receipt",
            "statement": verified.receipt.guarantee.statement,
            "seconds": mark(),
        }

    def judge(self) -> Iterator[Answer]:
        """Accuracy on the scientist's own held-out messages."""
        start = time.perf_counter()
        held_out = messages.read(self.home / "held_out.tsv")
        tokens: dict[str, Any] = text.tokenize(held_out.texts, self.encoder, LENGTH)
        found = self.own.predict(self.model, tokens)
        right = sum(a == b for a, b in zip(found, held_out.labels, strict=True))
        spam = sum(held_out.labels)
        yield {
            "stage": "judge",
            "accuracy": right / len(found),
            "majority": max(spam, len(found) - spam) / len(found),
            "caught": sum(a and b for a, b in zip(found, held_out.labels, strict=True)) / spam,
            "seconds": time.perf_counter() - start,
        }

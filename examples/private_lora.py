"""LoRA fine-tuning of a small transformer with privacy: python examples/private_lora.py

The encoder is trained on public sequences first, which costs no privacy; then it is frozen, and
low-rank adapters and a new head are trained on private ones, by peft's own modules. Everything is
made up here, so that nothing is downloaded. Needs transformers and peft.
"""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import casemate.engine as ce

WORDS, LENGTH = 40, 16
ROWS = int(os.environ.get("CASEMATE_EXAMPLE_ROWS", "3000"))


def sequences(rows: int, seed: int, marked: range) -> dict[str, torch.Tensor]:
    """Sequences of words, and whether at least three of them are among ``marked``."""
    made = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (rows, LENGTH), generator=made)
    found = ((words >= marked.start) & (words < marked.stop)).sum(1)
    return {"input_ids": words, "labels": (found >= 3).long()}


def encoder() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def accuracy(module: nn.Module, data: dict[str, torch.Tensor]) -> float:
    module.eval()
    with torch.no_grad():
        scores = module(input_ids=data["input_ids"]).logits
    return float((scores.argmax(1) == data["labels"]).float().mean())


def pretrain(module: nn.Module, data: dict[str, torch.Tensor], steps: int) -> None:
    """Plain training on public rows."""
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for step in range(steps):
        at = torch.arange(64) + 64 * step
        batch = {k: v[at % len(v)] for k, v in data.items()}
        optimizer.zero_grad()
        module(**batch).loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    base = encoder()
    pretrain(base, sequences(6400, seed=1, marked=range(8)), steps=200)

    train, test = (sequences(n, seed, marked=range(4, 12)) for n, seed in ((ROWS, 2), (2000, 3)))
    print(f"public task's model on the private task: {accuracy(base, test):.1%}")
    adapters = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = get_peft_model(base, adapters)
    model.eval()  # no dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    private = ce.Private(
        model,
        loss="cross_entropy",
        optimizer=torch.optim.Adam(trained, lr=1e-2),
        data={"input_ids": train["input_ids"], "labels": train["labels"]},
        batch_size=100,
        epochs=4,
        epsilon=4.0,
        delta=1e-5,
    )
    print(private.quote())
    private.train()
    print(f"accuracy: {accuracy(model, test):.1%} at epsilon {private.epsilon:.2f}")


if __name__ == "__main__":
    main()

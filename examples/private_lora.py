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

WORDS, LENGTH = 40, 12
ROWS = int(os.environ.get("CASEMATE_EXAMPLE_ROWS", "3000"))


def sequences(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def public(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Are there more of the first ten words than of the second ten?"""
    words = sequences(rows, seed)
    first, second = ((words // 10 == kind).sum(1) for kind in (0, 1))
    return {"input_ids": words, "labels": (first > second).long()}


def hidden(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Are there at least three of the first ten words?"""
    words = sequences(rows, seed)
    return {"input_ids": words, "labels": ((words // 10 == 0).sum(1) >= 3).long()}


def encoder() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def accuracy(module: nn.Module, data: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        scores = module(input_ids=data["input_ids"]).logits
    return float((scores.argmax(1) == data["labels"]).float().mean())


def pretrain(module: nn.Module, data: dict[str, torch.Tensor], steps: int) -> None:
    """Plain training on public rows."""
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for step in range(steps):
        at = torch.arange(64) + 64 * step
        batch = {k: v[at % len(v)] for k, v in data.items()}
        optimizer.zero_grad()
        module(**batch).loss.backward()
        optimizer.step()


def main() -> None:
    torch.set_num_threads(1)  # so small that more would wait for each other
    torch.manual_seed(0)
    base = encoder()
    pretrain(base, public(6400, seed=1), steps=200)

    train, test = hidden(ROWS, seed=2), hidden(2000, seed=3)
    print(f"accuracy of the public model: {accuracy(base, test):.1%}")
    adapters = LoraConfig(
        r=4, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = get_peft_model(base, adapters)
    trained = [p for p in model.parameters() if p.requires_grad]
    private = ce.Private(
        model,
        loss="cross_entropy",
        optimizer=torch.optim.Adam(trained, lr=1e-2),
        data=train,
        batch_size=100,
        epochs=1,
        epsilon=4.0,
        delta=1e-5,
    )
    print(private.quote())
    private.train()
    print(f"accuracy after LoRA: {accuracy(model, test):.1%} at epsilon {private.epsilon:.2f}")


if __name__ == "__main__":
    main()

"""Private training in a few lines, without any server: python examples/private_training.py

A made-up survey: 24 answers of each person, and which of three groups they are in.
"""

from __future__ import annotations

import torch
from torch import nn

import casemate.engine as ce


def survey(people: int, seed: int) -> dict[str, torch.Tensor]:
    """Answers in [-4, 4] and groups, by a rule that is the same for every seed."""
    made = torch.Generator().manual_seed(seed)
    answers = torch.randn(people, 24, generator=made).clamp(-4, 4)
    rule = torch.randn(24, 3, generator=torch.Generator().manual_seed(99))
    return {"input": answers, "target": (answers @ rule).argmax(1)}


def accuracy(module: nn.Module, data: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((module(data["input"]).argmax(1) == data["target"]).float().mean())


def main() -> None:
    torch.manual_seed(0)
    train, test = survey(4000, seed=1), survey(2000, seed=2)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))
    private = ce.Private(
        model,
        loss="cross_entropy",
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        data=train,
        bounds={"input": (-4, 4)},
        batch_size=200,
        epochs=8,
        epsilon=2.0,
        delta=1e-5,
        clip=1.0,
    )
    print(private.quote())
    print(f"accuracy before: {accuracy(model, test):.1%}")
    for step in private:
        if step % 40 == 0:
            private.pull()
            print(f"step {step}: epsilon {private.epsilon:.2f}, {accuracy(model, test):.1%}")
    print(f"accuracy after: {accuracy(model, test):.1%} at epsilon {private.epsilon:.2f}")


if __name__ == "__main__":
    main()

"""What is trained: nine models with random weights, synthetic batches, plain SGD.

A module is called with its inputs in order and gives logits of shape (B, classes); the loss is the
cross entropy per record. Dropout is off, so that every peer computes the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY: Final = 30522
TOKENS: Final = 128
LEARNING_RATE: Final = 1e-3
CLIP: Final = 1.0
NOISE_MULTIPLIER: Final = 1.0


@dataclass(frozen=True)
class Workload:
    """One row of the tables; ``batch`` records a step."""

    id: str
    title: str
    batch: int
    module: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    classes: int
    convolutional: bool = False
    text: bool = False

    def make(self) -> nn.Module:
        """The module, the same weights each time, in training mode."""
        torch.manual_seed(0)
        made = self.module()
        for part in made.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return made.train()

    def data(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of one batch, and targets of shape (B,)."""
        torch.manual_seed(1)
        return self.inputs(self.batch), torch.randint(self.classes, (self.batch,))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def _vgg9() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(o, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(4096, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


class _Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), _norm(o), nn.ReLU(),
            nn.Conv2d(o, o, 3, 1, 1, bias=False), _norm(o),
        )  # fmt: skip
        same = stride == 1 and i == o
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), _norm(o))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def _resnet18() -> nn.Module:
    """The 32x32 form of He et al. 2016: a 3x3 stem, no pooling before the stages."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), _norm(64), nn.ReLU()]
    i = 64
    for o, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Residual(i, o, stride), _Residual(o, o, 1)]
        i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class _MBConv(nn.Module):
    """The inverted bottleneck of EfficientNet (Tan and Le 2019), with GroupNorm."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        mid, squeezed = i * expand, max(1, i // 4)
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [nn.Conv2d(i, mid, 1, bias=False), _norm(mid), nn.SiLU()]
        layers += [
            nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False),
            _norm(mid), nn.SiLU(),
        ]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(mid, squeezed, 1), nn.SiLU(),
            nn.Conv2d(squeezed, mid, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.out = nn.Sequential(nn.Conv2d(mid, o, 1, bias=False), _norm(o))
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        y = self.out(y * self.squeeze(y))
        return x + y if self.residual else y


def _efficientnet() -> nn.Module:
    stages = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), _norm(32), nn.SiLU()]
    i = 32
    for expand, o, repeats, stride, kernel in stages:
        for r in range(repeats):
            layers.append(_MBConv(i, o, kernel, stride if r == 0 else 1, expand))
            i = o
    layers += [nn.Conv2d(i, 1280, 1, bias=False), _norm(1280), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 10))


class _MiniLm(nn.Module):
    """sentence-transformers' MiniLM-L6: BERT, mean over the tokens that are there, and a head."""

    def __init__(self) -> None:
        super().__init__()
        import transformers as hf

        config = hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536, max_position_embeddings=512, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = hf.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(384, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        kinds = torch.zeros_like(ids)  # as a tokenizer gives them
        found = self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
        hidden = found.last_hidden_state
        there = mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * there).sum(1) / there.sum(1))
        return logits


class _Logits(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.body(input_ids=ids, attention_mask=mask).logits
        return logits


def _distilbert() -> Any:
    import transformers as hf

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": 2,
    }  # fmt: skip
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**settings))


def _lora() -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_dropout=0.0, target_modules=["q_lin", "v_lin"]
    )
    return _Logits(get_peft_model(_distilbert(), config))


def _last_layer() -> nn.Module:
    made = _Logits(_distilbert())
    made.requires_grad_(False)
    made.body.classifier.requires_grad_(True)
    return made


def _images(side: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, 3, side, side),)


def _rows(width: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, width),)


def _text(n: int) -> tuple[Tensor, ...]:
    """Token ids (B, 128) and the mask of lengths between 64 and 128."""
    mask = (torch.arange(TOKENS) < torch.randint(64, TOKENS + 1, (n, 1))).long()
    mask[0] = 1
    return torch.randint(1000, VOCABULARY, (n, TOKENS)) * mask, mask


ALL: Final = (
    Workload("logreg", "logistic regression, 30 features", 1024,
             lambda: nn.Linear(30, 2), _rows(30), 2),
    Workload("mlp", "MLP 784-512-512-10", 256, _mlp, _rows(784), 10),
    Workload("vgg9", "VGG-9, 32x32", 64, _vgg9, _images(32), 10, convolutional=True),
    Workload("resnet18", "ResNet-18 GroupNorm, 32x32", 16, _resnet18, _images(32), 10,
             convolutional=True),
    Workload("efficientnet_b0", "EfficientNet-B0 GroupNorm, 64x64", 16, _efficientnet, _images(64),
             10, convolutional=True),
    Workload("minilm", "MiniLM, all parameters, T=128", 16, _MiniLm, _text, 2, text=True),
    Workload("distilbert", "DistilBERT, all parameters, T=128", 16,
             lambda: _Logits(_distilbert()), _text, 2, text=True),
    Workload("distilbert_lora", "DistilBERT, LoRA r=8 on q and v", 16, _lora, _text, 2, text=True),
    Workload("distilbert_last", "DistilBERT, last layer", 16, _last_layer, _text, 2, text=True),
)  # fmt: skip
BY_ID: Final = {w.id: w for w in ALL}


def losses(module: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Cross entropy of each record, shape (B,)."""
    return F.cross_entropy(module(*inputs), target, reduction="none")

# ruff: noqa: E501 - one entry a line
"""Models of many kinds, small, each with inputs for n records and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Case:
    """``make()`` gives the module, ``data(n)`` the inputs of n records by name."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[int], dict[str, Tensor]]
    loss: Any = "cross_entropy"


def _images(channels: int, side: int, classes: int = 5) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {
        "input": torch.randn(n, channels, side, side),
        "target": torch.randint(classes, (n,)),
    }


def _rows(width: int, classes: int = 5) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"input": torch.randn(n, width), "target": torch.randint(classes, (n,))}


def _text(
    length: int, vocabulary: int = 50, classes: int = 3
) -> Callable[[int], dict[str, Tensor]]:
    def make(n: int) -> dict[str, Tensor]:
        mask = (torch.arange(length) < torch.randint(2, length + 1, (n, 1))).long()
        return {
            "input_ids": torch.randint(1, vocabulary, (n, length)) * mask,
            "attention_mask": mask,
            "target": torch.randint(classes, (n,)),
        }

    return make


def _tokens(
    length: int, vocabulary: int = 40, classes: int = 3
) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {
        "tokens": torch.randint(vocabulary, (n, length)),
        "target": torch.randint(classes, (n,)),
    }


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 5),
    )


def vgg() -> nn.Module:
    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(3, 8),
        *block(8, 16),
        nn.Flatten(),
        nn.Linear(16 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.na = nn.GroupNorm(4, o)
        self.b = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.nb = nn.GroupNorm(4, o)
        self.skip = (
            nn.Identity() if (i, stride) == (o, 1) else nn.Conv2d(i, o, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(F.relu(self.na(self.a(x)), inplace=True)))
        y += self.skip(x)
        return F.relu(y)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8), nn.ReLU(inplace=True),
        Residual(8, 8, 1), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


class MBConv(nn.Module):
    """The inverted bottleneck of EfficientNet (Tan and Le 2019), with GroupNorm."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        mid, squeezed = i * expand, max(1, i // 4)
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [
                nn.Conv2d(i, mid, 1, bias=False),
                nn.GroupNorm(1, mid),
                nn.SiLU(inplace=True),
            ]
        layers += [
            nn.Conv2d(mid, mid, kernel, stride, kernel // 2, groups=mid, bias=False),
            nn.GroupNorm(1, mid), nn.SiLU(inplace=True),
        ]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(mid, squeezed, 1), nn.SiLU(), nn.Conv2d(squeezed, mid, 1),
            nn.Sigmoid(),
        )  # fmt: skip
        self.out = nn.Sequential(nn.Conv2d(mid, o, 1, bias=False), nn.GroupNorm(1, o))
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = self.out(y * self.squeeze(y))
        return x + y if self.residual else y


class EfficientNet(nn.Module):
    """EfficientNet-B0's seven stages; ``width`` scales the channels."""

    STAGES = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()

        def scaled(c: int) -> int:
            return max(4, int(c * width) // 4 * 4)

        i = scaled(32)
        layers: list[nn.Module] = [
            nn.Conv2d(3, i, 3, 2, 1, bias=False), nn.GroupNorm(1, i), nn.SiLU(inplace=True)
        ]  # fmt: skip
        for expand, channels, repeats, stride, kernel in self.STAGES:
            for r in range(repeats):
                o = scaled(channels)
                layers.append(MBConv(i, o, kernel, stride if r == 0 else 1, expand))
                i = o
        head = scaled(1280)
        layers += [nn.Conv2d(i, head, 1, bias=False), nn.GroupNorm(1, head), nn.SiLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens != 0).float().unsqueeze(-1)
        return self.head((self.table(tokens) * there).sum(1) / there.sum(1).clamp(min=1))


class Recurrent(nn.Module):
    def __init__(self, kind: str, **how: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6)
        self.rnn = getattr(nn, kind)(6, 7, batch_first=True, **how)
        ways = 2 if how.get("bidirectional") else 1
        self.head = nn.Linear(how.get("proj_size", 7) * ways, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.table(tokens))
        return self.head(out[:, -1])


class TimeFirst(nn.Module):
    """(T, B, F) inside, the last hidden state out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6)
        self.rnn = nn.GRU(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        _, h = self.rnn(self.table(tokens.t()))
        return self.head(h.squeeze(0))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 8, 3, padding="same"), nn.GELU(), nn.AvgPool1d(2), nn.Conv1d(8, 8, 3, dilation=2),
            nn.InstanceNorm1d(8, affine=True), nn.PReLU(8), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
            nn.Linear(8, 5),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return self.body(input)


class DeepSets(nn.Module):
    """A set of points in a record: one network over all points, then a symmetric pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(32, 5)

    def forward(self, points: Tensor) -> Tensor:
        n, k, d = points.shape
        y = self.point(points.reshape(n * k, d)).view(n, k, -1)
        return self.head(torch.cat([y.mean(1), y.max(dim=1).values], dim=-1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.LeakyReLU(0.1)
        )
        self.mid = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, input: Tensor) -> Tensor:
        a = self.down(input)
        b = self.up(self.mid(a)) + F.interpolate(a, scale_factor=1.0, mode="nearest")
        return self.out(torch.cat([a, b], dim=1))


class Attention(nn.Module):
    """A torch encoder with padding mask and causal mask, positions added."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.place = nn.Parameter(torch.randn(6, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        x = self.table(tokens) + self.place
        y = self.body(x, mask=mask, src_key_padding_mask=tokens == 0, is_causal=False)
        return self.head(y[:, 0])


class Gpt(nn.Module):
    """A small decoder with tied embedding and head, RMSNorm, rotary-like positions, masked by hand."""

    def __init__(self, vocabulary: int = 30, width: int = 16, length: int = 7) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer(
            "mask", torch.tril(torch.ones(length, length)).bool(), persistent=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.table(tokens)
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        place = torch.arange(t, device=x.device, dtype=torch.float32)
        angle = place[:, None] / torch.pow(100.0, torch.arange(q.shape[-1]) / q.shape[-1])
        q, k = q * angle.cos(), k * angle.cos()
        scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.mask[:t, :t], float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1)
        return self.head(x + self.out(y))


class Scalars(nn.Module):
    """Several inputs, a scalar parameter, a frozen prefix under no_grad, einsum, one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.mix = nn.Parameter(torch.randn(4, 6, 3) * 0.3)

    def forward(self, rows: Tensor, kind: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.base(rows).relu()
        x = x * self.scale.exp() + self.base(rows)
        hot = F.one_hot(kind, 4).float()
        return torch.einsum("bi,kij,bk->bj", x, self.mix, hot)


def frozen_batchnorm() -> nn.Module:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2)
    module[1].eval()
    return module


class SiameseLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.SELU(), nn.Linear(8, 4))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = F.normalize(self.body(left), dim=-1), F.normalize(self.body(right), dim=-1)
        return (a * b).sum(-1)


class Standardised(nn.Conv2d):
    """Of standardised weights, as Big Transfer's and timm's: each filter by its own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        filters = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(filters, None, None, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


def contrastive(similarity: Tensor, target: Tensor) -> Tensor:
    return torch.where(target > 0, 1 - similarity, F.relu(similarity - 0.2)) ** 2


def _transformers() -> list[Case]:
    import transformers as hf

    small: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "num_labels": 3,
    }  # fmt: skip
    text = _text(8)

    def minilm() -> nn.Module:
        """sentence-transformers' MiniLM is a BERT, mean-pooled, with a head."""

        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = hf.AutoModel.from_config(
                    hf.BertConfig(**small), attn_implementation="sdpa"
                )
                self.head = nn.Linear(16, 3)

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
                there = attention_mask.unsqueeze(-1).float()
                return self.head(
                    (hidden.last_hidden_state * there).sum(1) / there.sum(1).clamp(min=1e-9)
                )

        return Pooled()

    def lora() -> nn.Module:
        from peft import LoraConfig, TaskType, get_peft_model

        model = hf.DistilBertForSequenceClassification(distil)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_lin", "v_lin"])
        return get_peft_model(model, config)

    class Decoder(nn.Module):
        """Calls its part as anybody would: with a cache, which begins as a vector of nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.head = hf.LlamaModel(llama), nn.Linear(16, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.decoder(input_ids=input_ids, attention_mask=attention_mask)
            return self.head(hidden.last_hidden_state[:, 0])

    distil = hf.DistilBertConfig(
        vocab_size=50,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=32,
        num_labels=3,
    )
    gpt = hf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0
    )
    vit = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=4, num_labels=5,
    )  # fmt: skip
    llama = hf.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip

    def language(n: int) -> dict[str, Tensor]:
        data = text(n)
        ids, mask = data["input_ids"], data["attention_mask"]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }

    def pixels(n: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(n, 3, 16, 16), "target": torch.randint(5, (n,))}

    return [
        Case("bert", lambda: hf.BertForSequenceClassification(hf.BertConfig(**small)), text),
        Case("bert eager attention", lambda: hf.AutoModelForSequenceClassification.from_config(
            hf.BertConfig(**small), attn_implementation="eager"), text),
        Case("distilbert", lambda: hf.DistilBertForSequenceClassification(distil), text),
        Case("minilm", minilm, text),
        Case("lora", lora, text),
        Case("gpt2", lambda: hf.GPT2LMHeadModel(gpt), language, "next_token"),
        Case("llama", lambda: hf.LlamaForCausalLM(llama), language, "next_token"),
        Case("decoder in a module", Decoder, text),
        Case("vit", lambda: hf.ViTForImageClassification(vit), pixels),
    ]  # fmt: skip


def plain() -> list[Case]:
    """Models that need torch alone."""
    words = _tokens(6)
    return [
        Case("mlp", mlp, _rows(12)),
        Case("logistic", lambda: nn.Linear(9, 1), lambda n: {
            "input": torch.randn(n, 9), "target": torch.randint(2, (n,))},
            "binary_cross_entropy_with_logits"),
        Case("regression", lambda: nn.Linear(9, 2), lambda n: {
            "input": torch.randn(n, 9), "target": torch.randn(n, 2)}, nn.MSELoss()),
        Case("vgg", vgg, _images(3, 16)),
        Case("resnet", resnet, _images(3, 8)),
        Case("efficientnet", lambda: EfficientNet(5, 0.25), _images(3, 32),
             nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(5))),
        Case("frozen batchnorm", frozen_batchnorm, _images(3, 8)),
        Case("standardised weights", lambda: nn.Sequential(
            Standardised(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, 5)), _images(3, 8)),
        Case("bag of words", Bag, words),
        Case("lstm", lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), words),
        Case("lstm projected", lambda: Recurrent("LSTM", proj_size=3), words),
        Case("gru", lambda: Recurrent("GRU"), words),
        Case("rnn", lambda: Recurrent("RNN", nonlinearity="relu"), words),
        Case("gru time first", TimeFirst, words),
        Case("conv1d", Sequence, lambda n: {
            "input": torch.randn(n, 4, 20), "target": torch.randint(5, (n,))}),
        Case("conv3d", lambda: nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Softplus(), nn.MaxPool3d(2),
            nn.ConvTranspose3d(4, 2, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 5)),
            lambda n: {"input": torch.randn(n, 2, 4, 6, 6), "target": torch.randint(5, (n,))}),
        Case("deep sets", DeepSets, lambda n: {
            "points": torch.randn(n, 4, 3), "target": torch.randint(5, (n,))}),
        Case("u-net", UNet, lambda n: {
            "input": torch.randn(n, 3, 8, 8), "target": torch.randint(4, (n, 8, 8))}),
        Case("torch encoder", Attention, lambda n: {
            "tokens": torch.randint(1, 40, (n, 6)), "target": torch.randint(3, (n,))}),
        Case("gpt tied", Gpt, lambda n: {
            "tokens": (t := torch.randint(30, (n, 7))), "target": t.clone()}, "next_token"),
        Case("scalars", Scalars, lambda n: {
            "rows": torch.randn(n, 6), "kind": torch.randint(4, (n,)), "target": torch.randint(3, (n,))}),
        Case("siamese", SiameseLoss, lambda n: {
            "left": torch.randn(n, 5), "right": torch.randn(n, 5),
            "target": torch.randint(2, (n,)).float()}, contrastive),
    ]  # fmt: skip


def transformers() -> list[Case]:
    """Models of transformers and peft, with random weights."""
    return _transformers()

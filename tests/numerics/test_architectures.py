"""Architectures of Transformers, tiny and with random weights: the clipped sum is that of float64
gradients, one record at a time. What a user brings is rather one of these than a model of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from support import batched_lab

TOKENS, WORDS = 12, 64
SIZES = {
    2: "num_hidden_layers n_layers n_layer num_layers encoder_layers num_feat_extract_layers"
    " num_key_value_heads num_conv_pos_embedding_groups type_vocab_size eos_token_id",
    3: "num_labels",
    4: "num_attention_heads n_heads n_head num_heads num_conv_pos_embeddings rotary_dim",
    8: "head_dim patch_size",
    32: "hidden_size d_model dim n_embd emb_dim embedding_size pooler_hidden_size image_size",
    48: "intermediate_size ffn_dim hidden_dim ffn_hidden_size n_inner",
    64: "vocab_size max_position_embeddings n_positions n_ctx",
}
TINY: dict[str, Any] = {
    **{name: size for size, names in SIZES.items() for name in names.split()},
    "pad_token_id": 0, "bos_token_id": 1,
    "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4),
}  # fmt: skip
TEXT = (
    "albert", "arcee", "bert", "big_bird", "biogpt", "camembert", "convbert", "ctrl", "deberta",
    "deberta-v2", "diffllama", "distilbert", "doge", "electra", "ernie", "esm", "eurobert",
    "exaone4", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj",
)  # fmt: skip
LANGUAGE = ("gemma", "gemma2", "llama", "mistral", "opt", "qwen2", "qwen3")
IMAGES = ("beit", "data2vec-vision", "dinov2")
SOUNDS = ("data2vec-audio", "hubert", "sew", "unispeech", "wav2vec2", "wav2vec2-conformer")
CASES = [
    *(("SequenceClassification", name) for name in TEXT),
    *(("CausalLM", name) for name in LANGUAGE),
    *(("ImageClassification", name) for name in IMAGES),
    *(("AudioClassification", name) for name in SOUNDS),
]


class Logits(nn.Module):
    """As a user wraps one: scores of its own forward."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, input: Tensor) -> Tensor:
        scores: Tensor = self.model(**{self.name: input}).logits
        return scores


def _model(task: str, name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name)
    for key, value in TINY.items():
        several = isinstance(getattr(config, key, None), list | tuple)
        if hasattr(config, key) and several == isinstance(value, tuple):
            setattr(config, key, value)
    made: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    return made


def _next_token(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), target[:, 1:].flatten())


@pytest.mark.full
@pytest.mark.parametrize(("task", "name"), CASES)
def test_the_clipped_sum_of_an_architecture(task: str, name: str) -> None:
    torch.manual_seed(0)
    inputs = {"ImageClassification": "pixel_values", "AudioClassification": "input_values"}
    module = Logits(_model(task, name), inputs.get(task, "input_ids"))

    def data(rows: int) -> dict[str, Tensor]:
        if task == "ImageClassification":
            made = torch.randn(rows, 3, 32, 32)
        elif task == "AudioClassification":
            made = torch.randn(rows, 1600)
        else:
            made = torch.randint(3, WORDS, (rows, TOKENS))
        return {"input": made, "target": made if task == "CausalLM" else torch.randint(2, (rows,))}

    loss = "next_token" if task == "CausalLM" else "cross_entropy"
    found = batched_lab.lab(module, data, loss, rows=8)
    exact = batched_lab.gradients(
        module, found.program, found.data, _next_token if task == "CausalLM" else loss
    )
    bound = float(exact.norm(dim=1).median())
    expected, _ = batched_lab.clipped(exact, bound)
    assert batched_lab.relative(found.parts(bound)[0], expected) <= 1e-5

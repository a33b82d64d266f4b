"""Tokens by a model folder's own tokenizer; duplicates out before the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.client.data import encode
from casemate.client.data.text import deduplicate, tokenize
from casemate.spec.errors import DataError

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "free", "prize", "lunch", "##s", "today"]


@pytest.fixture
def folder(tmp_path):
    """A model folder with a small BERT tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_padding(direction="left", pad_id=0, pad_token="[PAD]")  # must not count
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokens_have_one_length(folder):
    made = tokenize(["Free prizes", "lunch", "", "free lunch today free prize xyz"], folder, 6)
    assert made["input_ids"].tolist() == [
        [2, 4, 5, 7, 3, 0],
        [2, 6, 3, 0, 0, 0],
        [2, 3, 0, 0, 0, 0],
        [2, 4, 6, 8, 4, 3],
    ]
    assert made["attention_mask"].sum(axis=1).tolist() == [5, 3, 2, 6]
    assert made["input_ids"].dtype == np.int64


def test_a_text_does_not_depend_on_the_others(folder):
    texts = ["free", "prizes today lunch", "x"]
    together = tokenize(texts, folder, 8)["input_ids"]
    alone = [tokenize([t], folder, 8)["input_ids"][0] for t in texts]
    assert np.array_equal(together, np.stack(alone))
    assert tokenize([], folder, 8)["input_ids"].shape == (0, 8)


def test_tokens_are_pushed(folder):
    tokens = tokenize(["free", "lunch"], folder, 4)
    bounds = {"input_ids": (0, len(WORDS) - 1), "attention_mask": (0, 1)}
    made = encode({**tokens, "y": [1, 0]}, name="t", label="y", bounds=bounds, classes=2)
    assert made.schema.column("input_ids").shape == (4,)


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    for path, length in ((tmp_path / "none", 4), (folder, -1)):
        with pytest.raises(DataError) as e:
            tokenize(["x"], path, length)
        assert e.value.code == "data.tokenizer"
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError):
        tokenize(["x"], folder, 4)


def test_duplicates_go_with_their_labels():
    texts = ["Win a prize", "hello", "win  a PRIZE\n", "hello", "bye"]
    assert deduplicate(texts, [1, 0, 1, 1, 0]) == (["Win a prize", "hello", "bye"], [1, 0, 0])
    with pytest.raises(DataError):
        deduplicate(["a"], [])


@given(st.lists(st.text(max_size=3)))
def test_deduplication_is_idempotent_and_keeps_order(texts):
    kept, labels = deduplicate(texts, range(len(texts)))
    assert deduplicate(kept, labels) == (kept, labels)
    assert labels == sorted(labels) and [texts[i] for i in labels] == kept
    assert {" ".join(t.casefold().split()) for t in texts} == {
        " ".join(t.casefold().split()) for t in kept
    }

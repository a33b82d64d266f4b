"""Text on the owner's side: duplicates out, then a Hugging Face tokenizer from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from casemate.client.data.columns import refuse
from casemate.spec.errors import UsageError

Label = TypeVar("Label")


def deduplicate(texts: Sequence[str], labels: Sequence[Label]) -> tuple[list[str], list[Label]]:
    """The first of each text with its label, in order; to be done before data are split.

    Otherwise a text in both halves makes held-out accuracy look better than it is. Texts are the
    same when they are so after runs of white space become one space and case is folded. Raises
    DataError ``data.rows-differ`` for unequal lengths.
    """
    if len(texts) != len(labels):
        raise refuse(
            "rows-differ",
            f"There are {len(texts)} texts and {len(labels)} labels.",
            "Give one label per text.",
        )
    seen: set[str] = set()
    kept: list[int] = []
    for at, text in enumerate(texts):
        key = " ".join(text.casefold().split())
        if key not in seen:
            seen.add(key)
            kept.append(at)
    return [texts[i] for i in kept], [labels[i] for i in kept]


def tokenize(texts: Sequence[str], folder: str | Path, max_length: int) -> dict[str, Any]:
    """Token ids of ``texts`` by the tokenizer of a model folder (``tokenizer.json``).

    Returns numpy int64 arrays ``input_ids`` and ``attention_mask`` of shape (len(texts),
    max_length), cut and padded on the right, with special tokens. Both lengths are the caller's,
    so the shape tells nothing of the texts. Raises DataError ``data.tokenizer`` for a folder
    without one, UsageError ``usage.extra`` when ``tokenizers`` or ``numpy`` is missing.
    """
    tokenizer = _tokenizer(folder, max_length)
    import numpy as np

    rows = tokenizer.encode_batch([str(text) for text in texts])
    shape = (len(texts), max_length)
    return {
        "input_ids": np.array([row.ids for row in rows], dtype=np.int64).reshape(shape),
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64).reshape(shape),
    }


def vocabulary(folder: str | Path) -> int:
    """Number of token ids of a model folder's tokenizer, the declared bound of ``input_ids``.

    Raises as :func:`tokenize`.
    """
    size: int = _tokenizer(folder, 512).get_vocab_size(with_added_tokens=True)
    return size


def _tokenizer(folder: str | Path, max_length: int) -> Any:
    try:
        import numpy as np  # noqa: F401  # what the tokens become
        from tokenizers import Tokenizer
    except ModuleNotFoundError as e:
        raise UsageError(
            "usage.extra",
            f"Tokenising needs the package {e.name}, which is not installed.",
            mend="Install it with: pip install 'casemate[data]'.",
        ) from None
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # Settings of the file itself would make lengths depend on the batch.
        pad = (tokenizer.padding or {}) or _pad_token(tokenizer)
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(
            length=max_length, pad_id=pad["pad_id"], pad_token=pad["pad_token"], direction="right"
        )
    except Exception as e:  # the library raises bare Exception
        raise refuse(
            "tokenizer",
            f"{path} makes no tokenizer for {max_length} tokens: {str(e)[:120]}.",
            "Name a Hugging Face model folder that holds tokenizer.json, and a longer max_length.",
            str(path),
        ) from None
    return tokenizer


def _pad_token(tokenizer: Any) -> dict[str, Any]:
    """The padding token by its usual names; models without one (GPT-2) pad with the end token."""
    for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return {"pad_id": found, "pad_token": token}
    return {"pad_id": 0, "pad_token": tokenizer.id_to_token(0)}

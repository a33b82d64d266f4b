"""What a sale may say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from casemate.spec import codec
from casemate.spec.sale import MAX_TERMS, Sale, SaleReceipt
from support.formats import DIGEST, IDENTITY, MODEL, sample

SALE = Sale(
    origin="casemate.dev/log/x", model=MODEL, model_digest=DIGEST, seller=IDENTITY,
    buyer="id_" + "0" * 40,
)  # fmt: skip


def test_a_sale_is_named_by_all_that_it_says() -> None:
    assert SALE.id == "sale_" + codec.digest(SALE)[7:39]
    changes: list[dict[str, Any]] = [
        {"origin": "casemate.dev/log/y"}, {"model": "model_" + "1" * 32}, {"buyer": IDENTITY},
        {"model_digest": "sha256:" + "1" * 64}, {"seller": "id_" + "1" * 40}, {"terms": "1 crown"},
    ]  # fmt: skip
    others = [replace(SALE, **change) for change in changes]
    assert len({SALE.id, *(o.id for o in others)}) == 7
    assert len({SALE.info, *(o.info for o in others)}) == 7
    for part in (SALE.id, MODEL, DIGEST, SALE.buyer):
        assert part.encode() in SALE.info


def test_terms_are_words_of_the_parties() -> None:
    assert replace(SALE, terms="10 crowns,\nno resale").terms.count("\n") == 1
    replace(SALE, terms="é" * MAX_TERMS)


@pytest.mark.parametrize(
    "fields",
    [
        {"terms": "x" * (MAX_TERMS + 1)},
        {"terms": "\x1b[2J"},
        {"terms": "a\rb"},
        {"terms": "a\u2028b"},
        {"model": "model_x"},
        {"model": MODEL + "0"},
        {"model_digest": "ab" * 32},
        {"seller": "id_"},
        {"buyer": "*"},
        {"origin": ""},
        {"origin": "x" * 201},
        {"origin": "a\nb"},
    ],
)
def test_what_is_no_sale_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        replace(SALE, **fields)


@pytest.mark.parametrize("name", ["sign_key", "seal_key"])
def test_a_receipt_holds_whole_keys(name: str) -> None:
    with pytest.raises(ValueError, match="wrong length"):
        replace(sample(SaleReceipt), **{name: b"short"})

"""A sealed call opens for its model, its caller and its number of records, and for nobody else."""

from __future__ import annotations

import pytest

from casemate.seal import calls, hpke, stream
from casemate.seams import OsRng
from casemate.spec.errors import FormatError

KEY = hpke.generate()
INPUTS = b"inputs" * 1000


def made(records: int = 3) -> tuple[bytes, bytes]:
    return calls.seal(KEY.public, "model_a", "id_a", records, INPUTS, OsRng())


def test_a_call_and_its_answer() -> None:
    body, answering = made()
    opened = calls.open_head(KEY, "model_a", "id_a", body)
    asking, other = calls.split(opened.keys)
    assert opened.records == 3 and other == answering != asking
    assert b"".join(stream.decrypt(asking, [opened.sealed])) == INPUTS
    sealed = b"".join(stream.encrypt(other, [b"outputs"]))
    assert calls.open_answer(answering, sealed) == b"outputs"
    assert INPUTS[:12] not in body


def test_keys_are_new_in_every_call() -> None:
    (one, a), (two, b) = made(), made()
    assert a != b and one[calls.HEAD_BYTES :] != two[calls.HEAD_BYTES :]


@pytest.mark.parametrize(("model", "caller"), [("model_b", "id_a"), ("model_a", "id_b")])
def test_it_is_for_one_model_and_one_caller(model: str, caller: str) -> None:
    with pytest.raises(FormatError, match="does not open"):
        calls.open_head(KEY, model, caller, made()[0])


def test_the_number_of_records_is_bound() -> None:
    body = bytearray(made()[0])
    body[3] = 4
    with pytest.raises(FormatError, match="does not open"):
        calls.open_head(KEY, "model_a", "id_a", bytes(body))


@pytest.mark.parametrize("body", [b"", bytes(calls.HEAD_BYTES), bytes(5000), b"\xff" * 5000])
def test_what_is_no_call_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError, match=r"format\.call"):
        calls.open_head(KEY, "model_a", "id_a", body)


def test_another_boots_key_opens_nothing() -> None:
    with pytest.raises(FormatError, match="does not open"):
        calls.open_head(hpke.generate(), "model_a", "id_a", made()[0])


def test_an_answer_that_was_changed_does_not_open() -> None:
    _, answering = made()
    sealed = bytearray(b"".join(stream.encrypt(answering, [bytes(100)])))
    sealed[-1] ^= 1
    with pytest.raises(FormatError):
        calls.open_answer(answering, bytes(sealed))

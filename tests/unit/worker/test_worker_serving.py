"""What a worker answers to a call: outputs, or what is wrong, always as long and to its caller."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate.engine.capture import capture_outputs
from casemate.graph.model import Packed
from casemate.seal import calls, stream
from casemate.spec import tensors
from casemate.spec.errors import CasemateError
from casemate.spec.messages import Call, Serve
from casemate.spec.serving import answer_size, layout, read_answer
from casemate.worker import serving
from support.server import mlp

Given = Mapping[str, tuple[str, tuple[int, ...], bytes]]


class Mixed(nn.Module):
    """Floats, tokens and a mask; the last divides by what a record may make zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(7, 2)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        words = self.embed(tokens).sum(1) * mask.float()
        return self.head(torch.cat([x, words], 1))


SPECS: Any = {"x": ("f32", (3,)), "tokens": ("i64", (2,)), "mask": ("bool", (1,))}


@cache
def packed() -> tuple[nn.Module, Packed]:
    torch.manual_seed(0)
    module = Mixed().eval()
    return module, capture_outputs(module, SPECS, {"tokens": (0, 9)})


def message(made: Packed, **changes: Any) -> Serve:
    plain = Serve(
        key=b"", model_digest=made.digest, records=4, slots=1, memory_bytes=16 << 30, threads=1,
        call_seconds=10,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@cache
def ready(slots: int = 1) -> serving.Ready:
    made = packed()[1]
    return serving.prepare(message(made, slots=slots), made.data)


def inputs(records: int = 2, **changes: Any) -> dict[str, Any]:
    numbers = [float(i) for i in range(3 * records)]
    plain = {
        "x": ("f32", (records, 3), struct.pack(f"<{3 * records}f", *numbers)),
        "tokens": ("i64", (records, 2), struct.pack(f"<{2 * records}q", *([1, 9] * records))),
        "mask": ("bool", (records, 1), b"\1" * records),
    }
    return plain | changes


def asked(given: Given | bytes, records: int = 2) -> tuple[Call, bytes]:
    keys = os.urandom(64)
    plain = given if isinstance(given, bytes) else tensors.dump(given)
    sealed = b"".join(stream.encrypt(calls.split(keys)[0], [plain]))
    return Call(keys=keys, records=records, size=len(sealed)), sealed


def answered(call: Call, answer: bytes) -> Any:
    outputs = ready().serving.outputs
    assert len(answer) == stream.sealed_size(answer_size(outputs, call.records))
    plain = calls.open_answer(calls.split(call.keys)[1], answer)
    found = tensors.load(read_answer(outputs, call.records, plain))
    info, raw = found["output"]
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(info.shape)


def ask(given: Given | bytes, records: int = 2) -> Any:
    call, sealed = asked(given, records)
    return answered(call, serving.answers(ready(), [call], [sealed])[0])


def test_a_call_is_answered_as_the_module_would() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with torch.inference_mode():
        wanted = packed()[0](x, torch.tensor([[1, 9]] * 2), torch.ones(2, 1, dtype=torch.bool))
    assert torch.equal(ask(inputs()), wanted)
    assert ready().serving.parameters == 40 + 16 and ready().serving.slots == 1


BAD: dict[str, dict[str, Any] | bytes] = {
    "another name": {**{k: v for k, v in inputs().items() if k != "x"}, "z": inputs()["x"]},
    "another dtype of the same size": inputs(x=("i32", (2, 3), bytes(24))),
    "another shape of the same size": inputs(x=("f32", (3, 2), bytes(24))),
    "short": inputs(x=("f32", (2, 2), bytes(16))),
    "huge": inputs(x=("f32", (2, 300), bytes(2400))),
    "one too many": inputs(y=("f32", (2,), bytes(8))),
    "one missing": {k: v for k, v in inputs().items() if k != "mask"},
    "a token too large": inputs(tokens=("i64", (2, 2), struct.pack("<4q", 1, 10, 0, 0))),
    "a negative token": inputs(tokens=("i64", (2, 2), struct.pack("<4q", 1, -1, 0, 0))),
    "a token past everything": inputs(
        tokens=("i64", (2, 2), struct.pack("<4q", 2**63 - 1, 0, 0, 0))
    ),
    "a bool that is none": inputs(mask=("bool", (2, 1), b"\1\2")),
    "no safetensors": bytes(len(tensors.dump(inputs()))),
    "nothing": b"",
    "a header that lies": tensors.dump(inputs()).replace(b"[2,3]", b"[6,1]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_inputs_is_said_within_the_answer(case: str) -> None:
    with pytest.raises(CasemateError) as refused:
        ask(BAD[case])
    assert refused.value.family in ("data", "format")


def test_a_tensor_given_twice_is_refused() -> None:
    wire = tensors.dump(inputs())
    twice = wire.replace(b'"tokens":', b'"mask":  ', 1)
    with pytest.raises(CasemateError):
        ask(twice)


def test_inputs_sealed_under_another_key_are_refused() -> None:
    call, sealed = asked(inputs())
    other = dataclasses.replace(call, keys=os.urandom(32) + call.keys[32:])
    with pytest.raises(CasemateError, match=r"format\.stream"):
        answered(call, serving.answers(ready(), [other], [sealed])[0])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1e38])
def test_numbers_that_are_none_stay_with_their_record(odd: float) -> None:
    plain = ask(inputs())
    raw = struct.pack("<6f", odd, odd, odd, *[3.0, 4.0, 5.0])
    found = ask(inputs(x=("f32", (2, 3), raw)))
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])


def test_a_refused_call_beside_others_changes_nothing_of_theirs() -> None:
    made = ready(4)
    assert made.serving.slots == 4
    good, sealed = asked(inputs())
    alone = answered(good, serving.answers(made, [good], [sealed])[0])
    for case in BAD:
        bad, closed = asked(BAD[case])
        for pair in ([(good, sealed), (bad, closed)], [(bad, closed), (good, sealed)]):
            found = serving.answers(made, [c for c, _ in pair], [s for _, s in pair])
            at = [c for c, _ in pair].index(good)
            assert torch.equal(answered(good, found[at]), alone)
            with pytest.raises(CasemateError):
                answered(bad, found[1 - at])


def test_a_pass_that_fails_is_tried_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ready(4)
    forward = type(made.forward)
    run = forward._run

    good, sealed = asked(inputs())
    bad, closed = asked(inputs(x=("f32", (2, 3), struct.pack("<6f", *[float("nan")] * 6))))

    def torn(self: Any, size: int, rows: Any) -> Any:
        if bool(rows[0].isnan().any()):
            raise serving.ModelError("model.run", "It fails.", mend="Look.")
        return run(self, size, rows)

    monkeypatch.setattr(forward, "_run", torn)
    found = serving.answers(made, [good, bad], [sealed, closed])
    assert answered(good, found[0]).shape == (2, 2)
    with pytest.raises(CasemateError, match=r"model\.run"):
        answered(bad, found[1])


def test_zeros_stand_within_bounds() -> None:
    specs = [dataclasses.replace(s, low=3, high=5) for s in ready().serving.inputs if s.low == 0]
    assert serving._zeros(specs, 2)["tokens"].tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_digest": "sha256:" + "0" * 64}, "model.digest"),
        ({"memory_bytes": 1 << 10}, "limit.memory"),
        ({"memory_bytes": 1 << 26}, "limit.memory"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_served_is_refused(changes: Any, code: str) -> None:
    made = packed()[1]
    with pytest.raises(CasemateError) as refused:
        serving.prepare(message(made, **changes), made.data)
    assert refused.value.code == code


def test_a_training_model_is_refused() -> None:
    with pytest.raises(CasemateError) as refused:
        serving.prepare(message(mlp()), mlp().data)
    assert refused.value.code == "model.outputs"


def test_the_public_layout_is_what_is_parsed() -> None:
    assert set(layout(ready().serving.inputs, 2).places) == set(inputs())

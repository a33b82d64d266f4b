"""A deployed model's policy, and the sizes and forms of calls and answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from casemate.spec import canonical, codec, tensors
from casemate.spec.errors import CasemateError, DataError, FormatError, ModelError
from casemate.spec.serving import (
    Deployment,
    ServePolicy,
    TensorSpec,
    answer_size,
    dump,
    layout,
    load,
    pack_answer,
    plain_size,
    read_answer,
)

ID = "id_" + "ab" * 20
OTHER = "id_" + "cd" * 20
SPECS = (
    TensorSpec(name="scores", dtype="f32", shape=(3, 2)),
    TensorSpec(name="classes", dtype="i64", shape=()),
)


def zeros(records: int) -> bytes:
    places = layout(SPECS, records).places
    return tensors.dump({
        n: (i.dtype, i.shape, bytes(i.end - i.start)) for n, i in places.items()
    })  # fmt: skip


def test_a_policy_admits_whom_it_names() -> None:
    assert ServePolicy(callers=(ID,)).admits(ID)
    assert not ServePolicy(callers=(ID,)).admits(OTHER)
    assert ServePolicy(callers=("*",)).admits(OTHER)
    assert not ServePolicy(callers=()).admits(ID)


@pytest.mark.parametrize(
    "fields",
    [
        {"callers": ("somebody",)}, {"callers": ("*", ID)}, {"callers": (ID, ID)},
        {"callers": tuple(f"id_{i:040x}" for i in range(4097))},
        {"calls": 0}, {"calls": 2**48 + 1}, {"records": 0}, {"records": 4097},
        {"at_once": 0}, {"at_once": 1025}, {"slots": 0}, {"slots": 257}, {"epoch": -1},
        {"epoch": 2**53},
    ],
    ids=lambda f: f"{next(iter(f))} {str(next(iter(f.values())))[:20]}",
)  # fmt: skip
def test_a_policy_out_of_its_limits_is_none(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ServePolicy(**{"callers": (ID,), **fields})
    wire = canonical.decode(codec.encode(ServePolicy(callers=(ID,))))
    assert isinstance(wire, dict)
    changed = {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}
    with pytest.raises(FormatError):
        codec.decode(ServePolicy, canonical.encode({**wire, **changed}))


@pytest.mark.parametrize(
    "fields",
    [{"model": "model_1"}, {"model_digest": "sha256:"}, {"name": ""}, {"name": "a\nb"}],
    ids=str,
)
def test_a_deployment_names_what_it_deploys(fields: dict[str, str]) -> None:
    good = Deployment(
        model="model_" + "0" * 32, owner=ID, name="a", policy=ServePolicy(callers=("*",)),
        model_digest="sha256:" + "0" * 64, upload="up", sealed_key=b"",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model|name"):
        dataclasses.replace(good, **fields)


def test_an_id_is_that_of_owner_model_and_upload() -> None:
    given = (ID, "sha256:" + "0" * 64, "up_" + "1" * 32)
    # printf 'casemate/model-id/v1|…|…|…' | sha256sum
    assert Deployment.id(*given) == "model_f803856dcae2332bc72e2021641f54b7"
    others = [(OTHER, *given[1:]), (ID, "sha256:" + "1" * 64, given[2]), (*given[:2], "up_2")]
    assert len({Deployment.id(*g) for g in (given, *others)}) == 4


@pytest.mark.parametrize(
    "fields", [{"name": "a b"}, {"name": "a" * 121}, {"shape": (1,) * 8}, {"shape": (-1,)}], ids=str
)
def test_a_tensor_of_no_possible_form_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tensor"):
        TensorSpec(**{"name": "x", "dtype": "f32", "shape": (), **fields})


@pytest.mark.parametrize("records", [1, 2, 7, 300])
def test_sizes_are_those_of_the_safetensors(records: int) -> None:
    data = zeros(records)
    assert plain_size(SPECS, records) == len(data)
    assert dict(layout(SPECS, records).places) == tensors.read_header(data, len(data))
    found = load(SPECS, records, data)
    assert dump(SPECS, records, {n: bytes(v) for n, v in found.items()}) == data
    for other in (data[:-1], data + b"\0", data.replace(b"scores", b"scared"), b""):
        with pytest.raises(FormatError, match=r"format\.tensors"):
            load(SPECS, records, other)
    assert answer_size(SPECS, records) == max(2049, 1 + len(zeros(records)))


HOSTILE = DataError("data.inputs", 'é\n\\"x' * 900, mend="\x00" * 900, where="w" * 900)


@pytest.mark.parametrize("records", [1, 300])
def test_every_answer_has_one_length(records: int) -> None:
    outputs = zeros(records)
    plain = ModelError("model.run", "It failed.", mend="Look.", where="x")
    packed = [pack_answer(SPECS, records, said) for said in (outputs, plain, HOSTILE)]
    assert {len(p) for p in packed} == {answer_size(SPECS, records)}
    assert bytes(read_answer(SPECS, records, packed[0])) == outputs
    with pytest.raises(ModelError, match=r"model.run \[x\]: It failed. Look."):
        read_answer(SPECS, records, packed[1])
    with pytest.raises(DataError) as refused:
        read_answer(SPECS, records, packed[2])
    assert len(refused.value.message) == 800 and refused.value.message.isprintable()


def _error(text: bytes) -> bytes:
    return (b"\1" + len(text).to_bytes(2, "big") + text).ljust(answer_size(SPECS, 1), b"\0")


@pytest.mark.parametrize(
    "plain",
    [
        b"", b"\0", bytes(answer_size(SPECS, 1) + 1), b"\2" + bytes(answer_size(SPECS, 1) - 1),
        _error(b""), _error(b"[1,2,3,4]"), _error(b'["a","b","c"]'),
        _error(b'["nothing.here","b","c","d"]'), _error(b'["data.x","b","c","d"] '),
    ],
    ids=range(9),
)  # fmt: skip
def test_an_answer_of_another_form_is_none(plain: bytes) -> None:
    with pytest.raises(CasemateError) as refused:
        read_answer(SPECS, 1, plain)
    assert refused.value.family in ("format", "net")

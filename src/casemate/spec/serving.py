"""A deployed model: who may call it, what it takes and gives, and how large sealed calls are.

All sizes here are public: those of a call follow from its number of records, those of an answer
too, whatever it says.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from casemate.spec import canonical, tensors
from casemate.spec.canonical import Json
from casemate.spec.codec import value
from casemate.spec.data import ANYONE, Dtype
from casemate.spec.errors import FAMILIES, CasemateError, FormatError
from casemate.spec.tensors import TensorInfo

MAX_CALLERS: Final = 4096
MAX_CALLS: Final = 2**48
MAX_RECORDS: Final = 4096
MAX_SLOTS: Final = 256
MAX_TENSORS: Final = 64
IDENTITY: Final = re.compile(r"id_[0-9a-f]{40}")
MODEL: Final = re.compile(r"model_[0-9a-f]{32}")
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@value("serve-policy/v1")
class ServePolicy:
    """Who may call a deployed model, and how much.

    callers: identity ids, or ``("*",)`` for anyone enrolled. calls: of each caller in one epoch,
    counted durably and never given back; ``None``: not counted. records: the most in one call.
    at_once: the most calls of one caller that wait or run. slots: records of one forward pass,
    which the calls of several callers may share; 1: each call has its own. epoch: goes forward
    alone; counts begin anew with it, and ``calls`` changes with it alone.
    """

    callers: tuple[str, ...]
    calls: int | None = None
    records: int = 64
    at_once: int = 8
    slots: int = 1
    epoch: int = 0

    def __post_init__(self) -> None:
        everyone = self.callers == (ANYONE,)
        if not everyone and not all(IDENTITY.fullmatch(c) for c in self.callers):
            raise ValueError("callers must be identity ids, or * alone")
        if len(self.callers) > MAX_CALLERS or len(set(self.callers)) != len(self.callers):
            raise ValueError(f"callers must be at most {MAX_CALLERS}, each once")
        for name, given, low, high in (
            ("calls", 1 if self.calls is None else self.calls, 1, MAX_CALLS),
            ("records", self.records, 1, MAX_RECORDS),
            ("at_once", self.at_once, 1, 1024),
            ("slots", self.slots, 1, MAX_SLOTS),
            ("epoch", self.epoch, 0, 2**53 - 1),
        ):
            if not low <= given <= high:
                raise ValueError(f"{name} must be in [{low}, {high}]")

    def admits(self, identity: str) -> bool:
        return self.callers == (ANYONE,) or identity in self.callers


@value("tensor-spec/v1")
class TensorSpec:
    """A tensor of a call or an answer: ``shape`` is that of one record; axis 0 before it is the
    record. low, high: inclusive bounds of an integer input."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None

    def __post_init__(self) -> None:
        if not (1 <= len(self.name) <= 120 and self.name.isascii() and self.name.isidentifier()):
            raise ValueError(
                "a tensor's name must be an ASCII identifier of at most 120 characters"
            )
        if len(self.shape) > 7 or any(not 0 <= d <= 2**31 for d in self.shape):
            raise ValueError(f"tensor {self.name!r} has an impossible shape")


@value("deployment/v1")
class Deployment:
    """A model to be deployed. ``model``: its :meth:`id`; the same id with another body is refused.
    ``sealed_key``: HPKE message holding the 32-byte stream key of the packed model that was
    uploaded, info :meth:`info`."""

    model: str
    owner: str
    name: str
    policy: ServePolicy
    model_digest: str
    upload: str
    sealed_key: bytes

    def __post_init__(self) -> None:
        if not MODEL.fullmatch(self.model):
            raise ValueError("model must be model_ and 32 hex digits")
        if not DIGEST.fullmatch(self.model_digest):
            raise ValueError("model_digest must be sha256: and 64 hex digits")
        if not (1 <= len(self.name) <= 120 and self.name.isprintable()):
            raise ValueError("a model's name must have 1 to 120 printable characters")

    @staticmethod
    def id(owner: str, model_digest: str, upload: str) -> str:
        """The one id for it: an upload serves once, so that no other model, nor the same under
        another owner, ever answers to it."""
        said = f"casemate/model-id/v1|{owner}|{model_digest}|{upload}"
        return "model_" + hashlib.sha256(said.encode()).hexdigest()[:32]

    @staticmethod
    def info(model: str, owner: str, policy_digest: str, model_digest: str) -> bytes:
        return f"casemate/deploy-key/v1|{model}|{owner}|{policy_digest}|{model_digest}".encode()


@value("model-info/v1")
class ModelInfo:
    """What its owner and its callers see of a deployed model.

    state: ``frozen`` until its owner sets the policy again, since the server's software changed or
    the state was restored. slots: of one forward pass, 1 where calls do not share one. left: the
    asking caller's calls that are left in this epoch, ``None`` where they are not counted or not
    admitted.
    """

    model: str
    owner: str
    name: str
    policy: ServePolicy
    policy_digest: str
    model_digest: str
    state: Literal["ready", "frozen"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    slots: int
    left: int | None


# A call: 4 bytes, its number of records (big endian), an HPKE message that holds the key of the
# inputs' stream and that of the answer's, info call_info, and the inputs (safetensors) as a stream.

CALL_KEYS: Final = 64
COUNT_BYTES: Final = 4


def call_info(model: str, caller: str, records: int) -> bytes:
    return f"casemate/call-key/v1|{model}|{caller}|{records}".encode()


@dataclass(frozen=True, slots=True)
class Layout:
    """The one form of so many records' safetensors: its ``prefix``, and where each tensor lies."""

    prefix: bytes
    places: Mapping[str, TensorInfo]
    size: int


@functools.lru_cache(maxsize=4096)
def layout(specs: tuple[TensorSpec, ...], records: int) -> Layout:
    """The form is canonical, so that there is one header for these names, dtypes and shapes: what
    begins otherwise is something else, and nothing has to be parsed."""
    shapes = {s.name: (s.dtype, (records, *s.shape)) for s in specs}
    prefix, names = tensors.layout(shapes)
    places, at = {}, len(prefix)
    for name in names:
        dtype, shape = shapes[name]
        end = at + tensors.DTYPES[dtype][1] * math.prod(shape)
        places[name] = TensorInfo(dtype, shape, at, end)
        at = end
    return Layout(prefix, places, at)


def plain_size(specs: tuple[TensorSpec, ...], records: int) -> int:
    """Bytes of the safetensors of so many records."""
    return layout(specs, records).size


def dump(specs: tuple[TensorSpec, ...], records: int, raw: Mapping[str, bytes]) -> bytes:
    """The safetensors of these row-major little-endian bytes, by name."""
    form = layout(specs, records)
    return b"".join([form.prefix, *(raw[name] for name in form.places)])


def load(
    specs: tuple[TensorSpec, ...], records: int, data: bytes | memoryview
) -> dict[str, memoryview]:
    """A view of each tensor's bytes. Raises ``FormatError`` ``format.tensors`` for anything but the
    safetensors of so many records."""
    form, view = layout(specs, records), memoryview(data)
    if len(view) != form.size or view[: len(form.prefix)] != form.prefix:
        raise FormatError(
            "format.tensors",
            "The tensors are not those that are due, by name, dtype and shape.",
            mend="Compare them with what the model takes: enclave.models.show(ref).",
        )
    return {name: view[i.start : i.end] for name, i in form.places.items()}


# An answer, before it is sealed: a byte that says what it is, then the outputs' safetensors, or an
# error; zeros to the one length of all answers to so many records.

_OUTPUTS, _ERROR = b"\0", b"\1"
_ERROR_BYTES: Final = 2048
_SHOWN: Final = (200, 800, 400, 120)  # of a code, a message, its mend, its place


def answer_size(outputs: tuple[TensorSpec, ...], records: int) -> int:
    """Bytes of every answer to so many records."""
    return 1 + max(_ERROR_BYTES, plain_size(outputs, records))


def pack_answer(
    outputs: tuple[TensorSpec, ...], records: int, said: bytes | CasemateError
) -> bytes:
    """The answer that holds the outputs' safetensors, or an error."""
    size = answer_size(outputs, records)
    if isinstance(said, bytes):
        return (_OUTPUTS + said).ljust(size, b"\0")
    parts = (said.code, said.message, said.mend, said.where)
    text = canonical.encode([_short(p, most) for p, most in zip(parts, _SHOWN, strict=True)])
    return (_ERROR + len(text).to_bytes(2, "big") + text).ljust(size, b"\0")


def _short(text: str, most: int) -> str:
    """In characters that JSON spells with one byte each."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else "'" for c in text)
    return "".join(plain)[:most]


def read_answer(outputs: tuple[TensorSpec, ...], records: int, plain: bytes) -> memoryview:
    """The safetensors of an answer. Raises the error that it holds, or ``FormatError``."""
    if len(plain) != answer_size(outputs, records) or plain[:1] not in (_OUTPUTS, _ERROR):
        raise _bad("An answer is not of the length or the kind that is due.")
    view = memoryview(plain)
    if plain[:1] == _OUTPUTS:
        return view[1 : 1 + plain_size(outputs, records)]
    told: Json = canonical.decode(plain[3 : 3 + int.from_bytes(plain[1:3], "big")])
    if not (isinstance(told, list) and len(told) == 4 and all(isinstance(x, str) for x in told)):
        raise _bad("An answer holds an error in no form that is known.")
    code, message, mend, where = map(str, told)
    body = {"error": {"code": code, "message": message, "mend": mend, "where": where}}
    if code.split(".")[0] not in FAMILIES:
        raise _bad("An answer holds an error of no known family.")
    raise CasemateError.from_wire(body, 422)


def _bad(message: str) -> FormatError:
    return FormatError(
        "format.answer", message, mend="Check that client and server have matching versions."
    )

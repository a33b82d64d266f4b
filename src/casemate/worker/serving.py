"""Serving a deployed model: parse, prove and warm it; shut in; then answer calls one by one.

A call's inputs are opened and parsed here alone, and its answer is sealed here. Whatever is wrong
with them is said to the caller, within the sealed answer, which is as long as any other and comes
after a forward pass as any other does.
"""

from __future__ import annotations

import hashlib
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from casemate.engine import predict
from casemate.engine.prepare import weights_of
from casemate.engine.program import DTYPES
from casemate.graph import check, pack
from casemate.seal import calls, stream
from casemate.spec import frames
from casemate.spec import serving as form
from casemate.spec.errors import CasemateError, DataError, LimitError, ModelError
from casemate.spec.messages import Call, Predict, Predicted, Serve, Serving
from casemate.spec.serving import MAX_TENSORS, TensorSpec

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that can be called."""

    forward: predict.Forward
    serving: Serving


def prepare(message: Serve, packed: bytes) -> Ready:
    """Parse, check, build, warm. Raises ``FormatError``, ``ModelError`` or ``LimitError``."""
    # Slots were tried on one thread: how work is split over several may follow the machine's load.
    torch.set_num_threads(1 if message.slots > 1 else message.threads)
    if "sha256:" + hashlib.sha256(packed).hexdigest() != message.model_digest:
        raise ModelError(
            "model.digest",
            "The packed model is not the one that the deployment names.",
            mend="Deploy it again.",
        )
    graph, view = pack.unpack(packed)
    predict.require_outputs(graph)
    bounds = check.known_bounds(graph, view, (), ())
    checked = check.check(graph, {n: i for n, (i, _) in view.items()}, bounds=bounds)
    inputs, outputs = predict.specs(graph, checked)
    if max(len(inputs), len(outputs)) > MAX_TENSORS:
        raise ModelError(
            "model.too-large",
            f"The model has {len(inputs)} inputs and {len(outputs)} outputs.",
            mend=f"At most {MAX_TENSORS} of each are admitted.",
        )
    most = max(message.records, message.slots)
    each = checked.saved_bytes + checked.workspace_bytes
    _require_memory(most * each + checked.fixed_bytes + 2 * len(packed), message.memory_bytes)
    weights = weights_of(view)
    forward = predict.Forward(graph, checked, weights, message.records)
    if message.slots > 1:
        forward.share(message.slots)
    forward.warm()
    _require_memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, message.memory_bytes)
    serving = Serving(
        model_digest=message.model_digest,
        inputs=inputs,
        outputs=outputs,
        parameters=sum(t.numel() for t in weights.values()),
        slots=forward.slots,
    )
    ready = Ready(forward, serving)
    warm(ready)
    return ready


def _require_memory(needed: int, there: int) -> None:
    if needed > there:
        raise LimitError(
            "limit.memory",
            f"The model needs {-(-needed // _MIB)} MiB of memory where {there // _MIB} are.",
            mend="Deploy with fewer records in a call, or ask the operator for a larger limit.",
        )


def warm(ready: Ready) -> None:
    """Answer a call as all will be, so that nothing is done for the first time after the lock."""
    keys = bytes(64)
    zeros = _zeros(ready.serving.inputs, 1)
    plain = _dump(ready.serving.inputs, zeros, 1)
    asked, answered = calls.split(keys)
    sealed = b"".join(stream.encrypt(asked, [plain]))
    call = Call(keys=keys, records=1, size=len(sealed))
    calls.open_answer(answered, answers(ready, [call], [sealed])[0])


def serve(sock: socket.socket, message: Serve, ready: Ready) -> None:
    """Answer calls until the peer is gone, which raises ``NetError``."""
    while True:
        asked, _ = frames.receive(sock, (Predict,))
        sealed = [frames.receive_bytes(sock, call.size) for call in asked.calls]
        signal.alarm(message.call_seconds)
        found = answers(ready, asked.calls, sealed)
        signal.alarm(0)
        frames.send(sock, Predicted(calls=len(found)))
        frames.send_bytes(sock, found)


def answers(ready: Ready, asked: Sequence[Call], sealed: Sequence[bytes]) -> list[bytes]:
    """The sealed answer to each call, of the length that is due."""
    serving = ready.serving
    opened = [_open(serving.inputs, call, data) for call, data in zip(asked, sealed, strict=True)]
    # A call that is refused takes its part in the pass all the same, with zeros.
    given = [
        _zeros(serving.inputs, call.records) if isinstance(found, CasemateError) else found
        for call, found in zip(asked, opened, strict=True)
    ]
    said = _run(ready.forward, serving.inputs, asked, given)
    out = []
    for call, found, outputs in zip(asked, opened, said, strict=True):
        told = found if isinstance(found, CasemateError) else outputs
        body = (
            told if isinstance(told, CasemateError) else _dump(serving.outputs, told, call.records)
        )
        plain = form.pack_answer(serving.outputs, call.records, body)
        out.append(b"".join(stream.encrypt(calls.split(call.keys)[1], [plain])))
    return out


def _run(
    forward: predict.Forward,
    inputs: Sequence[TensorSpec],
    asked: Sequence[Call],
    given: Sequence[predict.Tensors],
) -> Sequence[predict.Tensors | CasemateError]:
    """The outputs of each call; of several in one pass only where slots were tried."""
    assert forward.slots > 1 or len(asked) == 1
    total = sum(call.records for call in asked)
    whole = given[0]
    if len(given) > 1:
        whole = {s.name: torch.cat([g[s.name] for g in given]) for s in inputs}
    try:
        found = forward(whole, total)
    except ModelError as e:
        if len(asked) == 1:
            return [e]
        return [
            r for c, g in zip(asked, given, strict=True) for r in _run(forward, inputs, [c], [g])
        ]
    ends = torch.tensor([call.records for call in asked]).cumsum(0).tolist()
    return [
        {n: t[end - call.records : end] for n, t in found.items()}
        for call, end in zip(asked, ends, strict=True)
    ]


def _open(
    inputs: tuple[TensorSpec, ...], call: Call, sealed: bytes
) -> predict.Tensors | CasemateError:
    """A call's tensors, or why it has none."""
    try:
        if stream.plain_size(len(sealed)) != form.plain_size(inputs, call.records):
            raise _wrong("The inputs are not of the size that so many records have.", "")
        data = b"".join(stream.decrypt(calls.split(call.keys)[0], [sealed]))
        found = form.load(inputs, call.records, data)
        return {s.name: _tensor(s, (call.records, *s.shape), found[s.name]) for s in inputs}
    except CasemateError as e:
        return e


def _tensor(spec: TensorSpec, shape: tuple[int, ...], raw: memoryview) -> torch.Tensor:
    """A copy. Raises ``data.inputs`` for a bool that is none and an integer out of bounds."""
    if spec.dtype == "bool" and raw.tobytes().translate(None, b"\0\1"):
        raise _wrong(f"Input {spec.name!r} holds bytes that are no bool.", spec.name)
    if not len(raw):
        return torch.zeros(shape, dtype=DTYPES[spec.dtype])
    made = torch.frombuffer(bytearray(raw), dtype=DTYPES[spec.dtype]).reshape(shape)
    if spec.low is not None and spec.high is not None:
        low, high = (int(x) for x in torch.aminmax(made))
        if low < spec.low or high > spec.high:
            bounds = f"[{spec.low}, {spec.high}]"
            raise _wrong(f"Input {spec.name!r} has values outside of {bounds}.", spec.name)
    return made


def _wrong(message: str, where: str) -> DataError:
    return DataError(
        "data.inputs",
        message,
        mend="Compare them with what the model takes: enclave.models.show(ref).inputs.",
        where=where,
    )


def _zeros(inputs: Sequence[TensorSpec], records: int) -> predict.Tensors:
    """Records that the model takes: zeros, or what is next to them within bounds."""
    out = {}
    for s in inputs:
        fill = 0 if s.low is None or s.high is None else min(max(0, s.low), s.high)
        out[s.name] = torch.full((records, *s.shape), fill, dtype=DTYPES[s.dtype])
    return out


def _dump(specs: tuple[TensorSpec, ...], found: Mapping[str, torch.Tensor], records: int) -> bytes:
    return form.dump(specs, records, {n: _bytes(t) for n, t in found.items()})


def _bytes(t: torch.Tensor) -> bytes:
    raw: bytes = t.contiguous().numpy().tobytes()
    return raw

"""Deployed models: deploy, call, sell and buy them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from casemate.client import models, sales, values, views, weights
from casemate.client.connection import Connection
from casemate.client.jobs import pull
from casemate.client.memory import log_origin
from casemate.client.receipts import Verified
from casemate.client.sales import SaleView
from casemate.client.uploads import new_key, sealed_file, upload
from casemate.graph.model import Packed
from casemate.seal import calls, hpke
from casemate.seams import OsRng
from casemate.spec import codec, serving
from casemate.spec.errors import NetError, ReceiptError, UsageError
from casemate.spec.receipt import ReceiptBundle
from casemate.spec.sale import Sale, SaleInfo, SaleReceipt
from casemate.spec.serving import (
    Deployment,
    ModelInfo,
    ServePolicy,
    TensorSpec,
    read_answer,
)

if TYPE_CHECKING:
    from casemate.attest.trust import Trust

MAX_ANSWER: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelView:
    """A deployed model; ``info`` holds the values."""

    info: ModelInfo

    @property
    def id(self) -> str:
        return self.info.model

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.info.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.info.outputs

    @property
    def left(self) -> int | None:
        """One's own calls that are left in this epoch; ``None`` where they are not counted."""
        return self.info.left

    def __str__(self) -> str:
        return views.as_text("", (), views.model(self.info))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return views.as_html("Model", (), views.model(self.info))


class Models:
    """Deployed models that one owns, may call or has bought."""

    def __init__(self, connection: Connection, trust: Trust) -> None:
        self._connection = connection
        self._trust = trust
        self._known: dict[str, ModelInfo] = {}

    def deploy(
        self,
        model: Any,
        policy: ServePolicy,
        *,
        example: Any = None,
        bounds: Mapping[str, tuple[int, int]] | None = None,
        name: str = "model",
    ) -> ModelView:
        """See :meth:`casemate.client.enclave.Enclave.deploy`."""
        packed = models.export_outputs(model, example, bounds)
        connection = self._connection
        assert connection.identity is not None
        key, owner = new_key(), connection.identity.id
        with sealed_file(key, [packed.data]) as (file, size):
            place = upload(connection, file, size)
        id_ = Deployment.id(owner, packed.digest, place)
        info = Deployment.info(id_, owner, codec.digest(policy), packed.digest)
        sealed = hpke.seal(connection.line().attestation.binding.hpke_key, key, info=info)
        deployment = values.make(
            Deployment, model=id_, owner=owner, name=name, policy=policy,
            model_digest=packed.digest, upload=place, sealed_key=sealed,
        )  # fmt: skip
        return self._view(connection.request("POST", "/v1/models", deployment).value(ModelInfo))

    def _view(self, info: ModelInfo) -> ModelView:
        self._known[info.model] = info
        return ModelView(info)

    def list(self) -> views.Listing[ModelInfo]:
        """The models that one owns or may call."""
        return views.models(self._connection.listing("/v1/models", ModelInfo))

    def show(self, model: str | ModelView) -> ModelView:
        path = f"/v1/models/{_id(model)}"
        return self._view(self._connection.request("GET", path).value(ModelInfo))

    def set_policy(self, model: str | ModelView, policy: ServePolicy) -> ModelView:
        """Replace the policy. Another number of calls goes with a later epoch, in which counts
        begin anew. It also lets the model run under the software whose evidence was checked."""
        path = f"/v1/models/{_id(model)}/policy"
        return self._view(self._connection.request("PUT", path, policy).value(ModelInfo))

    def undeploy(self, model: str | ModelView) -> None:
        """Destroy the model's key."""
        self._connection.request("DELETE", f"/v1/models/{_id(model)}")

    def grant(self, model: str | ModelView, to: str, terms: str = "") -> SaleView:
        """Sell a deployed model of one's own: sign that it is handed, whole, to the enrolled
        identity ``to`` on ``terms`` (one's own words). Its key is then sealed to that buyer in the
        enclave; it cannot be taken back. The same again is the same sale."""
        connection, seller = self._connection, self._connection.identity
        assert seller is not None
        info = self.show(model).info
        sale = values.make(
            Sale, origin=log_origin(connection.line().attestation.binding.log_key),
            model=info.model, model_digest=info.model_digest, seller=seller.id, buyer=to,
            terms=terms,
        )  # fmt: skip
        body = {"envelope": sales.sign(sale, seller)}
        path = f"/v1/models/{info.model}/sales"
        made = connection.change("POST", path, body, retry=True).value(SaleInfo)
        if (made.id, made.sale) != (sale.id, sale):
            raise NetError(
                "net.protocol",
                "The server answered with another sale than the one that was signed.",
                mend="Check that client and server have matching versions.",
            )
        return SaleView(made)

    def sales(self) -> views.Listing[SaleInfo]:
        """What one sold and bought."""
        return views.sales(self._connection.listing("/v1/sales", SaleInfo))

    def receipt(self, sale: str | SaleView, model: Packed | None = None) -> Verified[SaleReceipt]:
        """A sale's receipt, verified under this connection's trust, with the ``model`` if pulled;
        ``.bundle`` is for a file or an auditor. For both parties."""
        name, connection = _id(sale), self._connection
        found = connection.request("GET", f"/v1/sales/{name}/receipt").value(ReceiptBundle)
        connection.sync()  # its head is newer than the one seen at the beginning
        verified = sales.verify_sale(
            found,
            trust=self._trust,
            model=None if model is None else model.data,
            memory=connection.memory,
        )
        if verified.receipt.sale.id != name:
            raise ReceiptError(
                "receipt.sale",
                f"The receipt is about {verified.receipt.sale.id}, not {name[:60]}.",
                mend="Do not rely on it; ask the enclave again.",
            )
        return verified

    def pull(self, sale: str | SaleView) -> Packed:
        """The packed model that one bought, opened with one's own key and compared with the sale's
        receipt, which is verified first. Raises ``ModelError`` ``model.sale-ended`` where the model
        is gone; as :meth:`receipt`."""
        bought = self.receipt(sale).receipt.sale
        path = f"/v1/sales/{bought.id}/model"
        return Packed(pull(self._connection, path, bought.info, bought.model_digest))

    def predict(self, model: str | ModelView, inputs: Any) -> Any:
        """See :meth:`casemate.client.enclave.Enclave.predict`."""
        name = _id(model)
        info = self._known.get(name) or self.show(name).info
        wire, records = _wire(info.inputs, inputs)
        connection = self._connection
        assert connection.identity is not None
        line = connection.line()
        body, key = calls.seal(
            line.attestation.binding.hpke_key, name, connection.identity.id, records, wire, OsRng()
        )
        answer = connection.request(
            "POST",
            f"/v1/models/{name}/predictions",
            body,
            headers={"content-type": "application/octet-stream"},
            limit=MAX_ANSWER,
        )
        plain = calls.open_answer(key, answer.body)
        return _arrays(info.outputs, records, read_answer(info.outputs, records, plain), inputs)


def _id(given: str | ModelView | SaleView) -> str:
    return given if isinstance(given, str) else given.id


def _named(specs: Sequence[TensorSpec], inputs: Any) -> dict[str, Any]:
    """Arrays by input; a single one needs no name, several may come in order."""
    if isinstance(inputs, Mapping):
        found = dict(inputs)
    elif isinstance(inputs, tuple):
        found = dict(zip([s.name for s in specs], inputs, strict=False))
    else:
        found = {specs[0].name: inputs}
    if set(found) != {s.name for s in specs}:
        raise UsageError(
            "usage.inputs",
            f"The model takes {', '.join(s.name for s in specs)}; given are"
            f" {', '.join(map(str, found))[:200] or 'none'}.",
            mend="Give a dict of arrays by these names.",
        )
    return found


def _wire(specs: tuple[TensorSpec, ...], inputs: Any) -> tuple[bytes, int]:
    """The inputs' safetensors, and how many records they are. Raises ``UsageError``."""
    np = weights.numpy()
    arrays = {}
    for name, given in _named(specs, inputs).items():
        if hasattr(given, "detach"):
            given = given.detach().cpu().numpy()
        arrays[name] = np.asarray(given)
    counts = {a.shape[0] if a.ndim else -1 for a in arrays.values()}
    records = counts.pop() if len(counts) == 1 else -1
    made = {}
    for s in specs:
        a = arrays[s.name]
        dtype = np.dtype(weights.NUMPY[s.dtype])
        if a.dtype == np.float64 and s.dtype == "f32":  # Python's own numbers
            a = a.astype(dtype)
        elif a.dtype != dtype and np.issubdtype(a.dtype, np.integer) and s.dtype in ("i32", "i64"):
            cut = a.astype(dtype)
            a = cut if np.array_equal(cut, a) else a  # what does not fit is no other number
        if records < 1 or a.dtype != dtype or a.shape[1:] != s.shape:
            raise UsageError(
                "usage.inputs",
                f"Input {s.name!r} is {a.dtype} {list(a.shape)}; the model takes {views.told(s)}.",
                mend="Give arrays of these shapes, with the records along axis 0.",
                where=s.name,
            )
        made[s.name] = np.ascontiguousarray(a).tobytes()
    return serving.dump(specs, records, made), records


def _arrays(specs: tuple[TensorSpec, ...], records: int, data: memoryview, inputs: Any) -> Any:
    """The outputs as arrays, or tensors where tensors were given; a single one without its name."""
    np = weights.numpy()
    found = serving.load(specs, records, data)
    arrays = {
        s.name: np.frombuffer(found[s.name], weights.NUMPY[s.dtype])
        .reshape(records, *s.shape)
        .copy()
        for s in specs
    }
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    first = first[0] if isinstance(first, tuple) else first
    if hasattr(first, "detach"):
        from casemate.client import torch as bridge

        arrays = bridge.tensors(arrays)
    only = next(iter(arrays.values()))
    return only if len(arrays) == 1 else arrays

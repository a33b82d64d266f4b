"""Sales of deployed models: what sellers and buyers do."""

from __future__ import annotations

from casemate.ledger import catalog, models, sales
from casemate.ledger.sales import Sold
from casemate.seal import dsse, hpke
from casemate.server import records
from casemate.server.config import software
from casemate.server.jobs import sealed_file
from casemate.server.keys import BootKeys
from casemate.server.models import require_accepted
from casemate.server.service import Call, Reply
from casemate.server.uploads import data_path
from casemate.spec import canonical
from casemate.spec.errors import LimitError, ModelError
from casemate.spec.identity import PublicIdentity
from casemate.spec.receipt import PAYLOAD_TYPE, ReceiptBundle
from casemate.spec.sale import Sale, SaleInfo, SaleReceipt, statement


def _show(found: Sold) -> SaleInfo:
    ended = found.sealed_key is None
    return SaleInfo(id=found.sale.id, sale=found.sale, state="ended" if ended else "open")


async def grant(call: Call) -> SaleInfo:
    """Sell a deployed model: its key is sealed to the buyer. The same sale again is the same."""
    service, envelope = call.service, call.body["envelope"]
    store = service.store
    sale = sales.read(store, envelope, call.caller, call.id)
    before = sales.find(store, sale.id)
    if before is not None:
        return _show(before)
    model = models.model(store, call.id)
    require_accepted(service, model)
    most = service.config.limits.sales
    if records.sales_of(store, call.caller) >= most:
        raise LimitError(
            "limit.sales",
            f"This identity has made {most} sales, as many as are allowed.",
            mend="Ask the operator for a higher limit.",
        )
    sealed = hpke.seal(catalog.identity(store, sale.buyer).seal_key, model.key, info=sale.info)
    seller = catalog.identity(store, call.caller)
    simulated = service.boot_attestation.evidence.simulated
    signed = sign_receipt(service.keys, simulated, sale, envelope, seller)
    made = sales.grant(store, sale, sealed, signed)
    service.log.event("model", model=sale.model, state="sold")
    return _show(made)


def sign_receipt(
    keys: BootKeys, simulated: bool, sale: Sale, signed: str, seller: PublicIdentity
) -> str:
    """The signed receipt of a sale, an envelope; ``signed``: the seller's own."""
    receipt = SaleReceipt(
        sale=sale,
        signed=signed,
        sign_key=seller.sign_key,
        seal_key=seller.seal_key,
        boot=keys.boot,
        simulated=("tee",) if simulated else (),
        software=software(),
    )
    payload = canonical.encode(statement(receipt))
    return dsse.sign(PAYLOAD_TYPE, payload, keys.receipt.sign, keys.receipt.public.hex())


async def list_sales(call: Call) -> list[SaleInfo]:
    return [_show(found) for found in sales.sales(call.service.store, call.caller)]


async def receipt(call: Call) -> ReceiptBundle:
    return sales.bundle(call.service.store, call.id)


async def model(call: Call) -> Reply:
    """The packed model as it was uploaded, behind its key, sealed to the buyer."""
    service = call.service
    found = sales.sold(service.store, call.id)
    if found.sealed_key is None:
        raise ModelError(
            "model.sale-ended",
            f"The model {found.sale.model} was undeployed, or did not pass on with its enclave's"
            " state: this sale can be pulled no more.",
            mend="Show the receipt to the seller, who can deploy the model again and sell it anew.",
            where=call.id,
            status=409,
        )
    upload = models.model(service.store, found.sale.model).deployment.upload
    return sealed_file(found.sealed_key, service.disk.open(data_path(upload)))

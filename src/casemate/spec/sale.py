"""The sale of a deployed model: what its owner signs, and what the receipt of it says.

A sale is a DSSE envelope (payload type :data:`SALE_TYPE`) by the owner's identity over one closed
format. It names the log, the model and the buyer, so that it serves for no other; the sale's id
follows from it, so that the same words are the same sale, however often they are sent.
"""

from __future__ import annotations

from typing import Final, Literal

from casemate.spec import codec
from casemate.spec.canonical import Json
from casemate.spec.codec import value
from casemate.spec.identity import SEAL_KEY_BYTES, SIGN_KEY_BYTES
from casemate.spec.receipt import STATEMENT_TYPE
from casemate.spec.serving import DIGEST, IDENTITY, MODEL

SALE_TYPE: Final = "application/vnd.casemate.sale+json"
SALE_PREDICATE: Final = "https://casemate.dev/sale/v1"
MAX_TERMS: Final = 2000
MAX_ORIGIN: Final = 200


@value("sale/v1")
class Sale:
    """``seller`` hands the deployed ``model``, whose packed bytes have ``model_digest``, to
    ``buyer``. ``origin``: the log that it is for; ``terms``: the parties' words, printable, lines
    apart by newlines."""

    origin: str
    model: str
    model_digest: str
    seller: str
    buyer: str
    terms: str = ""

    def __post_init__(self) -> None:
        if not MODEL.fullmatch(self.model) or not DIGEST.fullmatch(self.model_digest):
            raise ValueError("a sale names a deployed model and its digest")
        if not (IDENTITY.fullmatch(self.seller) and IDENTITY.fullmatch(self.buyer)):
            raise ValueError("seller and buyer must be identity ids")
        if not (1 <= len(self.origin) <= MAX_ORIGIN and self.origin.isprintable()):
            raise ValueError("a sale names the log that it is for")
        lines = self.terms.split("\n")
        if len(self.terms) > MAX_TERMS or not all(line.isprintable() for line in lines):
            raise ValueError(f"terms have at most {MAX_TERMS} printable characters")

    @property
    def id(self) -> str:
        """``sale_`` and 32 hex digits of the SHA-256 of its canonical bytes."""
        return "sale_" + codec.digest(self)[7:39]

    @property
    def info(self) -> bytes:
        """What the model's stream key is sealed to the buyer with (HPKE)."""
        parts = (self.id, self.model, self.model_digest, self.buyer)
        return "|".join(("casemate/sale-key/v1", *parts)).encode()


@value("sale-receipt/v1")
class SaleReceipt:
    """What the enclave says of a sale; :func:`statement` is what is signed.

    ``signed``: the owner's envelope over ``sale``; ``sign_key`` and ``seal_key``: those that the
    seller's id is made of. ``boot``, ``simulated``, ``software``: as in ``spec.receipt.Receipt``.
    """

    sale: Sale
    signed: str
    sign_key: bytes
    seal_key: bytes
    boot: bytes
    simulated: tuple[str, ...]
    software: str

    def __post_init__(self) -> None:
        if len(self.sign_key) != SIGN_KEY_BYTES or len(self.seal_key) != SEAL_KEY_BYTES:
            raise ValueError("a key has the wrong length")


def statement(receipt: SaleReceipt) -> dict[str, Json]:
    """The in-toto Statement v1 of a sale's receipt, whose subject is the packed model."""
    sale = receipt.sale
    digest: Json = {"sha256": sale.model_digest.removeprefix("sha256:")}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": f"{sale.model}.cmm", "digest": digest}],
        "predicateType": SALE_PREDICATE,
        "predicate": codec.to_json(receipt),
    }


@value("sale-info/v1")
class SaleInfo:
    """What its two parties see of a sale. state: ``ended`` once the model was undeployed, or did
    not pass on with its enclave's state: then its buyer cannot pull it any more."""

    id: str
    sale: Sale
    state: Literal["open", "ended"]

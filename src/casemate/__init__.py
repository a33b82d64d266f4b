"""casemate: confidential, differentially private deep learning for several parties.

``import casemate as cm`` gives the SDK. Names are loaded when first used, so that the import is
quick and needs no torch, numpy or pyarrow::

    me = cm.Identity.load("identity.json")
    enclave = cm.connect("https://host:8443", trust=cm.Trust.load("trust.toml"), identity=me)
    run = enclave.train(module, ["ds_…"], loss="cross_entropy", optimizer=cm.Adam(lr=1e-3),
                        batch_size=256, epochs=10, dp=cm.DP(2.0, 1e-5, clip=1.0))
    run.watch()
    run.weights(into=module)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.client.enclave import Enclave, connect
    from casemate.client.heads import Witnesses
    from casemate.client.jobs import Run
    from casemate.client.memory import Memory
    from casemate.client.receipts import load_bundle, verify_receipt
    from casemate.client.sales import verify_sale
    from casemate.client.values import (
        DP,
        SGD,
        Adam,
        AdamW,
        Budget,
        Contest,
        NonPrivate,
        Policy,
        Schedule,
        ServePolicy,
        Views,
    )
    from casemate.seal.identity import Identity
    from casemate.spec.errors import CasemateError

__version__ = "0.1.0"

_HOMES: Final = {
    "Adam": "casemate.client.values",
    "AdamW": "casemate.client.values",
    "Budget": "casemate.client.values",
    "CasemateError": "casemate.spec.errors",
    "Contest": "casemate.client.values",
    "DP": "casemate.client.values",
    "Enclave": "casemate.client.enclave",
    "Identity": "casemate.seal.identity",
    "Memory": "casemate.client.memory",
    "NonPrivate": "casemate.client.values",
    "Policy": "casemate.client.values",
    "Run": "casemate.client.jobs",
    "SGD": "casemate.client.values",
    "Schedule": "casemate.client.values",
    "ServePolicy": "casemate.client.values",
    "Views": "casemate.client.values",
    "Trust": "casemate.attest.trust",
    "Witnesses": "casemate.client.heads",
    "connect": "casemate.client.enclave",
    "load_bundle": "casemate.client.receipts",
    "verify_receipt": "casemate.client.receipts",
    "verify_sale": "casemate.client.sales",
}

__all__ = [
    "Adam", "AdamW", "Budget", "Contest", "DP", "Identity", "NonPrivate", "Policy", "SGD",
    "Schedule", "ServePolicy", "Trust", "Views",
    "Enclave", "Memory", "Run", "connect",
    "Witnesses", "load_bundle", "verify_receipt", "verify_sale",
    "CasemateError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'casemate' has no attribute {name!r}")
    found = getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""The roots of trust that casemate carries: AMD's root keys (ARK) of three product lines.

Pinned is the SHA-256 of the key's SubjectPublicKeyInfo. The certificates are AMD's own, as its key
server gives them at ``https://kdsintf.amd.com/vcek/v1/<product>/cert_chain``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Final, TypeAlias

from casemate.attest import x509

# Product line to the admitted fingerprints (hex) of its root key.
Roots: TypeAlias = Mapping[str, tuple[str, ...]]

AMD: Final[dict[str, tuple[str, ...]]] = {
    "Milan": ("9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9",),
    "Genoa": ("429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831",),
    "Turin": ("4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08",),
}


@cache
def amd(product: str) -> x509.Certificate:
    """The carried ARK certificate of a product line (a key of :data:`AMD`)."""
    file = f"amd-ark-{product.lower()}.pem"
    return x509.parse((resources.files(__package__) / file).read_bytes(), file)


# Issuers of endorsements of Azure's utility VMs, as did:x509 (SHA-256 of Microsoft's "Supply Chain
# RSA Root CA 2022" in base64url, then the usage that its leaf must have): container instances, AKS.
_SUPPLY_CHAIN: Final = "did:x509:0:sha256:I__iuL25oXEVFdTP_aBLx_eT1RPHbCQ_ECBQfYZpt9s"
UVM_ISSUERS: Final = (
    f"{_SUPPLY_CHAIN}::eku:1.3.6.1.4.1.311.76.59.1.2",
    f"{_SUPPLY_CHAIN}::eku:1.3.6.1.4.1.311.76.59.1.5",
)


@cache
def uvm() -> x509.Certificate:
    """The carried certificate that the fingerprint in :data:`UVM_ISSUERS` names."""
    file = "microsoft-uvm-root.pem"
    return x509.parse((resources.files(__package__) / file).read_bytes(), file)

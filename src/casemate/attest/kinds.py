"""All kinds of evidence, one row each."""

from __future__ import annotations

from typing import Final

from casemate.attest.azure.kind import KIND as AZURE_CVM
from casemate.attest.dcap.kind import SGX, TDX
from casemate.attest.kind import Files, Kind
from casemate.attest.nitro.kind import KIND as NITRO
from casemate.attest.nvidia.kind import KIND as NVIDIA
from casemate.attest.snp.kind import KIND as SEV_SNP
from casemate.attest.tokens.kind import KINDS as TOKENS
from casemate.attest.tpm.kind import KIND as TPM
from casemate.attest.verdict import refusal

# In the order in which a folder is tried: what contains other evidence comes before it.
_ROWS: Final[tuple[Kind, ...]] = (NITRO, AZURE_CVM, TPM, NVIDIA, SEV_SNP, SGX, TDX, *TOKENS)
KINDS: Final[dict[str, Kind]] = {kind.tee: kind for kind in _ROWS}


def recognise(files: Files) -> Kind:
    """The kind of evidence that ``files`` is, by content. Raises ``evidence.tee-unknown``."""
    for kind in KINDS.values():
        if kind.recognises(files):
            return kind
    raise refusal(
        "tee-unknown",
        "The files are no evidence of a known kind.",
        "kind",
        "Give a folder with the evidence of one machine, laid out as docs/evidence.md shows.",
    )

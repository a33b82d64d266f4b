"""What stands beside the paravisor's report.

Files, as in an evidence folder: ``hcl_report.bin``; the hardware's (see ``hardware``); the vTPM's
quote as ``tpm.collateral`` finds it (``tpm_quote.msg`` with ``.sig`` or ``.tpmt_signature``,
``pcrs.json``, ``event_log.bin``, ``aik_cert.der`` with certificates of authorities).

Procedure of :func:`vtpm`: all files that are not the hardware's, parsed by ``tpm.collateral``.
"""

from __future__ import annotations

from casemate.attest.azure import abi, hardware
from casemate.attest.kind import Files
from casemate.attest.tpm import collateral
from casemate.attest.tpm.collateral import Parts


def vtpm(files: Files) -> Parts:
    """The quotes of the vTPM and what belongs to them. Raises ``evidence.parse-*``."""
    return collateral.parse({
        name: data
        for name, data in files.items()
        if name != abi.FILE and not hardware.is_hardware(name)
    })  # fmt: skip

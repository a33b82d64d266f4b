"""Evidence of a TPM 2.0: a quote over all PCRs, its key and certificate, the boot's event log.

Files, as in a folder of evidence: ``quote_sha256.msg``, ``quote_sha256.tpmt_signature``,
``pcrs_sha256.json``, ``ak_public.tpmt``, ``ak_cert.der`` where the TPM holds one, ``event_log.bin``
where the kernel shows it. The quote's extraData is SHA-256 of ``report_data``.

A TPM says what was booted. It encrypts no memory: alone it protects nothing from who holds the
machine, and a client must ask for it by a section of its trust policy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from casemate.attest.tpm import eventlog
from casemate.spec.errors import EvidenceError
from casemate.tee import errors
from casemate.tee.hardware import Maker
from casemate.tee.tpm_device import TCTI, Ak, Quote, Tpm

KIND: Final = "tpm"
PATH: Final = Path("/dev/tpmrm0")
EVENT_LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
MAX_LOG: Final = 1 << 20


def pcrs_json(quote: Quote) -> bytes:
    table = {str(i): value.hex() for i, value in sorted(quote.pcrs.items())}
    return json.dumps(table, indent=1).encode()


def event_log(path: Path = EVENT_LOG) -> bytes:
    """The firmware's event log without what fills its table, or nothing where the kernel shows none
    or it may not be read."""
    try:
        with path.open("rb") as file:
            log = file.read(MAX_LOG + 1)
    except OSError:
        return b""
    if len(log) > MAX_LOG:
        raise errors.device(str(path), f"The event log has more than {MAX_LOG} bytes.")
    try:
        return log[: len(log) - eventlog.parse(log).padding] if log else log
    except EvidenceError:
        return log  # the client's verifier says what is wrong with it


def _files(quote: Quote, ak: Ak, log: bytes) -> dict[str, bytes]:
    optional = {"ak_cert.der": ak.certificate, "event_log.bin": log}
    return {
        "quote_sha256.msg": quote.message,
        "quote_sha256.tpmt_signature": quote.signature,
        "pcrs_sha256.json": pcrs_json(quote),
        "ak_public.tpmt": ak.public,
        **{name: data for name, data in optional.items() if data},
    }


def maker(tcti: str = TCTI, log_path: Path = EVENT_LOG) -> Maker:
    """Quotes over extraData; the key is made now. Each uses a connection of its own."""
    with Tpm(tcti) as tpm:
        ak = tpm.ak()

    def make(extra: bytes) -> dict[str, bytes]:
        with Tpm(tcti) as tpm:
            return _files(tpm.quote(ak, extra), ak, event_log(log_path))

    return make

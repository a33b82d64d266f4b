"""AWS Nitro Enclaves: attestation documents of the Nitro Secure Module, /dev/nsm.

Source: Linux, include/uapi/linux/nsm.h and drivers/misc/nsm.c (6.8 and later; the enclave images'
own driver has the same interface); AWS, "Nitro Secure Module library", Request and Response.

Procedure of :func:`document`:

 1. The request is CBOR ``{"Attestation": {"user_data", "nonce", "public_key"}}``, each bytes or
    null, of 4,096 bytes at most.
 2. NSM_IOCTL_RAW (``_IOWR(0x0A, 0)``) over two (address, length) pairs; the module writes the
    response, of 12,288 bytes at most, and its length.
 3. The response is ``{"Attestation": {"document": bytes}}``, a COSE_Sign1; ``{"Error": word}``, or
    anything else, is raised.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

from casemate.attest import cbor
from casemate.tee import errors
from casemate.tee.devices import Opener, OsDevice, iowr

PATH: Final = Path("/dev/nsm")
REQUEST_MAX: Final = 0x1000
RESPONSE_MAX: Final = 0x3000


class Iovec(ctypes.Structure):
    _fields_ = (("addr", ctypes.c_uint64), ("len", ctypes.c_uint64))


class Raw(ctypes.Structure):
    _fields_ = (("request", Iovec), ("response", Iovec))


IOCTL_RAW: Final = iowr(0x0A, 0, Raw)


def _ask(request: bytes, path: Path, opener: Opener) -> bytes:
    if len(request) > REQUEST_MAX:
        raise ValueError(f"a request of {len(request)} bytes; the module takes {REQUEST_MAX}")
    asked = ctypes.create_string_buffer(request, len(request))
    answer = ctypes.create_string_buffer(RESPONSE_MAX)
    raw = Raw(
        Iovec(ctypes.addressof(asked), len(request)), Iovec(ctypes.addressof(answer), RESPONSE_MAX)
    )
    try:
        device = opener(path)
        try:
            device.ioctl(IOCTL_RAW, raw)
        finally:
            device.close()
    except OSError as e:
        raise errors.os_error(str(path), e) from None
    return answer.raw[: min(raw.response.len, RESPONSE_MAX)]


def _document(answer: Any) -> bytes:
    if isinstance(answer, dict) and set(answer) == {"Error"}:
        raise errors.device("nsm", f"The Nitro Secure Module refuses: {str(answer['Error'])[:60]}.")
    inner = answer.get("Attestation") if isinstance(answer, dict) else None
    found = inner.get("document") if isinstance(inner, dict) else None
    if not isinstance(found, bytes) or not found:
        raise errors.device("nsm", "The Nitro Secure Module's answer holds no document.")
    return found


def document(
    user_data: bytes | None = None,
    nonce: bytes | None = None,
    public_key: bytes | None = None,
    *,
    path: Path = PATH,
    opener: Opener = OsDevice,
) -> bytes:
    """An attestation document. ``user_data`` and ``nonce``: up to 512 bytes; ``public_key``: 1,024.

    Raises ``usage.tee-device``; ValueError for a request that is too long.
    """
    fields = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
    given = {k: cbor.NULL if v is None else cbor.byte_string(v) for k, v in fields.items()}
    answer = _ask(cbor.mapping({"Attestation": cbor.mapping(given)}), path, opener)
    try:
        decoded = cbor.decode(answer, indefinite=True)
    except cbor.CborError:
        raise errors.device("nsm", "The Nitro Secure Module's answer is no CBOR.") from None
    return _document(decoded)

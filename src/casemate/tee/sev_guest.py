"""Keys that a SEV-SNP chip derives for one guest: /dev/sev-guest, SNP_GET_DERIVED_KEY.

Source: Linux, include/uapi/linux/sev-guest.h; AMD, "SEV Secure Nested Paging Firmware ABI",
publication 56860, section 7.2, tables 18 (MSG_KEY_REQ) and 20 (MSG_KEY_RSP).

The key is derived from the chip's VCEK and, as chosen here, from the guest's policy and
measurement: another image, another guest policy or another chip gets another key. A firmware update
that changes the VCEK may change it too.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from pathlib import Path
from typing import Final

from casemate.tee import errors
from casemate.tee.devices import Opener, OsDevice, iowr

PATH: Final = Path("/dev/sev-guest")
MESSAGE_VERSION: Final = 1
KEY_BYTES: Final = 32

VCEK: Final = 0  # ROOT_KEY_SELECT
# GUEST_FIELD_SELECT
POLICY, IMAGE_ID, FAMILY_ID, MEASUREMENT, GUEST_SVN, TCB_VERSION = (1 << n for n in range(6))
FIELDS: Final = POLICY | MEASUREMENT

_RESPONSE: Final = struct.Struct("<I28s32s")


class KeyRequest(ctypes.Structure):
    """struct snp_derived_key_req"""

    _fields_ = (
        ("root_key_select", ctypes.c_uint32), ("rsvd", ctypes.c_uint32),
        ("guest_field_select", ctypes.c_uint64), ("vmpl", ctypes.c_uint32),
        ("guest_svn", ctypes.c_uint32), ("tcb_version", ctypes.c_uint64),
    )  # fmt: skip


class KeyResponse(ctypes.Structure):
    """struct snp_derived_key_resp"""

    _fields_ = (("data", ctypes.c_uint8 * 64),)


class GuestRequest(ctypes.Structure):
    """struct snp_guest_request_ioctl; exitinfo2: the VMM's error above, the firmware's below."""

    _fields_ = (
        ("msg_version", ctypes.c_uint8), ("req_data", ctypes.c_uint64),
        ("resp_data", ctypes.c_uint64), ("exitinfo2", ctypes.c_uint64),
    )  # fmt: skip


GET_DERIVED_KEY: Final = iowr(ord("S"), 1, GuestRequest)


def derived_key(
    *, vmpl: int = 0, fields: int = FIELDS, path: Path = PATH, opener: Opener = OsDevice
) -> bytes:
    """32 bytes. ``vmpl``: not below the guest's own; ``fields``: what is mixed in.

    Raises ``usage.tee-device``.
    """
    request = KeyRequest(VCEK, 0, fields, vmpl, 0, 0)
    response = KeyResponse()
    call = GuestRequest(MESSAGE_VERSION, ctypes.addressof(request), ctypes.addressof(response), 0)
    try:
        device = opener(path)
        try:
            device.ioctl(GET_DERIVED_KEY, call)
        finally:
            device.close()
    except OSError as e:
        if e.errno == errno.EIO:
            vmm, firmware = call.exitinfo2 >> 32, call.exitinfo2 & 0xFFFFFFFF
            raise errors.device(
                str(path), f"The chip gives no key: firmware error {firmware:#x}, VMM's {vmm:#x}."
            ) from None
        raise errors.os_error(str(path), e) from None
    status, _, key = _RESPONSE.unpack(bytes(response.data))
    if status or not any(key):
        raise errors.device(str(path), f"The chip gives no key: status {status:#x}.")
    found: bytes = key
    return found

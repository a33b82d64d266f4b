"""TCG event logs: what was measured into the registers of a TPM or of a TEE, event by event.

Source: TCG, "PC Client Platform Firmware Profile Specification", level 00 version 1.06: section
10.2.1 (TCG_PCClientPCREvent), 10.2.2 (TCG_PCR_EVENT2), 10.4.1 (types of events), 10.4.5
(EV_NO_ACTION: TCG_EfiSpecIDEvent, TCG_EfiStartupLocalityEvent); TPM 2.0 Library part 1 section 17.2
(extend). Logs of confidential VMs (UEFI 2.10 section 38, the ACPI table CCEL) have the same form;
their registers count from 1, so that register n is RTMR[n - 1]. All integers are little endian.

Procedure of :func:`parse`:

 1. The first event, in the form with one SHA-1 digest, is EV_NO_ACTION with a digest of zeros. Its
    data begins with ``Spec ID Event03`` and lists the algorithms of the log with their sizes, which
    for known algorithms are the known ones. A log that begins otherwise is one of SHA-1 alone.
 2. Each further event has a known register, digests of listed algorithms, each once, and data that
    ends within the log. In PCR 7, separator and variables are what their digests say.
 3. What follows the last event is zeros or 0xff throughout; its length is told.

What a log says is worth as much as the registers that it replays to: :meth:`Log.replay`. An
event's type and, where the digest is not the hash of the data, its data are covered by nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from casemate.attest.verdict import Refused, refusal
from casemate.spec.canonical import Json

MAX_BYTES: Final = 4 << 20
MAX_EVENTS: Final = 1 << 14
MAX_ALGORITHMS: Final = 8
REGISTERS: Final = 24
NO_REGISTER: Final = 0xFFFFFFFF

# TCG Algorithm Registry, table 3: identifier to name and size; those with a name can be replayed.
ALGORITHMS: Final = {
    0x04: ("sha1", 20), 0x0B: ("sha256", 32), 0x0C: ("sha384", 48), 0x0D: ("sha512", 64),
    0x12: ("sm3_256", 32), 0x27: ("sha3_256", 32), 0x28: ("sha3_384", 48), 0x29: ("sha3_512", 64),
}  # fmt: skip
_REPLAYED: Final = ("sha1", "sha256", "sha384", "sha512")

EV_NO_ACTION: Final = 0x03
EV_SEPARATOR: Final = 0x04
EV_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_HCRTM: Final = 0x80000010
_SECURE_BOOT: Final = 7  # the PCR
TYPES: Final = {
    0x00: "EV_PREBOOT_CERT", 0x01: "EV_POST_CODE", 0x02: "EV_UNUSED", 0x03: "EV_NO_ACTION",
    0x04: "EV_SEPARATOR", 0x05: "EV_ACTION", 0x06: "EV_EVENT_TAG", 0x07: "EV_S_CRTM_CONTENTS",
    0x08: "EV_S_CRTM_VERSION", 0x09: "EV_CPU_MICROCODE", 0x0A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0B: "EV_TABLE_OF_DEVICES", 0x0C: "EV_COMPACT_HASH", 0x0D: "EV_IPL",
    0x0E: "EV_IPL_PARTITION_DATA", 0x0F: "EV_NONHOST_CODE", 0x10: "EV_NONHOST_CONFIG",
    0x11: "EV_NONHOST_INFO", 0x12: "EV_OMIT_BOOT_DEVICE_EVENTS", 0x13: "EV_POST_CODE2",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG", 0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION", 0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER", 0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION", 0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES", 0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2", 0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x8000000D: "EV_EFI_GPT_EVENT2", 0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY", 0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG", 0x800000E3: "EV_EFI_SPDM_DEVICE_POLICY",
    0x800000E4: "EV_EFI_SPDM_DEVICE_AUTHORITY",
}  # fmt: skip

_OLD: Final = struct.Struct("<II20sI")
_SPEC: Final = struct.Struct("<16sIBBBBI")
_SPEC_ID: Final = b"Spec ID Event03\0"
_LOCALITY: Final = b"StartupLocality\0"
_HCRTM_LOCALITY: Final = 4
_ERROR: Final = b"\x01\0\0\0"
# EFI_GLOBAL_VARIABLE as its bytes stand in a variable (UEFI 2.10 section 3.3).
_GLOBAL: Final = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")


@dataclass(frozen=True)
class Event:
    """``register``: the index of a PCR or measurement register; ``type``: of :data:`TYPES`, or
    one that is not named there; ``digests``: algorithm to digest."""

    register: int
    type: int
    digests: dict[str, bytes]
    data: bytes

    @property
    def extends(self) -> bool:
        return self.type != EV_NO_ACTION

    @property
    def covered(self) -> bool:
        """Whether the digests are those of the data, so that the registers vouch for it."""
        known = [(name, digest) for name, digest in self.digests.items() if name in _REPLAYED]
        return bool(known) and all(hashlib.new(n, self.data).digest() == d for n, d in known)

    def to_json(self) -> dict[str, Json]:
        return {
            "register": self.register,
            "type": TYPES.get(self.type, f"{self.type:#010x}"),
            "digests": {name: digest.hex() for name, digest in self.digests.items()},
            "covered": self.extends and self.covered,
            "data": self.data.hex(),
            "text": text(self),
        }


@dataclass(frozen=True, kw_only=True)
class Log:
    """``algorithms``: name to size in bytes. ``locality``: at which the TPM was started, which is
    the last byte of PCR 0's first value. ``padding``: bytes after the last event."""

    algorithms: dict[str, int]
    platform_class: int
    spec_version: tuple[int, int, int]
    vendor_info: bytes
    locality: int
    events: tuple[Event, ...]
    padding: int

    def replay(self, algorithm: str) -> dict[int, bytes]:
        """Register to the value that its events lead to, from zeros (PCR 0: from the locality).

        Only registers with events. Raises ``evidence.parse-event-log`` where the log cannot say:
        an algorithm that it does not have, or that an event lacks.
        """
        if algorithm not in _REPLAYED or algorithm not in self.algorithms:
            raise _refuse(f"it has no {algorithm} digests")
        size = self.algorithms[algorithm]
        out: dict[int, bytes] = {}
        for n, event in enumerate(self.events):
            if not event.extends:
                continue
            if algorithm not in event.digests:
                raise _refuse(f"event {n} has no {algorithm} digest")
            first = self.locality if event.register == 0 else 0
            before = out.get(event.register, first.to_bytes(size, "big"))
            out[event.register] = hashlib.new(algorithm, before + event.digests[algorithm]).digest()
        return out

    def rtmrs(self) -> dict[int, bytes]:
        """RTMR index to its value of SHA-384, for a confidential VM's log."""
        return {register - 1: value for register, value in self.replay("sha384").items()}

    @property
    def uncovered(self) -> tuple[int, ...]:
        """Numbers of the events whose data no register vouches for."""
        return tuple(n for n, e in enumerate(self.events) if not (e.extends and e.covered))

    def to_json(self) -> dict[str, Json]:
        return {
            "algorithms": dict(self.algorithms),
            "platform_class": self.platform_class,
            "spec_version": ".".join(map(str, self.spec_version)),
            "vendor_info": self.vendor_info.hex(),
            "startup_locality": self.locality,
            "events": [event.to_json() for event in self.events],
            "padding": self.padding,
        }


def _refuse(reason: str) -> Refused:
    return refusal("parse-event-log", f"The event log is malformed: {reason}.", "event log")


class _Reader:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at
        self._tail = max(len(data) - len(data.rstrip(byte)) for byte in (b"\0", b"\xff"))

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _refuse(f"an event ends after byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def padding(self) -> int:
        """The bytes that are left, if they are nothing but zeros or nothing but 0xff; else 0."""
        rest = len(self.data) - self.at
        return rest if rest <= self._tail else 0


def _register(index: int, kind: int) -> int:
    # Events that are extended nowhere may name no register (10.4.5).
    if index >= REGISTERS and not (index == NO_REGISTER and kind == EV_NO_ACTION):
        raise _refuse(f"register {index} is none")
    return index


def _old(reader: _Reader) -> Event:
    index, kind, digest, size = _OLD.unpack(reader.take(_OLD.size))
    return _told(Event(_register(index, kind), kind, {"sha1": digest}, reader.take(size)))


def _new(reader: _Reader, algorithms: dict[int, tuple[str, int]]) -> Event:
    index, kind, count = (reader.number(4) for _ in range(3))
    if not 1 <= count <= len(algorithms):
        raise _refuse(f"an event has {count} digests")
    digests: dict[str, bytes] = {}
    for _ in range(count):
        name, size = algorithms.get(reader.number(2), ("", 0))
        if not name or name in digests:
            raise _refuse("an event has a digest of an algorithm that is not listed, or two of one")
        digests[name] = reader.take(size)
    return _told(Event(_register(index, kind), kind, digests, reader.take(reader.number(4))))


def _told(event: Event) -> Event:
    """Refuses an event of PCR 7 whose digests are not those of its data though its type says so:
    readers of logs rely on these two (10.4.1; a separator may stand for an error, whose data is
    free). Other firmware is less exact elsewhere, which :attr:`Log.uncovered` tells."""
    if event.register != _SECURE_BOOT:
        return event
    if event.type == EV_VARIABLE_DRIVER_CONFIG and not event.covered:
        raise _refuse("a variable of Secure Boot is not what was measured")
    if event.type == EV_SEPARATOR and not (
        event.covered or Event(0, EV_SEPARATOR, event.digests, _ERROR).covered
    ):
        raise _refuse("the separator of PCR 7 is not what was measured")
    return event


def _algorithms(reader: _Reader, count: int) -> dict[int, tuple[str, int]]:
    if not 1 <= count <= MAX_ALGORITHMS:
        raise _refuse(f"it lists {count} algorithms")
    out: dict[int, tuple[str, int]] = {}
    for _ in range(count):
        number, size = reader.number(2), reader.number(2)
        name, known = ALGORITHMS.get(number, (f"algorithm_{number:#06x}", size))
        if number in out or size != known or not 1 <= size <= 64:
            raise _refuse(f"it gives {name} a size of {size} bytes, or stands twice")
        out[number] = name, size
    return out


def _locality(events: tuple[Event, ...]) -> int:
    """The locality that the log states, once (10.4.5); else 4 for a platform that measured
    before it started the TPM, as EV_EFI_HCRTM_EVENT shows."""
    found = {e.data for e in events if not e.extends and e.data.startswith(_LOCALITY)}
    if not found:
        return _HCRTM_LOCALITY if any(e.type == EV_HCRTM for e in events) else 0
    data = found.pop()
    if found or len(data) != len(_LOCALITY) + 1 or data[-1] > _HCRTM_LOCALITY:
        raise _refuse("its startup locality is impossible")
    return data[-1]


def _events(
    reader: _Reader, algorithms: dict[int, tuple[str, int]] | None
) -> tuple[tuple[Event, ...], int]:
    out: list[Event] = []
    while reader.at < len(reader.data):
        padding = reader.padding()
        if padding:
            return tuple(out), padding
        if len(out) == MAX_EVENTS:
            raise _refuse(f"it has more than {MAX_EVENTS} events")
        out.append(_old(reader) if algorithms is None else _new(reader, algorithms))
    return tuple(out), 0


def parse(raw: bytes) -> Log:
    """The log in ``raw``, by the procedure above. Raises ``evidence.parse-event-log``."""
    if len(raw) > MAX_BYTES:
        raise _refuse(f"it has {len(raw)} bytes")
    reader = _Reader(raw)
    head = _old(reader)
    if not head.data.startswith(_SPEC_ID):
        events, padding = _events(_Reader(raw), None)
        return Log(
            algorithms={"sha1": 20}, platform_class=0, spec_version=(0, 0, 0), vendor_info=b"",
            locality=_locality(events), events=events, padding=padding,
        )  # fmt: skip
    if head.type != EV_NO_ACTION or any(head.digests["sha1"]) or head.register > 1:
        raise _refuse("its first event is no header")
    inner = _Reader(head.data)
    _, platform, minor, major, errata, _, count = _SPEC.unpack(inner.take(_SPEC.size))
    algorithms = _algorithms(inner, count)
    vendor = inner.take(inner.number(1))
    if inner.at != len(head.data):
        raise _refuse("bytes are left over in its header")
    events, padding = _events(reader, algorithms)
    return Log(
        algorithms=dict(algorithms.values()), platform_class=platform,
        spec_version=(major, minor, errata), vendor_info=vendor, locality=_locality(events),
        events=events, padding=padding,
    )  # fmt: skip


def variable(event: Event) -> tuple[bytes, str, bytes] | None:
    """Vendor GUID (16 bytes), name and data of an event's UEFI_VARIABLE_DATA (section 10.4.3), or
    None where the data is no such thing."""
    data = event.data
    if len(data) < 32:
        return None
    name, size = struct.unpack_from("<QQ", data, 16)
    if name > 4096 or len(data) != 32 + 2 * name + size:
        return None
    try:
        return data[:16], data[32 : 32 + 2 * name].decode("utf-16-le"), data[32 + 2 * name :]
    except UnicodeDecodeError:
        return None


def secure_boot(log: Log) -> bool | None:
    """Whether the firmware measured Secure Boot as on, into PCR 7 (or its like, register 1, in a
    confidential VM's log); None where nothing that the registers vouch for says so, or two say
    different things."""
    said: set[bool] = set()
    for event in log.events:
        if event.type == EV_VARIABLE_DRIVER_CONFIG and event.register in (1, 7) and event.covered:
            found = variable(event)
            if found and found[:2] == (_GLOBAL, "SecureBoot"):
                said.add(found[2] == b"\x01")
    return said.pop() if len(said) == 1 else None


def _printable(data: bytes) -> Iterator[str]:
    for encoding in ("ascii", "utf-16-le"):
        try:
            found = data.decode(encoding).rstrip("\0")
        except UnicodeDecodeError:
            continue
        if found.isprintable() and found.isascii():
            yield found


def text(event: Event) -> str:
    """The data for people, where it is text or a variable with a name; else ""."""
    found = variable(event)
    if found:
        return found[1] if found[1].isprintable() else ""
    return next(_printable(event.data), "")

"""SEV-SNP reports and TDX quotes through Linux's configfs-tsm.

Source: Linux, Documentation/ABI/testing/configfs-tsm-report (6.7 and later), drivers/virt/coco.

Procedure of :func:`report`:

 1. Make an entry of a name of our own under ``/sys/kernel/config/tsm/report``; it is removed at the
    end in any case.
 2. Read ``provider``: it says what ``outblob`` will be.
 3. Read ``generation``. Write ``privlevel`` where its floor is not 0 (a guest under an SVSM), then
    ``inblob``; each write adds one to the generation.
 4. Read ``outblob``, which makes the report, and where they are there ``auxblob`` (SEV-SNP: the
    host's certificate table) and ``manifestblob``.
 5. Read ``generation`` again: if it grew by other than our writes, or the report carries other
    bytes than ours, another wrote between, and step 3 is done again. So it is after EBUSY, EAGAIN,
    EINTR and ETIMEDOUT. After :data:`ATTEMPTS` the last reason is raised.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from casemate.attest.snp import abi
from casemate.seams import Rng
from casemate.spec.errors import UsageError
from casemate.tee import errors

ROOT: Final = Path("/sys/kernel/config/tsm/report")
ATTEMPTS: Final = 8
PAUSE: Final = 0.25  # seconds; hardware gives about one report a second
INBLOB_BYTES: Final = 64
MAX_BLOB: Final = 1 << 20
_TEXT: Final = 256
_AGAIN: Final = (errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT)
_GENERATIONS: Final = 1 << (8 * 8)


class Tsm(Protocol):
    """The folder, as four operations; each raises OSError as the kernel says it."""

    def make(self, entry: str) -> None: ...

    def write(self, entry: str, attribute: str, data: bytes) -> None: ...

    def read(self, entry: str, attribute: str, limit: int) -> bytes: ...

    def remove(self, entry: str) -> None: ...


class OsTsm:
    """The folder itself."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root

    def make(self, entry: str) -> None:
        (self.root / entry).mkdir(mode=0o700)

    def write(self, entry: str, attribute: str, data: bytes) -> None:
        """One write: a second one would be a second value."""
        fd = os.open(self.root / entry / attribute, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.EIO, "short write")
        finally:
            os.close(fd)  # configfs takes a binary attribute's value here

    def read(self, entry: str, attribute: str, limit: int) -> bytes:
        fd = os.open(self.root / entry / attribute, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts, left = [], limit + 1
            while left > 0 and (part := os.read(fd, left)):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(fd)
        if left <= 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return b"".join(parts)

    def remove(self, entry: str) -> None:
        (self.root / entry).rmdir()


@dataclass(frozen=True)
class Provider:
    """What a provider's ``outblob`` is: its kind of evidence, the file's name in a folder of
    evidence, and the 64 bytes of ours that it carries."""

    tee: str
    file: str
    carries: Callable[[bytes], bytes]


def _snp_report_data(outblob: bytes) -> bytes:
    return outblob[0x50:0x90] if len(outblob) == abi.REPORT_BYTES else b""


def _tdx_report_data(outblob: bytes) -> bytes:
    """Intel TDX DCAP Quoting Library API, A.3: header of 48 bytes, in version 5 a type and a size,
    then the TD report, which ends its 1.0 part in REPORTDATA at 520."""
    start = {4: 48, 5: 54}.get(int.from_bytes(outblob[:2], "little"), len(outblob)) + 520
    return outblob[start : start + INBLOB_BYTES]


PROVIDERS: Final = {
    "sev_guest": Provider("sev-snp", "report.bin", _snp_report_data),
    "tdx_guest": Provider("tdx", "quote.bin", _tdx_report_data),
}


@dataclass(frozen=True)
class Report:
    """``auxblob``, ``manifestblob``: empty where the provider has none."""

    provider: Provider
    outblob: bytes
    auxblob: bytes
    manifestblob: bytes


def _optional(tsm: Tsm, entry: str, attribute: str, limit: int) -> bytes:
    try:
        return tsm.read(entry, attribute, limit)
    except FileNotFoundError:
        return b""


def _number(text: bytes, attribute: str) -> int:
    try:
        return int(text.decode("ascii").strip())
    except ValueError:
        raise errors.device(attribute, f"configfs-tsm's {attribute} is no number.") from None


def _generation(tsm: Tsm, entry: str) -> int:
    return _number(tsm.read(entry, "generation", _TEXT), "generation")


@contextmanager
def _entry(tsm: Tsm, rng: Rng) -> Iterator[str]:
    """Step 1, and its end."""
    entry = f"casemate-{rng.bytes(16).hex()}"
    try:
        tsm.make(entry)
        try:
            yield entry
        finally:
            tsm.remove(entry)
    except OSError as e:
        raise errors.os_error("configfs-tsm", e) from None


def _known(tsm: Tsm, entry: str) -> Provider:
    name = tsm.read(entry, "provider", _TEXT).decode("ascii", "replace").strip()
    if name not in PROVIDERS:
        raise UsageError(
            "usage.tee-unsupported",
            f"configfs-tsm gives reports of {name[:40]!r}, which casemate does not know.",
            mend=f"Run in a confidential VM whose provider is one of {', '.join(PROVIDERS)}.",
            where="configfs-tsm",
        )
    return PROVIDERS[name]


def provider(tsm: Tsm, rng: Rng) -> Provider:
    """Steps 1 and 2. Raises ``usage.tee-device`` and ``usage.tee-unsupported``."""
    with _entry(tsm, rng) as entry:
        return _known(tsm, entry)


def _level(tsm: Tsm, entry: str) -> int:
    text = _optional(tsm, entry, "privlevel_floor", _TEXT)
    return _number(text, "privlevel_floor") if text.strip() else 0


def floor(tsm: Tsm, rng: Rng) -> int:
    """The privilege level that this guest runs at, 0 to 3."""
    with _entry(tsm, rng) as entry:
        return _level(tsm, entry)


def _once(tsm: Tsm, entry: str, known: Provider, inblob: bytes, level: int) -> Report | str:
    """Steps 3 to 5; a text says why they must be done again."""
    before = _generation(tsm, entry)
    writes = 1
    if level:
        tsm.write(entry, "privlevel", str(level).encode())
        writes += 1
    tsm.write(entry, "inblob", inblob)
    found = Report(
        known,
        tsm.read(entry, "outblob", MAX_BLOB),
        _optional(tsm, entry, "auxblob", MAX_BLOB),
        _optional(tsm, entry, "manifestblob", MAX_BLOB),
    )
    if (_generation(tsm, entry) - before) % _GENERATIONS != writes:
        return "another process writes to the same entry"
    if known.carries(found.outblob) != inblob:
        return "the report carries other bytes than were asked for"
    return found


def _retried(
    tsm: Tsm, entry: str, known: Provider, inblob: bytes, pause: Callable[[float], None]
) -> Report:
    level, reason = _level(tsm, entry), ""
    for attempt in range(ATTEMPTS):
        if attempt:
            pause(PAUSE)
        try:
            found = _once(tsm, entry, known, inblob, level)
        except OSError as e:
            if e.errno not in _AGAIN:
                raise
            found = e.strerror or type(e).__name__
        if isinstance(found, Report):
            return found
        reason = found
    raise errors.device(
        "configfs-tsm", f"No report came in {ATTEMPTS} attempts; the last time: {reason}."
    )


def report(
    tsm: Tsm, inblob: bytes, rng: Rng, *, pause: Callable[[float], None] = time.sleep
) -> Report:
    """A report over 64 bytes. ``rng`` names the entry. Blocks for about a second on hardware.

    Raises ``usage.tee-device`` when the kernel refuses or no consistent report comes,
    ``usage.tee-unsupported`` for an unknown provider; ValueError for another length.
    """
    if len(inblob) != INBLOB_BYTES:
        raise ValueError(f"inblob has {len(inblob)} bytes, not {INBLOB_BYTES}")
    with _entry(tsm, rng) as entry:
        return _retried(tsm, entry, _known(tsm, entry), inblob, pause)

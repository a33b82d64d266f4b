"""Event logs, made up: each rule of the form, what they replay to, and what is told of them."""

from __future__ import annotations

import hashlib
import struct

import pytest

from casemate.attest.tpm import eventlog
from casemate.attest.verdict import Refused
from support import tpm
from support.mutation import fuzz

BANKS = ("sha1", "sha256", "sha384")


def refused(raw: bytes) -> str:
    with pytest.raises(Refused) as e:
        eventlog.parse(raw)
    assert e.value.code == "evidence.parse-event-log"
    return e.value.message


def extend(name: str, value: bytes, data: bytes) -> bytes:
    return hashlib.new(name, value + hashlib.new(name, data).digest()).digest()


def test_a_log_replays_to_its_registers():
    log = eventlog.parse(
        tpm.header(BANKS) + tpm.event(2, 4, bytes(4), BANKS) + tpm.event(2, 5, b"x", BANKS)
        + tpm.event(2, 3, b"said, not measured", BANKS) + tpm.event(9, 0xD, b"y", BANKS)
    )  # fmt: skip
    assert log.algorithms == {"sha1": 20, "sha256": 32, "sha384": 48}
    assert log.spec_version == (2, 0, 0)
    for name in BANKS:
        first = extend(name, extend(name, bytes(tpm.SIZES[name]), bytes(4)), b"x")
        assert log.replay(name) == {2: first, 9: extend(name, bytes(tpm.SIZES[name]), b"y")}
    assert log.rtmrs() == {n - 1: value for n, value in log.replay("sha384").items()}


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_the_startup_locality_is_where_pcr_0_begins(locality):
    said = tpm.event(0, 3, b"StartupLocality\0" + bytes([locality]))
    log = eventlog.parse(tpm.header() + said + tpm.event(0, 8, b"v") + tpm.event(1, 4, bytes(4)))
    assert log.locality == locality
    zero = extend("sha256", locality.to_bytes(32, "big"), b"v")
    assert log.replay("sha256") == {0: zero, 1: extend("sha256", bytes(32), bytes(4))}


def test_measurements_before_the_firmware_begin_at_locality_4():
    log = eventlog.parse(tpm.header() + tpm.event(0, eventlog.EV_HCRTM, b"HCRTM"))
    assert log.replay("sha256") == {0: extend("sha256", (4).to_bytes(32, "big"), b"HCRTM")}


def test_impossible_localities_are_refused():
    said = [tpm.event(0, 3, b"StartupLocality\0" + bytes([n])) for n in (0, 3)]
    assert "locality" in refused(tpm.header() + said[0] + said[1])
    assert "locality" in refused(tpm.header() + tpm.event(0, 3, b"StartupLocality\0\x07"))
    assert "locality" in refused(tpm.header() + tpm.event(0, 3, b"StartupLocality\0\x03\0"))


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
@pytest.mark.parametrize("size", [0, 1, 3, 11, 12, 13, 4096])
def test_padding_is_told(byte, size):
    log = eventlog.parse(tpm.boot() + byte * size)
    assert log.padding == size
    assert log.replay("sha256") == eventlog.parse(tpm.boot()).replay("sha256")


@pytest.mark.parametrize("rest", [b"\0" * 40 + b"\1", b"\xff" * 40 + b"\0", b"\1", b"\0\xff" * 9])
def test_other_bytes_after_the_last_event_are_refused(rest):
    refused(tpm.boot() + rest)


def test_a_log_of_sha1_alone():
    log = eventlog.parse(tpm.old_event(4, 5, b"one") + tpm.old_event(4, 5, b"two") + bytes(64))
    assert log.algorithms == {"sha1": 20}
    first = extend("sha1", extend("sha1", bytes(20), b"one"), b"two")
    assert log.replay("sha1") == {4: first}
    with pytest.raises(Refused):
        log.replay("sha256")


def test_an_event_that_lacks_a_bank_leaves_that_bank_unknown():
    log = eventlog.parse(
        tpm.header(BANKS) + tpm.event(1, 5, b"x", BANKS) + tpm.event(1, 5, b"x", ("sha256",))
    )
    assert 1 in log.replay("sha256")
    for name in ("sha1", "sha384", "sha512", "sm3_256"):
        with pytest.raises(Refused) as e:
            log.replay(name)
        assert e.value.code == "evidence.parse-event-log"


@pytest.mark.parametrize(
    "raw",
    [
        tpm.header(digest=b"\1" * 20),
        tpm.header(kind=5),
        tpm.header(register=2),
        tpm.header(data=b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 0) + b"\0"),
        tpm.header(data=b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1 << 31)),
        tpm.header(("sha256", "sha256")),
        tpm.header(
            data=b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 0xB, 20, 0)
        ),
        tpm.header(
            data=b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 0xB, 32, 9)
        ),
        tpm.header(
            data=b"Spec ID Event03\0" + struct.pack("<IBBBBIHHBB", 0, 0, 2, 0, 2, 1, 0xB, 32, 0, 7)
        ),
        b"",
        bytes(31),
    ],
)
def test_headers_that_are_none(raw):
    refused(raw + tpm.event(1, 5, b"x"))


def test_a_header_may_carry_vendor_information():
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 1, 5, 2, 6, 2, 1, 0xB, 32, 3) + b"abc"
    log = eventlog.parse(tpm.header(data=data))
    assert (log.vendor_info, log.platform_class, log.spec_version) == (b"abc", 1, (2, 5, 6))


@pytest.mark.parametrize(
    "event",
    [
        tpm.event(24, 5, b"x"),
        tpm.event(eventlog.NO_REGISTER, 5, b"x"),
        tpm.event(1, 5, b"x", count=0),
        tpm.event(1, 5, b"x", count=2),
        tpm.event(1, 5, b"x", count=1 << 31),
        tpm.event(1, 5, b"x", ("sha384",)),
        tpm.event(1, 5, b"x")[:-2],
        tpm.event(1, 5, b"x")[:-5] + struct.pack("<I", 1 << 31) + b"x",
        tpm.event(7, 4, b"other", measured=bytes(4)),
        tpm.event(7, eventlog.EV_VARIABLE_DRIVER_CONFIG, b"other", measured=b"this"),
    ],
)
def test_events_that_are_none(event):
    eventlog.parse(tpm.header())
    refused(tpm.header() + event)


def test_an_event_of_no_register_may_say_something():
    said = tpm.event(eventlog.NO_REGISTER, 3, b"reference manifest")
    assert eventlog.parse(tpm.header() + said).replay("sha256") == {}


def test_what_is_not_measured_as_its_type_says_is_told_outside_pcr_7():
    kind = eventlog.EV_VARIABLE_DRIVER_CONFIG
    log = eventlog.parse(
        tpm.header() + tpm.event(1, kind, b"other", measured=b"this") + tpm.event(1, 4, bytes(4))
        + tpm.event(2, 4, b"other", measured=bytes(4))
    )  # fmt: skip
    assert log.uncovered == (0, 2)


def test_a_separator_may_stand_for_an_error():
    log = eventlog.parse(tpm.header() + tpm.event(7, 4, b"why", measured=b"\1\0\0\0"))
    assert log.uncovered == (0,)


def test_secure_boot_is_what_pcr_7_vouches_for():
    assert eventlog.secure_boot(eventlog.parse(tpm.boot(secure=True))) is True
    assert eventlog.secure_boot(eventlog.parse(tpm.boot(secure=False))) is False
    assert eventlog.secure_boot(eventlog.parse(tpm.header())) is None
    kind = eventlog.EV_VARIABLE_DRIVER_CONFIG
    on, off = (tpm.variable("SecureBoot", bytes([n])) for n in (1, 0))
    both = tpm.header() + tpm.event(7, kind, on) + tpm.event(7, kind, off)
    assert eventlog.secure_boot(eventlog.parse(both)) is None
    others = (
        tpm.event(6, kind, on), tpm.event(7, 5, on),
        tpm.event(7, kind, tpm.variable("SecureBoot", b"\1", b"g" * 16)),
        tpm.event(7, kind, tpm.variable("SecureBoot2", b"\1")),
        tpm.event(7, kind, on + b"\0"),
    )  # fmt: skip
    for other in others:
        assert eventlog.secure_boot(eventlog.parse(tpm.header() + other)) is None


def test_what_no_register_vouches_for_is_told():
    log = eventlog.parse(tpm.boot())
    assert log.uncovered == (10,)
    shown = log.to_json()["events"]
    assert [n for n, event in enumerate(shown) if not event["covered"]] == [10]
    assert shown[1]["text"] == "SecureBoot"
    assert shown[0]["text"] == "version 1"
    assert shown[0]["type"] == "EV_S_CRTM_VERSION"


def test_limits():
    refused(tpm.boot() + bytes(eventlog.MAX_BYTES))
    many = tpm.old_event(1, 5, b"", bytes(20)) * (eventlog.MAX_EVENTS + 1)
    assert "events" in refused(many)


def test_fuzz():
    seeds = [tpm.boot(), tpm.boot(BANKS) + bytes(40), tpm.old_event(4, 5, b"one") * 3]
    seeds.append(tpm.header() + tpm.event(0, 3, b"StartupLocality\0\x03") + tpm.event(0, 8, b"v"))

    def read(raw: bytes) -> None:
        log = eventlog.parse(raw)
        log.to_json()
        for name in log.algorithms:
            log.replay(name)

    assert fuzz(read, seeds) > 0

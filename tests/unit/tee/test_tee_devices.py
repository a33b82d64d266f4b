"""/dev/nsm and /dev/sev-guest behind fakes that read the kernel's structures at their addresses."""

import ctypes
import errno

import cbor2
import pytest

from casemate.attest.nitro import abi
from casemate.seams import OsDisk
from casemate.spec.errors import UsageError
from casemate.tee import nsm, sev_guest
from casemate.tee.devices import OsDevice
from support import tees

DATA = bytes(range(64))


def document(fake, **fields):
    return nsm.document(**fields, path=nsm.PATH, opener=fake)


def code(call):
    with pytest.raises(UsageError) as e:
        call()
    return e.value.code


def test_request_numbers_and_structures_are_the_kernels():
    assert nsm.IOCTL_RAW == 0xC0200A00
    assert sev_guest.GET_DERIVED_KEY == 0xC0205301
    assert ctypes.sizeof(sev_guest.KeyRequest) == 32
    assert ctypes.sizeof(sev_guest.KeyResponse) == 64
    assert sev_guest.GuestRequest.req_data.offset == 8


def test_a_document_over_user_data():
    fake = tees.FakeNsm()
    found = abi.parse(document(fake, user_data=DATA), "document.cose")
    assert found.user_data == DATA
    assert found.nonce is found.public_key is None
    assert fake.requests == [
        {"Attestation": {"user_data": DATA, "nonce": None, "public_key": None}}
    ]
    assert fake.open == 0


def test_nonce_and_public_key_go_along():
    found = abi.parse(
        document(tees.FakeNsm(), user_data=DATA, nonce=b"n" * 20, public_key=b"k" * 300), "d"
    )
    assert (found.nonce, found.public_key) == (b"n" * 20, b"k" * 300)


@pytest.mark.parametrize(
    "answer",
    [
        {"Error": "InputTooLarge"}, {"Attestation": {}}, {"Attestation": {"document": b""}},
        {"Attestation": {"document": "text"}}, {"Attestation": 7}, [], 7, None, b"\xff\xff", b"",
        {"Error": {"deep": 1}}, b"\xa1" * 100,
    ],
)  # fmt: skip
def test_other_answers_are_refused(answer):
    fake = tees.FakeNsm(answer if answer is not None else cbor2.dumps(None))
    assert code(lambda: document(fake, user_data=DATA)) == "usage.tee-device"
    assert fake.open == 0


def test_what_the_module_refuses_is_told():
    with pytest.raises(UsageError, match="InputTooLarge"):
        document(tees.FakeNsm(), user_data=bytes(600))


@pytest.mark.parametrize("error", [errno.EMSGSIZE, errno.ETIMEDOUT, errno.EIO, errno.EACCES])
def test_errors_of_the_driver(error):
    fake = tees.FakeNsm(error=error)
    assert code(lambda: document(fake, user_data=DATA)) == "usage.tee-device"
    assert fake.open == 0


def test_too_long_a_request_never_reaches_the_module():
    fake = tees.FakeNsm()
    with pytest.raises(ValueError, match="4096"):
        document(fake, user_data=bytes(5000))
    assert fake.requests == []


def test_no_device(tmp_path):
    missing = tmp_path / "nsm"
    assert code(lambda: nsm.document(DATA, path=missing)) == "usage.tee-device"
    assert code(lambda: sev_guest.derived_key(path=missing)) == "usage.tee-device"


def test_a_file_that_is_no_device(tmp_path):
    OsDisk(tmp_path).open("x", create=True).close()
    device = OsDevice(tmp_path / "x")
    with pytest.raises(OSError, match="ioctl"):
        device.ioctl(nsm.IOCTL_RAW, nsm.Raw())
    device.close()


def key(fake, **options):
    return sev_guest.derived_key(opener=fake, **options)


def test_a_derived_key_is_of_chip_measurement_and_policy():
    base = tees.FakeGuest()
    first = key(base)
    assert len(first) == 32
    assert base.calls == [(0, sev_guest.POLICY | sev_guest.MEASUREMENT, 0)]
    others = [
        tees.FakeGuest(chip=b"other"),
        tees.FakeGuest(measurement=b"o" * 48),
        tees.FakeGuest(policy=1 << 17 | 1 << 19),
    ]
    assert len({first, *(key(other) for other in others)}) == 4
    assert key(tees.FakeGuest()) == first


def test_the_privilege_level_is_the_guests():
    assert key(tees.FakeGuest(vmpl=2), vmpl=2)
    assert code(lambda: key(tees.FakeGuest(vmpl=2))) == "usage.tee-device"


def test_a_chip_that_refuses():
    assert code(lambda: key(tees.FakeGuest(status=0x27))) == "usage.tee-device"
    with pytest.raises(UsageError, match=r"0x15.*0x2"):
        key(tees.FakeGuest(error=errno.EIO, exitinfo2=2 << 32 | 0x15))
    assert code(lambda: key(tees.FakeGuest(error=errno.EACCES))) == "usage.tee-device"


def test_a_key_of_zeros_is_none(monkeypatch):
    import hmac

    monkeypatch.setattr(hmac, "digest", lambda *_: bytes(32))
    assert code(lambda: key(tees.FakeGuest())) == "usage.tee-device"

import contextlib
import random

import pytest

from casemate.spec.errors import UsageError
from casemate.tee import snp_certificates
from support import snp, tees


def test_an_independent_writers_table():
    ark, ask = snp.authorities("Genoa")
    files = snp_certificates.files(tees.snp_table())
    assert files["vcek.der"] == snp.leaf("Genoa", "VCEK")
    assert files["ask.pem"] == snp._pem(ask)
    assert files["ark.pem"] == snp._pem(ark)
    assert set(files) == {"vcek.der", "ask.pem", "ark.pem"}


@pytest.mark.parametrize("blob", [b"", bytes(24), bytes(4096)])
def test_an_empty_table(blob):
    assert snp_certificates.files(blob) == {}


def test_a_vlek_comes_with_its_asvk_and_other_guids_are_left_out():
    files = snp_certificates.files(tees.table(vlek=b"0leaf", ask=b"0between", other=b"x", crl=b"0"))
    assert set(files) == {"vlek.der", "asvk.pem", "crl.der"}


def test_only_what_endorses_the_signing_key_is_kept():
    both = snp_certificates.files(tees.table(vcek=b"0", vlek=b"1", ask=b"0"))
    assert set(snp_certificates.fitting(both, "VCEK")) == {"vcek.der", "ask.pem"}
    assert set(snp_certificates.fitting(both, "VLEK")) == {"vlek.der"}


def test_some_hosts_put_pem_there():
    leaf = snp.leaf("Genoa", "VCEK")
    assert snp_certificates.files(tees.table(vcek=snp_certificates.pem(leaf)))["vcek.der"] == leaf


def test_a_longer_blob_than_the_table_needs():
    assert "vcek.der" in snp_certificates.files(tees.snp_table() + bytes(4096))


def entry(guid: str, offset: int, length: int) -> bytes:
    head = bytes.fromhex(tees.GUIDS[guid].replace("-", ""))
    return head + offset.to_bytes(4, "little") + length.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (entry("vcek", 48, 1), "outside"),
        (entry("vcek", 48, 2) + bytes(24) + b"x", "outside"),
        (entry("vcek", 0, 4) + bytes(24), "outside"),
        (entry("vcek", 2**32 - 1, 2**32 - 1) + bytes(24), "outside"),
        (entry("vcek", 48, 4) + entry("vcek", 48, 4), "two entries"),
        (entry("other", 0x10000, 0) * 10, "outside"),
        (b"\x01", "no end"),
    ],
)
def test_malformed_tables(blob, reason):
    with pytest.raises(UsageError) as e:
        snp_certificates.parse(blob)
    assert e.value.code == "usage.tee-device"
    assert reason in e.value.message or "two" in reason


def test_a_table_without_end():
    blob = entry("other", 24 * 100, 0) * 100
    with pytest.raises(UsageError):
        snp_certificates.parse(blob)


def test_no_foreign_exception_for_any_bytes():
    rng = random.Random(1)
    good = tees.snp_table()
    for _ in range(3000):
        blob = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.3 else good)
        for _ in range(rng.randrange(1, 6)):
            if blob:
                blob[rng.randrange(min(len(blob), 120))] = rng.randrange(256)
        with contextlib.suppress(UsageError):
            snp_certificates.files(bytes(blob))

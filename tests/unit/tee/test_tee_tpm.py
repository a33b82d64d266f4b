"""Quotes of a software TPM (libtpms), judged by the TPM verifier, and by the TSS's own types."""

import hashlib
import json
from dataclasses import replace

import pytest

from casemate.attest import folder
from casemate.attest.tpm import collateral, verify
from casemate.attest.tpm.policy import DEFAULT
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError
from casemate.tee import tpm, tpm_device
from support import tees
from support.evidence import NOW

pytestmark = tees.needs_tpm
EXTRA = hashlib.sha256(b"report data").digest()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A TPM that no cloud has provisioned."""
    with tees.swtpm(tmp_path_factory.mktemp("plain")) as tcti:
        yield tcti


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    with tees.swtpm(tmp_path_factory.mktemp("cloud")) as tcti:
        tees.provision(tcti)
        yield tcti


def made(tcti, folder, extra=EXTRA, **options):
    return tpm.maker(tcti, folder / "no-log", **options)(extra)


def pinned(files):
    """The default policy with this AK pinned."""
    key = collateral.parse(files).public.key
    return {"tpm": replace(DEFAULT, aks=(verify.fingerprint(key),))}


def test_an_unprovisioned_tpms_quote_holds_and_nobody_vouches_for_its_key(plain, tmp_path):
    files = made(plain, tmp_path)
    assert set(files) == {
        "quote_sha256.msg", "quote_sha256.tpmt_signature", "pcrs_sha256.json", "ak_public.tpmt",
    }  # fmt: skip
    judged = folder.judge(files, now=NOW)
    assert judged.code == "evidence.root-ak-unvouched"
    judged = folder.judge(files, now=NOW, policies=pinned(files), nonce=EXTRA)
    assert (judged.decision, judged.code, judged.crypto) == ("accept", "", "valid")
    assert judged.claims.bound == EXTRA


def test_the_key_may_sign_nothing_but_what_the_tpm_made(plain):
    import tpm2_pytss as tss

    with tpm_device.Tpm(plain) as device:
        area, _ = tss.TPMT_PUBLIC.unmarshal(device.ak().public)
    flags = tss.TPMA_OBJECT
    for wanted in ("RESTRICTED", "SIGN_ENCRYPT", "FIXEDTPM", "FIXEDPARENT", "SENSITIVEDATAORIGIN"):
        assert area.objectAttributes & getattr(flags, wanted)
    assert not area.objectAttributes & flags.DECRYPT


def test_the_same_key_at_every_start(plain, cloud):
    for tcti in (plain, cloud):
        keys = []
        for _ in range(2):
            with tpm_device.Tpm(tcti) as device:
                keys.append(device.ak().public)
        assert keys[0] == keys[1]


def test_a_clouds_key_comes_with_its_certificate(cloud, tmp_path):
    from cryptography import x509

    files = made(cloud, tmp_path)
    certificate = x509.load_der_x509_certificate(files["ak_cert.der"])
    certificate.verify_directly_issued_by(tees.authority())
    with tpm_device.Tpm(cloud) as device:
        assert device.ak().source == "Google Cloud vTPM, RSA"


def test_a_quote_for_another_nonce_is_refused(cloud, tmp_path):
    files = made(cloud, tmp_path)
    judged = folder.judge(files, now=NOW, policies=pinned(files), nonce=b"other")
    assert judged.code == "evidence.freshness-mismatch"


def test_values_are_those_of_the_quote(plain, tmp_path):
    files = made(plain, tmp_path)
    values = {int(i): bytes.fromhex(v) for i, v in json.loads(files["pcrs_sha256.json"]).items()}
    assert sorted(values) == list(range(24))
    assert files["quote_sha256.msg"].endswith(tpm_device.digest(values))
    tees.extend(plain, 16, b"e" * 32)
    after = json.loads(made(plain, tmp_path)["pcrs_sha256.json"])
    expected = hashlib.sha256(values[16] + b"e" * 32).hexdigest()
    assert after["16"] == expected
    assert {i: v for i, v in after.items() if i != "16"} == {
        str(i): v.hex() for i, v in values.items() if i != 16
    }


def test_pcrs_that_change_between_quote_and_reading_are_read_again(plain, monkeypatch):
    real, changes = tpm_device.Tpm.pcrs, [2]

    def moving(self, *wanted):
        found = real(self, *wanted)
        if changes[0]:
            changes[0] -= 1
            return found | {16: b"x" * 32}
        return found

    monkeypatch.setattr(tpm_device.Tpm, "pcrs", moving)
    with tpm_device.Tpm(plain) as device:
        quote = device.quote(device.ak(), EXTRA)
        assert quote.message.endswith(tpm_device.digest(quote.pcrs))
        changes[0] = 1000
        with pytest.raises(UsageError, match="faster"):
            device.quote(device.ak(), EXTRA)


def test_many_quotes_leave_nothing_in_the_tpm(plain, tmp_path):
    """It has three places for keys: a leak shows at the fourth."""
    make = tpm.maker(plain, tmp_path / "no-log")
    for i in range(8):
        make(bytes([i]) * 32)
        with tpm_device.Tpm(plain) as device:
            device.unseal(device.seal(b"s" * 32, (0, 7)), (0, 7))


def test_an_event_log_goes_along(plain, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"log")
    assert tpm.maker(plain, log)(EXTRA)["event_log.bin"] == b"log"
    log.write_bytes(bytes(tpm.MAX_LOG + 1))
    with pytest.raises(UsageError) as e:
        tpm.maker(plain, log)(EXTRA)
    assert e.value.code == "usage.tee-device"
    assert tpm.event_log(tmp_path) == b""  # a folder cannot be read: none, and no error


def test_an_event_log_that_is_not_this_tpms_is_noticed_by_the_verifier(plain, tmp_path):
    from support.evidence import CAPTURED

    log = CAPTURED.parent / "tpm" / "eventlog-ovmf-swtpm-own" / "event_log.bin"
    if not log.exists():
        pytest.skip(f"no captured evidence at {log}")
    files = tpm.maker(plain, log)(EXTRA)
    assert folder.judge(files, now=NOW, policies=pinned(files)).decision == "reject"


def test_nv_indices(cloud):
    with tpm_device.Tpm(cloud) as device:
        assert len(device.nv(0x01C10000)) == 1400
        assert device.nv(0x01C10042) is None


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"", b""), (b"\x30", b""), (b"\x31\x00", b""), (b"\x30\x01", b""),
        (b"\x30\x01x--", b"\x30\x01x"), (b"\x30\x81\x02xy", b"\x30\x81\x02xy"),
        (b"\x30\x82\x00\x01x\0\0", b"\x30\x82\x00\x01x"), (b"\x30\x82\xff\xff", b""),
        (b"\x30\xff" + b"\xff" * 130, b""),
    ],
)  # fmt: skip
def test_what_stands_in_front_of_padding(data, whole):
    assert tpm_device.whole(data) == whole


def test_no_tpm_at_the_other_end():
    with pytest.raises(UsageError) as e:
        tpm_device.Tpm("swtpm:host=127.0.0.1,port=1")
    assert e.value.code == "usage.tee-device"
    with pytest.raises(UsageError):
        tpm_device.Tpm("device:/dev/null")


def test_the_policy_leaves_freshness_open_without_a_nonce(plain, tmp_path):
    files = made(plain, tmp_path)
    judged = folder.judge(files, now=NOW, policies=pinned(files), nonce=Unchecked("not asked"))
    assert [c.outcome for c in judged.checks if c.name == "freshness"] == ["unchecked"]

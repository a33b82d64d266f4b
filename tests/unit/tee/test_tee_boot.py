"""Evidence of a boot that really took place: OVMF under QEMU's emulator, measured into a TPM."""

import hashlib
from dataclasses import replace

import pytest

from casemate.attest import folder
from casemate.attest.tpm import collateral, verify
from casemate.attest.tpm.policy import DEFAULT
from casemate.spec.errors import LedgerError
from support import firmware, tees
from support.disk import SimDisk
from support.evidence import NOW

DATA = bytes(range(64))

pytestmark = [
    pytest.mark.full,  # a minute
    pytest.mark.skipif(
        bool(firmware.lacks_firmware()), reason=firmware.lacks_firmware() or "-"
    ),
]  # fmt: skip


def test_a_booted_firmwares_quote_and_log(tmp_path):
    with firmware.booted(tmp_path) as (tcti, log):
        path = tmp_path / "log"
        path.write_bytes(log)
        machine = tees.machine(tmp_path, tpm_path=tmp_path, tcti=tcti, log_path=path)
        place = tees.Place("auto", machine, SimDisk(), lambda _: None)
        maker = place.open()
        assert maker.kind == "tpm"
        files = maker.attest(DATA).files
        key = verify.fingerprint(collateral.parse(files).public.key)
        policies = {"tpm": replace(DEFAULT, aks=(key,), event_log=True)}
        nonce = hashlib.sha256(DATA).digest()

        judged = folder.judge(files, now=NOW, policies=policies, nonce=nonce)
        assert (judged.decision, judged.code) == ("accept", ""), judged.message
        pcrs = judged.claims.other["pcrs"]["sha256"]
        assert {i for i, value in pcrs.items() if int(value, 16)} >= set("01234567")

        # A log of which one byte of one digest is another's does not replay to these PCRs.
        at = log.index(hashlib.sha256(bytes(4)).digest())
        other = {**files, "event_log.bin": log[:at] + bytes([log[at] ^ 1]) + log[at + 1 :]}
        assert folder.judge(other, now=NOW, policies=policies).decision == "reject"

        # What is sealed now does not open once a later stage has measured something else.
        secret = maker.sealing_key("store")
        assert place.open().sealing_key("store") == secret
        tees.extend(tcti, 4, b"x" * 32)
        with pytest.raises(LedgerError):
            place.open().sealing_key("store")

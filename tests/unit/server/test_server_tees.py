"""The server on hardware (support.tees): one report for many clients, and who releases keys."""

from pathlib import Path

import pytest

from casemate.attest.verify import verify_attestation
from casemate.server import attestation, keys
from casemate.server.config import Config, server_policy
from casemate.server.machine import owner
from casemate.spec import codec
from casemate.spec.errors import UsageError
from support import tees
from support.disk import SimDisk
from support.evidence import NOW

POLICY = server_policy(Config(state=Path("x"), sandbox=("seccomp",)))
NONCES = [bytes([i]) * 32 for i in range(20)]


@pytest.mark.parametrize("name", ["configfs-tsm", "configfs-tsm/tdx", "nsm"])
def test_one_report_of_hardware_answers_all_who_wait(tmp_path, name):
    from casemate.seams import OsRng

    with tees.PLACES[name](tmp_path, 0) as place:
        maker = place.open()
        boot = keys.make(OsRng(), ["localhost"], b"b" * 16, keys.sign_key(OsRng()))
        answers = attestation.attest_now(maker, boot, POLICY, NONCES)
        assert len({id(a.evidence) for a in answers}) == 1
        for nonce, answer in zip(NONCES, answers, strict=True):
            verdict = verify_attestation(answer, nonce, place.trust(maker), now=NOW)
            assert not verdict.simulated
            assert verdict.binding.server_policy == codec.digest(POLICY)


def test_the_owner_who_releases_keys_is_in_the_policy_that_evidence_binds():
    plain = Config(state=Path("x"))
    first, second = (Config(state=Path("x"), release_owner=c * 64) for c in "ab")
    less = Config(state=Path("x"), sandbox=("seccomp",))
    assert len({codec.digest(server_policy(c)) for c in (plain, first, second, less)}) == 4
    assert server_policy(plain) == server_policy(Config(state=Path("y"), release_owner=""))


def test_an_owners_key_is_64_hex_digits():
    assert owner("") is None
    assert owner("0a" * 32) == b"\x0a" * 32
    for bad in ("0A" * 32, "0a" * 31, "x" * 64, "0a" * 32 + "\n"):
        with pytest.raises(UsageError) as e:
            owner(bad)
        assert e.value.code == "usage.tee-release"


def test_a_store_on_hardware_opens_again_after_a_restart(tmp_path):
    """With the chip's own sealing key; another chip does not open it."""
    from casemate.ledger.store import Store
    from casemate.seams import OsRng
    from casemate.spec.errors import LedgerError

    with tees.snp_place(tmp_path, 0) as place:
        disk = SimDisk(5)
        label = "casemate/store/v1"
        Store.open(disk, place.open().sealing_key(label), b"b" * 16, OsRng()).close()
        after = disk.power_cycle()
        Store.open(after, place.open().sealing_key(label), b"c" * 16, OsRng()).close()
    with tees.snp_place(tmp_path / "other", 1) as other, pytest.raises(LedgerError):
        Store.open(after.power_cycle(), other.open().sealing_key(label), b"d" * 16, OsRng())

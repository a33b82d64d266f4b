import pytest

from casemate.seams import OsRng
from casemate.spec.errors import LedgerError, UsageError
from casemate.tee import sealing
from support import tees
from support.disk import PowerLoss, SimDisk


def nothing(_):
    raise AssertionError("no evidence is needed for this")


def test_each_label_and_kind_has_a_key_of_its_own():
    secret = b"s" * 32
    kinds = {sealing.key(secret, kind, label) for kind in sealing.KINDS for label in ("a", "b")}
    assert len(kinds) == 2 * len(sealing.KINDS)
    assert sealing.key(secret, "tpm-pcr", "a") in kinds
    with pytest.raises(ValueError, match="32"):
        sealing.key(b"short", "tpm-pcr", "a")


def test_only_kinds_of_the_table():
    with pytest.raises(ValueError, match="no kind"):
        sealing.Sealing("file", lambda _: b"")


def test_the_chips_key_is_the_secret():
    guest = tees.FakeGuest()
    from casemate.tee import sev_guest

    made = sealing.snp_derived(lambda: sev_guest.derived_key(opener=guest))
    assert made.kind == "snp-derived"
    assert made.secret(nothing) == sev_guest.derived_key(opener=guest)


def test_none_is_said_when_asked():
    with pytest.raises(UsageError) as e:
        sealing.unavailable("Why not.", "Do this.").secret(nothing)
    assert (e.value.code, e.value.message, e.value.mend) == (
        "usage.tee-sealing", "Why not.", "Do this.",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tcti(tmp_path_factory):
    with tees.swtpm(tmp_path_factory.mktemp("tpm")) as tcti:
        yield tcti


@tees.needs_tpm
class TestTpm:
    def secret(self, disk, tcti):
        return sealing.tpm_pcr(disk, OsRng(), tcti).secret(nothing)

    def test_the_same_after_a_restart_and_nothing_of_it_in_the_file(self, tcti):
        disk = SimDisk()
        first = self.secret(disk, tcti)
        after = disk.power_cycle()
        assert self.secret(after, tcti) == first
        file = after.open(sealing.TPM_FILE)
        assert first not in file.read(0, file.size())

    def test_another_disk_has_another_secret(self, tcti):
        assert self.secret(SimDisk(), tcti) != self.secret(SimDisk(), tcti)

    def test_a_crash_at_any_step(self, tcti):
        whole = SimDisk()
        self.secret(whole, tcti)
        for step in range(1, len(whole.trace) + 1):
            disk = SimDisk(step, fault=(step, "POWER"))
            with pytest.raises(PowerLoss):
                self.secret(disk, tcti)
            after = disk.power_cycle()
            first = self.secret(after, tcti)
            assert self.secret(after.power_cycle(), tcti) == first

    @pytest.mark.parametrize("damage", ["cut", "empty", "flip", "noise"])
    def test_a_damaged_file_is_told(self, tcti, damage):
        disk = SimDisk()
        self.secret(disk, tcti)
        file = disk.open(sealing.TPM_FILE)
        good = file.read(0, file.size())
        bad = {
            "cut": good[:50], "empty": b"", "noise": b"\xff" * 200,
            "flip": good[:40] + bytes([good[40] ^ 1]) + good[41:],
        }[damage]  # fmt: skip
        file.truncate(0)
        file.write(0, bad)
        with pytest.raises(LedgerError) as e:
            self.secret(disk, tcti)
        assert e.value.code == "ledger.tee-state"

    def test_another_tpm_does_not_open_it(self, tcti, tmp_path):
        disk = SimDisk()
        self.secret(disk, tcti)
        with tees.swtpm(tmp_path / "other") as other, pytest.raises(LedgerError):
            self.secret(disk, other)

    @pytest.mark.parametrize("pcr", [0, 7, 11])  # each needs a TPM of its own
    def test_another_boot_does_not_open_it(self, tmp_path, pcr):
        assert pcr in sealing.TPM_PCRS
        with tees.swtpm(tmp_path / "tpm") as tcti:
            disk = SimDisk()
            self.secret(disk, tcti)
            tees.extend(tcti, 16, b"1" * 32)  # not among those it is sealed to
            self.secret(disk, tcti)
            tees.extend(tcti, pcr, b"1" * 32)
            with pytest.raises(LedgerError) as e:
                self.secret(disk, tcti)
        assert e.value.code == "ledger.tee-state"
        assert "booted otherwise" in e.value.message

"""configfs-tsm against a folder that behaves as the kernel's (support.tees.FakeTsm)."""

import pytest

from casemate.seams import OsRng
from casemate.spec.errors import UsageError
from casemate.tee import configfs_tsm
from support import tees

INBLOB = bytes(range(64))
OTHER = b"x" * 64


def tsm(folder, made=tees.snp_report, **options):
    root = folder / "report"
    root.mkdir()
    return tees.FakeTsm(root, made, **options)


def report(fake, pauses=None):
    return configfs_tsm.report(
        fake, INBLOB, OsRng(), pause=(pauses if pauses is not None else []).append
    )


def code(fake):
    with pytest.raises(UsageError) as e:
        report(fake)
    assert list(fake.root.iterdir()) == [], "the entry is removed in any case"
    return e.value.code, e.value.message


def test_a_snp_report_with_its_certificates(tmp_path):
    fake = tsm(tmp_path)
    found = report(fake)
    assert found.provider.tee == "sev-snp"
    assert found.outblob[0x50:0x90] == INBLOB
    assert found.auxblob == tees.snp_table()
    assert found.manifestblob == b""
    assert fake.reports == 1, "aux and manifest come from the same report"
    assert list(fake.root.iterdir()) == []


def test_a_quote_of_a_td_which_has_no_privilege_level(tmp_path):
    fake = tsm(tmp_path, tees.td_quote, provider="tdx_guest", floor=None)
    found = report(fake)
    assert (found.provider.tee, found.provider.file) == ("tdx", "quote.bin")
    assert (found.auxblob, found.manifestblob) == (b"", b"")
    assert configfs_tsm.PROVIDERS["tdx_guest"].carries(found.outblob) == INBLOB


def test_the_order_of_operations(tmp_path):
    fake = tsm(tmp_path)
    report(fake)
    assert fake.trace == [
        ("make", ""), ("read", "provider"), ("read", "privlevel_floor"), ("read", "generation"),
        ("write", "inblob"), ("read", "outblob"), ("read", "auxblob"), ("read", "manifestblob"),
        ("read", "generation"), ("remove", ""),
    ]  # fmt: skip


def test_each_report_has_an_entry_of_its_own(tmp_path):
    fake = tsm(tmp_path)
    report(fake)
    report(fake)
    assert len({*fake.names}) == 2
    assert all(name.startswith("casemate-") for name in fake.names)


@pytest.mark.parametrize("floor", [0, 1, 2, 3])
def test_the_privilege_level_is_the_lowest_permitted(tmp_path, floor):
    fake = tsm(tmp_path, floor=floor)
    assert int.from_bytes(report(fake).outblob[0x30:0x34], "little") == floor
    assert (("write", "privlevel") in fake.trace) == (floor > 0)
    assert configfs_tsm.floor(fake, OsRng()) == floor


def test_another_writer_between_is_noticed_and_the_report_made_again(tmp_path):
    fake = tsm(tmp_path)
    left = [2]

    def other(what, entry, attribute):
        if (what, attribute) == ("read", "outblob") and left[0]:
            left[0] -= 1
            fake.kernel_write(entry, "inblob", OTHER)

    fake.before = other
    pauses = []
    assert report(fake, pauses).outblob[0x50:0x90] == INBLOB
    assert pauses == [configfs_tsm.PAUSE] * 2


def test_a_writer_after_the_report_is_noticed_too(tmp_path):
    """outblob is ours, what came after it may not be."""
    fake = tsm(tmp_path)
    left = [1]

    def other(what, entry, attribute):
        if (what, attribute) == ("read", "auxblob") and left[0]:
            left[0] -= 1
            fake.kernel_write(entry, "inblob", OTHER)

    fake.before = other
    pauses = []
    report(fake, pauses)
    assert len(pauses) == 1


def test_a_writer_who_never_stops_ends_it(tmp_path):
    fake = tsm(tmp_path)
    fake.before = lambda what, entry, attribute: (
        fake.kernel_write(entry, "inblob", OTHER) if attribute == "outblob" else None
    )
    found, message = code(fake)
    assert found == "usage.tee-device"
    assert str(configfs_tsm.ATTEMPTS) in message


def test_a_report_of_other_bytes_is_never_given(tmp_path):
    """The generation says nothing of it, should hardware or kernel mix two up."""
    fake = tsm(tmp_path, lambda inblob, level: tees.snp_report(OTHER, level))
    found, message = code(fake)
    assert found == "usage.tee-device"
    assert "other bytes" in message


@pytest.mark.parametrize("error", ["EBUSY", "EAGAIN", "EINTR", "ETIMEDOUT"])
@pytest.mark.parametrize(
    "where", [("write", "inblob"), ("read", "outblob"), ("read", "generation"), ("read", "auxblob")]
)
def test_what_passes_is_tried_again(tmp_path, error, where):
    fake = tsm(tmp_path)
    fake.faults[where] = [error] * 3
    pauses = []
    assert report(fake, pauses).outblob[0x50:0x90] == INBLOB
    assert len(pauses) == 3
    assert list(fake.root.iterdir()) == []


def test_what_stays_is_told_after_a_bound(tmp_path):
    fake = tsm(tmp_path)
    fake.faults["read", "outblob"] = ["EBUSY"] * 1000
    found, message = code(fake)
    assert found == "usage.tee-device"
    assert "busy" in message
    assert len(fake.faults["read", "outblob"]) == 1000 - configfs_tsm.ATTEMPTS


@pytest.mark.parametrize("error", ["EIO", "ENXIO", "EINVAL", "EFBIG", "EACCES"])
@pytest.mark.parametrize(
    "where",
    [("make", ""), ("read", "provider"), ("write", "inblob"), ("read", "outblob"),
     ("read", "generation")],
)  # fmt: skip
def test_other_errors_end_it_at_once(tmp_path, error, where):
    fake = tsm(tmp_path)
    fake.faults[where] = [error]
    found, message = code(fake)
    assert found == "usage.tee-device"
    assert "configfs-tsm fails" in message


def test_the_generation_may_wrap(tmp_path):
    fake = tsm(tmp_path, start=2**64 - 1)
    assert report(fake).outblob[0x50:0x90] == INBLOB


def test_a_generation_that_is_none(tmp_path):
    fake = tsm(tmp_path)
    real = fake._show
    fake._show = lambda entry, attribute, data: real(
        entry, attribute, b"many" if attribute == "generation" else data
    )
    assert code(fake)[0] == "usage.tee-device"


def test_an_unknown_provider(tmp_path):
    assert code(tsm(tmp_path, provider="arm_cca_guest"))[0] == "usage.tee-unsupported"


def test_a_blob_without_end_is_cut_off(tmp_path):
    fake = tsm(tmp_path, lambda inblob, level: (bytes(configfs_tsm.MAX_BLOB + 1), None, None))
    found, message = code(fake)
    assert found == "usage.tee-device"
    assert "too large" in message.lower()


@pytest.mark.parametrize("length", [0, 32, 63, 65])
def test_only_64_bytes(tmp_path, length):
    with pytest.raises(ValueError, match="64"):
        configfs_tsm.report(tsm(tmp_path), bytes(length), OsRng())


def test_the_os_folder_is_used_as_the_kernel_wants_it(tmp_path):
    """One write for a value, reads to the end: on plain files."""
    folder = configfs_tsm.OsTsm(tmp_path)
    folder.make("a")
    (tmp_path / "a" / "inblob").touch()
    folder.write("a", "inblob", INBLOB)
    assert (tmp_path / "a" / "inblob").read_bytes() == INBLOB
    (tmp_path / "a" / "outblob").write_bytes(b"o" * 100_000)
    assert folder.read("a", "outblob", 100_000) == b"o" * 100_000
    with pytest.raises(OSError, match="too large"):
        folder.read("a", "outblob", 99_999)
    with pytest.raises(FileExistsError):
        folder.make("a")
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    folder.remove("a")
    assert not (tmp_path / "a").exists()

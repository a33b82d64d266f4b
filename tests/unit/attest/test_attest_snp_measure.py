"""Expected measurements: the recipe of docs/evidence.md with sev-snp-measure, on a firmware that is
made up here, against the launch digest as AMD 56860 section 8.17.2 defines it (PAGE_INFO), and as a
policy uses it. The processor's initial state (VMSA) is taken from the tool's own dump."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from support import snp

pytest.importorskip("sevsnpmeasure", reason="sev-snp-measure is not installed")

PAGE = 4096
NORMAL, VMSA, ZERO, SECRETS, CPUID = 1, 2, 3, 5, 6
VMSA_AT = 0xFFFFFFFFF000
SECTIONS = [  # where, bytes, kind of OVMF's SEV metadata, type of page
    (0x800000, 2 * PAGE, 1, ZERO), (0x80D000, PAGE, 2, SECRETS), (0x80E000, PAGE, 3, CPUID),
    (0x810000, PAGE, 0x10, NORMAL),
]  # fmt: skip
HASHES_AT = 0x810400


def _entry(guid: str, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le


def firmware(folder: Path, *, hashes: bool = True) -> Path:
    """64 KiB with OVMF's table at its end: metadata, hash table and reset vector."""
    sections = SECTIONS if hashes else SECTIONS[:3]
    items = b"".join(struct.pack("<III", *section[:3]) for section in sections)
    metadata = struct.pack("<4sIII", b"ASEV", 16 + len(items), 1, len(sections)) + items
    table = (
        _entry("dc886566-984a-4798-a75e-5585a7bf67cc", struct.pack("<I", 0x1000))
        + _entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", struct.pack("<I", 0x80B004))
        + _entry("7255371f-3a3b-4b04-927b-1da6efa8d454", struct.pack("<II", HASHES_AT, 0x400))
    )
    footer = struct.pack("<H", len(table) + 18)
    table += footer + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    image = bytearray(b"firmware".ljust(16 * PAGE, b"\xf4"))
    image[-0x1000 : -0x1000 + len(metadata)] = metadata
    image[-32 - len(table) : -32] = table
    path = folder / "OVMF.fd"
    path.write_bytes(bytes(image))
    return path


def measured(folder: Path, *options: str | Path) -> str:
    """What the documented command prints."""
    command = [
        sys.executable,
        "-c",
        "import sys; from sevsnpmeasure.cli import main; sys.exit(main())",
    ]
    words = ["--mode", "snp", "--vcpu-type", "EPYC-v4", *map(str, options)]
    run = subprocess.run(
        [*command, *words], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    return run.stdout.strip()


def hash_page(kernel: bytes, initrd: bytes, command_line: bytes) -> bytes:
    """QEMU's table of hashes, which OVMF compares with what it is given."""
    parts = (
        ("97d02dd8-bd20-4c94-aa78-e7714d36ab2a", command_line + b"\0"),
        ("44baf731-3a2f-4bd7-9af1-41e29169781d", initrd),
        ("4de79437-abd2-427f-b835-d5b172d2045b", kernel),
    )
    entries = b"".join(
        uuid.UUID(guid).bytes_le + struct.pack("<H", 50) + hashlib.sha256(data).digest()
        for guid, data in parts
    )
    head = uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le
    table = head + struct.pack("<H", 18 + len(entries)) + entries
    return (bytes(HASHES_AT % PAGE) + table).ljust(PAGE, b"\0")


def launch_digest(image: bytes, hashes: bytes, states: list[bytes]) -> bytes:
    """DIGEST_NEXT over PAGE_INFO of each page: digest so far, page, length, type, flags, where."""
    digest = bytes(48)

    def update(kind: int, where: int, page: bytes | None) -> None:
        nonlocal digest
        content = bytes(48) if page is None else hashlib.sha384(page).digest()
        info = digest + content + struct.pack("<HBBBBBBQ", 0x70, kind, 0, 0, 0, 0, 0, where)
        digest = hashlib.sha384(info).digest()

    for at in range(0, len(image), PAGE):
        update(NORMAL, (1 << 32) - len(image) + at, image[at : at + PAGE])
    for where, size, _, kind in SECTIONS:
        for at in range(0, size, PAGE):
            update(kind, where + at, hashes if kind == NORMAL else None)
    for state in states:
        update(VMSA, VMSA_AT, state)
    return digest


@pytest.mark.parametrize("processors", [1, 3])
def test_the_recipe_gives_the_launch_digest(tmp_path, processors):
    kernel, initrd, line = b"a kernel", b"an initial disk", "console=ttyS0 verity=on"
    (tmp_path / "vmlinuz").write_bytes(kernel)
    (tmp_path / "initrd").write_bytes(initrd)
    path = firmware(tmp_path)
    found = measured(
        tmp_path, "--ovmf", path, "--vcpus", str(processors), "--kernel", tmp_path / "vmlinuz",
        "--initrd", tmp_path / "initrd", "--append", line, "--dump-vmsa",
    )  # fmt: skip
    states = [(tmp_path / f"vmsa{n}.bin").read_bytes() for n in range(processors)]
    page = hash_page(kernel, initrd, line.encode())
    assert found == launch_digest(path.read_bytes(), page, states).hex()


def test_what_is_measured_is_what_a_policy_pins(tmp_path):
    path = firmware(tmp_path)
    for name, data in (("vmlinuz", b"a kernel"), ("other", b"another kernel")):
        (tmp_path / name).write_bytes(data)
    seen = {
        name: measured(tmp_path, "--ovmf", path, "--vcpus", "2", "--kernel", tmp_path / name)
        for name in ("vmlinuz", "other")
    }
    files = snp.evidence(measurement=bytes.fromhex(seen["vmlinuz"]))
    assert snp.judge(files, measurements=(seen["vmlinuz"],)).code == ""
    found = snp.judge(files, measurements=(seen["other"],))
    assert found.code == "evidence.appraise-measurement"


def test_a_firmware_that_checks_no_hashes_measures_no_kernel(tmp_path):
    """With it the kernel would be whatever the host gives: the tool says so."""
    (tmp_path / "vmlinuz").write_bytes(b"a kernel")
    path = firmware(tmp_path, hashes=False)
    with pytest.raises(subprocess.CalledProcessError) as e:
        measured(tmp_path, "--ovmf", path, "--vcpus", "1", "--kernel", tmp_path / "vmlinuz")
    assert "SNP_KERNEL_HASHES" in e.value.stderr

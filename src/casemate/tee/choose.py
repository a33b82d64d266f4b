"""Which attester: by name, or the machine's own.

One table (:data:`KINDS`), in the order in which ``auto`` looks: what only an enclave has comes
first, a TPM, which many machines have and which encrypts nothing, last. Simulation is never found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from casemate.attest.snp import abi as snp_abi
from casemate.seams import Clock, Disk, Rng
from casemate.spec.errors import CasemateError, UsageError
from casemate.tee import (
    anchor,
    azure,
    collateral,
    configfs_tsm,
    errors,
    nsm,
    nvidia,
    sealing,
    sev_guest,
    snp_certificates,
    tpm,
    tpm_device,
)
from casemate.tee.configfs_tsm import OsTsm, Tsm
from casemate.tee.devices import Opener, OsDevice
from casemate.tee.fetch import Fetch, https
from casemate.tee.hardware import HardwareTee, Maker
from casemate.tee.protocol import Tee
from casemate.tee.release import owner_release
from casemate.tee.sealing import Sealing
from casemate.tee.simulated import SimulatedTee

CCEL: Final = Path("/sys/firmware/acpi/tables/data/CCEL")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where evidence comes from: this machine's devices, or fakes of them.

    tcti: how the TSS reaches the TPM. log_path, ccel_path: event logs of a TPM and of a TD. fetch:
    for Azure's metadata service. gpus: what NVIDIA's software finds. owner: the Ed25519 key of who
    releases the sealing secret, where no hardware holds one. policies: by which an attester judges
    its own evidence, to say what it is; None: each kind's default.
    """

    tsm_path: Path = configfs_tsm.ROOT
    nsm_path: Path = nsm.PATH
    guest_path: Path = sev_guest.PATH
    tpm_path: Path = tpm.PATH
    tcti: str = tpm_device.TCTI
    log_path: Path = tpm.EVENT_LOG
    ccel_path: Path = CCEL
    tsm_folder: Callable[[Path], Tsm] = OsTsm
    opener: Opener = OsDevice
    fetch: Fetch = https
    gpus: Callable[[], nvidia.Found] = nvidia.detect
    pause: Callable[[float], None] = time.sleep
    owner: bytes | None = None
    policies: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Context:
    """What an attester is opened with."""

    machine: Machine
    disk: Disk
    rng: Rng
    clock: Clock


@dataclass(frozen=True)
class Found:
    """``present``: whether this attester can be opened here; ``reason``: what was seen."""

    kind: str
    present: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """``look``: what was seen of it, or None where it is not there, without changing anything."""

    look: Callable[[Machine, Rng], tuple[bool, str]]
    open: Callable[[Context], Tee]


def _released(c: Context) -> Sealing:
    if c.machine.owner is None:
        return sealing.unavailable(
            "This TEE has no sealing key of its own, and no owner was named to release one.",
            "Name the owner's Ed25519 key, or run where the TEE has a sealing key.",
        )
    return owner_release(c.machine.owner, c.disk, c.rng, c.clock, pause=c.machine.pause)


def _hardware(kind: str, make: Maker, seal: Sealing, c: Context) -> HardwareTee:
    return HardwareTee(
        kind, make, seal, c.clock,
        filler=collateral.filler(c.disk), parts=nvidia.parts(c.machine.gpus()),
        policies=c.machine.policies,
    )  # fmt: skip


# configfs-tsm.


def _look_tsm(m: Machine, rng: Rng) -> tuple[bool, str]:
    if not m.tsm_path.is_dir():
        return False, f"no {m.tsm_path}"
    try:
        found = configfs_tsm.provider(m.tsm_folder(m.tsm_path), rng)
    except CasemateError as e:
        return False, e.message
    return True, f"{m.tsm_path}: {found.tee}"


def _snp_files(found: configfs_tsm.Report) -> dict[str, bytes]:
    report = snp_abi.parse(found.outblob)
    return snp_certificates.current(snp_certificates.files(found.auxblob), report)


def _log(path: Path) -> dict[str, bytes]:
    log = tpm.event_log(path)
    return {"ccel_data.bin": log} if log else {}


def _open_tsm(c: Context) -> Tee:
    m = c.machine
    folder = m.tsm_folder(m.tsm_path)
    provider = configfs_tsm.provider(folder, c.rng)

    def make(field: bytes) -> dict[str, bytes]:
        found = configfs_tsm.report(folder, field, c.rng, pause=m.pause)
        beside = _snp_files(found) if provider.tee == "sev-snp" else _log(m.ccel_path)
        manifest = {"manifest.bin": found.manifestblob} if found.manifestblob else {}
        return {**beside, **manifest, provider.file: found.outblob}

    if provider.tee == "sev-snp" and m.guest_path.exists():
        seal = sealing.snp_derived(
            lambda: sev_guest.derived_key(
                vmpl=configfs_tsm.floor(folder, c.rng), path=m.guest_path, opener=m.opener
            )
        )
    else:
        seal = _released(c)
    return _hardware(provider.tee, make, seal, c)


# Nitro.


def _look_nsm(m: Machine, _: Rng) -> tuple[bool, str]:
    return m.nsm_path.exists(), f"{m.nsm_path}" if m.nsm_path.exists() else f"no {m.nsm_path}"


def _open_nsm(c: Context) -> Tee:
    m = c.machine

    def make(field: bytes) -> dict[str, bytes]:
        return {"document.cose": nsm.document(field, path=m.nsm_path, opener=m.opener)}

    return _hardware("nitro", make, _released(c), c)


# TPMs.


def _look_tpm(m: Machine, *, azure_only: bool) -> tuple[bool, str]:
    if not m.tpm_path.exists():
        return False, f"no {m.tpm_path}"
    try:
        with tpm_device.Tpm(m.tcti) as device:
            hcl = device.nv(azure.HCL_INDEX) is not None
            source = "" if azure_only else device.ak().source
    except CasemateError as e:
        return False, f"{m.tpm_path}: {e.message}"
    if azure_only:
        return hcl, f"{m.tpm_path}: {'an' if hcl else 'no'} HCL report"
    return True, f"{m.tpm_path}: a TPM (AK: {source}); it encrypts no memory"


def _open_azure(c: Context) -> Tee:
    m = c.machine
    seal = sealing.tpm_pcr(c.disk, c.rng, m.tcti)
    return _hardware(azure.KIND, azure.maker(m.fetch, m.tcti), seal, c)


def _open_tpm(c: Context) -> Tee:
    m = c.machine
    seal = sealing.tpm_pcr(c.disk, c.rng, m.tcti)
    return _hardware(tpm.KIND, tpm.maker(m.tcti, m.log_path), seal, c)


SIMULATED: Final = "simulated"
KINDS: Final[dict[str, Row]] = {
    "nsm": Row(_look_nsm, _open_nsm),
    "configfs-tsm": Row(_look_tsm, _open_tsm),
    "azure-vtpm": Row(lambda m, _: _look_tpm(m, azure_only=True), _open_azure),
    "tpm": Row(lambda m, _: _look_tpm(m, azure_only=False), _open_tpm),
    SIMULATED: Row(
        lambda _m, _r: (False, "never chosen by itself"),
        lambda c: SimulatedTee(c.disk, c.rng, c.clock),
    ),
}


def look(machine: Machine, rng: Rng) -> tuple[Found, ...]:
    """What this machine has of each kind, in the order of choice; raises nothing."""
    return tuple(Found(kind, *row.look(machine, rng)) for kind, row in KINDS.items())


def detect(machine: Machine, rng: Rng) -> str | None:
    """The attester that this machine's hardware offers, or None. Simulation is never detected."""
    return next(
        (kind for kind, row in KINDS.items() if kind != SIMULATED and row.look(machine, rng)[0]),
        None,
    )


_HERE: Final = Machine()


def open(kind: str, *, disk: Disk, rng: Rng, clock: Clock, machine: Machine = _HERE) -> Tee:
    """The attester of that kind (a key of :data:`KINDS`), or the machine's own for ``auto``.

    ``disk`` keeps what a restart needs. Raises ``usage.tee-*`` for a kind that is unknown, absent
    or not supported, ``usage.extra``; ``auto`` never falls back to simulation.
    """
    if kind == "auto":
        found = detect(machine, rng)
        if found is None:
            raise errors.absent(
                "tee",
                "This machine has no TEE that casemate knows; `casemate doctor` says what was"
                " looked for.",
                "Run in a confidential VM, or choose the simulated TEE by name, for development"
                " only.",
            )
        kind = found
    if kind not in KINDS:
        raise UsageError(
            "usage.tee-unknown",
            f"{kind[:40]!r} is no kind of TEE.",
            mend=f"Choose auto or one of {', '.join(KINDS)}.",
            where="tee",
        )
    return KINDS[kind].open(Context(machine, disk, rng, clock))


def open_anchor(
    tee: Tee, secret: bytes, *, machine: Machine = _HERE, index: int = anchor.INDEX
) -> anchor.Anchor | None:
    """The anchor against rollback beside this TEE: its machine's TPM, or None where that has none
    and for the simulated TEE, which keeps none. ``secret``: 32 bytes of the sealed store.

    Touches nothing; what the TPM cannot do is raised when it is asked. Raises ``usage.tee-absent``
    for an index that is not the owner's.
    """
    if tee.simulated or not machine.tpm_path.exists():
        return None
    return anchor.TpmAnchor(secret, machine.tcti, index)

"""What each kind of evidence gives to the table in :mod:`casemate.attest.kinds`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from casemate.attest.verdict import Checks, Unchecked
from casemate.spec.canonical import Json

# Evidence and collateral as files, named as in an evidence folder.
Files: TypeAlias = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What evidence says, once verified.

    bound: the bytes of the vendor's field that holds the binding. fresh: every value in the
    evidence that a challenger's nonce may be. product, root, measurement, chip_id, tcb: as in
    ``Verdict``; measurement and chip_id are "" where the kind has none. other: fields of the
    evidence for people and programs to read.
    """

    bound: bytes
    fresh: tuple[bytes, ...]
    product: str
    root: str
    measurement: str
    chip_id: str
    tcb: Mapping[str, int]
    other: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of evidence.

    tee: ``Evidence.tee`` and the section's name in a trust policy. recognises: whether files are
    of this kind, by content. check: parse, verify and appraise (each a module of the package),
    each check recorded by name; ``now`` in Unix seconds. It sets ``checks.crypto`` to ``valid`` as
    soon as the last signature has held. policy: the class of its section of a trust policy (a
    frozen dataclass whose fields are all given or ``Unchecked``), default: the one where nothing
    is pinned. field: the vendor's field that holds the binding; of: its bytes from the 64 bytes of
    ``binding.report_data``. fields: the parsed evidence, field by field, for ``enclave show``.
    instances: fields of the policy that list admitted machines or devices; one of them must be
    given where the operator holds the hardware. vendor: whose word it is; two kinds of one vendor
    are no independent roots. device: it speaks of a device beside the CPU, such as a GPU, and
    cannot stand alone.
    """

    tee: str
    recognises: Callable[[Files], bool]
    check: Callable[[Files, Any, float, Checks], Claims]
    policy: type[Any]
    default: Callable[[], Any]
    field: str
    of: Callable[[bytes], bytes]
    fields: Callable[[Files], Mapping[str, Json]]
    instances: tuple[str, ...] = ()
    vendor: str = ""
    device: bool = False


def unpinned(what: str) -> Unchecked:
    """For default policies."""
    return Unchecked(f"{what} is not pinned")


def whole(report_data: bytes) -> bytes:
    """For a field that takes all 64 bytes."""
    return report_data


def hashed(report_data: bytes) -> bytes:
    """For a shorter field: SHA-256."""
    return hashlib.sha256(report_data).digest()

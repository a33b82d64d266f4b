"""What evidence binds, and how: shared by the side that makes evidence and the one that checks it.

    report_data = SHA-512( item(tag) item(boot) item(tls_spki) item(hpke_key) item(receipt_key)
                           item(log_key) item(server_policy) item(nonce_root) )
    item(x)     = length of x as 4 bytes, big endian, then x

The nonces that wait are the leaves of an RFC 6962 tree, so that one report answers many clients.

Each kind of evidence has a field for these 64 bytes, or for fewer that follow from them
(``Kind.field``, ``Kind.of``). Where a device beside the CPU, or a second vendor, shows evidence of
its own, its files stand under a name ("gpu0/report.bin"), and what it must carry follows in the
same way from what the CPU's report carries:

    device_data = SHA-512( item("casemate/device/v1") item(kind of the CPU's evidence)
                           item(bytes of its field) item(name) )
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final

from casemate.attest.kinds import KINDS
from casemate.attest.verdict import refusal
from casemate.spec import merkle
from casemate.spec.evidence import NONCE_BYTES, Attestation, Binding
from casemate.spec.identity import SEAL_KEY_BYTES, SIGN_KEY_BYTES

TAG: Final = b"casemate/report-data/v1"
DEVICE_TAG: Final = b"casemate/device/v1"
REPORT_DATA_BYTES: Final = 64
BOOT_BYTES: Final = 16
MAX_NONCES: Final = 1 << 20

# Names of further evidence, which is what precedes "/" in its files' names.
DEVICE: Final = re.compile(r"[a-z][a-z0-9-]{0,15}")

_MEND: Final = "Use a client and a server of matching versions."
_LENGTHS: Final = {
    "boot": BOOT_BYTES,
    "tls_spki": 32,
    "hpke_key": SEAL_KEY_BYTES,
    "receipt_key": SIGN_KEY_BYTES,
    "log_key": SIGN_KEY_BYTES,
    "nonce_root": 32,
}


def item(data: bytes) -> bytes:
    """Its length in 4 bytes, big endian, then itself."""
    return len(data).to_bytes(4, "big") + data


def report_data(binding: Binding) -> bytes:
    """The 64 bytes that evidence must carry. ``EvidenceError`` when a part has a wrong length."""
    for name, length in _LENGTHS.items():
        if len(getattr(binding, name)) != length:
            raise refusal(
                "binding-malformed",
                f"The binding's {name} is not {length} bytes long.",
                name,
                _MEND,
            )
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", binding.server_policy):
        raise refusal(
            "binding-malformed", "The binding's server_policy is no digest.", "server_policy", _MEND
        )
    parts = (
        TAG,
        binding.boot,
        binding.tls_spki,
        binding.hpke_key,
        binding.receipt_key,
        binding.log_key,
        binding.server_policy.encode("ascii"),
        binding.nonce_root,
    )
    return hashlib.sha512(b"".join(map(item, parts))).digest()


def carried(tee: str, data: bytes) -> bytes:
    """What evidence of kind ``tee`` (a key of ``KINDS``) must carry in its field for these 64 bytes
    of :func:`report_data` or :func:`device_data`."""
    return KINDS[tee].of(data)


def device_data(tee: str, bound: bytes, name: str) -> bytes:
    """The 64 bytes for evidence under ``name`` beside that of the CPU, which is of kind ``tee`` and
    carries ``bound``; each name has its own, so that no device answers for two."""
    parts = (DEVICE_TAG, tee.encode("ascii"), bound, name.encode("ascii"))
    return hashlib.sha512(b"".join(map(item, parts))).digest()


def split(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, dict[str, bytes]]]:
    """The CPU's files, and those of further evidence by name. ``EvidenceError`` for a name that is
    none."""
    own: dict[str, bytes] = {}
    further: dict[str, dict[str, bytes]] = {}
    for path, data in files.items():
        name, slash, file = path.partition("/")
        if not slash:
            own[path] = data
        elif not DEVICE.fullmatch(name) or not file or "/" in file:
            raise refusal(
                "parse-name", f"{path[:40]!r} is no name of a file of evidence.", path[:80], _MEND
            )
        else:
            further.setdefault(name, {})[file] = data
    return own, further


def nonce_root(nonces: Sequence[bytes]) -> bytes:
    """32-byte root over 1 to 2^20 nonces of 32 bytes; ValueError for anything else."""
    if not 1 <= len(nonces) <= MAX_NONCES or any(len(n) != NONCE_BYTES for n in nonces):
        raise ValueError(f"1 to {MAX_NONCES} nonces of {NONCE_BYTES} bytes are needed")
    return merkle.root(len(nonces), merkle.tree(nonces))


def nonce_path(nonces: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The audit path of nonce ``index``; IndexError outside."""
    return merkle.inclusion(index, len(nonces), merkle.tree(nonces))


def check_nonce(attestation: Attestation, nonce: bytes) -> None:
    """``EvidenceError`` unless ``nonce`` is the leaf that the attestation's path says it is."""
    if len(nonce) != NONCE_BYTES:
        raise refusal(
            "freshness-nonce",
            f"A nonce of {len(nonce)} bytes was given; {NONCE_BYTES} random bytes are needed.",
            "nonce",
            "Ask again with a fresh nonce.",
        )
    reason = f"it is of a tree of more than {MAX_NONCES} nonces"
    if attestation.count <= MAX_NONCES:
        try:
            found = merkle.root_from_inclusion(
                merkle.leaf_hash(nonce), attestation.index, attestation.count, attestation.path
            )
        except ValueError as e:
            reason = str(e)
        else:
            if found == attestation.binding.nonce_root:
                return
            reason = "it leads to another root"
    raise refusal(
        "freshness-path",
        f"The evidence was not made for this nonce: its audit path fails ({reason}).",
        "nonce",
        "Ask the server for new evidence; if this comes again, something replays old evidence.",
    )

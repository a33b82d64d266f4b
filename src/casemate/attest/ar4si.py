"""A verification as attestation results: trustworthiness claims, each with a value and a tier.

Source: draft-ietf-rats-ar4si (Attestation Results for Secure Interactions), section 2.3:
instance-identity, configuration, executables, file-system, hardware, runtime-opaque,
storage-opaque, sourced-data; a claim is a number from -128 to 127 whose size gives its tier. RFC
9334 (RATS architecture) for the words, draft-ietf-rats-ear for status and vector.

Procedure:

 1. The evidence could not be parsed: every claim that evidence of a TEE can carry is 1
    (unexpected). Its signatures are wrong: 99. They could not be checked, nothing was signed, or
    collateral is missing or not valid at this time: 0 (no claim).
 2. ``hardware``: 2 genuine; 32 genuine, with known vulnerabilities (the vendor's status); 96
    revoked, or below the TCB that is wanted; 97 the root is unknown.
 3. ``configuration`` (debug, migration, privilege level, secure boot), ``executables``
    (measurements of what was booted, against what is listed or endorsed), ``instance-identity``
    (chip, PPID, AK, device, as listed): from the checks of that name. One failed: 96, 33, 97. All
    that were made passed: 2 (executables 3: what was loaded at boot); configuration 3 where some
    were left unchecked. None made: 0.
 4. ``runtime-opaque``: 2 where the TEE encrypts memory, 32 where it only isolates it, and no check
    of the configuration failed; 96 where one did, since memory is then open to the host.
 5. Simulated: ``hardware`` and ``runtime-opaque`` are 96 whatever else holds.
 6. ``file-system``, ``storage-opaque``, ``sourced-data``: 0; no evidence here speaks of them.
 7. ``status`` is the tier of the worst claim; at least contraindicated where the decision is to
    reject, and none where nothing was decided.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from casemate.attest.verdict import HARDENING, Check, stage
from casemate.spec.canonical import Json

CLAIMS: Final = (
    "instance-identity", "configuration", "executables", "file-system", "hardware",
    "runtime-opaque", "storage-opaque", "sourced-data",
)  # fmt: skip
SAID: Final = (
    "instance-identity", "configuration", "executables", "hardware", "runtime-opaque",
)  # fmt: skip
NONE, UNEXPECTED, AFFIRMED, CRYPTO_FAILED = 0, 1, 2, 99
_NONE: Final = "none"

# The size of a claim's value, at most, to its tier.
_TIERS: Final = ((1, _NONE), (31, "affirming"), (95, "warning"), (128, "contraindicated"))
_ORDER: Final = tuple(tier for _, tier in _TIERS)

# Of which claim a check speaks, by its name; names under "gpu0/" count like others. Only checks
# against what the policy lists, or the vendor endorses, say that something is recognised.
_NAMES: Final = {
    "instance-identity": "chip|instance|ak-pin|module-id|vm-id|ueid",
    "executables": (r"measurements?|mrtd|mrenclave|pcrs|pcr-?[0-9]+|uvm-measurement|image-digest"),
    "configuration": (
        "debug|dbgstat|guest-policy-.+|vmpl|migration|(td-)?attributes-.+|xfam|(vm-)?secure-boot"
        "|platform-info-.+|support-attributes|mode|protected-pcie"
    ),
}
_PATTERNS: Final = {
    claim: re.compile(rf"(?:[^/]+/)?(?:{names})") for claim, names in _NAMES.items()
}
# Value when a check failed, and when all that were made passed.
_VALUES: Final = {"instance-identity": (97, 2), "executables": (33, 3), "configuration": (96, 2)}
_SOME_UNCHECKED: Final = 3

# How a TEE keeps memory from its host: 2 encrypted, 32 isolated. Others do not.
_OPAQUE: Final = {"sev-snp": 2, "tdx": 2, "sgx": 2, "azure-cvm": 2, "nitro": 32}
_UNDECIDED: Final = ("collateral", "validity")
# The checks that hardware has signed; reference values alone speak of none.
_SIGNED: Final = ("signature", "quote-signature")


def tier(value: int) -> str:
    """The tier of a claim's value."""
    return next(name for most, name in _TIERS if abs(value) <= most)


def claim_of(check: str) -> str:
    """The claim that a check of this name speaks of; "" for none."""
    return next((claim for claim, names in _PATTERNS.items() if names.fullmatch(check)), "")


def _of_checks(claim: str, checks: Iterable[Check]) -> int:
    outcomes = {c.outcome for c in checks if claim_of(c.name) == claim}
    failed, passed = _VALUES[claim]
    if "failed" in outcomes:
        return failed
    if "passed" not in outcomes:
        return NONE
    some = claim == "configuration" and "unchecked" in outcomes
    return _SOME_UNCHECKED if some else passed


def _hardware(code: str, tcb_status: str, checks: Iterable[Check]) -> int:
    if stage(code) in ("tcb", "revocation"):
        return 96
    if not any(c.outcome == "passed" and c.name in _SIGNED for c in checks):
        return NONE
    return 32 if tcb_status in HARDENING else AFFIRMED


def vector(
    *, tee: str, simulated: bool, crypto: str, code: str, tcb_status: str, checks: Sequence[Check]
) -> dict[str, int]:
    """The value of each claim (steps 1 to 6)."""
    out = dict.fromkeys(CLAIMS, NONE)
    if stage(code) == "parse":
        return out | dict.fromkeys(SAID, UNEXPECTED)
    if code.startswith("evidence.root-"):
        return out | {"hardware": 97}
    if crypto == "invalid" or stage(code) == "signature":
        return out | dict.fromkeys(SAID, CRYPTO_FAILED)
    if crypto != "valid" or stage(code) in _UNDECIDED or code.startswith("evidence.absent-"):
        return out
    out |= {claim: _of_checks(claim, checks) for claim in _VALUES}
    out["hardware"] = _hardware(code, tcb_status, checks)
    opaque = _OPAQUE.get(tee, NONE)
    out["runtime-opaque"] = 96 if opaque and out["configuration"] == 96 else opaque
    if stage(code) == "revocation":
        out["instance-identity"] = 96
    if simulated:
        out |= {"hardware": 96, "runtime-opaque": 96}
    return out


def result(
    *,
    tee: str,
    simulated: bool,
    crypto: str,
    decision: str,
    code: str,
    tcb_status: str,
    checks: Sequence[Check],
) -> dict[str, Json]:
    """Status, vector and tiers for ``--format json``. ``crypto``, ``decision``, ``code``: as in
    ``Verdict`` and ``Judgement``; ``code`` is "" where nothing failed."""
    values = vector(
        tee=tee, simulated=simulated, crypto=crypto, code=code, tcb_status=tcb_status,
        checks=checks,
    )  # fmt: skip
    tiers = {claim: tier(value) for claim, value in values.items()}
    status = max(tiers.values(), key=_ORDER.index)
    if decision == "reject":
        status = _ORDER[-1]
    elif decision in ("needs-collateral", "not-applicable"):
        status = _NONE
    return {
        "status": status,
        "trustworthiness-vector": dict(values),
        "tiers": dict(tiers),
    }

"""Genuine quotes of a TPM against a trust policy: do we want what they say?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are
``evidence.appraise-<check>``.

 1. ``ak-pin``: the attestation key is one that is admitted.
 2. ``hash-algorithms``: a quote covers PCRs of an admitted bank; SHA-1 never counts.
 3. ``pcr-<n>``: PCR n, in the bank of the admitted digests' length, is quoted and admitted.
 4. ``log-required``: there is an event log, and it replayed to quoted PCRs.
 5. ``secure-boot``: what the log's measurement of the variable SecureBoot says, where the log
    replayed to PCR 7, which holds it (PC Client Platform Firmware Profile, section 3.3.4.8).
 6. ``firmware-version``, ``clock-safe``, ``reset-count``, ``restart-count``: as the quotes say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from casemate.attest.judge import Judged, among, fields, made, unwanted
from casemate.attest.tpm import eventlog
from casemate.attest.tpm.abi import Attest
from casemate.attest.tpm.collateral import Banks
from casemate.attest.tpm.policy import BANKS, TpmPolicy
from casemate.attest.verdict import Checks, Refused, Unchecked

_MEND: Final = (
    "Ask the operator to run what the trust policy admits, or change the policy knowingly."
)
_SECURE_BOOT_PCR: Final = 7


def _pcr(index: str, admitted: tuple[str, ...], quoted: Banks) -> Judged:
    """In the bank of each admitted digest; several banks may be given, each must then agree."""
    found = []
    ok = True
    for bank, digits in BANKS.items():
        pins = [pin for pin in admitted if len(pin) == digits]
        if pins:
            value = quoted.get(bank, {}).get(int(index), b"").hex()
            found.append(f"{bank} {value or 'not quoted'}")
            ok = ok and value in pins
    return f"pcr-{index}", ok, ", ".join(found), "one of " + ", ".join(admitted[:8])


def _secure_boot(log: eventlog.Log | None, quoted: Banks, logged: bool) -> str:
    if log is None or not logged:
        return "unknown without an event log"
    if not any(
        _SECURE_BOOT_PCR in quoted.get(bank, {}) for bank in log.algorithms if bank in BANKS
    ):
        return "unknown without a quote of PCR 7"
    return {True: "on", False: "off", None: "not in the log"}[eventlog.secure_boot(log)]


def judge(
    attest: Attest, ak: str, quoted: Banks, log: eventlog.Log | None, logged: bool,
    policy: TpmPolicy,
) -> Iterator[Judged]:  # fmt: skip
    """The checks above. attest: any one of the quotes, which agree in what is asked here."""
    yield among("ak-pin", ak, policy.aks)
    covered = [bank for bank in policy.hash_algorithms if quoted.get(bank)]
    yield (
        "hash-algorithms", bool(covered), ", ".join(covered) or "none",
        "one of " + ", ".join(policy.hash_algorithms),
    )  # fmt: skip
    if isinstance(policy.pcrs, Unchecked):
        yield "pcrs", policy.pcrs, "", ""
    else:
        for index, admitted in sorted(policy.pcrs.items(), key=lambda item: int(item[0])):
            yield _pcr(index, admitted, quoted)
    if isinstance(policy.event_log, Unchecked):
        yield "log-required", policy.event_log, "", ""
    else:
        yield "log-required", logged or not policy.event_log, str(logged).lower(), "a log"
    if isinstance(policy.secure_boot, Unchecked):
        yield "secure-boot", policy.secure_boot, "", ""
    else:
        found, wanted = _secure_boot(log, quoted, logged), "on" if policy.secure_boot else "off"
        yield "secure-boot", found == wanted, found, wanted
    yield among("firmware-version", f"{attest.firmware_version:016x}", policy.firmware_versions)
    safe = policy.clock_safe
    yield among("clock-safe", attest.safe, safe if isinstance(safe, Unchecked) else (safe,))
    yield among("reset-count", attest.reset_count, policy.reset_counts)
    yield among("restart-count", attest.restart_count, policy.restart_counts)


def record(judged: Iterator[Judged], checks: Checks) -> list[Refused]:
    """Each check recorded; the failures in order."""
    return made(fields(judged, partial(unwanted, "evidence", _MEND)), checks)


def settle(failed: list[Refused], checks: Checks) -> None:
    """Raises the first failure, with all checks; what is wrong before what is missing, since more
    collateral would not mend it."""
    if failed:
        worst = min(failed, key=lambda e: e.code.startswith("evidence.needs-"))
        worst.checks = tuple(checks.done)
        raise worst


def attempt(check: Callable[[], None]) -> list[Refused]:
    """A check that is made among those of the policy, so that all are recorded."""
    try:
        check()
    except Refused as e:
        return [e]
    return []

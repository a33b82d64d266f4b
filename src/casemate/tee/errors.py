"""How making evidence fails."""

from __future__ import annotations

from casemate.spec.errors import LedgerError, UsageError


def device(where: str, message: str, mend: str = "") -> UsageError:
    """``usage.tee-device``: a device or tool of the TEE failed, or answered what it may not."""
    return UsageError(
        "usage.tee-device",
        message,
        mend=mend or "Try again; if this stays, run `casemate doctor` and see the kernel's log.",
        where=where,
        status=503,
    )


def absent(where: str, message: str, mend: str) -> UsageError:
    """``usage.tee-absent``: the machine lacks what was asked for."""
    return UsageError("usage.tee-absent", message, mend=mend, where=where)


def os_error(where: str, e: OSError) -> UsageError:
    """``usage.tee-device`` for what the kernel said."""
    mend = "Run the server as a user who may open it." if e.errno in (1, 13) else ""
    return device(where, f"{where} fails: {e.strerror or type(e).__name__}.", mend)


def sealing(where: str, message: str, mend: str) -> UsageError:
    """``usage.tee-sealing``: no sealing key can be had here."""
    return UsageError("usage.tee-sealing", message, mend=mend, where=where)


def state(where: str, message: str, mend: str) -> LedgerError:
    """``ledger.tee-state``: what a restart needs is damaged or does not open."""
    return LedgerError("ledger.tee-state", message, mend=mend, where=where)

"""The one tree of errors.

Every failure that a person or a program meets is a :class:`CasemateError` with

- ``code``: stable, ``family.reason``, the same on the wire, in the CLI and in logs;
- ``message``: one sentence that names the offending thing;
- ``mend``: one sentence that says what to do;
- ``where``: the node, field, file or check concerned, or ``""``.

The family decides the class, the HTTP status and the exit code::

    CasemateError
     +- UsageError       usage.*     exit 2   the command line or a call's arguments
     +- FormatError      format.*    exit 3   bytes that are not in a canonical, admitted form
     +- DataError        data.*      exit 4   a table or tensor against its schema
     +- ModelError       model.*     exit 5   a graph or its weights
     +- PlanError        plan.*      exit 6   a job that cannot be planned
     +- AuthError        auth.*      exit 7   who asks: signature, identity, nonce, replay
     +- PolicyError      policy.*    exit 8   what an owner's policy, approval or epoch forbids
     +- BudgetError      budget.*    exit 9   the privacy budget
     +- EvidenceError    evidence.*  exit 10  attestation (later: one exit code a stage, 10 to 19)
     +- ReceiptError     receipt.*   exit 20  a receipt, a log entry or their signatures
     +- LedgerError      ledger.*    exit 21  the stored state
     +- JobError         job.*       exit 22  a job that failed, was cancelled or is unknown
     +- NetError         net.*       exit 23  the server cannot be reached or broke the protocol
     +- LimitError       limit.*     exit 24  too large, too many, too fast
     +- InternalError    internal.*  exit 1   a fault of casemate itself
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

_CODE: Final = re.compile(r"[a-z]+(\.[a-z0-9]+(-[a-z0-9]+)*)+\Z")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


class CasemateError(Exception):
    """Base of all errors. ``status`` is the HTTP status, ``exit_code`` the CLI's."""

    family: ClassVar[str] = ""
    exit_code: ClassVar[int] = 1
    status: int = 500

    def __init__(
        self, code: str, message: str, *, mend: str, where: str = "", status: int | None = None
    ) -> None:
        if not _CODE.match(code) or (self.family and code.split(".")[0] != self.family):
            raise ValueError(f"{code!r} is no error code of {type(self).__name__}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.mend = mend
        self.where = where
        if status is not None:
            self.status = status

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        return f"{self.code}{place}: {self.message} {self.mend}".strip()

    def to_wire(self) -> dict[str, object]:
        """The one JSON error shape."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "mend": self.mend,
                "where": self.where,
            }
        }

    @staticmethod
    def from_wire(body: object, status: int = 500) -> CasemateError:
        """The error that a peer sent; a body of any other shape is itself a ``NetError``.

        Characters that a terminal would obey are replaced: the peer may be hostile.
        """
        error = body.get("error") if isinstance(body, dict) else None
        if isinstance(error, dict) and set(error) == {"code", "message", "mend", "where"}:
            code, message, mend, where = (error[k] for k in ("code", "message", "mend", "where"))
            if all(isinstance(x, str) and len(x) <= 4096 for x in (code, message, mend, where)):
                kind = FAMILIES.get(code.split(".")[0])
                if kind is not None and _CODE.match(code):
                    message, mend, where = map(_printable, (message, mend, where))
                    return kind(code, message, mend=mend, where=where, status=status)
        return NetError(
            "net.bad-error",
            f"The server answered {status} with a body that is no casemate error.",
            mend="Check that the URL is a casemate server and no proxy stands between.",
        )


class UsageError(CasemateError):
    family, exit_code, status = "usage", 2, 400


class FormatError(CasemateError):
    family, exit_code, status = "format", 3, 400


class DataError(CasemateError):
    family, exit_code, status = "data", 4, 422


class ModelError(CasemateError):
    family, exit_code, status = "model", 5, 422


class PlanError(CasemateError):
    family, exit_code, status = "plan", 6, 422


class AuthError(CasemateError):
    family, exit_code, status = "auth", 7, 401


class PolicyError(CasemateError):
    family, exit_code, status = "policy", 8, 403


class BudgetError(CasemateError):
    family, exit_code, status = "budget", 9, 409


class EvidenceError(CasemateError):
    family, exit_code, status = "evidence", 10, 403


class ReceiptError(CasemateError):
    family, exit_code, status = "receipt", 20, 422


class LedgerError(CasemateError):
    family, exit_code, status = "ledger", 21, 500


class JobError(CasemateError):
    family, exit_code, status = "job", 22, 409


class NetError(CasemateError):
    family, exit_code, status = "net", 23, 502


class LimitError(CasemateError):
    family, exit_code, status = "limit", 24, 413


class InternalError(CasemateError):
    family, exit_code, status = "internal", 1, 500


FAMILIES: Final[dict[str, type[CasemateError]]] = {
    kind.family: kind
    for kind in (
        UsageError, FormatError, DataError, ModelError, PlanError, AuthError, PolicyError,
        BudgetError, EvidenceError, ReceiptError, LedgerError, JobError, NetError, LimitError,
        InternalError,
    )
}  # fmt: skip

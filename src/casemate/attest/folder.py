"""A folder of evidence, judged by itself: what signatures say, and what to do about it.

Procedure:

 1. Read the files of the folder, but for ``about.json``, which states what others found.
 2. ``kind``: recognise the kind by content.
 3. Parse, verify and appraise under the given policy, or under the kind's default, which pins
    nothing. Roots in the folder are never trusted for standing there.
 4. ``freshness``: the given nonce is in the evidence; without one it stays unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from casemate.attest import ar4si, kinds
from casemate.attest.kind import Claims, Files, Kind
from casemate.attest.trust import Trust
from casemate.attest.verdict import (
    Check,
    Checks,
    Decision,
    Refused,
    Step,
    Unchecked,
    decision,
    refusal,
    stage,
)
from casemate.attest.verify import appraise_terms, vendors_root
from casemate.spec.canonical import Json

MAX_FILE: Final = 4 << 20
MAX_FILES: Final = 64
_STATED: Final = "about.json"
NOT_ASKED: Final = Unchecked("evidence folder")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """simulated: judged as simulation, which protects nothing from its operator. crypto: what
    signatures and chains say. code: "" when accepted. claims: None when refused."""

    tee: str
    simulated: bool
    crypto: str
    decision: Decision
    tcb_status: str
    advisories: tuple[str, ...]
    code: str
    message: str
    mend: str
    where: str
    checks: tuple[Check, ...]
    claims: Claims | None

    @property
    def stage(self) -> str:
        return stage(self.code)

    def to_json(self) -> dict[str, Json]:
        out: dict[str, Json] = {
            "tee": self.tee,
            "simulated": self.simulated,
            "crypto": self.crypto,
            "decision": self.decision,
            "tcb_status": self.tcb_status or None,
            "advisories": list(self.advisories),
            "code": self.code or None,
            "stage": self.stage or None,
            "message": self.message,
            "mend": self.mend,
            "where": self.where,
            "ar4si": ar4si.result(
                tee=self.tee,
                simulated=self.simulated,
                crypto=self.crypto,
                decision=self.decision,
                code=self.code,
                tcb_status=self.tcb_status,
                checks=self.checks,
            ),
            "checks": [
                {"name": c.name, "outcome": c.outcome, "detail": c.detail, "code": c.code}
                for c in self.checks
            ],
        }
        if self.claims is not None:
            claims = self.claims
            out["claims"] = {
                "product": claims.product,
                "root": claims.root,
                "measurement": claims.measurement,
                "chip_id": claims.chip_id,
                "tcb": dict(claims.tcb),
                "bound": claims.bound.hex(),
                **claims.other,
            }
        return out


def read(folder: Path) -> dict[str, bytes]:
    """The files of an evidence folder by name, but for what others state about it."""
    try:
        found = sorted(p for p in folder.iterdir() if p.is_file() and p.name != _STATED)
        if len(found) > MAX_FILES or any(p.stat().st_size > MAX_FILE for p in found):
            raise refusal("parse-too-large", "The evidence is too large.", str(folder)[:200])
        return {p.name: p.read_bytes() for p in found}
    except OSError as e:
        raise refusal(
            "parse-folder",
            f"The evidence cannot be read: {e.strerror}.",
            str(folder)[:200],
            "Give the folder that holds the evidence's files.",
        ) from None


def fresh(claims: Claims, nonce: bytes | Unchecked, checks: Checks) -> None:
    """``evidence.freshness-*`` unless the evidence carries ``nonce``."""
    with checks.step("freshness") as step:
        if isinstance(nonce, Unchecked):
            step.unchecked(nonce.reason)
        elif not nonce:
            raise refusal(
                "freshness-nonce", "The nonce is empty.", "nonce", "Give what you challenged with."
            )
        elif nonce not in claims.fresh:
            raise refusal(
                "freshness-mismatch",
                "The evidence was not made for this nonce.",
                "nonce",
                "Ask for new evidence; if this comes again, something replays old evidence.",
            )
        else:
            step.detail = nonce.hex()


def judge(
    files: Files,
    *,
    now: float,
    policies: Mapping[str, Any] | None = None,
    trust: Trust | None = None,
    nonce: bytes | Unchecked = NOT_ASKED,
) -> Judgement:
    """The judgement on evidence in files; never raises for what they hold.

    now: Unix seconds to verify at. trust: the policy, whose ``simulation`` says nothing here: a
    folder has no label. policies: sections by kind instead; neither: each kind's default.
    """
    if trust is not None:
        policies = trust.policies
    checks, tee, claims, error = Checks(), "", None, None
    try:
        with checks.step("kind") as step:
            kind = kinds.recognise(files)
            tee = step.detail = kind.tee
            if policies is not None and tee not in policies:
                raise refusal(
                    "tee-not-trusted",
                    f"The trust policy says nothing about {tee}.",
                    "kind",
                    "Add a section for it, or use another server.",
                )
        policy = kind.default() if policies is None else policies[tee]
        claims = kind.check(files, policy, now, checks)
        if trust is not None:
            with checks.step("label") as step:
                _label(trust, kind, claims, step)
            appraise_terms(trust, checks, now=now)
        fresh(claims, nonce, checks)
    except Refused as e:
        error = e
    return _judged(tee, checks, claims, error, trust is not None and trust.simulation)


def _label(trust: Trust, kind: Kind, claims: Claims, step: Step) -> None:
    if not trust.simulation:
        step.detail = "a vendor's root"
    elif vendors_root(kind, claims.root):
        raise refusal(
            "simulated-expected",
            "Simulation was asked for, but the evidence is hardware's.",
            "label",
            "Judge hardware with a policy for it.",
        )
    else:
        step.detail = "SIMULATED, asked for by name"


def unread(error: Refused) -> Judgement:
    """The judgement on a folder that cannot be read."""
    return _judged("", Checks(), None, error)


def _judged(
    tee: str,
    checks: Checks,
    claims: Claims | None,
    error: Refused | None,
    simulated: bool = False,
) -> Judgement:
    code = "" if error is None else error.code
    crypto = checks.crypto
    if not crypto:
        crypto = "invalid" if stage(code) in ("parse", "signature") else "unknown"
    return Judgement(
        tee=tee,
        simulated=simulated,
        crypto=crypto,
        decision=decision(code, checks.tcb_status),
        tcb_status=checks.tcb_status,
        advisories=checks.advisories,
        code=code,
        message="" if error is None else error.message,
        mend="" if error is None else error.mend,
        where="" if error is None else error.where,
        checks=tuple(checks.done),
        claims=None if error is not None else claims,
    )

"""From an attestation to a verdict.

Procedure, the same for hardware and simulation:

 1. ``label``: the evidence is simulated if and only if the policy asked for simulation by name.
 2. ``kind``: the kind of TEE is known and the policy names it.
 3. Parse, verify and appraise the evidence (a row of :data:`VERIFIERS`; see ``snp``).
 4. ``binding``: the TEE's own field holds the hash of all that the attestation binds.
 5. ``tls-key``: the connection's TLS key is the bound one (given by the caller).
 6. ``freshness``: the caller's nonce is a leaf under the bound nonce root.

The first failure raises :class:`~casemate.attest.verdict.Refused` (an ``EvidenceError``) with a
stable code, the check's name and the checks until then. Nothing is looked up: roots come from the
policy, ``now`` from the caller, collateral from the evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from casemate.attest import binding
from casemate.attest.roots import AMD
from casemate.attest.snp import abi, appraise, collateral
from casemate.attest.snp import verify as snp_verify
from casemate.attest.trust import SnpPolicy, Trust
from casemate.attest.verdict import Check, Checks, Refused, Step, Unchecked, Verdict, refusal
from casemate.spec.evidence import Attestation, Evidence

__all__ = [
    "Check", "Claims", "Refused", "Unchecked", "Verdict", "verify_attestation", "verify_claims",
    "verify_evidence",
]  # fmt: skip

MAX_FILE: Final = 64 << 10
MAX_FILES: Final = 32

_TLS_BY_CALLER: Final = Unchecked("the caller compares it with its connection")
_NOT_ASKED: Final = (
    "A simulated TEE protects nothing from its operator. To accept it all the same, ask for it by"
    " name: Trust.simulated() or --trust simulated."
)


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a kind of evidence says, once verified. ``bound``: the field that holds the binding."""

    bound: bytes
    product: str
    root: str
    measurement: str
    chip_id: str
    tcb: dict[str, int]


def _snp(evidence: Evidence, policy: SnpPolicy, now: float, checks: Checks) -> Claims:
    with checks.step("parse") as step:
        if "report.bin" not in evidence.files:
            raise refusal("parse-report-missing", "The evidence has no report.bin.", "report.bin")
        report = abi.parse(evidence.files["report.bin"])
        chain = collateral.parse(evidence.files)
        step.detail = f"report version {report.version}, {chain.kind} chain"
    root = snp_verify.verify(report, chain, policy.roots, now=now, checks=checks)
    appraise.appraise(report, chain, policy, checks)
    return Claims(
        bound=report.report_data,
        product=chain.product,
        root=root.fingerprint,
        measurement=report.measurement.hex(),
        chip_id=chain.hwid.hex(),
        tcb=collateral.tcb_components(chain.product, report.reported_tcb),
    )


# One row for each kind of evidence (Evidence.tee). Simulation is a root and a label, not a row.
VERIFIERS: Final[dict[str, Callable[[Evidence, SnpPolicy, float, Checks], Claims]]] = {
    "sev-snp": _snp,
}


def _label(evidence: Evidence, trust: Trust, step: Step) -> None:
    if evidence.simulated and not trust.simulation:
        raise refusal("simulated-not-asked", "The server's TEE is simulated.", "label", _NOT_ASKED)
    if trust.simulation and not evidence.simulated:
        raise refusal(
            "simulated-expected",
            "Simulation was asked for, but the evidence says that it is hardware's.",
            "label",
            "Check hardware with a policy for it, such as Trust.sev_snp(measurements=...).",
        )
    step.detail = "SIMULATED, asked for by name" if evidence.simulated else "hardware"


def _kind(evidence: Evidence, trust: Trust) -> SnpPolicy:
    if evidence.tee not in VERIFIERS:
        raise refusal(
            "tee-unknown",
            f"Evidence of kind {evidence.tee[:40]!r} is unknown.",
            "kind",
            "Use a casemate that knows this TEE.",
        )
    if evidence.tee not in trust.policies:
        raise refusal(
            "tee-not-trusted",
            f"The trust policy says nothing about {evidence.tee}.",
            "kind",
            "Add a section for it, or use another server.",
        )
    if len(evidence.files) > MAX_FILES or any(len(f) > MAX_FILE for f in evidence.files.values()):
        raise refusal("parse-too-large", "The evidence is too large.", "evidence")
    return trust.policies[evidence.tee]


def _binding(attestation: Attestation, bound: bytes, step: Step) -> None:
    field = binding.FIELDS[attestation.evidence.tee]
    if bound != field.of(binding.report_data(attestation.binding)):
        raise refusal(
            "binding-mismatch",
            "The evidence binds other keys than the server shows.",
            field.name,
            "Do not use this server: something stands between you and the enclave, or replays"
            " another boot's evidence.",
        )
    step.detail = field.name


def _tls(attestation: Attestation, tls_spki: bytes | Unchecked, step: Step) -> None:
    if isinstance(tls_spki, Unchecked):
        step.unchecked(tls_spki.reason)
    elif tls_spki != attestation.binding.tls_spki:
        raise refusal(
            "binding-tls",
            "The connection's TLS key is not the attested one.",
            "tls-key",
            "Do not use this connection: something stands between you and the enclave.",
        )
    else:
        step.detail = tls_spki.hex()


def verify_claims(evidence: Evidence, trust: Trust, *, now: float, checks: Checks) -> Claims:
    """Steps 1 to 3: what the evidence says, whatever it binds. Each check goes to ``checks``."""
    with checks.step("label") as step:
        _label(evidence, trust, step)
    with checks.step("kind") as step:
        policy = _kind(evidence, trust)
        step.detail = evidence.tee
    claims = VERIFIERS[evidence.tee](evidence, policy, now, checks)
    with checks.step("label-root") as step:
        if evidence.simulated and any(claims.root in pins for pins in AMD.values()):
            raise refusal(
                "simulated-expected", "Hardware's evidence is labelled simulated.", "label"
            )
        step.detail = "a simulation's root" if evidence.simulated else "a vendor's root"
    return claims


def verify_attestation(
    attestation: Attestation,
    nonce: bytes | Unchecked,
    trust: Trust,
    *,
    now: float,
    tls_spki: bytes | Unchecked = _TLS_BY_CALLER,
) -> Verdict:
    """The verdict on an attestation that answers ``nonce`` (32 bytes).

    ``now``: Unix seconds at which certificates must be valid. ``tls_spki``: SHA-256 of the
    connection's SubjectPublicKeyInfo. Raises ``EvidenceError`` with the code of the failed check.
    """
    evidence, checks = attestation.evidence, Checks()
    claims = verify_claims(evidence, trust, now=now, checks=checks)
    with checks.step("binding") as step:
        _binding(attestation, claims.bound, step)
    with checks.step("tls-key") as step:
        _tls(attestation, tls_spki, step)
    with checks.step("freshness") as step:
        if isinstance(nonce, Unchecked):
            step.unchecked(nonce.reason)
        else:
            binding.check_nonce(attestation, nonce)
            step.detail = f"nonce {attestation.index + 1} of {attestation.count}"
    return Verdict(
        tee=evidence.tee,
        simulated=evidence.simulated,
        product=claims.product,
        root=claims.root,
        measurement=claims.measurement,
        chip_id=claims.chip_id,
        tcb=claims.tcb,
        binding=attestation.binding,
        checks=tuple(checks.done),
    )


def verify_evidence(attestation: Attestation, trust: Trust, *, now: float) -> Verdict:
    """As :func:`verify_attestation` for evidence that was stored, in a receipt say: ``now`` is the
    time to verify at, and freshness stays unchecked."""
    stored = Unchecked("stored evidence was fresh only to whoever asked for it")
    offline = Unchecked("stored evidence has no connection")
    return verify_attestation(attestation, stored, trust, now=now, tls_spki=offline)

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
from casemate.attest.verdict import Check, Checks, Refused, Unchecked, Verdict, refusal
from casemate.spec.evidence import Attestation, Evidence

__all__ = ["Check", "Refused", "Unchecked", "Verdict", "verify_attestation", "verify_evidence"]

MAX_FILE: Final = 64 << 10
MAX_FILES: Final = 32

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
    if "report.bin" not in evidence.files:
        raise checks.stop(
            "parse",
            refusal("parse-report-missing", "The evidence has no report.bin.", "report.bin"),
        )
    try:
        report = abi.parse(evidence.files["report.bin"])
        chain = collateral.parse(evidence.files)
    except Refused as e:
        raise checks.stop("parse", e) from None
    checks.passed("parse", f"report version {report.version}, {chain.kind} chain")
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


def _label(evidence: Evidence, trust: Trust, checks: Checks) -> None:
    if evidence.simulated and not trust.simulation:
        raise checks.stop(
            "label",
            refusal("simulated-not-asked", "The server's TEE is simulated.", "label", _NOT_ASKED),
        )
    if trust.simulation and not evidence.simulated:
        raise checks.stop(
            "label",
            refusal(
                "simulated-expected",
                "Simulation was asked for, but the evidence says that it is hardware's.",
                "label",
                "Check real hardware with its own policy, such as Trust.sev_snp(measurements=...).",
            ),
        )
    checks.passed("label", "SIMULATED, asked for by name" if evidence.simulated else "hardware")


def verify_attestation(
    attestation: Attestation,
    nonce: bytes | Unchecked,
    trust: Trust,
    *,
    now: float,
    tls_spki: bytes | Unchecked = Unchecked("the caller compares it with its connection"),  # noqa: B008
) -> Verdict:
    """The verdict on an attestation that answers ``nonce`` (32 bytes).

    ``now``: Unix seconds at which certificates must be valid. ``tls_spki``: SHA-256 of the
    connection's SubjectPublicKeyInfo. Raises ``EvidenceError`` with the code of the failed check.
    """
    evidence, checks = attestation.evidence, Checks()
    _label(evidence, trust, checks)
    verifier = VERIFIERS.get(evidence.tee)
    if verifier is None:
        raise checks.stop(
            "kind",
            refusal(
                "tee-unknown",
                f"Evidence of kind {evidence.tee[:40]!r} is unknown.",
                "kind",
                "Use a casemate that knows this TEE.",
            ),
        )
    policy = trust.policies.get(evidence.tee)
    if policy is None:
        raise checks.stop(
            "kind",
            refusal(
                "tee-not-trusted",
                f"The trust policy says nothing about {evidence.tee}.",
                "kind",
                "Add a section for it, or use another server.",
            ),
        )
    if len(evidence.files) > MAX_FILES or any(len(f) > MAX_FILE for f in evidence.files.values()):
        raise checks.stop(
            "kind", refusal("parse-too-large", "The evidence is too large.", "evidence")
        )
    checks.passed("kind", evidence.tee)
    claims = verifier(evidence, policy, now, checks)
    if evidence.simulated and claims.root in {pin for pins in AMD.values() for pin in pins}:
        raise checks.stop(
            "label",
            refusal("simulated-expected", "Hardware's evidence is labelled as simulated.", "label"),
        )
    try:
        expected = binding.FIELDS[evidence.tee].of(binding.report_data(attestation.binding))
    except Refused as e:
        raise checks.stop("binding", e) from None
    if claims.bound != expected:
        raise checks.stop(
            "binding",
            refusal(
                "binding-mismatch",
                "The evidence binds other keys than the server shows.",
                binding.FIELDS[evidence.tee].name,
                "Do not use this server: something stands between you and the enclave, or replays"
                " another boot's evidence.",
            ),
        )
    checks.passed("binding", binding.FIELDS[evidence.tee].name)
    if isinstance(tls_spki, Unchecked):
        checks.unchecked("tls-key", tls_spki.reason)
    elif tls_spki != attestation.binding.tls_spki:
        raise checks.stop(
            "tls-key",
            refusal(
                "binding-tls",
                "The connection's TLS key is not the attested one.",
                "tls-key",
                "Do not use this connection: something stands between you and the enclave.",
            ),
        )
    else:
        checks.passed("tls-key", tls_spki.hex())
    if isinstance(nonce, Unchecked):
        checks.unchecked("freshness", nonce.reason)
    else:
        try:
            binding.check_nonce(attestation, nonce)
        except Refused as e:
            raise checks.stop("freshness", e) from None
        checks.passed("freshness", f"nonce {attestation.index + 1} of {attestation.count}")
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
    stored = Unchecked("stored evidence: it was fresh to whoever asked for it")
    offline = Unchecked("stored evidence: there is no connection")
    return verify_attestation(attestation, stored, trust, now=now, tls_spki=offline)

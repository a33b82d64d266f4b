"""From an attestation to a verdict.

Procedure, the same for hardware and simulation:

 1. ``label``: the evidence is simulated if and only if the policy asked for simulation by name.
 2. ``kind``: the kind of TEE is known, is a CPU's, and the policy names it.
 3. Parse, verify and appraise the evidence (a row of ``kinds.KINDS``); ``label-root``: no vendor's
    root stands behind evidence that calls itself simulated.
 4. ``collateral-age``, ``advisories``, ``physical-access``: what the policy says of all kinds.
 5. Evidence under other names in the same attestation (a GPU's, a second vendor's), each as in 3
    and 4 by its own section, its checks under its name; ``<name>/binding``: it carries what follows
    from what the CPU's report carries, so that it was made after that and for it. ``devices``: no
    two names show one device. ``gpu``, ``independent-roots``: what the policy demands is there.
 6. ``binding``: the TEE's own field holds the hash of all that the attestation binds;
    ``server-policy``: the server's own policy, bound there, is one that the trust policy admits.
 7. ``tls-key``: the connection's TLS key is the bound one (given by the caller).
 8. ``freshness``: the caller's nonce is a leaf under the bound nonce root.

The first failure raises :class:`~casemate.attest.verdict.Refused` (an ``EvidenceError``) with a
stable code, the check's name and the checks until then. Nothing is looked up: roots come from the
policy, ``now`` from the caller, collateral from the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from casemate.attest import binding
from casemate.attest.kind import Claims, Files, Kind
from casemate.attest.kinds import KINDS, recognise
from casemate.attest.trust import Trust, parts_of
from casemate.attest.verdict import (
    Check,
    Checks,
    Part,
    Refused,
    Step,
    Unchecked,
    Verdict,
    decision,
    refusal,
)
from casemate.spec import codec
from casemate.spec.evidence import Attestation, Evidence, ServerPolicy

__all__ = [
    "Check", "Claims", "Refused", "Unchecked", "Verdict", "appraise_terms", "verify_attestation",
    "verify_claims", "verify_evidence", "verify_parts",
]  # fmt: skip

MAX_FILE: Final = 1 << 20
MAX_FILES: Final = 128
MAX_ALL: Final = 4 << 20
DAY: Final = 86400

# NVIDIA's switches by the name of their chip; they are no GPUs.
_SWITCH: Final = "LS_"
_TLS_BY_CALLER: Final = Unchecked("the caller compares it with its connection")
_NOT_ASKED: Final = (
    "A simulated TEE protects nothing from its operator. To accept it all the same, ask for it by"
    " name: Trust.simulated() or --trust simulated."
)
_RELAYED: Final = (
    "Do not use this server: something stands between you and the enclave, or replays another"
    " boot's evidence."
)
_TERMS_MEND: Final = "Ask the operator to mend the platform, or change the policy knowingly."


# Whose evidence it is.


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


def _kind(evidence: Evidence, trust: Trust) -> Kind:
    kind = KINDS.get(evidence.tee)
    if kind is None:
        raise refusal(
            "tee-unknown",
            f"Evidence of kind {evidence.tee[:40]!r} is unknown.",
            "kind",
            "Use a casemate that knows this TEE.",
        )
    if kind.tee not in trust.policies:
        raise refusal(
            "tee-not-trusted",
            f"The trust policy says nothing about {evidence.tee}.",
            "kind",
            "Add a section for it, or use another server.",
        )
    if kind.device:
        raise refusal(
            "tee-device",
            f"Evidence of kind {kind.tee} is a device's, which runs no server.",
            "kind",
            "Ask the operator for evidence of the CPU, with the device's beside it.",
        )
    files = evidence.files.values()
    if (
        len(files) > MAX_FILES
        or any(len(f) > MAX_FILE for f in files)
        or sum(map(len, files)) > MAX_ALL
    ):
        raise refusal("parse-too-large", "The evidence is too large.", "evidence")
    return kind


def _pins(roots: Any) -> Iterator[str]:
    """The fingerprints in a policy's ``roots``, whatever its form."""
    if isinstance(roots, str):
        yield roots
    elif isinstance(roots, Mapping):
        yield from _pins(tuple(roots.values()))
    elif isinstance(roots, tuple):
        for part in roots:
            yield from _pins(part)


def vendors_root(kind: Kind, root: str) -> bool:
    """Whether casemate carries ``root`` as a vendor's."""
    return any(root in _pins(getattr(part, "roots", ())) for part in parts_of(kind.default()))


# What the policy says of all kinds.


def _age(checks: Checks, most: int | Unchecked, now: float, step: Step) -> None:
    if isinstance(most, Unchecked):
        step.unchecked(most.reason)
    elif not checks.issued:
        step.unchecked("nothing dated comes with this evidence")
    else:
        name, issued = min(checks.issued.items(), key=lambda item: (item[1], item[0]))
        days = (now - issued) / DAY
        if days > most:
            raise refusal(
                "collateral-age",
                f"{name} was issued {days:.1f} days ago; the policy wants {most} at most.",
                name,
                "Ask the operator to renew collateral (casemate enclave collateral).",
            )
        step.detail = f"{name} is the oldest, {days:.1f} days"


def _advisories(checks: Checks, denied: tuple[str, ...] | Unchecked, step: Step) -> None:
    if isinstance(denied, Unchecked):
        step.unchecked(denied.reason)
    elif found := sorted(set(checks.advisories) & set(denied)):
        raise refusal(
            "appraise-advisory",
            f"The vendor's advisory {', '.join(found)} applies to this platform.",
            "advisories",
            _TERMS_MEND,
        )
    else:
        step.detail = " ".join(checks.advisories) or "the vendor names none"


def _physical(access: bool | Unchecked, step: Step) -> None:
    if isinstance(access, Unchecked):
        step.unchecked(access.reason)
    elif access:
        step.detail = "the operator has it; only listed instances are admitted"
    else:
        step.unchecked("the policy states that the operator has none; evidence cannot show it")


def appraise_terms(trust: Trust, checks: Checks, *, now: float) -> None:
    """Step 4, after a kind's own checks; ``checks`` are those of this evidence alone."""
    with checks.step("collateral-age") as step:
        _age(checks, trust.collateral_age, now, step)
    with checks.step("advisories") as step:
        _advisories(checks, trust.advisories, step)
    with checks.step("physical-access") as step:
        _physical(trust.operator_physical_access, step)


# Further evidence.


def _part_kind(name: str, files: Files, trust: Trust) -> Kind | None:
    """None where the policy does not ask for it."""
    kind = recognise(files)
    return kind if kind.tee in trust.policies else None


def _part_binding(kind: Kind, part: Claims, tee: str, bound: bytes, name: str, step: Step) -> None:
    if part.bound != kind.of(binding.device_data(tee, bound, name)):
        raise refusal(
            "binding-device",
            f"The evidence under {name} was not made for this report of the CPU.",
            f"{name}/{kind.field}",
            "Do not use this server: its device's evidence is another machine's, or an older one.",
        )
    step.detail = kind.field


def _part(
    name: str, files: Files, main: tuple[str, Claims], trust: Trust, now: float, checks: Checks
) -> tuple[Kind, Claims] | None:
    with checks.step("kind") as step:
        kind = _part_kind(name, files, trust)
        if kind is None:
            step.unchecked("not looked at: the policy has no section for this kind")
            return None
        step.detail = kind.tee
    claims = kind.check(files, trust.policies[kind.tee], now, checks)
    appraise_terms(trust, checks, now=now)
    with checks.step("binding") as step:
        _part_binding(kind, claims, main[0], main[1].bound, name, step)
    return kind, claims


def _distinct(parts: Mapping[str, tuple[Kind, Claims]], step: Step) -> None:
    seen: dict[tuple[str, str], str] = {}
    for name, (kind, claims) in parts.items():
        key = (kind.tee, claims.chip_id)
        if claims.chip_id and key in seen:
            raise refusal(
                "binding-device-twice", f"{seen[key]} and {name} are the same device.", name
            )
        seen[key] = name
    step.detail = " ".join(parts) or "none beside the CPU"


def _gpu(parts: Mapping[str, tuple[Kind, Claims]], wanted: bool | Unchecked, step: Step) -> None:
    found = [
        name
        for name, (kind, claims) in parts.items()
        if kind.device and not claims.product.startswith(_SWITCH)
    ]
    if isinstance(wanted, Unchecked):
        step.unchecked(wanted.reason)
    elif wanted and not found:
        raise refusal(
            "appraise-gpu",
            "The policy requires a GPU, and none shows evidence.",
            "gpu",
            "Ask the operator for a machine with a GPU in confidential mode.",
        )
    else:
        step.detail = " ".join(f"{name} ({parts[name][1].product})" for name in found) or "none"


def _vendor(kind: Kind, claims: Claims) -> str:
    """Whose root it ends in: Azure's evidence ends in the CPU vendor's."""
    whose = {k.vendor for k in KINDS.values() if k.vendor and vendors_root(k, claims.root)}
    return min(whose, default=kind.vendor or kind.tee)


def _independent(
    main: tuple[Kind, Claims],
    parts: Mapping[str, tuple[Kind, Claims]],
    wanted: int | Unchecked,
    step: Step,
) -> None:
    if isinstance(wanted, Unchecked):
        step.unchecked(wanted.reason)
        return
    vendors = sorted({_vendor(*shown) for shown in (main, *parts.values())})
    if len(vendors) < wanted:
        raise refusal(
            "appraise-independent-roots",
            f"Evidence of {len(vendors)} vendors ({', '.join(vendors)}) binds these keys; the"
            f" policy wants {wanted}.",
            "independent-roots",
            "Ask the operator for evidence by another vendor beside the CPU's.",
        )
    step.detail = ", ".join(vendors)


def verify_parts(
    evidence: Evidence, main: Claims, trust: Trust, *, now: float, checks: Checks
) -> tuple[Part, ...]:
    """Step 5: evidence beside the CPU's, which ``main`` claims; each check goes to ``checks``."""
    _, further = binding.split(evidence.files)
    verified: dict[str, tuple[Kind, Claims]] = {}
    parts = []
    for name in sorted(further):
        own = Checks()
        try:
            found = _part(name, further[name], (evidence.tee, main), trust, now, own)
        except Refused as e:
            own.done = list(e.checks)
            checks.done += _under(name, own)
            e.checks = tuple(checks.done)
            raise
        checks.done += _under(name, own)
        checks.advisories += tuple(a for a in own.advisories if a not in checks.advisories)
        if found is not None:
            verified[name] = found
            parts.append(_shown(name, *found, own))
    with checks.step("devices") as step:
        _distinct(verified, step)
    with checks.step("gpu") as step:
        _gpu(verified, trust.gpu, step)
    with checks.step("independent-roots") as step:
        _independent((KINDS[evidence.tee], main), verified, trust.independent_roots, step)
    return tuple(parts)


def _under(name: str, own: Checks) -> list[Check]:
    return [Check(f"{name}/{c.name}", c.outcome, c.detail, c.code) for c in own.done]


def _shown(name: str, kind: Kind, claims: Claims, own: Checks) -> Part:
    return Part(
        name=name,
        tee=kind.tee,
        product=claims.product,
        root=claims.root,
        measurement=claims.measurement,
        chip_id=claims.chip_id,
        tcb=dict(claims.tcb),
        tcb_status=own.tcb_status,
    )


# The whole.


def _binding(attestation: Attestation, bound: bytes, step: Step) -> None:
    kind = KINDS[attestation.evidence.tee]
    if bound != kind.of(binding.report_data(attestation.binding)):
        raise refusal(
            "binding-mismatch",
            "The evidence binds other keys than the server shows.",
            kind.field,
            _RELAYED,
        )
    if codec.digest(attestation.policy) != attestation.binding.server_policy:
        raise refusal(
            "binding-policy",
            "The evidence binds another server policy than the server shows.",
            "server-policy",
            _RELAYED,
        )
    step.detail = kind.field


def _server_policy(found: str, admitted: tuple[str, ...] | Unchecked, step: Step) -> None:
    if isinstance(admitted, Unchecked):
        step.unchecked(f"{admitted.reason} ({found})")
    elif found not in admitted:
        raise refusal(
            "appraise-server-policy",
            f"The server's policy is {found}, which the trust policy does not list.",
            "server-policy",
            "Ask the operator what the server promises, and list its digest knowingly.",
        )
    else:
        step.detail = found


def _sandbox(found: tuple[str, ...], asked: tuple[str, ...] | Unchecked, step: Step) -> None:
    held = ", ".join(found) or "no layer"
    if isinstance(asked, Unchecked):
        step.unchecked(f"{asked.reason} ({held})")
    elif missing := sorted(set(asked) - set(found)):
        raise refusal(
            "appraise-sandbox",
            f"The server's workers run without {', '.join(missing)}.",
            "sandbox",
            "Ask the operator to run `casemate doctor`, or demand less knowingly.",
        )
    else:
        step.detail = held


def verify_policy(policy: ServerPolicy, trust: Trust, *, checks: Checks) -> None:
    """What a server promises of itself, by the policy whose digest its evidence binds."""
    with checks.step("server-policy") as step:
        _server_policy(codec.digest(policy), trust.server_policies, step)
    with checks.step("sandbox") as step:
        _sandbox(policy.sandbox, trust.sandbox, step)


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
    """Steps 1 to 4: what the CPU's evidence says, whatever it binds. Each check goes to
    ``checks``."""
    with checks.step("label") as step:
        _label(evidence, trust, step)
    with checks.step("kind") as step:
        kind = _kind(evidence, trust)
        files, _ = binding.split(evidence.files)
        step.detail = kind.tee
    claims = kind.check(files, trust.policies[kind.tee], now, checks)
    with checks.step("label-root") as step:
        if evidence.simulated and vendors_root(kind, claims.root):
            raise refusal(
                "simulated-expected", "Hardware's evidence is labelled simulated.", "label"
            )
        step.detail = "a simulation's root" if evidence.simulated else "a vendor's root"
    appraise_terms(trust, checks, now=now)
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
    parts = verify_parts(evidence, claims, trust, now=now, checks=checks)
    with checks.step("binding") as step:
        _binding(attestation, claims.bound, step)
    verify_policy(attestation.policy, trust, checks=checks)
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
        tcb=dict(claims.tcb),
        binding=attestation.binding,
        checks=tuple(checks.done),
        crypto=checks.crypto,
        decision=decision("", checks.tcb_status),
        tcb_status=checks.tcb_status,
        advisories=checks.advisories,
        parts=parts,
    )


def verify_evidence(attestation: Attestation, trust: Trust, *, now: float) -> Verdict:
    """As :func:`verify_attestation` for evidence that was stored, in a receipt say: ``now`` is the
    time to verify at, and freshness stays unchecked."""
    stored = Unchecked("stored evidence was fresh only to whoever asked for it")
    offline = Unchecked("stored evidence has no connection")
    return verify_attestation(attestation, stored, trust, now=now, tls_spki=offline)

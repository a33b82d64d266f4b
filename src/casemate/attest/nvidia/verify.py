"""Signatures of NVIDIA's evidence: is it NVIDIA's word about this device and these values?

Procedure for a report (DSP0274 1.1, MEASUREMENTS and its signature; RFC 5280 section 6.1). Roots
and ``now`` are passed in.

 1. ``chain``: each certificate is issued by the next, ECDSA with SHA-384 on P-384; authorities may
    sign certificates, the leaf may sign data.
 2. ``root``: the last key is one whose SHA-256 the policy pins for devices.
 3. ``product``: the chip is a GPU or NVSwitch, not another device under the same root, and the
    authority above the device is named for it: so no device's own key speaks for another chip.
 4. ``signature``: ECDSA P-384 with SHA-384 over request and response by the leaf's key.
 5. ``fwid``: where the report states the FWID, it is the leaf's.

Then the cryptography has held, and ``crypto`` is valid whatever follows.

 6. ``validity``: ``now`` lies in the validity of all certificates.
 7. ``revocation``: no key of the chain is on the policy's list; every answer that came (OCSP, RFC
    6960; lists, RFC 5280 section 5) is its authority's and current, and says that nothing is
    revoked; a hold counts as revoked. The leaf is issued by the device at its start and has no
    answers. What no answer spoke of is unchecked here; ``appraise`` may demand it.

Procedure for reference values (:func:`rim`, :func:`rim_current`): parse (W3C XML Signature, see
``xmldsig``), the chain in KeyInfo as above to a root pinned for reference values, the digest and
the signature by the first certificate's key; then validity and revocation.

Raises :class:`~casemate.attest.verdict.Refused`. The twin (r, n-s) of a signature gets the same
answer, and nothing is keyed on signature bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest import crl, x509
from casemate.attest.nvidia import ocsp, xmldsig
from casemate.attest.nvidia import rim as manifests
from casemate.attest.nvidia.abi import Report
from casemate.attest.nvidia.collateral import CHIP, RIM_ROOT, Answers, Device, completed
from casemate.attest.nvidia.policy import NvidiaPolicy
from casemate.attest.verdict import Checks, Refused, Step, Unchecked, moment, refusal

Path: TypeAlias = Sequence[tuple[x509.Certificate, str]]

_ALGORITHMS: Final = frozenset({x509.ECDSA_SHA384})
_DIGITAL_SIGNATURE: Final = 0x80
_ROOT_MEND = "Trust a root only if its fingerprint reached you from its vendor."
_FOREIGN_MEND = "Ask the operator for the certificates of this very device and firmware."
_REVOKED_MEND = "Use another device; ask the operator why its vendor revoked this one."


def _chain(path: Path) -> ec.EllipticCurvePublicKey:
    """The leaf's key, once its path has held."""
    x509.check_chain(path, _ALGORITHMS)
    leaf, where = path[0]
    if not x509.key_usage(leaf) & _DIGITAL_SIGNATURE:
        raise refusal("chain-usage", f"The key in {where} may not sign data.", where)
    return x509.p384(leaf, where)


def _root(path: Path, pins: tuple[str, ...] | Unchecked, step: Step) -> None:
    found, where = path[-1]
    if isinstance(pins, Unchecked):
        step.unchecked(f"{pins.reason} ({found.fingerprint})")
    elif found.fingerprint not in pins:
        raise refusal(
            "root-unknown",
            f"The chain ends in the root key {found.fingerprint}, which is not trusted.",
            where,
            _ROOT_MEND,
        )
    else:
        step.detail = f"{found.name()} {found.fingerprint}"


def verify(report: Report, device: Device, policy: NvidiaPolicy, *, checks: Checks) -> None:
    """Steps 1 to 5 above."""
    with checks.step("chain") as step:
        key = _chain(device.path)
        step.detail = ", ".join(c.name() for c, _ in device.path)
    with checks.step("root") as step:
        _root(device.path, policy.roots, step)
    with checks.step("product") as step:
        if not CHIP.fullmatch(device.chip):
            raise refusal(
                "endorsement-product", f"{device.chip[:40]!r} is no GPU or NVSwitch.",
                "cert_chain.pem", _FOREIGN_MEND,
            )  # fmt: skip
        authority, where = device.path[2]
        if device.chip not in authority.name().split():
            raise refusal(
                "endorsement-product", f"{where} is no authority for {device.chip}.", where,
                _FOREIGN_MEND,
            )  # fmt: skip
        step.detail = f"{device.chip} {device.device_id}".strip()
    with checks.step("signature") as step:
        try:
            key.verify(
                utils.encode_dss_signature(report.r, report.s), report.signed,
                ec.ECDSA(hashes.SHA384()),
            )  # fmt: skip
        except InvalidSignature:
            raise refusal(
                "signature-report", "The report's signature is not its key's.", "report.bin"
            ) from None
        step.detail = "ECDSA P-384 with SHA-384 over request and response"
    with checks.step("fwid") as step:
        stated = report.opaque.get("FWID")
        if stated is None:
            step.unchecked("the report states no FWID")
        elif stated != device.fwid:
            raise refusal(
                "endorsement-fwid", "The report's FWID is not that of its certificate.",
                "report.bin", _FOREIGN_MEND,
            )  # fmt: skip
        else:
            step.detail = stated.hex()


def current(
    path: Path, subjects: Path, policy: NvidiaPolicy, answers: Answers, prefix: str, *,
    now: float, checks: Checks,
) -> list[str]:  # fmt: skip
    """Steps 6 and 7 for ``path``; ``subjects``: those of it about which answers are wanted;
    ``prefix`` of the checks' names. Returns the names of those that have no answer."""
    with checks.step(f"{prefix}validity") as step:
        for certificate, where in path:
            x509.check_validity(certificate, where, now)
        step.detail = f"at {moment(now)}, until {moment(min(c.not_after for c, _ in path))}"
    with checks.step(f"{prefix}revocation") as step:
        revoked = () if isinstance(policy.revoked, Unchecked) else policy.revoked
        for certificate, where in path:
            if certificate.fingerprint in revoked:
                raise refusal(
                    "revocation-listed", f"The key in {where} is known to be revoked or on hold.",
                    where, _REVOKED_MEND,
                )  # fmt: skip
        issuers = {c.raw: issuer for (c, _), (issuer, _) in pairwise(path)}
        open_ = [
            where
            for certificate, where in subjects
            if not _answered(certificate, issuers[certificate.raw], where, answers, now, checks)
        ]
        if open_:
            step.unchecked(f"no answer came for {', '.join(open_)}")
        else:
            step.detail = "each certificate has an answer: not revoked"
    return open_


def _answered(
    certificate: x509.Certificate, issuer: x509.Certificate, where: str, answers: Answers,
    now: float, checks: Checks,
) -> bool:  # fmt: skip
    """Whether an answer speaks of ``certificate``; raises where it is no true one, or says that the
    certificate is revoked."""
    found = False
    for name, response in answers.responses.items():
        answer = ocsp.find(response, certificate, issuer)
        if answer is None:
            continue
        ocsp.check(response, answer, issuer, name, now, _ALGORITHMS)
        checks.issued[name] = answer.this_update
        if answer.status != "good":
            reason = "unknown" if answer.status == "unknown" else "revoked"
            raise refusal(
                f"revocation-{reason}",
                f"NVIDIA's responder says of {where}: {answer.status}.",
                where,
                _REVOKED_MEND,
            )
        found = True
    for name, listed in answers.lists.items():
        if listed.issuer != issuer.subject:
            continue
        crl.check_issued(listed, issuer, name, _ALGORITHMS)
        crl.check_validity(listed, name, now)
        checks.issued[name] = listed.this_update
        crl.check_revoked(listed, certificate, where)
        found = True
    return found


def rim(data: bytes, file: str, policy: NvidiaPolicy, step: Step) -> manifests.Rim:
    """The manifest in ``data``, whose signature, chain and root have held. Its certificates are not
    yet known to be current."""
    found = manifests.parse(data, file)
    path = rim_path(found)
    key = _chain(path)
    _root(path, policy.rim_roots, step)
    xmldsig.verify(found.signed, key, file)
    if step.outcome == "passed":
        step.detail = f"{found.product} {found.role} {found.version}, {found.tag_id[:16]}"
    return found


def rim_path(found: manifests.Rim) -> Path:
    return completed(tuple((c, f"{found.file}[{n}]") for n, c in enumerate(found.chain)), RIM_ROOT)


def rim_current(
    found: manifests.Rim, policy: NvidiaPolicy, answers: Answers, *, now: float, checks: Checks
) -> list[str]:
    """Validity and revocation of the manifest's certificates, as :func:`current`."""
    path = rim_path(found)
    return current(path, path[:-1], policy, answers, f"{found.role}-rim-", now=now, checks=checks)


@contextmanager
def as_collateral() -> Iterator[None]:
    """Where a manifest comes with a report, what is wrong with it is wrong with collateral:
    ``evidence.collateral-rim-<what failed>``."""
    try:
        yield
    except Refused as e:
        word = e.code.removeprefix("evidence.").partition("-")[0]
        raise refusal(f"collateral-rim-{word}", e.message, e.where, e.mend) from None

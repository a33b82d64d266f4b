"""Signatures, endorsements and bindings of a TPM's quotes: did a genuine TPM say it?

Procedure (TPM 2.0 Library part 1, sections 17.7 and 31, part 2 section 10.12.8, part 3 TPM2_Quote;
TCG EK and AK certificate profiles). Roots and ``now`` are passed in.

 1. ``ak``: the attestation key's certificate and its public area, as far as both are there, hold
    the same key; by its public area it is a restricted signing key that cannot leave its TPM
    (TPMA_OBJECT), so that it signs nothing that looks like a quote and is none.
 2. ``chain``: the key's certificate, up to a self-signed one (``certificates``).
 3. ``quote-signature``: RSASSA-PKCS1-v1_5, RSASSA-PSS (of any salt: TPMs differ) or ECDSA with
    SHA-256, SHA-384 or SHA-512, over the bytes of each TPMS_ATTEST.
 4. ``pcr-digest``: each quote's pcrDigest is the hash, by the signature's algorithm, of the PCR
    values that it selects, in the order of selection. Values that no quote covers are told.
 5. ``signer``: where the public area is there, qualifiedSigner is its name as a primary key.
 6. ``event-log``: replayed, it gives the quoted values of all PCRs that have events. PCRs without
    events, padding, and events whose data no PCR vouches for are told.
 7. ``revocation-signature``: lists are signed by the authorities that they are of
    (``certificates``).
 8. ``root``: the chain ends in a root that the policy pins, or the policy pins the key itself.

Steps 1 to 8 are :func:`verify`: all signatures, before anything is said about time. After them
``certificates.windows``, and:

 9. ``same-boot``: all quotes have one nonce, signer, count of resets and of restarts, firmware.
10. ``nonce``: none of them is empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from casemate.attest import x509
from casemate.attest.tpm import abi, certificates, collateral
from casemate.attest.tpm.certificates import Path
from casemate.attest.tpm.collateral import Banks, Key, Parts, Quote
from casemate.attest.tpm.eventlog import Log
from casemate.attest.tpm.policy import BANKS, TpmPolicy
from casemate.attest.verdict import Checks, Refused, Unchecked, refusal

_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512(),
}  # fmt: skip
_RSA_BITS: Final = range(2048, 8193)
_AK_MEND = (
    "Ask for the certificate of the machine's attestation key with its authorities, or pin the key"
    " in the trust policy once you know that it is this machine's."
)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """path: of certificates, from the key's, () where it has none. root: fingerprint of the root
    that vouches for the key, "" where the policy pins the key. ak: the key's own fingerprint.
    quoted: bank to PCR to value, as quotes cover them. logged: whether the event log replayed to
    quoted PCRs of a bank that counts."""

    path: Path
    root: str
    ak: str
    quoted: Banks
    logged: bool


def fingerprint(key: Key) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo in hex."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _admitted_key(key: object, where: str) -> Key:
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in {
        curve.name for curve in abi.CURVES.values()
    }:
        return key
    raise refusal("chain-key", f"The attestation key in {where} is of no admitted kind.", where)


def copies(parts: Parts) -> list[tuple[Key, str]]:
    """The attestation key as each file holds it; a public area has the attributes of one."""
    found: list[tuple[Key, str]] = []
    if parts.certificate is not None:
        file = parts.certificate_file
        found.append((_admitted_key(x509.public_key(parts.certificate, file), file), file))
    if parts.public is not None:
        file = parts.public_file
        found.append((_admitted_key(parts.public.key, file), file))
        _attributes(parts.public, file)
    if parts.pem is not None:
        found.append((_admitted_key(parts.pem, parts.pem_file), parts.pem_file))
    return found


def attestation_key(parts: Parts, checks: Checks) -> Key | None:
    """Step 1: the key, or None where nothing says what it is."""
    with checks.step("ak") as step:
        found = copies(parts)
        for key, file in found[1:]:
            if key.public_numbers() != found[0][0].public_numbers():
                raise refusal(
                    "endorsement-ak", f"{file} holds another key than {found[0][1]}.", file
                )
        if not found:
            step.unchecked("no attestation key comes with the quote")
            return None
        step.detail = f"{fingerprint(found[0][0])} of {', '.join(file for _, file in found)}"
        return found[0][0]


def _attributes(public: abi.Public, where: str) -> None:
    wanted = abi.FIXED_TPM | abi.RESTRICTED | abi.SIGN
    if public.attributes & (wanted | abi.DECRYPT) != wanted:
        raise refusal(
            "endorsement-ak-attributes",
            "The key is no restricted signing key of its TPM, so that what it signs may be forged.",
            where,
            _AK_MEND,
        )


def chain(parts: Parts, checks: Checks) -> tuple[Path, bool]:
    """Step 2, for a key that has a certificate."""
    if parts.certificate is None:
        return (), False
    with checks.step("chain") as step:
        certificates.check_leaf(parts.certificate, parts.certificate_file)
        found, whole = certificates.path(
            parts.certificate, parts.certificate_file, parts.authorities
        )
        step.detail = ", ".join(file for _, file in found)
        if not whole:
            step.unchecked(f"the issuer of {found[-1][1]} does not come with the evidence")
        unused = [file for one, file in parts.authorities if all(one != c for c, _ in found)]
        if unused:
            step.detail += f". Of no use: {', '.join(unused)}"
        return found, whole


def signature(quote: Quote, key: Key) -> abi.Signature:
    """Step 3 for one quote: its signature, which ``key`` made. Raises ``evidence.signature-*``."""
    where = quote.file
    found = quote.signature
    if found is None:
        raise refusal("signature-missing", f"{where} has no signature.", where)
    if isinstance(found, bytes):
        rsassa = isinstance(key, rsa.RSAPublicKey)
        found = (
            abi.Signature(scheme="rsassa", hash="sha256", sig=found)
            if rsassa
            else collateral.ecdsa(found, where)
        )
    digest = _HASHES[found.hash]
    try:
        if isinstance(key, rsa.RSAPublicKey) and found.scheme == "rsassa":
            key.verify(found.sig, quote.attest.raw, padding.PKCS1v15(), digest)
        elif isinstance(key, rsa.RSAPublicKey) and found.scheme == "rsapss":
            scheme = padding.PSS(padding.MGF1(digest), padding.PSS.AUTO)
            key.verify(found.sig, quote.attest.raw, scheme, digest)
        elif isinstance(key, ec.EllipticCurvePublicKey) and found.scheme == "ecdsa":
            encoded = utils.encode_dss_signature(found.r, found.s)
            key.verify(encoded, quote.attest.raw, ec.ECDSA(digest))
        else:
            raise refusal(
                "signature-scheme", f"{where} is signed by a scheme that its key has not.", where
            )
    except (InvalidSignature, ValueError):
        raise refusal(
            "signature-quote", f"The signature of {where} is not its attestation key's.", where
        ) from None
    return found


def pcr_digest(quote: Quote, hash_name: str, banks: Banks) -> Banks:
    """Step 4 for one quote: the values that it covers. Raises ``evidence.signature-pcr-digest``,
    or ``needs-pcrs`` where a selected value is not there."""
    composite, covered = hashlib.new(hash_name), Banks()
    for selection in quote.attest.pcr_select:
        bank = banks.get(selection.hash, {})
        for index in selection.pcrs:
            if index not in bank:
                raise refusal(
                    "needs-pcrs",
                    f"The value of PCR {index} ({selection.hash}), which {quote.file} is about,"
                    " does not come with the evidence.",
                    quote.file,
                )
            composite.update(bank[index])
            covered.setdefault(selection.hash, {})[index] = bank[index]
    if composite.digest() != quote.attest.pcr_digest:
        raise refusal(
            "signature-pcr-digest", f"The PCR values are not those that {quote.file} signs.",
            quote.file,
        )  # fmt: skip
    return covered


def _listed(banks: Banks) -> str:
    return "; ".join(
        f"{name} {', '.join(map(str, sorted(values)))}" for name, values in banks.items() if values
    )


def quotes(found: Sequence[Quote], key: Key, banks: Banks, checks: Checks) -> Banks:
    """Steps 3 and 4: the values that quotes cover."""
    schemes = []
    with checks.step("quote-signature") as step:
        for quote in found:
            schemes.append(signature(quote, key))
        step.detail = "; ".join(
            f"{quote.file}: {one.scheme} {one.hash}"
            for quote, one in zip(found, schemes, strict=True)
        )
    covered = Banks()
    with checks.step("pcr-digest") as step:
        for quote, one in zip(found, schemes, strict=True):
            for name, values in pcr_digest(quote, one.hash, banks).items():
                covered.setdefault(name, {}).update(values)
        step.detail = f"PCRs: {_listed(covered)}"
        loose = {
            name: {n: v for n, v in values.items() if n not in covered.get(name, {})}
            for name, values in banks.items()
        }
        if any(loose.values()):
            step.detail += f". No quote covers {_listed(loose)}"
    return covered


def _signer(parts: Parts, checks: Checks) -> None:
    with checks.step("signer") as step:
        if parts.public is None:
            step.unchecked("the attestation key's public area does not come with the evidence")
            return
        names = {parts.public.qualified(h): name for h, name in abi.HIERARCHIES.items()}
        found = {quote.attest.qualified_signer for quote in parts.quotes}
        if len(found) == 1 and (known := names.get(next(iter(found)))):
            step.detail = f"a primary key of the {known} hierarchy"
        else:
            step.unchecked("the attestation key is no primary key, so its path is not known")


def replayed(log: Log, banks: Banks, checks: Checks, *, quoted: bool) -> bool:
    """Step 6: whether the log leads to values of ``banks`` of an algorithm that counts. Raises
    ``evidence.signature-event-log``. quoted: whether quotes cover the values."""
    with checks.step("event-log") as step:
        compared: dict[str, list[int]] = {}
        notes = []
        for name in sorted(set(log.algorithms) & set(banks)):
            values = log.replay(name)
            compared[name] = sorted(set(values) & set(banks[name]))
            for index in compared[name]:
                if values[index] != banks[name][index]:
                    raise refusal(
                        "signature-event-log",
                        f"The event log leads to another value of PCR {index} ({name}).",
                        collateral.LOG,
                    )
            alone = sorted(set(values) - set(banks[name]))
            if alone:
                notes.append(f"{name} PCRs {_numbers(alone)} are in the log alone")
            free = [n for n, v in banks[name].items() if n not in values and v.strip(b"\0\xff")]
            if free:
                notes.append(f"{name} PCRs {_numbers(sorted(free))} are not in the log")
        if not any(compared.values()):
            step.unchecked("the log is of other PCRs than the values")
            return False
        for name in sorted(set(log.algorithms) - set(banks)):
            notes.append(f"{name} digests are compared with nothing")
        loose = f", the data of events {_numbers(log.uncovered)}" if log.uncovered else ""
        notes.append(f"nothing vouches for the header, the types of events{loose}")
        if log.padding:
            notes.append(f"{log.padding} bytes of padding")
        what = "quoted PCRs" if quoted else "PCR values, which nothing signs"
        found = "; ".join(f"{name} {_numbers(both)}" for name, both in compared.items())
        step.detail = ". ".join([f"{what}: {found}", *notes])
        return any(both and name in BANKS for name, both in compared.items())


def _numbers(found: Sequence[int]) -> str:
    return ", ".join(map(str, found))


def _unvouched(where: str) -> Refused:
    return refusal(
        "root-ak-unvouched",
        "No certificate that comes with the evidence vouches for the attestation key.",
        where,
        _AK_MEND,
    )


def root(path: Path, whole: bool, ak: str, policy: TpmPolicy, checks: Checks) -> str:
    """Step 8: the root's fingerprint, or "" for a key that is pinned itself."""
    with checks.step("root") as step:
        if not isinstance(policy.aks, Unchecked) and ak in policy.aks:
            step.detail = "the policy pins the attestation key"
            return path[-1][0].fingerprint if whole else ""
        if not whole:
            raise _unvouched(path[-1][1] if path else "ak_cert.der")
        found = path[-1][0].fingerprint
        if found not in policy.roots:
            raise refusal(
                "root-unknown",
                f"The chain ends in the root key {found}, which is not trusted.",
                path[-1][1],
                "Trust a root only if its fingerprint reached you from its vendor.",
            )
        step.detail = f"root key {found}"
        return found


def same_boot(found: Sequence[Quote], checks: Checks) -> None:
    """Step 9. Raises ``evidence.freshness-*``."""
    with checks.step("same-boot") as step:
        first = found[0].attest
        for quote in found[1:]:
            other = quote.attest
            if any(
                getattr(first, name) != getattr(other, name)
                for name in (
                    "extra_data", "qualified_signer", "reset_count", "restart_count",
                    "firmware_version",
                )
            ):  # fmt: skip
                raise refusal(
                    "freshness-mixed",
                    f"{quote.file} and {found[0].file} are of different challenges or boots.",
                    quote.file,
                )
        step.detail = f"{len(found)} with one nonce, resets {first.reset_count}"


def nonce(found: Sequence[Quote], checks: Checks) -> None:
    """Raises ``evidence.freshness-empty`` where a quote answers no challenge."""
    with checks.step("nonce") as step:
        for quote in found:
            if not quote.attest.extra_data:
                raise refusal(
                    "freshness-empty",
                    f"{quote.file} has no nonce, so that it may be from any time.",
                    quote.file,
                    "Ask for a quote over a nonce of your own.",
                )
        step.detail = found[0].attest.extra_data.hex()


def verify(parts: Parts, policy: TpmPolicy, checks: Checks) -> Verified:
    """Follow steps 1 to 8, for evidence that has a quote."""
    if all(quote.signature is None for quote in parts.quotes):
        checks.crypto = "not-applicable"
        with checks.step("quote-signature"):
            raise refusal(
                "signature-missing", f"{parts.quotes[0].file} has no signature.",
                parts.quotes[0].file,
            )  # fmt: skip
    key = attestation_key(parts, checks)
    if key is None:
        checks.crypto = "unknown"
        with checks.step("root"):
            raise _unvouched("ak_cert.der")
    found, whole = chain(parts, checks)
    quoted = quotes(parts.quotes, key, parts.banks, checks)
    _signer(parts, checks)
    logged = parts.log is not None and replayed(parts.log, quoted, checks, quoted=True)
    certificates.lists(found, parts, checks)
    ak = fingerprint(key)
    if not whole:
        checks.crypto = "unknown" if parts.certificate is not None else "valid"
    vouched = root(found, whole, ak, policy, checks)
    checks.crypto = "valid"
    return Verified(path=found, root=vouched, ak=ak, quoted=quoted, logged=logged)

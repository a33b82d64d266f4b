"""Trust policies: what evidence must show before data is handed over.

A policy has no "unset means unchecked": every field is given, or is ``Unchecked("reason")``, and
the verdict repeats the reason. In TOML (``Trust.load``) a field is its value or
``{ unchecked = "reason" }``::

    simulated = false

    [sev-snp]
    products = ["Genoa", "Turin"]
    signing_keys = ["VCEK"]
    measurements = ["<96 hex digits>"]
    crl = { unchecked = "no revocation list is demanded" }
    host_data = { unchecked = "no container policy is used" }
    id_keys = { unchecked = "no id block is used" }
    author_keys = { unchecked = "no id block is used" }
    family_ids = { unchecked = "no id block is used" }
    image_ids = { unchecked = "no id block is used" }
    guest_svn = { unchecked = "no versions are assigned" }
    vmpl = [0]
    guest_policy = { debug = false, migrate_ma = false }
    uvm_issuers = { unchecked = "no container instance of Azure's" }
    uvm_feeds = { unchecked = "no container instance of Azure's" }
    uvm_svn = { unchecked = "no container instance of Azure's" }
    uvm_validity = { unchecked = "no container instance of Azure's" }
    chip_ids = { unchecked = "any genuine chip" }
    extractable = ["Milan"]
    csp_ids = { unchecked = "no VLEK is admitted" }
    report_versions = [3, 5]
    firmware = "1.55.21"
    provisional = false
    platform_info = { tsme_en = true }
    launch_mitigations = { unchecked = "no mitigations are asked for" }
    current_mitigations = { unchecked = "no mitigations are asked for" }
    committed_tcb = { unchecked = "the reported one is checked" }
    launch_tcb = { unchecked = "the reported one is checked" }

    [sev-snp.reported_tcb]
    Genoa = { bootloader = 10, tee = 0, snp = 25, microcode = 84 }
    Turin = { fmc = 1, bootloader = 1, tee = 1, snp = 4, microcode = 81 }
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from casemate.attest import x509
from casemate.attest.roots import AMD
from casemate.attest.snp.policy import DEFAULT, SnpPolicy
from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError

__all__ = ["SnpPolicy", "Trust", "Unchecked"]

_SIMULATION: Final = "simulation was asked for by name"


def _bad(message: str, where: str = "") -> UsageError:
    return UsageError(
        "usage.trust",
        message,
        mend="Write the trust policy as docs/evidence.md shows; a field that is not to be checked"
        ' is { unchecked = "reason" }.',
        where=where,
    )


def _fingerprint(root: str | bytes | Path) -> str:
    """The pin that names a root: 64 hex digits, or the certificate (PEM or DER) or its path."""
    if isinstance(root, str):
        pin = root.lower().removeprefix("sha256:").replace(":", "")
        if re.fullmatch(r"[0-9a-f]{64}", pin):
            return pin
        root = root.encode() if root.startswith("-----BEGIN") else Path(root)
    if isinstance(root, Path):
        root = _read(root)
    return x509.parse(root, "the root").fingerprint


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise _bad(f"{str(path)[:200]} cannot be read: {e.strerror}.", str(path)[:200]) from None


@dataclass(frozen=True, kw_only=True)
class Trust:
    """A trust policy: for each kind of evidence (``Evidence.tee``) what it must show; a kind that
    is not named is refused. With ``simulation`` only simulated evidence is accepted, and without
    it only hardware's: a policy for one says nothing about the other."""

    simulation: bool
    policies: Mapping[str, SnpPolicy]

    def __post_init__(self) -> None:
        for policy in self.policies.values():
            if not self.simulation and isinstance(policy.roots, Unchecked):
                raise _bad("Only simulation can leave the root unchecked.", "roots")

    @classmethod
    def simulated(cls, root: str | bytes | Path | None = None) -> Trust:
        """Accept a simulated TEE, which protects nothing from its operator.

        ``root``: the simulated root key's fingerprint (64 hex digits), or its certificate (PEM,
        DER or path); None takes whatever root comes with the evidence, and the verdict says so.
        """
        roots: Mapping[str, tuple[str, ...]] | Unchecked
        if root is None:
            roots = Unchecked(f"{_SIMULATION}: the root that came with the evidence is taken")
        else:
            roots = dict.fromkeys(AMD, (_fingerprint(root),))
        policy = _snp(Unchecked(f"{_SIMULATION}: any software may run"), roots=roots)
        return cls(simulation=True, policies={"sev-snp": policy})

    @classmethod
    def sev_snp(
        cls,
        *,
        measurements: Sequence[str] | Unchecked,
        products: Sequence[str] = tuple(AMD),
        **other: Any,
    ) -> Trust:
        """Accept AMD SEV-SNP hardware of these product lines under AMD's own roots.

        ``other`` are fields of :class:`SnpPolicy` in place of :data:`SNP_DEFAULTS`.
        """
        roots = {line: AMD[line] for line in _known(_toml(products))}
        given = {name: _toml(field) for name, field in other.items()}
        policy = _snp(_toml(measurements), roots=roots, **given)
        return cls(simulation=False, policies={"sev-snp": policy})

    @classmethod
    def load(cls, path: str | Path) -> Trust:
        """The policy in a TOML file. UsageError when a field is missing, unknown or malformed."""
        try:
            table = tomllib.loads(_read(Path(path)).decode("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise _bad(f"{path} is no TOML: {e}.", str(path)) from None
        simulation = table.pop("simulated", None)
        if type(simulation) is not bool:
            raise _bad("simulated must be true or false.", "simulated")
        for tee in table:
            if tee not in _LOADERS:
                raise _bad(f"{tee[:40]!r} is no known kind of evidence.", tee[:40])
        if not table:
            raise _bad("The policy names no kind of evidence.")
        return cls(
            simulation=simulation,
            policies={tee: _LOADERS[tee](section, simulation) for tee, section in table.items()},
        )

    @classmethod
    def parse(cls, text: str) -> Trust:
        """For the command line: ``simulated``, ``simulated:FINGERPRINT``, or a TOML file's path."""
        name, _, root = text.partition(":")
        if name == "simulated":
            if text != name and not root:
                raise _bad("simulated: is followed by no fingerprint.")
            return cls.simulated(root or None)
        return cls.load(text)


# What hardware must show beside its measurement unless told otherwise: privilege level 0, too.
SNP_DEFAULTS: Final[dict[str, Any]] = {
    field.name: getattr(DEFAULT, field.name)
    for field in fields(SnpPolicy)
    if field.name not in ("roots", "measurements")
} | {"vmpl": (0,), "report_versions": (2, 3, 5)}


def _snp(measurements: tuple[str, ...] | Unchecked, **other: Any) -> SnpPolicy:
    unknown = set(other) - set(SNP_DEFAULTS) - {"roots"}
    if unknown:
        raise _bad(f"{sorted(unknown)[0]} is no field of a SEV-SNP policy.", sorted(unknown)[0])
    return SnpPolicy(measurements=measurements, **(SNP_DEFAULTS | other))


def _known(products: object) -> tuple[str, ...]:
    if not isinstance(products, tuple) or not products or not set(products) <= set(AMD):
        raise _bad(f"products must be of {', '.join(AMD)}.", "products")
    return products


def _toml(data: Any) -> Any:
    """A value as a field's: lists as tuples, ``{ unchecked = "..." }`` as Unchecked."""
    if isinstance(data, list):
        return tuple(map(_toml, data))
    if isinstance(data, dict) and set(data) == {"unchecked"}:
        if not isinstance(data["unchecked"], str) or not data["unchecked"].strip():
            raise _bad("unchecked needs a reason.")
        return Unchecked(data["unchecked"])
    return data


def _load_snp(section: Any, simulation: bool) -> SnpPolicy:
    if not isinstance(section, dict):
        raise _bad("sev-snp must be a table.", "sev-snp")
    found = {name: _toml(data) for name, data in section.items()}
    names = {f.name for f in fields(SnpPolicy)} - {"roots"} | {
        "roots" if simulation else "products"
    }
    for name in sorted(names ^ set(found)):
        problem = "is missing from" if name in names else "is no field of"
        raise _bad(f"{name[:40]} {problem} sev-snp.", name[:40])
    if not simulation:
        found["roots"] = {line: AMD[line] for line in _known(found.pop("products"))}
    elif not isinstance(found["roots"], Unchecked):
        found["roots"] = dict.fromkeys(AMD, found["roots"])
    if isinstance(found["firmware"], str):
        if not re.fullmatch(r"\d{1,3}\.\d{1,3}\.\d{1,3}", found["firmware"]):
            raise _bad("firmware must be MAJOR.MINOR.BUILD.", "firmware")
        found["firmware"] = tuple(map(int, found["firmware"].split(".")))
    try:
        return SnpPolicy(**found)
    except (TypeError, AttributeError):
        raise _bad("A field of sev-snp has the wrong type.", "sev-snp") from None


_LOADERS: Final[dict[str, Callable[[Any, bool], SnpPolicy]]] = {"sev-snp": _load_snp}

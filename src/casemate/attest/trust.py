"""Trust policies: what evidence must show before data is handed over.

A policy has no "unset means unchecked": every field is given, or is ``Unchecked("reason")``, and
the verdict repeats the reason. In TOML (``Trust.load``) a field is its value or
``{ unchecked = "reason" }``. Above the sections stands what holds for all kinds of evidence; a
section names a kind (``casemate.attest.kinds``) and has all fields of its policy::

    simulated = false
    collateral_age = 30
    advisories = { unchecked = "the TCB floors stand for them" }
    operator_physical_access = false
    gpu = { unchecked = "no GPU is used" }
    independent_roots = { unchecked = "AMD's word is enough" }
    server_policies = { unchecked = "any policy of a casemate server" }
    sandbox = ["seccomp", "landlock"]

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

``[sev-snp]`` names ``products`` in place of roots, and firmware as "MAJOR.MINOR.BUILD". Vendors'
roots need not be written: they are those that casemate carries. A simulation's section gives
``roots`` (fingerprints, or unchecked). ``preset = "..."`` at the top takes every field that the
file does not give from one of :data:`PRESETS`; what a preset leaves open must be given.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from casemate.attest import fields, x509
from casemate.attest.fields import bad
from casemate.attest.kind import Kind
from casemate.attest.kinds import KINDS
from casemate.attest.roots import AMD
from casemate.attest.snp.policy import SnpPolicy
from casemate.attest.verdict import Unchecked
from casemate.spec.evidence import SANDBOX

__all__ = ["PRESETS", "SnpPolicy", "Trust", "Unchecked"]

_SIMULATION: Final = "simulation was asked for by name"
_HANDS_ON: Final = (
    "Who can touch the hardware can read or redirect its memory bus (TEE.fail, Battering RAM,"
    " BadRAM, WireTap) and take out keys that sign evidence"
)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """A trust policy: for each kind of evidence (``Evidence.tee``) what it must show; a kind that
    is not named is refused. With ``simulation`` only simulated evidence is accepted, and without
    it only hardware's: a policy for one says nothing about the other.

    collateral_age: the most days since revocation lists and TCB info were issued. advisories:
    vendors' advisories that must not apply. operator_physical_access: whether the operator can
    touch the machine; if so, each section must list admitted instances. gpu: whether a GPU must
    show evidence, asked with a nonce that follows from the CPU's report. independent_roots: how
    many vendors' evidence must bind the same keys, 2 to 4. server_policies: admitted digests
    (``sha256:<hex>``) of what the server promises of itself, who may release its sealing key
    among it. sandbox: the layers that must hold around each of its workers (docs/sandbox.md).

    Raises ``usage.trust`` where the policy contradicts itself:

     1. outside of simulation every root is pinned;
     2. Milan, whose chips give up the seed of their keys to who holds one, only with ``chip_ids``,
        or by a cloud's VLEK alone with ``csp_ids`` (a chip that no such cloud runs has none);
     3. physical access only with an allow-list of instances in each section;
     4. a GPU, or several roots, only with sections that can show them.
    """

    simulation: bool
    policies: Mapping[str, Any]
    collateral_age: int | Unchecked
    advisories: tuple[str, ...] | Unchecked
    operator_physical_access: bool | Unchecked
    gpu: bool | Unchecked
    independent_roots: int | Unchecked
    server_policies: tuple[str, ...] | Unchecked
    sandbox: tuple[str, ...] | Unchecked

    def __post_init__(self) -> None:
        fields.integer(self.collateral_age, range(1, 3660), "collateral_age")
        fields.words(self.advisories, None, "advisories")
        fields.flag(self.operator_physical_access, "operator_physical_access")
        fields.flag(self.gpu, "gpu")
        fields.integer(self.independent_roots, range(2, 5), "independent_roots")
        fields.words(self.server_policies, None, "server_policies")
        fields.words(self.sandbox, SANDBOX, "sandbox")
        if not self.simulation:
            for tee, policy in self.policies.items():
                _pinned(tee, policy)
        if self.operator_physical_access is True:
            for tee, policy in self.policies.items():
                _listed(tee, policy)
        kinds = [KINDS[tee] for tee in self.policies]
        if self.gpu is True and not any(kind.device for kind in kinds):
            raise bad("A GPU is required, but no section says what one must show.", "gpu")
        if self.policies and all(kind.device for kind in kinds):
            raise bad("The policy names no kind of evidence of a CPU, only of devices.")
        if isinstance(self.independent_roots, int):
            vendors = len({kind.vendor or kind.tee for kind in kinds})
            if vendors < self.independent_roots:
                raise bad(
                    f"Evidence of {self.independent_roots} vendors is required, but the sections"
                    f" name {vendors}.",
                    "independent_roots",
                )

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
        measurements = Unchecked(f"{_SIMULATION}: any software may run")
        terms = dict.fromkeys(TERMS, Unchecked(_SIMULATION))
        policy = _replaced(KINDS["sev-snp"], {"measurements": measurements, "roots": roots})
        return cls(simulation=True, policies={"sev-snp": policy}, **terms)

    @classmethod
    def sev_snp(
        cls,
        *,
        measurements: Sequence[str] | Unchecked,
        products: Sequence[str] = ("Genoa", "Turin"),
        **other: Any,
    ) -> Trust:
        """Accept AMD SEV-SNP hardware of these product lines under AMD's own roots; ``other`` as
        for :meth:`of`. Privilege level 0 is asked for unless ``vmpl`` says otherwise."""
        roots = {line: AMD[line] for line in _lines(fields.toml(products))}
        given = {"vmpl": (0,), "measurements": measurements, "roots": roots}
        return cls.of("sev-snp", **(given | other))

    @classmethod
    def of(cls, tee: str, **given: Any) -> Trust:
        """Accept hardware of one kind (a key of ``KINDS``). ``given``: fields of its policy in
        place of its default, which pins nothing, and of this class in place of :data:`TERMS`."""
        if tee not in KINDS:
            raise _unknown(tee)
        terms = {name: given.pop(name) for name in TERMS if name in given}
        policy = _replaced(KINDS[tee], given)
        return cls(simulation=False, policies={tee: policy}, **(TERMS | _values(terms)))

    @classmethod
    def preset(cls, name: str, given: Mapping[str, Any] | None = None) -> Trust:
        """The policy ``name`` of :data:`PRESETS`, with what it leaves to its owner given as in
        TOML: ``Trust.preset("bare-metal-snp", {"sev-snp": {"measurements": [...], ...}})``."""
        return cls.read({**(given or {}), "preset": name})

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Trust:
        """The policy in a table as TOML gives it. UsageError (``usage.trust``) when a field is
        missing, unknown or malformed, or the policy contradicts itself."""
        found = _merged(table)
        simulation = found.pop("simulated", None)
        if type(simulation) is not bool:
            raise bad("simulated must be true or false.", "simulated")
        terms = {name: found.pop(name) for name in TERMS if name in found}
        for name in TERMS:
            if name not in terms:
                raise bad(f"{name} is missing from the policy.", name)
        if not found:
            raise bad("The policy names no kind of evidence.")
        return cls(
            simulation=simulation,
            policies={tee: _section(tee, data, simulation) for tee, data in found.items()},
            **_values(terms),
        )

    @classmethod
    def load(cls, path: str | Path) -> Trust:
        """The policy in a TOML file; see :meth:`read`."""
        try:
            table = tomllib.loads(_read(Path(path)).decode("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise bad(f"{path} is no TOML: {e}.", str(path)) from None
        return cls.read(table)

    @classmethod
    def parse(cls, text: str) -> Trust:
        """For the command line: ``simulated``, ``simulated:FINGERPRINT``, or a TOML file's path."""
        name, _, root = text.partition(":")
        if name == "simulated":
            if text != name and not root:
                raise bad("simulated: is followed by no fingerprint.")
            return cls.simulated(root or None)
        return cls.load(text)


# What holds for all kinds, as the constructors in Python take it where it is not given.
TERMS: Final[dict[str, Any]] = {
    "collateral_age": Unchecked("no age of collateral was given"),
    "advisories": Unchecked("no advisories were given"),
    "operator_physical_access": Unchecked("nothing was said of the operator's physical access"),
    "gpu": Unchecked("nothing was said of GPUs"),
    "independent_roots": Unchecked("one vendor's word is enough"),
    "server_policies": Unchecked("any policy of a casemate server is accepted"),
    "sandbox": Unchecked("no layer of the workers' sandbox is demanded"),
}
PRESETS: Final = tuple(
    sorted(
        file.name.removesuffix(".toml")
        for file in (resources.files("casemate.attest") / "presets").iterdir()
        if file.name.endswith(".toml")
    )
)


def _unknown(tee: object) -> Exception:
    return bad(f"{str(tee)[:40]!r} is no known kind of evidence.", str(tee)[:40])


def _values(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields.toml(value) for name, value in table.items()}


def _replaced(kind: Kind, given: Mapping[str, Any]) -> Any:
    """The kind's default policy with fields replaced."""
    names = {f.name for f in dataclasses.fields(kind.policy)}
    for name in sorted(set(given) - names):
        raise bad(f"{name[:40]} is no field of {kind.tee}.", name[:40])
    return dataclasses.replace(kind.default(), **_values(given))


# Presets.


def preset_table(name: object) -> dict[str, Any]:
    """What a preset gives, as TOML gives it."""
    if name not in PRESETS:
        raise bad(f"{str(name)[:40]!r} is none of {', '.join(PRESETS)}.", "preset")
    file = resources.files("casemate.attest") / "presets" / f"{name}.toml"
    return tomllib.loads(file.read_text("utf-8"))


def _merged(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table over the preset that it names; of a section, field over field."""
    given = {name: data for name, data in table.items() if name != "preset"}
    if "preset" not in table:
        return given
    base = preset_table(table["preset"])
    for name, data in given.items():
        part = KINDS[name].default() if name in KINDS else None
        base[name] = _over(base.get(name), data, part)
    return base


def _over(base: Any, data: Any, policy: Any) -> Any:
    """Tables of policies, and of those inside them, field over field; anything else whole."""
    parts = dataclasses.is_dataclass(policy) and not isinstance(policy, Unchecked)
    if not (parts and isinstance(base, Mapping) and isinstance(data, Mapping)):
        return data
    if set(data) == {"unchecked"}:
        return data
    inner = {name: getattr(policy, name, None) for name in data}
    return {**base, **{name: _over(base.get(name), data[name], inner[name]) for name in data}}


# Sections.


def _section(tee: str, data: Any, simulation: bool) -> Any:
    if tee not in KINDS:
        raise _unknown(tee)
    kind = KINDS[tee]
    if not isinstance(data, Mapping):
        raise bad(f"{tee} must be a table.", tee)
    found = _FORMS.get(tee, _plain)(dict(data), simulation, kind)
    return fields.load(kind.policy, found, tee)


def _plain(found: dict[str, Any], simulation: bool, kind: Kind) -> dict[str, Any]:
    """What casemate carries of the vendor, where the section says nothing of it."""
    default = kind.default()
    carried = {name: getattr(default, name) for name in _CARRIED if hasattr(default, name)}
    return found if simulation else carried | found


def _snp(found: dict[str, Any], simulation: bool, kind: Kind) -> dict[str, Any]:
    here, other = ("roots", "products") if simulation else ("products", "roots")
    if here not in found:
        raise bad(f"{here} is missing from {kind.tee}.", here)
    if other in found:
        raise bad(f"{other} is no field of {kind.tee}.", other)
    named = fields.toml(found.pop(here))
    if not simulation:
        found["roots"] = {line: AMD[line] for line in _lines(named)}
    else:
        found["roots"] = named if isinstance(named, Unchecked) else dict.fromkeys(AMD, named)
    if isinstance(firmware := found.get("firmware"), str):
        if not re.fullmatch(r"\d{1,3}\.\d{1,3}\.\d{1,3}", firmware):
            raise bad("firmware must be MAJOR.MINOR.BUILD.", "firmware")
        found["firmware"] = list(map(int, firmware.split(".")))
    return found


def _lines(products: object) -> tuple[str, ...]:
    fields.words(products, AMD, "products")
    if not isinstance(products, tuple):
        raise bad(f"products must be of {', '.join(AMD)}.", "products")
    return products


# A section's form in TOML where it is not that of the policy's fields.
_FORMS: Final[dict[str, Callable[[dict[str, Any], bool, Kind], dict[str, Any]]]] = {
    "sev-snp": _snp,
}


_CARRIED: Final = ("roots", "rim_roots", "revoked")


# What a policy may not leave open.


def parts_of(policy: Any) -> Iterator[Any]:
    """A policy and those inside it."""
    yield policy
    for f in dataclasses.fields(policy):
        value = getattr(policy, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Unchecked):
            yield from parts_of(value)


def _pinned(tee: str, policy: Any) -> None:
    for part in parts_of(policy):
        for name in ("roots", "rim_roots"):
            if isinstance(getattr(part, name, ()), Unchecked):
                raise bad("Only simulation can leave the root unchecked.", name)
        if isinstance(part, SnpPolicy) and _milan(part) and not _in_custody(part):
            raise bad(
                f"{tee} admits Milan without a list of chips: the seed of a Milan chip's keys can"
                " be taken out by who holds it, and signs any evidence after that.",
                "chip_ids",
            )


def _milan(policy: SnpPolicy) -> bool:
    return not isinstance(policy.roots, Unchecked) and "Milan" in policy.roots


def _in_custody(policy: SnpPolicy) -> bool:
    by_cloud = policy.signing_keys == ("VLEK",) and not isinstance(policy.csp_ids, Unchecked)
    return by_cloud or not isinstance(policy.chip_ids, Unchecked)


def _listed(tee: str, policy: Any) -> None:
    names = KINDS[tee].instances
    if any(not isinstance(getattr(p, n, Unchecked("-")), Unchecked)
           for p in parts_of(policy) for n in names):  # fmt: skip
        return
    needed = f"Give {' or '.join(names)}" if names else "This kind of evidence names no instance"
    raise bad(
        f"{tee}: the operator has physical access and no instance is listed. {_HANDS_ON}; a list"
        f" of machines whose custody is known is what remains. {needed}.",
        names[0] if names else tee,
    )


# Simulated roots.


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
        raise bad(f"{str(path)[:200]} cannot be read: {e.strerror}.", str(path)[:200]) from None

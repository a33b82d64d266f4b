"""A TEE of hardware: what its parts make, as one attester.

Procedure of ``attest``:

 1. The bytes for the vendor's field follow from the 64 of ``report_data`` (``binding.carried``).
 2. The CPU's files are made over them; collateral kept beside fills what is missing.
 3. Each further device (a GPU) makes its files over bytes that follow from those of step 1
    (``binding.device_data``); they stand under its name.

At the start one report is made and judged as a client would under the default policy: it gives
``measurement`` and ``root``, and :attr:`HardwareTee.judged` for ``casemate doctor``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

from casemate.attest import folder
from casemate.attest.binding import REPORT_DATA_BYTES, carried, device_data
from casemate.attest.folder import Judgement
from casemate.seams import Clock
from casemate.spec.evidence import Evidence
from casemate.tee import sealing
from casemate.tee.sealing import Sealing

# Files of evidence over the bytes of the vendor's field.
Maker: TypeAlias = Callable[[bytes], dict[str, bytes]]
# Further files for those that were made: collateral by the part's name ("" is the CPU).
Filler: TypeAlias = Callable[[str, Mapping[str, bytes]], dict[str, bytes]]


@dataclass(frozen=True)
class Part:
    """A device beside the CPU: the name that its files stand under, its kind, its maker."""

    name: str
    kind: str
    make: Maker


class HardwareTee:
    """See the module. Not for several threads at once."""

    simulated: Final = False

    def __init__(
        self,
        kind: str,
        make: Maker,
        seal: Sealing,
        clock: Clock,
        *,
        filler: Filler = lambda _, __: {},
        parts: tuple[Part, ...] = (),
        policies: Mapping[str, Any] | None = None,
    ) -> None:
        """``policies``: to judge its own evidence by, for each kind; None: each kind's default."""
        self.kind, self._policies = kind, policies
        self._make, self._filler, self.parts = make, filler, parts
        self._seal, self._clock = seal, clock
        self._first = self._cpu(bytes(REPORT_DATA_BYTES))

    @property
    def sealing(self) -> str:
        """The kind of sealing key, of ``sealing.KINDS``."""
        return self._seal.kind

    def _cpu(self, report_data: bytes) -> dict[str, bytes]:
        made = self._make(carried(self.kind, report_data))
        return {**self._filler("", made), **made}

    def _part(self, part: Part, bound: bytes) -> dict[str, bytes]:
        made = part.make(carried(part.kind, device_data(self.kind, bound, part.name)))
        files = {**self._filler(part.name, made), **made}
        return {f"{part.name}/{file}": data for file, data in files.items()}

    def attest(self, report_data: bytes) -> Evidence:
        """Fresh evidence over these 64 bytes. Raises ``usage.tee-*``; ValueError for another
        length."""
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report_data has {len(report_data)} bytes, not {REPORT_DATA_BYTES}")
        files = self._cpu(report_data)
        for part in self.parts:
            files |= self._part(part, carried(self.kind, report_data))
        return Evidence(tee=self.kind, simulated=False, files=files)

    @cached_property
    def judged(self) -> Judgement:
        """What a client says of the CPU's evidence of the start."""
        return folder.judge(self._first, now=self._clock.wall(), policies=self._policies)

    @property
    def root(self) -> str:
        claims = self.judged.claims
        return "" if claims is None else claims.root

    @property
    def measurement(self) -> str:
        claims = self.judged.claims
        return "" if claims is None else claims.measurement

    @cached_property
    def _secret(self) -> bytes:
        return self._seal.secret(self.attest)

    def sealing_key(self, label: str) -> bytes:
        """Raises ``usage.tee-sealing``, ``usage.tee-release``, ``ledger.tee-state``."""
        return sealing.key(self._secret, self._seal.kind, label)

"""What every attester does."""

from __future__ import annotations

from typing import Protocol

from casemate.spec.evidence import Evidence


class Tee(Protocol):
    @property
    def kind(self) -> str:
        """The kind of evidence, ``Evidence.tee``."""

    @property
    def simulated(self) -> bool:
        """True where nothing protects from the operator."""

    @property
    def root(self) -> str:
        """SHA-256 (hex) of the root key that the evidence leads to."""

    @property
    def measurement(self) -> str:
        """What the evidence says is running (hex)."""

    @property
    def sealing(self) -> str:
        """The kind of sealing key, of ``sealing.KINDS``."""

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence that carries these 64 bytes (``attest.binding.report_data``)."""

    def sealing_key(self, label: str) -> bytes:
        """32 bytes, the same for the same label after each restart on this machine."""

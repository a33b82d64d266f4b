"""Making evidence: one attester for each kind of TEE, behind one protocol.

``open("simulated", disk=..., rng=..., clock=...)`` or ``open("auto", ...)``, which takes the
machine's own TEE where it has one.
"""

from __future__ import annotations

from casemate.tee.choose import KINDS, Found, Machine, detect, look, open, open_anchor
from casemate.tee.protocol import Tee

__all__ = ["KINDS", "Found", "Machine", "Tee", "detect", "look", "open", "open_anchor"]

"""A genuine Nitro document against a trust policy: do we want what it says?

Each field of the policy is one check by its own name, and an ``Unchecked`` field is reported with
its reason. All are looked at before the first failure is raised. Codes are
``evidence.appraise-<check>``.

 1. ``debug``: PCR0 to PCR2 are there and none is zero (AWS, "Nitro Enclaves User Guide": in debug
    mode they are, and the host reads the enclave's console).
 2. ``pcr-<n>``: an admitted value, for each register that the policy names.
 3. ``module-id``, ``instance``: admitted ones only. The parent instance stands before ``-enc`` in
    module_id.
 4. ``age``: the document was made at most so long ago, and not in the future but for what clocks
    may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from casemate.attest.judge import Judged, among, every, fields, unwanted
from casemate.attest.nitro.abi import PCR_BYTES, Document
from casemate.attest.nitro.policy import NitroPolicy
from casemate.attest.verdict import Checks, Unchecked

MEASURED: Final = (0, 1, 2)
# Seconds that the clocks of a verifier and of AWS may differ.
SKEW: Final = 60
_MEND = "Ask the operator to run what the trust policy admits, or change the policy knowingly."


def is_debug(document: Document) -> bool:
    """Whether a measured register is zero or not there."""
    zero = bytes(PCR_BYTES)
    return any(document.pcrs.get(index, zero) == zero for index in MEASURED)


def instance(document: Document) -> str:
    """The parent instance; "" where module_id names none."""
    name, found, _ = document.module_id.rpartition("-enc")
    return name if found else ""


def _judge(document: Document, policy: NitroPolicy, now: float) -> Iterator[Judged]:
    if isinstance(policy.debug, Unchecked):
        yield "debug", policy.debug, "", ""
    else:
        on = is_debug(document)
        yield "debug", policy.debug or not on, "on" if on else "off", "it off"
    if isinstance(policy.pcrs, Unchecked):
        yield "pcrs", policy.pcrs, "", ""
    else:
        for index, admitted in sorted(policy.pcrs.items()):
            yield among(f"pcr-{index}", document.pcrs.get(index, b"").hex(), admitted, "not there")
    yield among("module-id", document.module_id, policy.module_ids, "not there")
    yield among("instance", instance(document), policy.instances, "not there")
    if isinstance(policy.max_age, Unchecked):
        yield "age", policy.max_age, "", ""
    else:
        age = now - document.timestamp / 1000
        ok = -SKEW <= age <= policy.max_age
        yield "age", ok, f"{age:.0f} s", f"at most {policy.max_age} s"


def appraise(document: Document, policy: NitroPolicy, *, now: float, checks: Checks) -> None:
    """Follow the procedure above; raises the first failure once all checks are recorded."""
    every(fields(_judge(document, policy, now), partial(unwanted, "document", _MEND)), checks)

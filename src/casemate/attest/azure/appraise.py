"""A confidential VM's evidence against a trust policy: do we want what it says?

The hardware's report and the quote are held against their own parts of the policy (``hardware``,
``tpm.appraise``); here is what the runtime claims say. Each field is one check by its own name; all
are looked at before the first failure is raised. Codes are ``evidence.appraise-<check>``.

 1. ``vm-secure-boot``, ``vm-console``: secure-boot and console-enabled of the configuration have
    their values; what the claims do not state is not that value.
 2. ``vm-id``: vmUniqueId is admitted. ``user-data``: user-data is admitted.
 3. ``aik``: the certificate of the attestation key comes along, up to a pinned root.
"""

from __future__ import annotations

from collections.abc import Iterator

from casemate.attest.azure.abi import HclReport
from casemate.attest.azure.policy import AzurePolicy
from casemate.attest.judge import Judged, among
from casemate.attest.verdict import Unchecked


def judge(hcl: HclReport, rooted: bool, policy: AzurePolicy) -> Iterator[Judged]:
    """The checks above. rooted: whether the key's certificate ends in a pinned root."""
    for name, key, wanted in (
        ("vm-secure-boot", "secure-boot", policy.secure_boot),
        ("vm-console", "console-enabled", policy.console),
    ):
        found = hcl.configuration.get(key)
        shown = str(found).lower() if isinstance(found, bool) else "not stated"
        if isinstance(wanted, Unchecked):
            yield name, wanted, "", ""
        else:
            yield name, found is wanted, shown, str(wanted).lower()
    vm = hcl.configuration.get("vmUniqueId")
    yield among("vm-id", vm.upper() if isinstance(vm, str) else "not stated", policy.vm_ids)
    yield among("user-data", hcl.user_data.hex(), policy.user_data)
    if isinstance(policy.aik, Unchecked):
        yield "aik", policy.aik, "", ""
    else:
        shown = "rooted" if rooted else "not there, or not up to a root"
        yield "aik", rooted or not policy.aik, shown, "a certificate up to a pinned root"

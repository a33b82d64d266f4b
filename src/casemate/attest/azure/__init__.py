"""Azure confidential VMs: ``abi`` parses the paravisor's report, ``collateral`` what stands beside
it, ``verify`` checks the hardware's report, the vTPM's quote and how they hang together,
``appraise`` holds the result against the policy of ``policy``."""

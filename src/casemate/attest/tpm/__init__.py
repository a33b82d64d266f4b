"""TPM 2.0: ``abi`` parses quotes and signatures, ``eventlog`` the log of measurements,
``collateral`` what stands beside them, ``certificates`` and ``verify`` check what is signed,
``appraise`` holds the result against the policy of ``policy``."""

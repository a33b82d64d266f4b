"""TPM 2.0: ``abi`` parses quotes and signatures, ``eventlog`` the log of measurements,
``collateral`` the certificates and PCR values, ``verify`` checks what is signed, ``appraise`` holds
the result against the policy of ``policy``."""

"""AWS Nitro Enclaves: ``abi`` parses the attestation document, ``collateral`` the certificates,
``verify`` checks signatures and chain, ``appraise`` holds the result against a trust policy."""

"""AMD SEV-SNP: ``abi`` parses the report, ``collateral`` the certificates, ``verify`` checks
signatures and endorsements, ``appraise`` holds the result against a trust policy."""

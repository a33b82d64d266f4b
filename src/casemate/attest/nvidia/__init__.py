"""NVIDIA GPUs and NVSwitches: ``abi`` parses the SPDM report, ``collateral`` finds certificates,
reference values and revocation answers, ``xmldsig`` and ``rim`` check reference values, ``ocsp``
answers of a responder, ``verify`` checks signatures, ``appraise`` holds the result against a
policy."""

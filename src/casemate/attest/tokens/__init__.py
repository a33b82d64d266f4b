"""Attestation tokens of services: ``abi`` parses tokens and claims, ``collateral`` certificates and
key sets, ``verify`` checks signatures and times, ``appraise`` holds the claims against a trust
policy. A token is a service's word about evidence that it saw: it replaces the CPU vendor's root by
the service's."""

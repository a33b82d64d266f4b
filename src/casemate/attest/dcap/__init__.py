"""Evidence of Intel SGX enclaves and TDX guests: DCAP quotes with their collateral."""

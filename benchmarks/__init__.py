"""Measurements, started by ``python -m benchmarks.NAME``; docs/benchmarks.md has the figures."""

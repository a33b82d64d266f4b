"""The engine's step beside plain PyTorch's and other private ones: docs/benchmarks-engine.md."""

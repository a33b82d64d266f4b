"""The engine's step beside plain PyTorch and other private steps: ``python -m benchmarks.engine``."""

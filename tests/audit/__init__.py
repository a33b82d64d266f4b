"""The audit of the claimed epsilon, over the real step (docs/audit.md); ``python -m audit``."""

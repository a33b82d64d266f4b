"""The server under crashes, lying disks, restored state and races. ``python -m torture --help``."""

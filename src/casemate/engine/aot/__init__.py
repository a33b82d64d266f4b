"""The native step: a job's step compiled ahead of time, without Python and libtorch."""

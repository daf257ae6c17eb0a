"""Kernels for GPUs, in Triton. torch's own operations do the same everywhere else, and are the tests' oracle."""

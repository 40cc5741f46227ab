"""Kernels for GPUs, written in Triton's language."""

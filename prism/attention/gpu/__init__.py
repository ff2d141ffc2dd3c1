"""Triton kernels of the CUDA backend. Imported by workers of CUDA devices only."""

"""Triton kernels of the sampling and verification ops."""

"""Triton kernels of the attention ops. Importing this package imports no Triton; its modules with kernels do."""

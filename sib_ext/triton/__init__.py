"""Triton kernels: one module per op, for GPUs without native kernels. Imported when an op first runs in them."""

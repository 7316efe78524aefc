"""Triton kernels, which import only torch and triton."""

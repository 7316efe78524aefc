"""Stands for lmms-eval: the same calls, on clips of random patches."""

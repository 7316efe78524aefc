"""Attention backends, one file each. Backends differ in speed, never in the result."""

"""Measures dense attention and XAttention by their parts, each checked before it is timed."""

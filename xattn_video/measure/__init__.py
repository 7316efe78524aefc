"""Measures the operator's speed, and how far sparse videos are from dense ones."""

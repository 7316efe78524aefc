"""Measures the speed of the operator, and how far sparse videos are from dense videos."""

"""Trains a small language model on generated RULER forms."""

"""Scores language models with public harnesses, dense and sparse."""

"""Stands for lm-evaluation-harness: the same calls, on prompts of random tokens."""

from lm_eval.evaluator import CALLS, NOISE, simple_evaluate

__all__ = ["CALLS", "NOISE", "simple_evaluate"]

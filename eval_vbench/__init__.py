"""VBench: prompts, sampling, scoring and tables."""

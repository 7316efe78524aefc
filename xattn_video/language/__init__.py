"""The transformers side: sparse prefill of long prompts through its attention interface."""

"""When attention is sparse, and how much."""

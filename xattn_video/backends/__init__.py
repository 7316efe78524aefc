"""Attention backends, one file each. A backend differs from another in time, never in meaning."""

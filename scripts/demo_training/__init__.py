"""Training of the demo model: `scripts/train_demo_model.py` runs these stages."""

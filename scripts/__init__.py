"""Lets `python -m scripts.NAME` find what `python scripts/NAME.py` finds beside the script."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

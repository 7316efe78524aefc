"""Lets `python -m scripts.NAME` import modules beside the script, as `python scripts/NAME.py`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

"""The examples and the bench that times them lie at the top of a checkout, beside the packages."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

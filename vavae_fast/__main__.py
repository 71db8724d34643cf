"""python -m vavae_fast = vavae-fast."""

import sys

from vavae_fast.cli import main

sys.exit(main())

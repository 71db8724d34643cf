"""Train LightningDiT on latents, on one process or many: `torchrun --nproc-per-node N train.py --config FILE [--fused] [key=value ...]`.

The same as `vavae-fast train`.
"""

import sys

from vavae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

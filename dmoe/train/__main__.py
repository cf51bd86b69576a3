"""`torchrun ... -m dmoe.train [PRESET|CONFIG.yaml] [options]`: `dmoe train` as a module, which torchrun can start."""

import sys

from dmoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""python -m pretrain CONFIG [key=value ...]: the entry point for torchrun.

`cots pretrain` does the same in one process.
"""

import sys

from cots.config import read_config
from cots.errors import CotsError
from pretrain.trainer import pretrain

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m pretrain CONFIG [key=value ...]")
    try:
        pretrain(read_config(sys.argv[1], sys.argv[2:]))
    except CotsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)

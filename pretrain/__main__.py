"""python -m pretrain CONFIG [key=value ...]: the entry point for torchrun.

`cots pretrain` does the same in one process.
"""

import sys

from cots.errors import CotsError
from pretrain.launch import launch

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m pretrain CONFIG [key=value ...]")
    try:
        launch(sys.argv[1], sys.argv[2:])
    except CotsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)

"""python -m pretrain CONFIG [key=value ...]: the entry point for torchrun.

`cots pretrain` does the same in one process.
"""

import sys

from cots.errors import CotsError


def main(arguments: list[str]) -> int:
    """Run a training; returns the exit code: 0 done, 1 a user's error, 2 wrong usage, 130 interrupted."""
    if not arguments:
        print("usage: python -m pretrain CONFIG [key=value ...]", file=sys.stderr)
        return 2
    try:
        from pretrain.launch import launch  # here, so that Ctrl-C while it loads is caught too

        launch(arguments[0], arguments[1:])
    except CotsError as error:
        sys.stderr.write(f"Error: {error}\n")  # at once: print's two writes mix with other ranks'
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

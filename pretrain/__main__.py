"""python -m pretrain CONFIG [key=value ...]: the entry point for torchrun.

`cots pretrain` does the same in one process.
"""

import sys

from pretrain.command import exit_code


def main(arguments: list[str]) -> int:
    """Run a training; returns the exit code: 0 done, 1 a user's error, 2 wrong usage, 130 interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m pretrain CONFIG [key=value ...]", file=sys.stderr)
        return 0 if arguments else 2

    def train() -> None:
        from pretrain.launch import launch  # here, so that Ctrl-C while it loads is caught too

        launch(arguments[0], arguments[1:])

    return exit_code(train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

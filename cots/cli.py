"""The `cots` command: what it ends with, however it ends."""

import sys

from cots.errors import CotsError


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a user's error (one sentence on stderr), 2 wrong usage, 130 interrupted.
    """
    try:
        from cots.commands.application import app  # here, so that Ctrl-C while it loads is caught too

        app()
    except CotsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

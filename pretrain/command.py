"""How a command of this part ends."""

import sys
from collections.abc import Callable

from cots.errors import CotsError


def exit_code(command: Callable[[], None]) -> int:
    """Run a command; returns 0 done, 1 a user's error (one sentence on stderr), 130 interrupted."""
    try:
        command()
    except CotsError as error:
        sys.stderr.write(f"Error: {error}\n")  # at once: print's two writes mix with other ranks'
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0

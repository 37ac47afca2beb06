"""How many of a run's files may be unreadable: each is told of, and past a share of all the run stops."""

from collections.abc import Callable

from cots.errors import MediaError, SourceError

ENOUGH_TO_JUDGE = 20  # samples of a stream of unknown length


class BadFiles:
    """Takes the files that a run cannot read, as `on_error`, and ends the run when they are too many of all.

    Args:
        max_share: the share of all files that is allowed; 1 never ends it.
        on_error: told of each.
        advice: what to do, the end of the error's sentence.

    Attributes:
        errors: so far.
    """

    def __init__(self, max_share: float, on_error: Callable[[MediaError], None], advice: str) -> None:
        self.errors: list[MediaError] = []
        self._max_share = max_share
        self._on_error = on_error
        self._advice = advice
        self._total: int | None = None

    def __call__(self, error: MediaError) -> None:
        """
        Raises:
            SourceError: they are too many, once it is known of how many.
        """
        self.errors.append(error)
        self._on_error(error)
        self._judge()

    def of(self, total: int) -> None:
        """All files are listed, those among them that cannot be read too.

        Raises:
            SourceError: they are too many.
        """
        self._total = total
        self._judge()

    def _judge(self) -> None:
        if self._total is not None and self.errors:
            require_readable(len(self.errors), self._total, self._max_share, self.errors[-1], 1, self._advice)


def require_readable(
    failed: int,
    seen: int,
    max_bad_share: float,
    last: MediaError,
    enough: int,
    advice: str = "mend the source or allow more",
) -> None:
    """Stop a run of which too many samples cannot be read.

    Args:
        failed, seen: unreadable samples, and all so far.
        max_bad_share: the share of these that is allowed.
        last: the last one's error.
        enough: samples that must have been seen.
        advice: what to do.

    Raises:
        SourceError: more are unreadable.
    """
    if seen >= enough and failed > max_bad_share * seen:
        raise SourceError(
            f"{failed} of {seen} files could not be read, more than the allowed share of {max_bad_share:g} "
            f"(the last one: {last}); {advice}."
        )

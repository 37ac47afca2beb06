"""Entries of sources that cannot be used: which they are, and when they are too many to go on."""

from collections.abc import Callable, Sequence

from cots.errors import MediaError, TrainingError
from pretrain.pair_sources import PairSource, TablePairs

_FEW = 1000  # entries or samples, of which as many may be bad as of this number


def too_many(bad: int, among: int, max_bad_share: float) -> bool:
    """Whether so many bad ones are more than `data.max_bad_share` allows: of few, one bad one says little."""
    return bad > max_bad_share * max(among, _FEW)


def entries_left_out(source: PairSource) -> list[MediaError]:
    """What a source names and does not hold: files that are missing or no media, and entries without a caption."""
    return source.left_out if isinstance(source, TablePairs) else []


def name_left_out(sources: Sequence[PairSource], max_bad_share: float, say: Callable[[str], None]) -> None:
    """Name every entry that is left out.

    Raises:
        TrainingError: they are too many.
    """
    left_out = [error for source in sources for error in entries_left_out(source)]
    for error in left_out:
        say(f"left out {error.path}: {error.reason}")
    entries = sum(map(len, sources)) + len(left_out)
    if too_many(len(left_out), entries, max_bad_share):
        raise TrainingError(
            f"{len(left_out)} of {entries} entries of data.train cannot be used, more than data.max_bad_share allows; "
            "they are named above."
        )

"""Who embeds what: every sample is settled once, whoever dies on the way, and one that kills its worker is found.

A worker is given samples ahead of its needs, and acknowledges each. When it dies, those that it had not acknowledged
are suspects, and given again to a worker that holds nothing else: many in groups, few one by one, and so the members
of a group at which a worker dies. A sample that was given alone and killed its worker is condemned; all others are
settled.
"""

from collections import deque
from collections.abc import Sequence
from math import ceil

from cots.data.samples import Sample
from cots.errors import CotsError

VIDEO_WEIGHT = 16  # images that a video counts as
FEWEST = 8  # samples given at once towards the end, so that a worker of several cores can use them
GROUP = 64  # suspects given together, while there are more than two groups of them
DEATHS_IN_A_ROW = 4  # for each worker


class Ledger:
    """The samples of one run, by their positions.

    Args:
        samples: what is to be embedded.
        workers: how many there are, numbered from 0.
        window: most images that a worker holds unacknowledged; a video counts as `VIDEO_WEIGHT` of them.
    """

    def __init__(self, samples: Sequence[Sample], workers: int, window: int) -> None:
        self._samples = samples
        self._window = window
        self._next = 0
        self._suspects: deque[list[int]] = deque()
        self._held: list[dict[int, int]] = [{} for _ in range(workers)]  # position -> weight
        self._weights = [0] * workers
        self._investigating: set[int] = set()  # workers that hold suspects
        self._deaths_in_a_row = 0
        self.settled = 0

    @property
    def finished(self) -> bool:
        return self.settled == len(self._samples)

    def take(self, worker: int) -> list[int]:
        """The positions to give a worker at this moment; none if it holds enough or nothing is left.

        Towards the end a worker is given less, so that all end together.
        """
        held = self._held[worker]
        if not held and self._suspects:
            self._investigating.add(worker)
            return self._give(worker, self._suspects.popleft())
        share = max(ceil((len(self._samples) - self._next) / (2 * len(self._held))), FEWEST)
        if worker in self._investigating or self._weights[worker] > 0.75 * self._window or len(held) > 0.75 * share:
            return []
        given: list[int] = []
        weight = self._weights[worker]
        while self._next < len(self._samples) and len(held) + len(given) < share:
            weight += self._weight(self._next)
            if weight > self._window and (held or given):
                break
            given.append(self._next)
            self._next += 1
        return self._give(worker, given)

    def settle(self, worker: int, position: int) -> bool:
        """Note an acknowledgement; False if the worker does not hold the sample, which others may have settled."""
        weight = self._held[worker].pop(position, None)
        if weight is None:
            return False
        self._weights[worker] -= weight
        if not self._held[worker]:
            self._investigating.discard(worker)
        self._deaths_in_a_row = 0
        self.settled += 1
        return True

    def bury(self, worker: int, cause: str) -> int | None:
        """Note that a worker has died; it holds nothing any more.

        Args:
            worker: which one; whoever takes its place has its number.
            cause: of its death.

        Returns:
            the position of a sample that is now settled as one that kills its worker; None if there is none.

        Raises:
            CotsError: workers die though they are given other samples each time.
        """
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > DEATHS_IN_A_ROW * len(self._held):
            raise CotsError(
                f"{self._deaths_in_a_row} workers died one after another without embedding anything (the last one "
                f"by {cause}); see above what they said, and try fewer workers or a smaller --batch-size."
            )
        held, self._held[worker], self._weights[worker] = list(self._held[worker]), {}, 0
        alone = worker in self._investigating and len(held) == 1
        self._investigating.discard(worker)
        if alone:
            self.settled += 1
            return held[0]
        size = GROUP if len(held) > 2 * GROUP else 1
        self._suspects.extend(held[start : start + size] for start in range(0, len(held), size))
        return None

    def _give(self, worker: int, positions: list[int]) -> list[int]:
        self._held[worker] |= {position: self._weight(position) for position in positions}
        self._weights[worker] = sum(self._held[worker].values())
        return positions

    def _weight(self, position: int) -> int:
        return VIDEO_WEIGHT if self._samples[position].kind == "video" else 1

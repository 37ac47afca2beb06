"""Exact search on a GPU: all vectors as float16 on the device, read once for a batch of queries.

Two passes. The first multiplies queries with vectors on the tensor cores and keeps of each block of 64 or 128 vectors
only the highest score, its maximum. The second takes the blocks with the highest maxima, scores their vectors with
float32 queries, and keeps the k best.

Why the hits are exact. Let every block's maximum be right. If one of the k best vectors, of score t, lay outside the k
blocks with the highest maxima, each of these would hold a vector of at least the maximum of that block, so of at least
t: k vectors that are as good, and the result differs only in ties. (A second level works alike: the highest maxima
themselves are looked for in the groups of 64 blocks that have the highest.)

The maxima are not quite right, because the tensor cores take half-precision queries. Let e bound the error of a score
in the first pass: by Cauchy and Schwarz, the norm of what rounding took from the query times the greatest norm of a
vector, plus the rounding of the sums. With k + 4 + k / 8 blocks chosen, let m be the highest maximum that was not. No
vector outside scores above m + e. So if the k-th best score found is at least m + e, nothing was missed. This is
checked for every query. Those that fail, because very many vectors are nearly as good as the k-th, are asked again with
queries of twice the precision: a second half-precision number for what the first leaves out, whose scores are added on
the chip. So are at most 64 queries from the start, for which the time goes into reading the vectors anyway. What then
remains of e (below 1e-6 for unit vectors) is what any order of summing in float32 has.

Any k is answered; for a large one the second pass has more to read, and fewer queries are answered at a time. Where a
filter allows few vectors, these are copied together before they are searched, so that it costs less than none; else the
first pass takes the filter as bits. Where few scores are to be made, the second pass makes all of them without a first,
since so few kernels take longer to start than to run.

Where the time goes on an H200, for N = 10 M of 256 dimensions (5.1 GB) and k = 10 (benchmarks/exact_search.py):

    one query, 1.35 ms       first pass 1.16: 512 B a vector at 4.4 TB/s; choosing and second pass 0.10; the rest Python
    1,024 queries, 9.4 ms    first pass 7.2: 5.2 TFLOP at 96 % of the rate, and 640 MB of maxima instead of 40 GB
                             of scores; choosing 0.5; second pass 0.1; the rest Python, and copies
"""

import numpy as np
import torch
from torch.nn.functional import pad

from cots.errors import GalleryError
from index.allowed_rows import Filters, Searched
from index.exact import checked_queries, require_mask
from index.recorded import RecordedSearches
from index.topk_passes import LARGEST_TILE, Passes, Rows, padded_width, passes_for

UPLOAD = 16_384  # vectors that are copied to the device at a time
SPARE = 0.125  # of the vectors, room for more, where there is memory for it
GROUP = 64  # blocks
FEW_QUERIES = 64  # precise ones cost nothing extra
FEW_SCORES = 2**17  # are sooner made than chosen from
MOST_QUERIES = 1024
MOST_RECORDED = 128  # hits; to choose more takes what cannot be recorded
SCRATCH = 2**30  # bytes that a search may take beside the vectors and what is kept of filters


class ExactGpuIndex:
    """N vectors with ids on a device, searched by inner product; what `index.exact.ExactIndex` is on the CPU.

    Args:
        vectors: (N, D), any float type, of unit norm, on any device; kept as float16, in which galleries store them.
        ids: (N,) int64, unique.
        device: where they are kept.
        passes: by default the quickest that the device can run.

    Attributes:
        passes: how they are searched.

    Raises:
        GalleryError: they do not fit into the device's memory; the message says how many would.
    """

    kind = "exact"

    def __init__(
        self,
        vectors: np.ndarray | torch.Tensor,
        ids: np.ndarray,
        device: str | torch.device = "cuda",
        passes: Passes | None = None,
    ) -> None:
        self._dimension = vectors.shape[1]
        self._width = padded_width(self._dimension)
        self._vectors = torch.zeros(0, self._width, dtype=torch.float16, device=device)
        self.device = self._vectors.device
        self.passes = passes or passes_for(self.device, self._width)
        self._count = 0
        self._ids = np.empty(0, np.int64)
        self._unusable = np.empty(0, np.int64)  # positions of vectors that are not finite
        self._norm = 0.0  # the greatest of a vector
        self._recorded = RecordedSearches(self._width, self.device)
        self._filters = Filters(Rows(self._vectors, 0), self._unusable)
        self.append(vectors, ids)

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64."""
        return self._ids[: self._count]

    @property
    def vectors(self) -> torch.Tensor:
        """(N, D) float16 on the device."""
        return self._vectors[: self._count, : self._dimension]

    def reserve(self, count: int) -> None:
        """Make room for so many vectors, no fewer than there are; those that are there move.

        Raises:
            GalleryError: there is not enough memory.
        """
        capacity = max(-(-count // LARGEST_TILE), 1) * LARGEST_TILE
        try:
            vectors = self._vectors.new_zeros(capacity, self._width)
        except torch.OutOfMemoryError as error:
            raise self._too_large(count) from error
        vectors[: self._count] = self._vectors[: self._count]
        self._vectors = vectors
        self._filters = Filters(Rows(vectors, self._count), self._unusable)

    def append(self, vectors: np.ndarray | torch.Tensor, ids: np.ndarray) -> None:
        """Add M vectors behind the others, which stay where they are as long as there is room.

        Args:
            vectors: (M, D), any float type, of unit norm, on any device.
            ids: (M,) int64, that no other vector has.

        Raises:
            GalleryError: they do not fit into the device's memory. The index is then what it was.
        """
        end = self._count + len(vectors)
        if end > len(self._vectors):
            try:
                self.reserve(int((1 + SPARE) * end))
            except GalleryError:
                self.reserve(end)
        unusable, norm = [self._unusable], self._norm
        try:
            for start in range(0, len(vectors), UPLOAD):
                block = _as_halves(vectors[start : start + UPLOAD]).to(self.device)
                spoilt, longest = self._put(self._count + start, block)
                unusable.append(self._count + start + spoilt)
                norm = max(norm, longest)
        except torch.OutOfMemoryError as error:
            raise self._too_large(end) from error
        if end > len(self._ids):
            self._ids = np.concatenate([self.ids, np.empty(len(self._vectors) - self._count, np.int64)])
        self._ids[self._count : end] = ids
        self._count, self._unusable, self._norm = end, np.concatenate(unusable), norm
        self._filters = Filters(Rows(self._vectors, end), self._unusable)  # those there were know nothing of these

    def _put(self, start: int, block: torch.Tensor) -> tuple[np.ndarray, float]:
        """Store vectors (M, D) float16. Those that are not finite become zero, and are never looked at.

        Returns:
            which these are, and the greatest norm of the others.
        """
        usable = block.isfinite().all(dim=1)
        block = torch.where(usable[:, None], block, 0)
        target = self._vectors[start : start + len(block)]
        target[:, : self._dimension] = block
        target[:, self._dimension :] = 0
        return (~usable).nonzero().flatten().cpu().numpy(), float(block.norm(dim=1, dtype=torch.float32).amax())

    def _too_large(self, count: int) -> GalleryError:
        size = 2 * self._width
        room = _free_memory(self.device)
        return GalleryError(
            f"{count:,} vectors of {self._dimension} dimensions need {count * size / 1e9:.1f} GB of {self.device}, "
            f"where {room / 1e9:.1f} GB are free, enough for {room // size:,}; free some of its memory, or search on "
            "the CPU."
        )

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query; see `index.exact.ExactIndex.search`.

        A filter that is asked with often should be read-only (`allowed.flags.writeable = False`): the last few such are
        kept on the device, as long as nothing is appended, and must not change.

        Raises:
            GalleryError: the queries have another dimension or are not finite, `allowed` is of other rows, or the
                device's memory is full.
        """
        queries = checked_queries(queries, self._dimension)
        require_mask(allowed, self._count)
        try:
            with torch.cuda.device_of(self._vectors):
                return self._best(queries, k, allowed)
        except torch.OutOfMemoryError as error:
            raise GalleryError(
                f"The memory of {self.device} is full: a search for {k} of {self._count:,} vectors needs up to "
                f"{SCRATCH / 1e9:.1f} GB beside them; ask for fewer, or search on the CPU."
            ) from error

    def _best(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids (Q, K): the best vectors that are finite, then those that are not."""
        searched = self._filters.searched(allowed)
        k = min(k, searched.finite + len(searched.unusable))
        found = min(k, searched.finite)
        scores = np.full((len(queries), k), np.nan, np.float32)
        positions = np.empty((len(queries), k), np.int64)
        positions[:, found:] = searched.unusable[: k - found]
        if found and len(queries):
            answer = self._recorded_answer if self._is_recorded(searched, len(queries), found) else self._answers
            scores[:, :found], positions[:, :found] = answer(searched, queries, found)
        return scores, self._ids[positions]

    def _is_recorded(self, searched: Searched, queries: int, k: int) -> bool:
        """Whether a search may come again, costs little, and fits into the memory that one may take."""
        if self.device.type != "cuda" or searched.number is None or k > MOST_RECORDED:
            return False
        return queries <= min(FEW_QUERIES, self._batch(searched.rows, k))

    def _recorded_answer(self, searched: Searched, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        def search(asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scores, places, _ = self._search(searched.rows, asked, k, precise=True)
            return scores, places if searched.origin is None else searched.origin[places]

        return self._recorded.answer(queries, (self.passes, searched.number, k), search)

    def _answers(self, searched: Searched, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (Q, k) of the best."""
        rows = searched.rows
        asked = torch.tensor(queries, device=self.device)
        if self._dimension < self._width:
            asked = pad(asked, (0, self._width - self._dimension))
        parts = [self._answer(rows, part, k) for part in asked.split(self._batch(rows, k))]
        scores, places = (torch.cat(part) for part in zip(*parts, strict=True))
        if searched.origin is not None:
            places = searched.origin[places]
        return scores.cpu().numpy(), places.cpu().numpy()

    def _batch(self, rows: Rows, k: int) -> int:
        """How many queries are answered at once, so that what is kept of each stays within `SCRATCH`."""
        block = self.passes.block(MOST_QUERIES, precise=False)
        chosen = min(_chosen(k), -(-rows.count // block))
        numbers = rows.count // block + 4 * chosen * (block + GROUP)
        batch = min(SCRATCH // (4 * numbers), MOST_QUERIES)
        return max(batch - batch % 128 if batch > 128 else batch, 1)

    def _answer(self, rows: Rows, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (Q, width) float32 -> scores (Q, k), descending, and positions among the rows (Q, k) int64."""
        precise = len(queries) <= FEW_QUERIES or not self.passes.rounds
        scores, places, elsewhere = self._search(rows, queries, k, precise)
        if precise or elsewhere is None:
            return scores, places
        uncertain = (scores[:, -1] < elsewhere + self._error(queries)).nonzero().flatten()
        for start in range(0, len(uncertain), FEW_QUERIES):
            part = uncertain[start : start + FEW_QUERIES]
            scores[part], places[part], _ = self._search(rows, queries[part], k, precise=True)
        return scores, places

    def _search(
        self, rows: Rows, queries: torch.Tensor, k: int, precise: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The two passes, or the second over everything: scores and positions (Q, k), and the highest maximum (Q,) of
        the blocks that were not rescored, or None if all were."""
        block = self.passes.block(len(queries), precise)
        blocks = -(-rows.count // block)
        partial = rows.count % block > 0
        chosen = _chosen(k) + partial
        elsewhere = None
        if chosen >= blocks or len(queries) * rows.count <= FEW_SCORES:
            best = torch.arange(blocks, device=self.device).expand(len(queries), -1)
        else:
            scale = _scale(queries)
            maxima = self.passes.maxima(rows, queries / scale, precise)
            if partial:  # what is behind the last vector may have raised its maximum, or hidden it
                maxima[-1] = torch.inf
            highest, best = _highest(maxima, chosen + 1)
            best, elsewhere = best[:, :chosen], highest[:, chosen] * scale[:, 0]
        scores, found = self.passes.scores(rows, queries, best, block).topk(k, dim=1)
        places = best.gather(1, found // block) * block + found % block
        return scores, places, elsewhere

    def _error(self, queries: torch.Tensor) -> torch.Tensor:
        """(Q,) by how much a maximum can be off because the queries (Q, width) were rounded to half precision."""
        scale = _scale(queries)
        scaled = queries / scale
        rounding = (scaled - scaled.half().float()).norm(dim=1)
        summing = self._width * 2.0**-24 * scaled.norm(dim=1)
        return (rounding + summing) * scale[:, 0] * self._norm


def _scale(queries: torch.Tensor) -> torch.Tensor:
    """(Q, 1) the largest magnitude in each query, by which it is divided so as neither to overflow half precision nor
    to vanish in it."""
    return queries.norm(torch.inf, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _as_halves(vectors: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(vectors, torch.Tensor):
        return vectors.half()
    with np.errstate(over="ignore"):  # what becomes infinite is told apart later
        return torch.from_numpy(np.array(vectors, dtype=np.float16))


def _chosen(k: int) -> int:
    """How many blocks are rescored for k hits: a few more than k, so that the k-th stands clear of the rest."""
    return k + 4 + k // 8


def _highest(maxima: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of each query's maxima (blocks, Q): values (Q, count), descending, and blocks (Q, count) int64."""
    whole = len(maxima) // GROUP
    if whole < 4 * count:
        return maxima.T.topk(count, dim=1)
    of_groups = maxima[: whole * GROUP].unflatten(0, (whole, GROUP)).amax(dim=1)
    groups = of_groups.T.topk(count, dim=1).indices
    blocks = (groups[:, :, None] * GROUP + torch.arange(GROUP, device=maxima.device)).flatten(1)
    rest = torch.arange(whole * GROUP, len(maxima), device=maxima.device).expand(len(blocks), -1)
    blocks = torch.cat([blocks, rest], dim=1)
    values, which = maxima.T.gather(1, blocks).topk(count, dim=1)
    return values, blocks.gather(1, which)


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process could still take."""
    free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(min(free, limit - torch.cuda.memory_reserved(device)), 0)

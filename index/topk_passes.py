"""The two passes of exact search over vectors on a device: block maxima, and the scores of chosen blocks.

`TritonPasses` runs the kernels of `index.topk_kernels`; `TorchPasses` does the same with matrix products, for devices
that Triton does not know, and as the slow twin in the tests.
"""

import logging
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any, Protocol

import torch

LARGEST_TILE = 256  # the capacity of what is searched is a multiple of it
SLICE = 64  # dimensions that `streamed_maxima` takes at a time
WHOLE = 256  # vectors of up to so many dimensions lie on the chip whole
RESCORED = 32  # vectors that one program of `block_scores` takes
TORCH_ROWS = 65_536
RESERVED = 2048  # bytes of shared memory that a program takes beside its tiles
log = logging.getLogger("cots")


@dataclass(frozen=True)
class Rows:
    """Vectors that are searched.

    Attributes:
        vectors: (capacity, width) float16, finite; capacity is a multiple of `LARGEST_TILE`, width what
            `padded_width` gives.
        count: how many of them are in use.
        mask: (capacity / 32,) int32, in which bit i % 32 of word i // 32 says whether vector i may be found, and 0 from
            `count` on; None allows all.
    """

    vectors: torch.Tensor
    count: int
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class TileShape:
    """How a kernel cuts up the scores.

    Attributes:
        kernel: "resident" or "streamed", see `index.topk_kernels`.
        queries, tile: rows and columns of a tile of scores.
        block: vectors that share a maximum; divides `tile`.
        stages: tiles, or slices of them, that are on their way or in use at once.
        warps: of a program.
    """

    kernel: str
    queries: int
    tile: int
    block: int
    stages: int
    warps: int

    def shared_bytes(self, width: int) -> int:
        """Shared memory of a program for vectors of a width."""
        if self.kernel == "resident":
            halves = (self.queries + self.stages * self.tile) * width
        else:
            halves = self.stages * (self.queries + self.tile) * min(width, SLICE)
        return 2 * halves + RESERVED


# Best first, by `benchmarks/exact_search.py --sweep` on 10 M x 256; the first that fits is taken. Up to 64 queries are
# precise ones, for which the memory bus is the limit; with many it is the tensor cores.
FEW_QUERIES = (
    TileShape("streamed", 64, 128, 128, stages=4, warps=4),
    TileShape("streamed", 64, 64, 64, stages=2, warps=4),
)
SOME = 128
SOME_QUERIES = (
    TileShape("resident", 128, 64, 64, stages=4, warps=8),
    TileShape("streamed", 128, 256, 128, stages=3, warps=8),
    TileShape("streamed", 128, 128, 128, stages=3, warps=8),
    TileShape("streamed", 64, 64, 64, stages=2, warps=4),
)
MANY_QUERIES = (TileShape("resident", 256, 64, 64, stages=3, warps=8), *SOME_QUERIES)

# What the sweep compares, each for any number of queries.
SWEPT = (
    *FEW_QUERIES,
    *MANY_QUERIES,
    TileShape("resident", 16, 64, 64, stages=3, warps=4),
    TileShape("resident", 64, 64, 64, stages=4, warps=4),
    TileShape("resident", 64, 128, 128, stages=3, warps=4),
    TileShape("resident", 64, 128, 128, stages=3, warps=8),
    TileShape("resident", 256, 64, 64, stages=2, warps=8),
    TileShape("resident", 256, 32, 32, stages=4, warps=8),
    TileShape("streamed", 64, 128, 128, stages=3, warps=4),
    TileShape("streamed", 64, 128, 64, stages=4, warps=4),
    TileShape("streamed", 64, 256, 128, stages=4, warps=4),
)


class Passes(Protocol):
    """What searches.

    Attributes:
        rounds: whether `maxima` are of queries rounded to half precision, unless precise ones are asked for.
    """

    rounds: bool

    def block(self, queries: int, precise: bool) -> int:
        """Vectors in a block when so many queries are asked."""

    def maxima(self, rows: Rows, queries: torch.Tensor, precise: bool) -> torch.Tensor:
        """The highest score in each block; of a last one that is not full, anything.

        Queries (Q, width) float32, at most 1 in magnitude -> (blocks, Q) float32.
        """

    def scores(self, rows: Rows, queries: torch.Tensor, blocks: torch.Tensor, block: int) -> torch.Tensor:
        """The scores of some blocks' vectors, -inf for those that may not be found.

        Queries (Q, width) float32, blocks (Q, C) int64 -> (Q, C * block) float32.
        """


def passes_for(device: torch.device, width: int) -> Passes:
    """The quickest passes that a device, such as cuda:0, can run."""
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            import triton

            facts = triton.runtime.driver.active.utils.get_device_properties(device.index)
        except (ImportError, RuntimeError, CalledProcessError) as error:  # it compiles its launchers
            log.warning(
                "Triton cannot be used (%s), so exact search on the GPU takes several times as long; it needs a C "
                "compiler and Python's headers.",
                error,
            )
            return TorchPasses()
        return TritonPasses(width, facts["multiprocessor_count"], facts["max_shared_mem"])
    return TorchPasses()


def padded_width(dimension: int) -> int:
    """Dimensions that a vector has on the device, of which the last may be 0: what the kernels can cut up."""
    if dimension > WHOLE:
        return -(-dimension // SLICE) * SLICE
    return max(1 << (dimension - 1).bit_length(), 16)


class TritonPasses:
    """The passes by Triton kernels.

    Args:
        width: of the vectors.
        multiprocessors: of the device.
        shared: bytes of shared memory that a program may take; as many as one multiprocessor has.
        few, some, many: the shapes to choose from for precise queries, for up to `SOME` others, and for more.
    """

    rounds = True

    def __init__(
        self,
        width: int,
        multiprocessors: int,
        shared: int,
        few: tuple[TileShape, ...] = FEW_QUERIES,
        some: tuple[TileShape, ...] = SOME_QUERIES,
        many: tuple[TileShape, ...] = MANY_QUERIES,
    ) -> None:
        from index import topk_kernels

        self._kernels = topk_kernels
        self._width = width
        self._multiprocessors = multiprocessors
        self._shared = shared
        self._few, self._some, self._many = map(self._first_fitting, (few, some, many))

    def _first_fitting(self, shapes: tuple[TileShape, ...]) -> TileShape:
        """The last of the shapes is small enough for every device."""
        usable = (shape for shape in shapes if shape.kernel == "streamed" or self._width <= WHOLE)
        return next((shape for shape in usable if shape.shared_bytes(self._width) <= self._shared), shapes[-1])

    def _shape(self, queries: int, precise: bool) -> TileShape:
        if precise:
            return self._few
        return self._some if queries <= SOME else self._many

    def block(self, queries: int, precise: bool) -> int:
        return self._shape(queries, precise).block

    def maxima(self, rows: Rows, queries: torch.Tensor, precise: bool) -> torch.Tensor:
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = self._shape(len(queries), precise)
        parts = 2 if precise else 1
        asked = queries.new_zeros(-(-parts * len(queries) // shape.queries) * shape.queries // parts, self._width)
        asked[: len(queries)] = queries
        asked = _halves(asked) if precise else asked.half()
        tiles = -(-rows.count // shape.tile)
        maxima = queries.new_empty(tiles * (shape.tile // shape.block), len(asked) // parts)
        depth = min(SLICE, self._width) if shape.kernel == "streamed" else self._width
        vectors = TensorDescriptor.from_tensor(rows.vectors, [shape.tile, depth])
        asked_tiles = TensorDescriptor.from_tensor(asked, [shape.queries, depth])
        settings: dict[str, Any] = {
            "QUERIES": shape.queries,
            "TILE": shape.tile,
            "BLOCK": shape.block,
            "STAGES": shape.stages,
            "PAIRED": precise,
            "MASKED": rows.mask is not None,
            "num_warps": shape.warps,
        }
        mask = maxima if rows.mask is None else rows.mask
        groups = len(asked) // shape.queries
        if shape.kernel == "resident":
            lanes = max(min(self._multiprocessors * self._programs(shape) // groups, tiles), 1)
            self._kernels.resident_maxima[(groups * lanes,)](
                vectors, asked_tiles, mask, maxima, len(asked), tiles, lanes, **settings
            )
        else:
            self._kernels.streamed_maxima[(tiles * groups,)](
                vectors, asked_tiles, mask, maxima, len(asked), D=self._width, DEPTH=depth, **settings
            )
        return maxima[: -(-rows.count // shape.block), : len(queries)]

    def _programs(self, shape: TileShape) -> int:
        """How many programs run on a multiprocessor at once; one too many would wait until all others have ended."""
        return max(min(self._shared // shape.shared_bytes(self._width), 16 // shape.warps), 1)

    def scores(self, rows: Rows, queries: torch.Tensor, blocks: torch.Tensor, block: int) -> torch.Tensor:
        scores = queries.new_empty(len(queries), blocks.shape[1] * block)
        depth = next(depth for depth in (256, 128, 64, 32, 16) if self._width % depth == 0)
        members = min(RESCORED, block)
        self._kernels.block_scores[(scores.shape[1] // members, len(queries))](
            rows.vectors,
            queries.contiguous(),
            scores if rows.mask is None else rows.mask,
            blocks.contiguous(),
            scores,
            rows.count,
            blocks.shape[1],
            D=self._width,
            DEPTH=depth,
            BLOCK=block,
            ROWS=members,
            MASKED=rows.mask is not None,
        )
        return scores


def _halves(queries: torch.Tensor) -> torch.Tensor:
    """Queries (8 G, width) as halves and what these leave out: 8 rows of the one, 8 of the other, and so on."""
    groups = queries.unflatten(0, (-1, 8))
    parts = queries.new_empty(len(groups), 2, 8, queries.shape[1], dtype=torch.float16)
    parts[:, 0] = groups
    torch.sub(groups, parts[:, 0], out=parts[:, 1])
    return parts.flatten(0, 2)


class TorchPasses:
    """The passes by matrix products in float32.

    Args:
        block: vectors that share a maximum.
    """

    rounds = False

    def __init__(self, block: int = 128) -> None:
        self._block = block

    def block(self, queries: int, precise: bool) -> int:
        return self._block

    def maxima(self, rows: Rows, queries: torch.Tensor, precise: bool) -> torch.Tensor:
        blocks = -(-rows.count // self._block)
        maxima = queries.new_empty(blocks, len(queries))
        for start in range(0, blocks * self._block, TORCH_ROWS):
            places = torch.arange(start, min(start + TORCH_ROWS, blocks * self._block), device=queries.device)
            scores = rows.vectors[places].float() @ queries.T
            scores[~_allowed(rows, places)] = -torch.inf
            first = start // self._block
            of_blocks = scores.unflatten(0, (-1, self._block)).amax(dim=1)
            maxima[first : first + len(of_blocks)] = of_blocks
        return maxima

    def scores(self, rows: Rows, queries: torch.Tensor, blocks: torch.Tensor, block: int) -> torch.Tensor:
        places = (blocks[:, :, None] * block + torch.arange(block, device=blocks.device)).flatten(1)
        scores = torch.stack(
            [rows.vectors[chosen].float() @ query for chosen, query in zip(places, queries, strict=True)]
        )
        return torch.where(_allowed(rows, places), scores, -torch.inf)


def _allowed(rows: Rows, places: torch.Tensor) -> torch.Tensor:
    """Which of some places hold a vector that may be found."""
    if rows.mask is None:
        return places < rows.count
    return (rows.mask[places // 32] >> (places % 32).int()) & 1 != 0

"""Triton kernels of exact search: the maxima of blocks of scores, and the scores of chosen blocks.

The scores of Q queries against N vectors are never written: 10 M x 1,024 of them would be 40 GB. Each tile of them is
reduced on the chip to one maximum for every block of `BLOCK` vectors; `index/exact_gpu.py` says why the blocks with the
highest maxima hold the best vectors.

    resident_maxima   queries stay on the chip, tiles of vectors pass by, each of them whole
    streamed_maxima   both pass by in slices of DEPTH dimensions, for vectors that are too long for the chip

All take `vectors` (N, D) and `queries` (R, D), R a multiple of QUERIES, as descriptors of float16 tensors: on Hopper
their tiles are fetched by the copy engine. With MASKED, bit i % 32 of word i // 32 of `mask` (int32) says whether
vector i may be found. What comes out is `maxima` (blocks, R) float32: what is written together lies together. With
PAIRED, each 16 rows of `queries` are the high parts of 8 queries and then their low parts, whose scores are added, and
`maxima` is (blocks, R / 2).

The tile shapes are in `index/topk_passes.py`. In machine code for an H100 none of them spills, the products are `wgmma`
instructions that read both sides from shared memory, and a loop waits for the copy engine and the tensor cores once a
tile; Triton's pipeliner does not let the reduction of one tile overlap with the product of the next.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (Triton reads every annotation but its own constexpr as a value.)

import triton
import triton.language as tl


@triton.jit
def _only_allowed(scores, tile, mask, TILE: tl.constexpr):
    """Scores (R, TILE) with -inf for the vectors that the mask does not allow."""
    words = tl.load(mask + tile * (TILE // 32) + tl.arange(0, TILE // 32))
    allowed = tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :]) & 1, (TILE,)) != 0
    return tl.where(allowed[None, :], scores, float("-inf"))


@triton.jit
def _store_maxima(scores, maxima, tile, first, rows, TILE: tl.constexpr, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """Reduce scores (QUERIES, TILE) of the queries from `first` on to the maximum of each block, and write these."""
    QUERIES: tl.constexpr = scores.shape[0]
    BLOCKS: tl.constexpr = TILE // BLOCK
    PARTS: tl.constexpr = 2 if PAIRED else 1
    if PAIRED:  # the high and the low part stand eight rows apart, which is where one thread holds both
        scores = tl.sum(tl.reshape(scores, (QUERIES // 16, 2, 8, TILE)), axis=1)
    highest = tl.max(tl.reshape(scores, (QUERIES // PARTS, BLOCKS, BLOCK)), axis=2)
    columns = first // PARTS + tl.arange(0, QUERIES // PARTS)
    blocks = (tile * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    tl.store(maxima + blocks[None, :] * (rows // PARTS) + columns[:, None], highest)


@triton.jit(do_not_specialize=["tiles", "lanes"])
def resident_maxima(
    vectors,
    queries,
    mask,
    maxima,
    rows,
    tiles,
    lanes,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Block maxima by `lanes` programs for each QUERIES of the `rows` queries, all of which run at once.

    The programs of one lane take the same tiles in the same order, so that a tile crosses the memory bus once and is
    found in the cache by all of them but the first. Tiles are loaded STAGES - 1 ahead.
    """
    groups = rows // QUERIES
    first = tl.program_id(0) % groups * QUERIES
    asked = queries.load([first, 0])
    for tile in tl.range(tl.program_id(0) // groups, tiles, lanes, num_stages=STAGES):
        members = vectors.load([tile * TILE, 0])
        scores = tl.dot(asked, tl.trans(members))
        if MASKED:
            scores = _only_allowed(scores, tile, mask, TILE)
        _store_maxima(scores, maxima, tile, first, rows, TILE, BLOCK, PAIRED)


@triton.jit
def streamed_maxima(
    vectors,
    queries,
    mask,
    maxima,
    rows,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Block maxima, one tile of scores a program.

    The queries are the faster axis of the grid, so that the programs that need one tile of vectors run together.
    """
    groups = rows // QUERIES
    tile = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * QUERIES
    scores = tl.zeros((QUERIES, TILE), tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        scores = tl.dot(queries.load([first, start]), tl.trans(vectors.load([tile * TILE, start])), scores)
    if MASKED:
        scores = _only_allowed(scores, tile, mask, TILE)
    _store_maxima(scores, maxima, tile, first, rows, TILE, BLOCK, PAIRED)


@triton.jit(do_not_specialize=["count", "chosen"])
def block_scores(
    vectors,
    queries,
    mask,
    blocks,
    scores,
    count,
    chosen,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The scores of ROWS vectors of one of a query's chosen blocks, all in float32.

    Args: `queries` (Q, D) float32, `blocks` (Q, chosen) int64 -> `scores` (Q, chosen * BLOCK) float32, -inf where a
    row may not be found. The grid is (chosen * BLOCK / ROWS, Q).
    """
    query = tl.program_id(1).to(tl.int64)
    pair = query * chosen + tl.program_id(0) // (BLOCK // ROWS)
    inside = tl.program_id(0) % (BLOCK // ROWS) * ROWS + tl.arange(0, ROWS)
    places = tl.load(blocks + pair) * BLOCK + inside
    depth = tl.arange(0, DEPTH)
    found = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, DEPTH):
        members = tl.load(vectors + places[:, None] * D + (start + depth)[None, :])
        asked = tl.load(queries + query * D + start + depth)
        found += tl.sum(members.to(tl.float32) * asked[None, :], axis=1)
    allowed = places < count
    if MASKED:
        allowed = ((tl.load(mask + places // 32) >> (places % 32).to(tl.int32)) & 1) != 0
    tl.store(scores + pair * BLOCK + inside, tl.where(allowed, found, float("-inf")))

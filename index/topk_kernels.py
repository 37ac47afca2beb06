"""Triton kernels of exact search: the maxima of blocks of scores, and the scores of chosen blocks.

The scores of Q queries against N vectors are never written: 10 M x 1,024 of them would be 40 GB. Each tile of them is
reduced on the chip to one maximum for every block of `BLOCK` vectors; `index/exact_gpu.py` says why the k blocks with
the highest maxima hold the k best vectors.

A program of `stationary_maxima` keeps one tile of vectors on the chip and lets all queries pass by, so that the
vectors, which are the larger side by far, cross the memory bus once; the queries come from the cache. A tile of which
no vector is allowed is not read at all.

All kernels take `vectors` (capacity, D) float16, of which the first `count` rows are in use. With `MASKED` bit i % 32 of
word i // 32 of `mask` (int32) says whether row i may be found; with `GATHER` the kernel looks only at the rows that
`positions` (count,) int32 names. `maxima` is (blocks, padded queries) float32: what is written together lies together.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _rows(places: Any, count: Any, mask: Any, positions: Any, MASKED: tl.constexpr, GATHER: tl.constexpr) -> Any:
    """The rows that stand at some places, and which of them may be found."""
    allowed = places < count
    rows = places
    if GATHER:
        rows = tl.load(positions + places, mask=allowed, other=0)
    if MASKED:
        words = tl.load(mask + rows // 32, mask=allowed, other=0)
        allowed = allowed & (((words >> (rows % 32)) & 1) != 0)
    return rows.to(tl.int64), allowed


@triton.jit
def _store_maxima(
    scores: Any, maxima: Any, tile: Any, places: Any, padded: Any, TILE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Reduce scores (queries, TILE) to the maximum of each block, and write them at the queries' `places`."""
    QUERIES: tl.constexpr = scores.shape[0]
    BLOCKS: tl.constexpr = TILE // BLOCK
    if BLOCKS == 1:
        tl.store(maxima + tile.to(tl.int64) * padded + places, tl.max(scores, axis=1))
    else:
        highest = tl.max(tl.reshape(scores, (QUERIES, BLOCKS, BLOCK)), axis=2)
        blocks = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        tl.store(maxima + blocks[None, :] * padded + places[:, None], highest)


@triton.jit
def _pass_queries(
    tile_vectors: Any,
    allowed: Any,
    queries: Any,
    maxima: Any,
    tile: Any,
    padded: Any,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL: tl.constexpr,
) -> None:
    """All queries against one tile of vectors (D, TILE)."""
    depth = tl.arange(0, D)
    for first in tl.range(0, padded, QUERIES, num_stages=STAGES):
        places = first + tl.arange(0, QUERIES)
        asked = tl.load(queries + places[:, None] * D + depth[None, :])
        scores = tl.dot(asked, tile_vectors)
        if PARTIAL:
            scores = tl.where(allowed[None, :], scores, float("-inf"))
        _store_maxima(scores, maxima, tile, places, padded, TILE, BLOCK)


@triton.jit
def stationary_maxima(
    vectors: Any,
    queries: Any,
    mask: Any,
    positions: Any,
    maxima: Any,
    count: Any,
    padded: Any,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """Block maxima, one tile of vectors a program; for a D that is a power of two and fits on the chip.

    `queries` is (padded, D) float16, padded a multiple of QUERIES. A tile whose vectors may all be found, which is
    nearly every one, does not pay for the masking of its scores.
    """
    tile = tl.program_id(0)
    rows, allowed = _rows(tile * TILE + tl.arange(0, TILE), count, mask, positions, MASKED, GATHER)
    members = tl.sum(allowed.to(tl.int32), axis=0)
    if members > 0:
        depth = tl.arange(0, D)
        pointers = vectors + rows[None, :] * D + depth[:, None]
        if members == TILE:
            columns = tl.load(pointers)
            _pass_queries(
                columns, allowed, queries, maxima, tile, padded, D, QUERIES, TILE, BLOCK, STAGES, PARTIAL=False
            )
        else:
            columns = tl.load(pointers, mask=allowed[None, :], other=0.0)
            _pass_queries(
                columns, allowed, queries, maxima, tile, padded, D, QUERIES, TILE, BLOCK, STAGES, PARTIAL=True
            )
    else:
        for first in range(0, padded, QUERIES):
            nothing = tl.full((QUERIES, TILE), float("-inf"), tl.float32)
            _store_maxima(nothing, maxima, tile, first + tl.arange(0, QUERIES), padded, TILE, BLOCK)


@triton.jit
def streamed_maxima(
    vectors: Any,
    queries: Any,
    mask: Any,
    positions: Any,
    maxima: Any,
    count: Any,
    padded: Any,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """Block maxima for any D that is a multiple of DEPTH: one tile of scores a program, both sides read in slices.

    The queries are the faster axis of the grid, so that the programs that need one tile of vectors run together.
    """
    tile = tl.program_id(0) // (padded // QUERIES)
    places = tl.program_id(0) % (padded // QUERIES) * QUERIES + tl.arange(0, QUERIES)
    rows, allowed = _rows(tile * TILE + tl.arange(0, TILE), count, mask, positions, MASKED, GATHER)
    scores = tl.zeros((QUERIES, TILE), tl.float32)
    if tl.sum(allowed.to(tl.int32), axis=0) > 0:
        depth = tl.arange(0, DEPTH)
        for start in tl.range(0, D, DEPTH, num_stages=STAGES):
            asked = tl.load(queries + places[:, None] * D + (start + depth)[None, :])
            columns = tl.load(vectors + rows[None, :] * D + (start + depth)[:, None], mask=allowed[None, :], other=0.0)
            scores = tl.dot(asked, columns, scores)
    scores = tl.where(allowed[None, :], scores, float("-inf"))
    _store_maxima(scores, maxima, tile, places, padded, TILE, BLOCK)


@triton.jit
def single_maxima(
    vectors: Any,
    queries: Any,
    mask: Any,
    positions: Any,
    maxima: Any,
    count: Any,
    padded: Any,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """Block maxima of a few queries, each by multiply and add without tensor cores; nothing passes through shared memory.

    WIDTH is D rounded up to a power of two. The second and later queries find the tile's vectors in registers.
    """
    tile = tl.program_id(0)
    rows, allowed = _rows(tile * TILE + tl.arange(0, TILE), count, mask, positions, MASKED, GATHER)
    depth = tl.arange(0, WIDTH)
    tile_vectors = tl.load(
        vectors + rows[:, None] * D + depth[None, :], mask=allowed[:, None] & (depth < D)[None, :], other=0.0
    )
    for query in range(padded):
        asked = tl.load(queries + query * D + depth, mask=depth < D, other=0.0)
        scores = tl.sum(tile_vectors.to(tl.float32) * asked.to(tl.float32)[None, :], axis=1)
        scores = tl.where(allowed, scores, float("-inf"))
        _store_maxima(scores[None, :], maxima, tile, query + tl.arange(0, 1), padded, TILE, BLOCK)


@triton.jit
def block_scores(
    vectors: Any,
    queries: Any,
    mask: Any,
    positions: Any,
    blocks: Any,
    scores: Any,
    count: Any,
    chosen: Any,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    """The scores of the vectors of each query's chosen blocks, with the queries as float32.

    Args: `queries` (Q, D) float32, `blocks` (Q, chosen) int64 -> `scores` (Q, chosen * BLOCK) float32, -inf where a
    row may not be found.
    """
    query = tl.program_id(1)
    pair = query.to(tl.int64) * chosen + tl.program_id(0)
    places = tl.load(blocks + pair).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    rows, allowed = _rows(places, count, mask, positions, MASKED, GATHER)
    depth = tl.arange(0, WIDTH)
    inside = (depth < D)[None, :]
    members = tl.load(vectors + rows[:, None] * D + depth[None, :], mask=allowed[:, None] & inside, other=0.0)
    asked = tl.load(queries + query * D + depth, mask=depth < D, other=0.0)
    found = tl.sum(members.to(tl.float32) * asked[None, :], axis=1)
    tl.store(scores + pair * BLOCK + tl.arange(0, BLOCK), tl.where(allowed, found, float("-inf")))

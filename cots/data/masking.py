"""What the token level hides: blocks of patches, and word pieces. Shapes depend on the configuration alone, never on
the draw, so that a compiled step is compiled once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cots.data.sample_draws import SampleDraws
from cots.errors import ConfigError

IGNORED = -100
_BLOCKS = 8


def hidden_count(grid: int, share: float) -> int:
    """How many of grid * grid patches are hidden: at least one, and not all.

    Raises:
        ConfigError: the grid is too small to hide a part of it.
    """
    if grid < 2:
        raise ConfigError(
            f"A token grid of {grid} x {grid} has no part to hide; give larger pictures or a finer tower."
        )
    return min(max(1, round(share * grid * grid)), grid * grid - 1)


def hide_patches(count: int, grid: int, share: float, draws: SampleDraws) -> Tensor:
    """Blockwise masks (BEiT, Bao et al. 2022, algorithm 1), exactly `hidden_count` patches each.

    Rectangles of a sixth to a half of the hidden area, with aspects of 0.3 to 1 / 0.3, are laid one after another
    until the count is reached; the last one is cut at random patches.

    Returns:
        (count, hidden_count) int64, ascending: row-major places of the hidden patches.
    """
    hidden = hidden_count(grid, share)
    size, shape, down, across = draws.uniform(count, 4, _BLOCKS).unbind(dim=1)
    area = hidden * (1 / 6 + size / 3)
    aspect = torch.exp((2 * shape - 1) * math.log(1 / 0.3))
    height = (area * aspect).sqrt().round().clamp(1, grid)
    width = (area / aspect).sqrt().round().clamp(1, grid)
    top = (down * (grid - height + 1)).floor()
    left = (across * (grid - width + 1)).floor()
    place = torch.arange(grid, device=size.device)
    rows = (place >= top[..., None]) & (place < (top + height)[..., None])  # (count, blocks, grid)
    columns = (place >= left[..., None]) & (place < (left + width)[..., None])
    covered = rows[..., :, None] & columns[..., None, :]  # (count, blocks, grid, grid)
    first = torch.where(covered.any(dim=1), covered.int().argmax(dim=1), _BLOCKS).flatten(1)
    order = first + draws.uniform(count, grid * grid)  # patches of the first block, then of the second, ...
    return order.topk(hidden, dim=1, largest=False).indices.sort(dim=1).values


def patch_mask(places: Tensor, grid: int) -> Tensor:
    """(B, K) places -> (B, grid * grid) bool, True where hidden."""
    mask = torch.zeros(len(places), grid * grid, dtype=torch.bool, device=places.device)
    return mask.scatter(1, places, True)


@dataclass
class HiddenWords:
    """Attributes:
    token_ids: (B, L) int64, with some word pieces replaced.
    places: (B, K) int64, the word pieces to predict.
    targets: (B, K) int64, what stood there, IGNORED in the places that a short caption leaves over.
    """

    token_ids: Tensor
    places: Tensor
    targets: Tensor


def hide_words(
    token_ids: Tensor,
    share: float,
    mask_id: int,
    special_ids: Tensor,
    vocabulary: int,
    draws: SampleDraws,
) -> HiddenWords:
    """BERT's masking (Devlin et al. 2019, section 3.1): of the word pieces to be predicted, 80 % become [MASK], 10 %
    another word piece, 10 % stay. Every caption that has a word hides at least one.

    Args:
        token_ids: (B, L) int64.
        share: of a caption's word pieces, special ones not counted.
        mask_id: the word piece that stands for a hidden one.
        special_ids: (S,) int64, word pieces that are never hidden ([PAD], [CLS], [SEP]).
        vocabulary: number of word pieces, from which the random ones are drawn.
        draws: what is hidden of each caption.
    """
    words = ~torch.isin(token_ids, special_ids)
    wanted = (words.sum(dim=1) * share).round().clamp_min(1)
    slots = max(1, round(token_ids.shape[1] * share))
    priority = draws.uniform(*token_ids.shape).masked_fill(~words, 2.0)
    chosen = priority.topk(slots, dim=1, largest=False)
    valid = (torch.arange(slots, device=token_ids.device) < wanted[:, None]) & (chosen.values < 2)
    targets = token_ids.gather(1, chosen.indices)
    draw = draws.uniform(*targets.shape)
    random_ids = draws.integers(vocabulary, *targets.shape)
    written = torch.where(draw < 0.8, mask_id, torch.where(draw < 0.9, random_ids, targets))
    written = torch.where(valid, written, targets)
    return HiddenWords(
        token_ids.scatter(1, chosen.indices, written), chosen.indices, targets.masked_fill(~valid, IGNORED)
    )

"""The queues of momentum features, one a modality: the negatives of many past batches (MoCo, He et al. 2020, 3.2).

Both queues share pointer and fill, so that row j of both comes from the same pair, and every row knows the item it
came from: another caption of the same picture is never a negative.
"""

import torch
from torch import Tensor, nn

NO_ITEM = -1


class FeatureQueue(nn.Module):
    """Ring buffers of unit-norm momentum features.

    Attributes:
        image, text: (Q, D) float32.
        item_ids: (Q,) int64, the item each row came from, NO_ITEM where nothing has been written.
        pointer: () int64, the row that is written next.
        fill: () int64, rows written so far, at most Q.
    """

    image: Tensor
    text: Tensor
    item_ids: Tensor
    pointer: Tensor
    fill: Tensor

    def __init__(self, size: int, dimension: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image", torch.zeros(size, dimension))
        self.register_buffer("text", torch.zeros(size, dimension))
        self.register_buffer("item_ids", torch.full((size,), NO_ITEM, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, item_ids: Tensor) -> None:
        """Write pairs over the oldest ones, around the end where the size is no multiple of the batch.

        Args:
            image, text: (B, D) momentum features of all ranks, in the same order on every rank.
            item_ids: (B,) int64.
        """
        if self.size == 0:
            return
        image, text, item_ids = image[-self.size :], text[-self.size :], item_ids[-self.size :]
        rows = (self.pointer + torch.arange(len(item_ids), device=item_ids.device)) % self.size
        self.image[rows] = image.to(self.image.dtype)
        self.text[rows] = text.to(self.text.dtype)
        self.item_ids[rows] = item_ids
        self.pointer.copy_((self.pointer + len(item_ids)) % self.size)
        self.fill.copy_((self.fill + len(item_ids)).clamp_max(self.size))

    def negatives_of(self, item_ids: Tensor) -> Tensor:
        """(B,) item ids -> (B, Q) bool: which rows are written and come from another item."""
        return (self.item_ids != NO_ITEM) & (self.item_ids != item_ids[:, None])

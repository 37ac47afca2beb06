"""Networks that compute in bf16 while their fp32 originals are optimized and averaged.

Autocast rounds weights anew in every forward pass and keeps the residual stream of a transformer in fp32; a copy whose
weights are bf16 moves half the bytes. Batch norms, projections to the sphere and all buffers stay in fp32.
"""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from cots.model.dual_encoder import DualEncoder
from cots.model.tower import lower_precision
from pretrain.network import TrainingNetwork

Network = TypeVar("Network", bound=nn.Module)


class WorkingCopy(Generic[Network]):
    """The network that computes. With `dtype` None it is the original itself, and nothing needs copying.

    Attributes:
        network: in training mode if the original is; it shares the original's buffers.
    """

    def __init__(self, original: Network, dtype: torch.dtype | None) -> None:
        self.network = original
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        if dtype is None:
            return
        self.network = copy.deepcopy(original)
        for name, buffer in original.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.network.get_submodule(owner)._buffers[leaf] = buffer
        for module in self.network.modules():
            if isinstance(module, DualEncoder):
                lower_precision(module, dtype)
            elif isinstance(module, TrainingNetwork):
                for head in (module.image_head, module.text_head):
                    if head is not None:
                        head.to(dtype)
        self._pairs = list(zip(original.parameters(), self.network.parameters()))

    @torch.no_grad()
    def take_weights(self) -> None:
        """Round the original's weights into the copy."""
        if self._pairs:
            torch._foreach_copy_([mine for _, mine in self._pairs], [theirs for theirs, _ in self._pairs])

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Move the gradients to the original, in fp32."""
        trained = [(theirs, mine) for theirs, mine in self._pairs if mine.grad is not None]
        for theirs, _ in trained:
            if theirs.grad is None:
                theirs.grad = torch.empty_like(theirs)
        if trained:
            torch._foreach_copy_([_gradient(theirs) for theirs, _ in trained], [_gradient(mine) for _, mine in trained])
        for _, mine in trained:
            mine.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad

"""Gradient caching (Gao et al. 2021): the loss of a whole batch, with all its negatives, in the memory of a part of it.

All parts are embedded without keeping anything, the loss gives the gradient of every embedding, and each part is
encoded again and differentiated with the gradients of its own embeddings.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.batch_norms import still_statistics
from pretrain.network import NetworkInput, TrainingNetwork


class EmbeddingCache:
    """The embeddings of a batch that goes through the network in equal parts.

    Attributes:
        image: (B, D), text: (B * captions, D) float32, without a graph. Differentiate a loss of them, then call
            `backward`.
    """

    def __init__(self, network: TrainingNetwork, parts: Sequence[NetworkInput]) -> None:
        self._parts = parts
        self._device = parts[0].pixels.device
        self._random_states = []
        embeddings = []
        for part in parts:
            self._random_states.append(_random_state(self._device))
            # with gradients, as the second encoding, so that a compiled one draws the same dropout; they are dropped
            with still_statistics(network):
                output = network(part.pixels, part.token_ids, counts=part.counts)
            embeddings.append((output.image.detach(), output.text.detach()))
            del output  # or the graphs of two parts would be there at once
        self.image, self.text = (torch.cat(side).requires_grad_() for side in zip(*embeddings))

    def backward(self, network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Carry the gradients of the embeddings into the weights, and with them those of the token level's losses.

        The second encoding draws the dropout of the first.

        Args:
            network: the one that embedded, perhaps wrapped.

        Returns:
            the mean of the token level's losses (0 without it), and values for the log, all detached and ().
        """
        assert self.image.grad is not None
        assert self.text.grad is not None
        count = len(self._parts)
        gradients = zip(self.image.grad.chunk(count), self.text.grad.chunk(count))
        masked_loss = torch.zeros((), device=self._device)
        scalars: dict[str, Tensor] = {}
        for index, (part, (image_gradient, text_gradient)) in enumerate(zip(self._parts, gradients)):
            _set_random_state(self._random_states[index], self._device)
            last = index == count - 1
            waiting: AbstractContextManager = nullcontext()
            if isinstance(network, DistributedDataParallel) and not last:
                waiting = network.no_sync()
            with waiting:
                output = network(part.pixels, part.token_ids, part.patches, part.words, part.counts)
                loss = (output.image * image_gradient).sum() + (output.text * text_gradient).sum()
                if output.masked_losses is not None:
                    mean = output.masked_losses.mean() / count
                    loss = loss + mean
                    masked_loss += mean.detach()
                with still_statistics(network):  # of layers that are computed again
                    loss.backward()
            for name, value in output.scalars.items():
                scalars[name] = scalars.get(name, 0) + value / count
        return masked_loss, scalars


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state)

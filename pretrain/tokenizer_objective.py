"""The loss of the discrete VAE, its schedules, and the revival of codes that nothing is assigned to.

With the names of cots/model/visual_tokenizer.py, for a batch of patches n and at progress p in [0, 1] of the training:

    L = R + b(p) KL_patch / log K + c KL_batch / log K
    R        = mean of (x - decoder(v))^2 (l2) or |x - decoder(v)| (l1), pixel values in [-1, 1]
    KL_patch = mean_n KL( q(. | x, n) || uniform )
    KL_batch = KL( mean_n q(. | x, n) || uniform )

The evidence lower bound has R and KL_patch (Ramesh et al. 2021, equation 1). KL_patch is the information that a token
tells about its patch plus KL_batch (Hoffman & Johnson 2016), and a single weight on both has to choose between tokens
that say little and a codebook that is hardly used. So the second part has a weight of its own, which costs no
information at all. For a Gaussian of the variance that the decoder attains, b = 2 R log K / (3 stride^2) makes L the
bound itself: about 0.002 for patches of 8 x 8 pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cots.model.visual_tokenizer import RelaxedPicture
from cots.objectives.gathering import gather, gather_with_gradient
from cots.tokenizer_config import VisualTokenizerObjectiveConfig


@dataclass
class TokenizerLoss:
    """Attributes:
    loss: what is minimised.
    scalars: detached parts of it by name, in nats and in squared pixel values of [0, 1].
    """

    loss: Tensor
    scalars: dict[str, Tensor]


class TokenizerObjective(nn.Module):
    """The loss; it counts what each code was chosen for.

    State: `counts` (K,) float32, patches of this rank assigned to each code since the last revival.
    """

    counts: Tensor

    def __init__(self, config: VisualTokenizerObjectiveConfig, codebook_size: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.zeros(codebook_size))

    def forward(self, picture: RelaxedPicture, pixels: Tensor, progress: float) -> TokenizerLoss:
        """The loss of a batch of pixels (B, 3, S, S) uint8 at `progress` of the training."""
        config, most = self.config, math.log(len(self.counts))
        difference = picture.reconstruction.float() - (pixels.float() / 127.5 - 1)
        squared = difference.square().mean()
        reconstruction = squared if config.reconstruction == "l2" else difference.abs().mean()
        kl_patch, kl_batch = divergences(picture.log_probabilities)
        self._count(picture.log_probabilities)
        weight = kl_weight(progress, config)
        loss = reconstruction + weight * kl_patch / most + config.usage_weight * kl_batch / most
        scalars = {
            "loss": loss,
            "reconstruction_error": squared / 4,
            "kl": kl_patch,
            "kl_batch": kl_batch,
        }
        return TokenizerLoss(loss, {name: value.detach() for name, value in scalars.items()})

    @torch.no_grad()
    def _count(self, log_probabilities: Tensor) -> None:
        tokens = log_probabilities.argmax(dim=1)
        self.counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=self.counts.dtype))

    @torch.no_grad()
    def revive(self, codes: nn.Parameter, features: Tensor, optimizer: torch.optim.Optimizer) -> int:
        """Place codes (K, D) that were hardly chosen on patches (M, D) of the batch that no code is near to.

        Jukebox (Dhariwal et al. 2020) restarts them on any patch; drawing patches by their distance from the nearest
        code (as k-means++ does, Arthur & Vassilvitskii 2007) spends them where something is missing. Returns how many
        were placed. The ranks stay equal: the first one's choice holds for all.
        """
        counts = gather(self.counts[None]).sum(dim=0)
        dead = (counts < self.config.revival * counts.sum() / len(counts)).nonzero().flatten()
        self.counts.zero_()
        if len(dead) == 0:
            return 0
        codes[dead] = draw_far_patches(features, codes, len(dead)).to(codes.dtype)
        if dist.is_initialized():
            dist.broadcast(codes.data, src=0)
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[codes]:
                optimizer.state[codes][name][dead] = 0  # the momentum was of where they lay before
        return len(dead)


def divergences(log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """KL_patch and KL_batch in nats, from (M, K) float32; the batch is that of all ranks."""
    most = math.log(log_probabilities.shape[1])
    probabilities = log_probabilities.exp()
    kl_patch = most + (probabilities * log_probabilities).sum(dim=1).mean()
    mean = gather_with_gradient(probabilities.mean(dim=0, keepdim=True)).mean(dim=0)
    return kl_patch, most + torch.special.xlogy(mean, mean).sum()


def draw_far_patches(features: Tensor, codes: Tensor, count: int) -> Tensor:
    """`count` of the unit vectors (M, D), drawn by their distance from the nearest of `codes` (K, D)."""
    nearest = torch.cat([(part @ F.normalize(codes, dim=1).T).amax(dim=1) for part in features.split(65536)])
    far = (1 - nearest).clamp_min(1e-6)
    return features[torch.multinomial(far, count, replacement=count > len(features))]


def temperature_at(progress: float, config: VisualTokenizerObjectiveConfig) -> float:
    """The Gumbel-softmax's temperature."""
    done = min(1.0, progress / config.temperature_steps) if config.temperature_steps else 1.0
    start, end = config.temperature_start, config.temperature_end
    if config.temperature_schedule == "exponential":
        return start * (end / start) ** done
    if config.temperature_schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return start + (end - start) * done


def kl_weight(progress: float, config: VisualTokenizerObjectiveConfig) -> float:
    """b(p): rises in a straight line over the warm-up."""
    return config.kl_weight * (min(1.0, progress / config.kl_warmup) if config.kl_warmup else 1.0)

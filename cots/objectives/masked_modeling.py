"""Token level: masked vision-language modelling without a fusion network.

Hidden patches are named by a discrete VAE (BEiT, Bao et al. 2022) and predicted from the image tower's outputs, to
which the paired text's global embedding is added; hidden word pieces are predicted from the text tower's outputs, to
which the paired image's global embedding is added (COTS, Lu et al. 2022, equations 4 to 7). The partner's embedding
is all that the other modality contributes: what it must know to help, it must have learnt to put there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cots.data.masking import IGNORED


@dataclass
class MaskedOutput:
    """Attributes:
    losses: (B,) float32, mean cross-entropy over an item's hidden places (0 if it has none).
    accuracy: () float32, share of all hidden places predicted right, without gradient.
    """

    losses: Tensor
    accuracy: Tensor


class MaskedModelingHead(nn.Module):
    """Predicts what was hidden from a tower's outputs there and from the partner's global embedding.

    Args:
        width: of the tower's outputs.
        dimension: of the global embeddings.
        classes: visual tokens or word pieces; `decoder` is left out if its weight is given in `forward` (word pieces
            are decoded by the tower's own word embeddings, as in BERT).
    """

    def __init__(self, width: int, dimension: int, classes: int, *, tied: bool) -> None:
        super().__init__()
        self.partner = nn.Linear(dimension, width)
        norm = nn.LayerNorm(width)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), norm)
        self.decoder = None if tied else nn.Linear(width, classes, bias=False)
        self.bias = nn.Parameter(torch.zeros(classes))
        # an untrained head speaks softly: its gradient would shake the towers more than the other levels teach them
        nn.init.constant_(norm.weight, 0.1)
        nn.init.normal_(self.partner.weight, std=0.02)
        nn.init.zeros_(self.partner.bias)
        if self.decoder is not None:
            nn.init.normal_(self.decoder.weight, std=0.02)

    def forward(
        self, tokens: Tensor, places: Tensor, targets: Tensor, partner: Tensor, tied_weight: Tensor | None = None
    ) -> MaskedOutput:
        """Cross-entropy at the hidden places only.

        Args:
            tokens: (B, N, C) outputs of the tower that saw the masked input.
            places: (B, K) int64, the hidden ones of the N.
            targets: (B, K) int64, IGNORED where there is nothing to predict.
            partner: (B, D) float32, the paired item's global embedding, from its unmasked input.
            tied_weight: (classes, C), if the head was built `tied`.
        """
        hidden = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        dtype = self.bias.dtype
        hidden = self.transform(hidden.to(dtype) + self.partner(partner.to(dtype))[:, None])
        weight = tied_weight if self.decoder is None else self.decoder.weight
        assert weight is not None
        logits = F.linear(hidden, weight, self.bias).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        counted = targets != IGNORED
        right = (logits.detach().argmax(dim=2) == targets) & counted
        return MaskedOutput(
            losses.view(targets.shape).sum(dim=1) / counted.sum(dim=1).clamp_min(1),
            right.sum() / counted.sum().clamp_min(1),
        )

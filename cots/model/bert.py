"""BERT (Devlin et al. 2019) with the parameter names of Hugging Face's BertModel, whose weights it takes unchanged."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PAD = 0
_EPSILON = 1e-12


class Embeddings(nn.Module):
    """(B, L) int64 -> (B, L, C): word piece + position + the embedding of the first segment, normalised."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, token_ids: Tensor) -> Tensor:
        words = self.word_embeddings(token_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(words + self.position_embeddings.weight[: token_ids.shape[1]]))


class SelfAttention(nn.Module):
    """Heads of scaled dot-product attention: (B, L, C), mask (B, 1, 1, L) bool -> (B, L, C)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.heads = heads
        self.dropout = dropout

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = states.shape
        parts = (self.query, self.key, self.value)
        # one product instead of three: a third of the width alone would leave a GPU half empty
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        joined = F.linear(states, weight, bias).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return attended.transpose(1, 2).reshape(batch, length, width)


class AddAndNorm(nn.Module):
    """The end of both halves of a layer: a linear map of what was computed, added to what came in, normalised."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, computed: Tensor, states: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(computed)) + states)


class Layer(nn.Module):
    """Attention and a feed-forward network, each with a residual connection normalised afterwards."""

    def __init__(self, width: int, heads: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(width, heads, dropout), "output": AddAndNorm(width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, intermediate)})
        self.output = AddAndNorm(intermediate, width, dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = self.attention["output"](self.attention["self"](states, mask), states)
        return self.output(F.gelu(self.intermediate["dense"](states)), states)


class Bert(nn.Module):
    """Word pieces (B, L) int64, zero-padded -> (B, L, width), the outputs of the last layer.

    Its computation depends on the shape of its input alone, so that captions padded to one length are compiled once.
    """

    def __init__(
        self, vocabulary: int, positions: int, width: int, layers: int, heads: int, intermediate: int, dropout: float
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocabulary, positions, width, dropout)
        stack = nn.ModuleList(Layer(width, heads, intermediate, dropout) for _ in range(layers))
        self.encoder = nn.ModuleDict({"layer": stack})
        self.activation_checkpointing = False
        self.apply(_initialise)

    @property
    def layers(self) -> nn.ModuleList:
        stack = self.encoder["layer"]
        assert isinstance(stack, nn.ModuleList)
        return stack

    def forward(self, token_ids: Tensor) -> Tensor:
        mask = (token_ids != PAD)[:, None, None, :]
        states = self.embeddings(token_ids)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                states = checkpoint(layer, states, mask, use_reentrant=False)
            else:
                states = layer(states, mask)
        return states


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()

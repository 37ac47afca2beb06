"""The text tower: BERT over word pieces."""

from torch import Tensor

from cots.model.bert import PAD, Bert
from cots.model.tower import TowerOutput, WordTower
from cots.model_config import TextTowerConfig


class TextTower(WordTower):
    """Word pieces (B, L) int64, zero-padded -> TowerOutput of width `width`."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.bert = Bert(
            config.vocabulary,
            config.positions,
            config.width,
            config.layers,
            config.heads,
            config.intermediate,
            config.dropout,
        )
        self.pooling = config.pooling
        self.width = config.width

    def forward(self, token_ids: Tensor) -> TowerOutput:
        tokens = self.bert(token_ids)
        if self.pooling == "cls":
            return TowerOutput(tokens[:, 0], tokens)
        weights = (token_ids != PAD).unsqueeze(-1).to(tokens.dtype)
        return TowerOutput((tokens * weights).sum(dim=1) / weights.sum(dim=1), tokens)

    @property
    def word_embeddings(self) -> Tensor:
        return self.bert.embeddings.word_embeddings.weight

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.bert.activation_checkpointing = enabled

    def layer_depths(self) -> dict[str, int]:
        depths = {}
        for name, _ in self.named_parameters():
            layer = name.removeprefix("bert.encoder.layer.")
            depths[name] = 0 if layer == name else 1 + int(layer.partition(".")[0])
        return depths

"""The text tower: BERT, and the WordPiece tokenizer that feeds it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from cots.config import TextTowerConfig
from cots.errors import ConfigError
from cots.model.image_tower import TowerOutput

PAD = 0


class TextTower(nn.Module):
    """Word pieces (B, L) int64, zero-padded -> TowerOutput of width `width`."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.intermediate,
                max_position_embeddings=config.positions,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                pad_token_id=PAD,
            ),
            add_pooling_layer=False,
        )
        self.pooling = config.pooling
        self.width = config.width

    def forward(self, token_ids: Tensor) -> TowerOutput:
        mask = token_ids != PAD
        tokens = self.bert(input_ids=token_ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return TowerOutput(tokens[:, 0], tokens)
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        return TowerOutput((tokens * weights).sum(dim=1) / weights.sum(dim=1), tokens)


class WordPieceTokenizer:
    """Texts -> (B, L) int64, padded to the longest of the batch or to `max_length`, truncated there."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.no_padding()

    @classmethod
    def from_file(cls, path: str | Path, max_length: int) -> "WordPieceTokenizer":
        """Read a `tokenizer.json`, or a BERT `vocab.txt` (taken as uncased).

        Raises:
            ConfigError: the file is missing or no tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"The tokenizer {path} does not exist; give a WordPiece tokenizer.json or vocab.txt.")
        try:
            if path.suffix == ".txt":
                return cls(BertWordPieceTokenizer(str(path), lowercase=True)._tokenizer, max_length)
            return cls(Tokenizer.from_file(str(path)), max_length)
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"The tokenizer {path} cannot be read: {error}.") from error

    def __call__(self, texts: Sequence[str], *, pad_to_max: bool = False) -> Tensor:
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        length = self.max_length if pad_to_max else max((len(ids) for ids in encoded), default=1)
        token_ids = torch.full((len(encoded), length), PAD, dtype=torch.int64)
        for row, ids in enumerate(encoded):
            token_ids[row, : len(ids)] = torch.tensor(ids)
        return token_ids

    @property
    def vocabulary(self) -> int:
        return self._tokenizer.get_vocab_size()

    def to_json(self) -> str:
        """The whole tokenizer as text, as `tokenizer.json` holds it."""
        return self._tokenizer.to_str()

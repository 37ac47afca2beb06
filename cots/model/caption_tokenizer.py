"""Captions to rows of ids: what the text towers read."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

from cots.errors import ConfigError
from cots.model.bert import PAD


def without_surrogates(text: str) -> str:
    """`?` for what is no character and no tokenizer takes: a byte of a command line that is not UTF-8, half a pair."""
    return text.encode("utf-8", "replace").decode()


class CaptionTokenizer(ABC):
    """Texts -> (B, L) int64, zero-padded to the longest of the batch or to `max_length`, truncated there."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str], *, pad_to_max: bool = False) -> Tensor:
        cleaned = [self._clean(without_surrogates(text)) for text in texts]
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)]
        length = self.max_length if pad_to_max else max((len(ids) for ids in encoded), default=1)
        token_ids = torch.full((len(encoded), length), PAD, dtype=torch.int64)
        for row, ids in enumerate(encoded):
            token_ids[row, : len(ids)] = torch.tensor(ids)
        return token_ids

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return self._tokenizer.get_vocab_size()

    @property
    @abstractmethod
    def mask_id(self) -> int:
        """The id that stands for a hidden word piece."""

    @property
    @abstractmethod
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are no part of a caption: padding, begin and end."""

    def to_json(self) -> str:
        """The whole tokenizer as text, as `tokenizer.json` holds it."""
        return self._tokenizer.to_str()

    def _clean(self, text: str) -> str:
        return text


class WordPieceTokenizer(CaptionTokenizer):
    """BERT's word pieces."""

    @classmethod
    def from_file(cls, path: str | Path, max_length: int) -> "WordPieceTokenizer":
        """Read a `tokenizer.json`, or a BERT `vocab.txt` (taken as uncased).

        Raises:
            ConfigError: the file is missing or no tokenizer, or one that puts no [CLS] before a caption.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"The tokenizer {path} does not exist; give a WordPiece tokenizer.json or vocab.txt.")
        try:
            if path.suffix == ".txt":
                tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)._tokenizer
            else:
                tokenizer = Tokenizer.from_file(str(path))
            found = cls(tokenizer, max_length)
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"The tokenizer {path} cannot be read: {error}.") from error
        if not tokenizer.num_special_tokens_to_add(False):
            raise ConfigError(
                f"The tokenizer {path} puts no [CLS] before a caption; save it with BERT's post-processor."
            )
        return found

    @property
    def mask_id(self) -> int:
        """The id of [MASK].

        Raises:
            ConfigError: the vocabulary has none.
        """
        found = self._tokenizer.token_to_id("[MASK]")
        if found is None:
            raise ConfigError(
                "The tokenizer has no [MASK], which masked modelling of text needs; give BERT's vocabulary or set "
                "objective.masked_modeling.text_weight=0."
            )
        return found

    @property
    def special_ids(self) -> tuple[int, ...]:
        found = (self._tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
        return (PAD, *(token_id for token_id in found if token_id is not None))

"""CLIP's byte pairs (Radford et al. 2021), with the merges that the open_clip package carries."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from cots.errors import ConfigError
from cots.model.bert import PAD
from cots.model.caption_tokenizer import CaptionTokenizer
from cots.model.open_clip_architecture import import_open_clip

_START, _END = "<start_of_text>", "<end_of_text>"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer(CaptionTokenizer):
    """What open_clip's tokenizer does, by the compiled one of `tokenizers`.

    The mask is the start token, which never stands inside a caption: CLIP has none of its own. Padding is 0, as
    open_clip pads, which is also the id of an exclamation mark inside a run of punctuation.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self._cleaning: Callable[[str], str] | None = None
        self._start, self._end = (tokenizer.get_vocab()[name] for name in (_START, _END))

    @classmethod
    def create(cls, max_length: int) -> "ClipTokenizer":
        """Build it from open_clip's vocabulary.

        Raises:
            MissingDependency: open_clip is not installed.
        """
        simple = import_open_clip().SimpleTokenizer()
        merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
        tokenizer = Tokenizer(models.BPE(simple.encoder, merges, end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        ids = [(name, simple.encoder[name]) for name in (_START, _END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=ids)
        return cls(tokenizer, max_length)

    @classmethod
    def from_file(cls, path: str | Path, max_length: int) -> "ClipTokenizer":
        """Read the `tokenizer.json` of a saved model.

        Raises:
            ConfigError: the file is missing or no tokenizer.
        """
        try:
            return cls(Tokenizer.from_file(str(path)), max_length)
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"The tokenizer {path} cannot be read: {error}.") from error

    @property
    def mask_id(self) -> int:
        return self._start

    @property
    def special_ids(self) -> tuple[int, ...]:
        return (PAD, self._start, self._end)

    def _clean(self, text: str) -> str:
        if self._cleaning is None:  # mended Unicode, one space for several, lower case
            import_open_clip()
            from open_clip.tokenizer import get_clean_fn

            self._cleaning = get_clean_fn("lower")
        return self._cleaning(text)

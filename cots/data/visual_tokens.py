"""Visual tokens stored in a webdataset shard beside the picture that they name.

The member `KEY.14x14.0123456789ab.tokens.npy` holds the tokens of KEY's picture on a grid of 14 x 14, named by the
tokenizer with this fingerprint: tokens of several grids and tokenizers can lie side by side, and those of another
tokenizer are never taken by mistake. It is a uint16 array (2, N, N): the tokens of the whole picture squashed to a
square, and those of its mirror image, which are not the mirrored tokens.
"""

import io
from collections.abc import Iterable, Mapping

import numpy as np

from cots.errors import SourceError

SUFFIX = "tokens.npy"
MOST_CODES = 2**16


def tokens_extension(grid: int, fingerprint: str) -> str:
    """The extension of the member, without its leading dot."""
    return f"{grid}x{grid}.{fingerprint[:12]}.{SUFFIX}"


def pack_tokens(tokens: np.ndarray) -> bytes:
    """(2, N, N) integers in [0, 65536) -> the content of a member."""
    content = io.BytesIO()
    np.save(content, tokens.astype(np.uint16), allow_pickle=False)
    return content.getvalue()


def stored_tokens(parts: Mapping[str, bytes], grid: int, fingerprint: str, mirrored: bool) -> np.ndarray:
    """The tokens of a whole picture, or of its mirror image.

    Args:
        parts: contents of a pair by extension, as `TarIndex.read` gives them.
        grid: patches a side.
        fingerprint: of the tokenizer that the tokens must come from.
        mirrored: whether the picture is shown mirrored.

    Returns:
        (grid * grid,) int64, row by row.

    Raises:
        SourceError: the pair has none for this grid and tokenizer, or they are damaged; what it has is named.
    """
    extension = tokens_extension(grid, fingerprint)
    if extension not in parts:
        raise SourceError(f"the shard has no tokens {extension} ({_what_there_is(parts)}); {_advice(parts, grid)}")
    try:
        tokens = np.load(io.BytesIO(parts[extension]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SourceError(f"the tokens {extension} are damaged ({error}); write the shard again") from error
    if tokens.shape != (2, grid, grid):
        raise SourceError(f"the tokens {extension} have the shape {tokens.shape}; write the shard again")
    return tokens[int(mirrored)].reshape(-1).astype(np.int64)


def _what_there_is(parts: Iterable[str]) -> str:
    there = sorted(extension for extension in parts if extension.endswith(SUFFIX))
    return f"it has {', '.join(there)}" if there else "it has none at all"


def _advice(parts: Iterable[str], grid: int) -> str:
    write = f"write them with `python -m pretrain.tokenize ... --grid {grid}"
    if any(extension.startswith(f"{grid}x{grid}.") and extension.endswith(SUFFIX) for extension in parts):
        return (
            "those are of another tokenizer: name it in objective.masked_modeling.visual_tokenizer, or "
            f"{write} --tokenizer DIR`"
        )
    return f"{write}`"

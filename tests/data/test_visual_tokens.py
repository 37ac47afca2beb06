import numpy as np
import pytest

from cots.data.shards import split_key
from cots.data.visual_tokens import pack_tokens, stored_tokens, tokens_extension
from cots.errors import SourceError

FINGERPRINT = "0123456789abcdef0123456789abcdef"


def test_tokens_come_back_as_they_were_stored() -> None:
    tokens = np.random.default_rng(0).integers(0, 65536, (2, 3, 3))
    extension = tokens_extension(3, FINGERPRINT)
    assert extension == "3x3.0123456789ab.tokens.npy"
    assert split_key(f"dir/0001.{extension}") == ("dir/0001", extension)  # beside the picture under one key
    parts = {"webp": b"", extension: pack_tokens(tokens)}
    for mirrored in (False, True):
        stored = stored_tokens(parts, 3, FINGERPRINT, mirrored)
        assert stored.dtype == np.int64
        assert stored.tolist() == tokens[int(mirrored)].flatten().tolist()


def test_tokens_of_another_grid_or_tokenizer_are_never_taken() -> None:
    parts = {tokens_extension(3, FINGERPRINT): pack_tokens(np.zeros((2, 3, 3)))}
    with pytest.raises(SourceError, match=r"no tokens 4x4.*it has 3x3\.0123456789ab\.tokens\.npy.*--grid 4"):
        stored_tokens(parts, 4, FINGERPRINT, False)
    with pytest.raises(SourceError, match=r"no tokens 3x3.*of another tokenizer.*masked_modeling\.visual_token"):
        stored_tokens(parts, 3, "f" + FINGERPRINT[1:], False)
    with pytest.raises(SourceError, match="it has none at all"):
        stored_tokens({"webp": b""}, 3, FINGERPRINT, False)


@pytest.mark.parametrize("content", [b"", b"no array", pack_tokens(np.zeros((2, 4, 4)))])
def test_damaged_tokens_are_named(content: bytes) -> None:
    extension = tokens_extension(3, FINGERPRINT)
    with pytest.raises(SourceError, match=r"3x3\.0123456789ab\.tokens\.npy"):
        stored_tokens({extension: content}, 3, FINGERPRINT, False)

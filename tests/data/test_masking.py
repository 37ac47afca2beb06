import pytest
import torch

from cots.data.masking import IGNORED, hidden_count, hide_patches, hide_words, patch_mask
from cots.data.sample_draws import SampleDraws
from cots.errors import ConfigError

PAD, CLS, SEP, MASK = 0, 101, 102, 103
SPECIAL = torch.tensor([PAD, CLS, SEP])
DRAWS = SampleDraws(0, torch.device("cpu"))


@pytest.mark.parametrize(("grid", "share", "expected"), [(14, 0.4, 78), (7, 0.4, 20), (2, 0.9, 3), (3, 0.01, 1)])
def test_the_hidden_count_is_exact(grid: int, share: float, expected: int) -> None:
    places = hide_patches(50, grid, share, DRAWS)
    assert hidden_count(grid, share) == expected
    assert places.shape == (50, expected)
    assert patch_mask(places, grid).sum(dim=1).tolist() == [expected] * 50
    assert (places.diff(dim=1) > 0).all()


def test_hidden_patches_form_blocks() -> None:
    """A hidden patch has far more hidden neighbours than the same number of patches drawn one by one would give."""
    mask = patch_mask(hide_patches(400, 14, 0.4, DRAWS), 14).view(400, 14, 14)

    def hidden_neighbours(mask: torch.Tensor) -> float:
        both = (mask[:, :, 1:] & mask[:, :, :-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
        return (both / mask.sum()).item()

    scattered = torch.rand(400, 196).argsort(dim=1).argsort(dim=1).view(400, 14, 14) < 78
    assert hidden_neighbours(mask) > 1.4 > 1.1 * hidden_neighbours(scattered)


def test_every_patch_is_hidden_now_and_then() -> None:
    often = patch_mask(hide_patches(3000, 7, 0.4, DRAWS), 7).float().mean(dim=0)
    assert often.min() > 0.1  # the corners, as in BEiT, less often than the middle
    assert often.max() < 0.75


def test_a_grid_of_one_patch_has_nothing_to_hide() -> None:
    with pytest.raises(ConfigError, match="no part to hide"):
        hidden_count(1, 0.4)


def _captions(lengths: list[int], length: int = 32) -> torch.Tensor:
    token_ids = torch.full((len(lengths), length), PAD)
    for row, words in enumerate(lengths):
        token_ids[row, 0], token_ids[row, words + 1] = CLS, SEP
        token_ids[row, 1 : words + 1] = torch.randint(1000, 2000, (words,))
    return token_ids


def test_words_are_hidden_as_bert_does() -> None:
    token_ids = _captions([20] * 4000)
    hidden = hide_words(token_ids, 0.15, MASK, SPECIAL, 30_000, DRAWS)
    asked = hidden.targets != IGNORED
    assert asked.sum(dim=1).tolist() == [3] * 4000
    original = token_ids.gather(1, hidden.places)
    assert torch.equal(original[asked], hidden.targets[asked])
    written = hidden.token_ids.gather(1, hidden.places)[asked]
    masked, kept = (written == MASK).float().mean(), (written == original[asked]).float().mean()
    assert masked.item() == pytest.approx(0.8, abs=0.02)
    assert kept.item() == pytest.approx(0.1, abs=0.02)
    untouched = torch.ones_like(token_ids, dtype=torch.bool).scatter(1, hidden.places, False)
    assert torch.equal(hidden.token_ids[untouched], token_ids[untouched])


def test_short_and_empty_captions() -> None:
    hidden = hide_words(_captions([1, 2, 0, 30]), 0.15, MASK, SPECIAL, 30_000, DRAWS)
    asked = (hidden.targets != IGNORED).sum(dim=1)
    assert asked.tolist() == [1, 1, 0, 4]  # 15 % of 30 is 4.5, rounded to the even 4
    assert not torch.isin(hidden.targets, SPECIAL).any()

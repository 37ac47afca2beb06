import torch

from cots.data.masking import hide_patches, hide_words
from cots.data.sample_draws import SampleDraws
from cots.data.transforms import ColorJitter

CPU = torch.device("cpu")


def _augment(pixels: torch.Tensor, token_ids: torch.Tensor, draws: SampleDraws) -> list[torch.Tensor]:
    """All that a step draws for its samples, in the step's order."""
    jittered = ColorJitter(0.5, CPU)(pixels, draws)
    places = hide_patches(len(pixels), 7, 0.4, draws)
    words = hide_words(token_ids, 0.15, 103, torch.tensor([0, 101, 102]), 30_000, draws)
    return [jittered, places, words.token_ids, words.places, words.targets]


def test_a_sample_is_changed_alike_on_any_number_of_ranks() -> None:
    pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    token_ids = torch.randint(1000, 2000, (12, 20))
    draws = SampleDraws(3, CPU)
    draws.begin(5)
    whole = _augment(pixels, token_ids, draws)
    for ranks in (2, 3):
        shares = []
        for rank, (share, captions) in enumerate(zip(pixels.chunk(ranks), token_ids.chunk(ranks), strict=True)):
            draws = SampleDraws(3, CPU, rank, ranks)
            draws.begin(5)
            shares.append(_augment(share, captions, draws))
        for together, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert torch.equal(together, torch.cat(parts))


def test_numbers_depend_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[float]:
        draws = SampleDraws(seed, CPU)
        draws.begin(step)
        return [*draws.uniform(2, 3).flatten().tolist(), *draws.integers(1000, 4).tolist()]

    before = torch.get_rng_state()
    first = drawn(1, 1)
    torch.rand(7)
    assert drawn(1, 1) == first
    assert len({tuple(drawn(seed, step)) for seed in range(3) for step in range(3)}) == 9
    torch.set_rng_state(before)
    drawn(1, 1)
    assert torch.equal(torch.get_rng_state(), before)  # which is the model's, for its dropout


def test_on_the_meta_device_there_are_shapes_only() -> None:
    draws = SampleDraws(0, torch.device("meta"), 1, 2)
    assert draws.uniform(4, 5).shape == (4, 5)
    assert hide_patches(4, 7, 0.4, draws).device.type == "meta"

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from cots.config import DataConfig, SourceConfig
from cots.errors import TrainingError
from cots.model.caption_tokenizer import WordPieceTokenizer
from pretrain.loader import ATTEMPTS, Batch, StepSampler, attempts, training_loader
from pretrain.pair_sources import TablePairs, open_source


@pytest.fixture
def batches(shards: Path, vocabulary_file: Path) -> Callable[..., list[Batch]]:
    def load(
        workers: int = 0, first_step: int = 0, rank: int = 0, ranks: int = 1, path: Path | None = None
    ) -> list[Batch]:
        config = DataConfig(
            train=[SourceConfig(path=str(path or shards / "train-*.tar"))], captions_per_item=2, workers=workers
        )
        sources = [open_source(source) for source in config.train]
        sampler = StepSampler([len(source) for source in sources], [1.0], 8, 3, rank, ranks).between(first_step, 7)
        tokenizer = WordPieceTokenizer.from_file(vocabulary_file, 16)
        return list(training_loader(sources, config, tokenizer, 32, sampler, pin_memory=False))

    return load


def _equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("pixels", "token_ids", "item_ids"))


def test_batches_are_the_same_for_any_workers_ranks_and_start(batches: Callable[..., list[Batch]]) -> None:
    torch.manual_seed(1)
    whole = batches()
    torch.manual_seed(2)  # the state of the process does not matter
    assert whole[0].pixels.shape == (8, 3, 32, 32)
    assert whole[0].token_ids.shape == (16, 16)
    assert whole[0].item_ids.shape == (8,)
    for others in (batches(workers=2), batches(first_step=4)):
        assert all(_equal(one, other) for one, other in zip(whole[-len(others) :], others, strict=True))
    for one, first, second in zip(whole, batches(rank=0, ranks=2), batches(rank=1, ranks=2), strict=True):
        for name in ("pixels", "token_ids", "item_ids"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(first, name), getattr(second, name)]))
    # an item that comes again is augmented anew
    seen: dict[int, torch.Tensor] = {}
    for batch in whole:
        for item, pixels in zip(batch.item_ids.tolist(), batch.pixels):
            assert not torch.equal(pixels, seen.get(item, torch.zeros_like(pixels)))
            seen[item] = pixels


def test_loading_leaves_the_global_generator_alone(batches: Callable[..., list[Batch]]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches()
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_leaves_the_generators_of_gpus_alone(
    batches: Callable[..., list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws from them, and before CUDA is in use each seed that is put off for it takes its time."""

    def seeded(seed: int) -> None:
        raise AssertionError(f"every GPU was given the seed {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    assert len(batches()) == 7


def test_a_bad_sample_is_named_and_another_stands_in(
    batches: Callable[..., list[Batch]], shape_shard: Callable[..., Path], tmp_path: Path
) -> None:
    path = shape_shard(tmp_path / "a.tar", {"bad.png": b"no picture", "bad.json": b'{"captions": ["a dog"]}'})
    loaded = batches(path=path)
    bad = {(name.rpartition("::")[2], reason) for batch in loaded for name, reason in batch.bad}
    assert [name for name, _ in bad] == ["bad"]
    assert "not an image" in bad.pop()[1]
    assert all(len(batch.item_ids) == 8 for batch in loaded)


@pytest.mark.parametrize("count", [16, 7919, 3 * 7919])
def test_as_many_others_stand_in_as_there_are(count: int) -> None:
    assert len(set(attempts(5, count))) == ATTEMPTS
    assert attempts(5, count)[0] == 5
    assert set(attempts(2, 3)) == {0, 1, 2}


def test_nothing_but_bad_samples_ends_the_training(
    batches: Callable[..., list[Batch]], tmp_path: Path, shards: Path
) -> None:
    table = tmp_path / "pairs.jsonl"
    rows = []
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
        rows.append(f'{{"path": "{number}.png", "caption": "a dog"}}\n')
    table.write_text("".join(rows))
    with pytest.raises(TrainingError, match="16 samples in a row could not be read"):
        batches(path=table)


def test_a_table_with_a_row_for_each_caption_has_an_item_for_each_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    rows = ["a.png,a dog", "b.png,a cat", "a.png,", 'a.png,"a brown dog, asleep"', "c.png,", "b.png,a cat"]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    source = open_source(SourceConfig(path=str(tmp_path / "pairs.csv")))
    assert isinstance(source, TablePairs)
    assert [Path(source.name(index)).name for index in range(len(source))] == ["a.png", "b.png"]
    captions = [source.read(index).captions for index in range(2)]
    assert captions == [("a dog", "a brown dog, asleep"), ("a cat",)]
    assert [(Path(error.path).name, error.reason) for error in source.left_out] == [("c.png", "it has no caption")]


def _shard(path: Path, *items: dict[str, bytes]) -> Path:
    """A shard of some items, given as their members by extension."""
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(items):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:03}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_an_item_without_a_group_is_a_group_of_its_own(tmp_path: Path) -> None:
    """Else all items that say `null` would be relevant to each other's captions."""
    groups = (b"", b', "group": null', b', "group": 7', b', "group": "g"')
    items = ({"png": b"1", "json": b'{"captions": ["a dog"]%s}' % group} for group in groups)
    source = open_source(SourceConfig(path=str(_shard(tmp_path / "a.tar", *items))))
    assert [source.read(index).group for index in range(4)] == ["", "", "7", "g"]


def test_half_a_character_in_a_caption_is_replaced(batches: Callable[..., list[Batch]], tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "PNG")
    item = {"png": picture.getvalue(), "json": rb'{"captions": ["a \ud83d dog"]}'}
    path = _shard(tmp_path / "a.tar", *[item] * 8)
    assert open_source(SourceConfig(path=str(path))).read(0).captions == ("a ? dog",)
    assert batches(path=path)[0].token_ids.shape == (16, 16)


def test_the_picture_is_found_among_other_members(tmp_path: Path) -> None:
    text = {"json": b'{"captions": ["a dog"]}'}
    items = (
        {"clip.npy": b"array", "jpg": b"picture", **text},
        {"left.JPG": b"picture", "npy": b"array", **text},
        {"img": b"picture", **text},
    )
    source = open_source(SourceConfig(path=str(_shard(tmp_path / "a.tar", *items))))
    assert [source.read(index).media for index in range(3)] == [b"picture"] * 3


def test_shards_are_found_at_any_depth_and_by_names_with_brackets(tmp_path: Path) -> None:
    item = {"png": b"1", "json": b'{"captions": ["a dog"]}'}
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    _shard(tmp_path / "deep" / "a.tar", item)
    _shard(tmp_path / "deep" / "deeper" / "b.tar", item, item)
    assert len(open_source(SourceConfig(path=str(tmp_path / "**" / "*.tar")))) == 3
    _shard(tmp_path / "1.tar", item)
    _shard(tmp_path / "[1].tar", item, item)
    assert len(open_source(SourceConfig(path=str(tmp_path / "[1].tar")))) == 2

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cots.config import SourceConfig
from cots.data.image_io import open_image
from cots.data.shards import TarIndex
from cots.data.square_transform import SquareTransform
from cots.data.visual_tokens import stored_tokens
from cots.errors import SourceError
from cots.model.visual_tokenizer import VisualTokenizer, load_visual_tokenizer, save_visual_tokenizer
from cots.tokenizer_config import VisualTokenizerConfig
from pretrain.pair_sources import open_source
from pretrain.tokenize import tokenize_shards

ROOT = Path(__file__).parents[2]
WriteShard = Callable[..., Path]


@pytest.fixture
def tokenizer(tmp_path: Path) -> VisualTokenizer:
    torch.manual_seed(0)
    shape = VisualTokenizerConfig(codebook_size=40, code_dim=8, width=16, min_width=8, blocks=1, image_size=32)
    save_visual_tokenizer(tmp_path / "tokenizer", VisualTokenizer(shape))
    return load_visual_tokenizer(str(tmp_path / "tokenizer"))


@pytest.mark.parametrize("image_size", [None, 64])
def test_stored_tokens_are_those_computed_on_the_fly(
    tokenizer: VisualTokenizer, shards: Path, tmp_path: Path, image_size: int | None
) -> None:
    done = tokenize_shards([shards / "val-0.tar"], tokenizer, tmp_path / "out", grid=3, image_size=image_size)
    assert (done.pictures, done.clips, done.bad) == (24, 0, [])
    before, after = TarIndex([shards / "val-0.tar"]), TarIndex([tmp_path / "out" / "val-0.tar"])
    assert [after.key(place) for place in range(len(after))] == [before.key(place) for place in range(24)]
    transform = SquareTransform(image_size or 24)
    seen = set()
    for place in range(24):
        old, new = before.read(place), after.read(place)
        assert {name: new[name] for name in old} == old
        pixels = transform(open_image(old["png"]))[None]
        for mirrored, shown in ((False, pixels), (True, pixels.flip(-1))):
            stored = stored_tokens(new, 3, tokenizer.fingerprint(), mirrored)
            assert stored.tolist() == tokenizer.tokens(shown, 3)[0].tolist()
            seen |= set(stored.tolist())
    assert len(seen) > 3


def test_a_tokenized_shard_is_still_a_source_and_holds_several_grids(
    tokenizer: VisualTokenizer, shards: Path, tmp_path: Path
) -> None:
    tokenize_shards([shards / "val-0.tar"], tokenizer, tmp_path / "one", grid=2)
    tokenize_shards([tmp_path / "one" / "val-0.tar"], tokenizer, tmp_path / "two", grid=4)
    parts = TarIndex([tmp_path / "two" / "val-0.tar"]).read(5)
    for grid in (2, 4):
        assert len(stored_tokens(parts, grid, tokenizer.fingerprint(), False)) == grid * grid
    source = open_source(SourceConfig(path=str(tmp_path / "two" / "val-0.tar")))
    plain = open_source(SourceConfig(path=str(shards / "val-0.tar")))
    assert len(source) == 24
    assert source.read(5).captions == plain.read(5).captions
    assert np.array_equal(np.asarray(source.read(5).frames(1)[0]), np.asarray(plain.read(5).frames(1)[0]))


def test_the_command_names_what_it_could_not_read(
    tokenizer: VisualTokenizer, shape_shard: WriteShard, tmp_path: Path
) -> None:
    further = {"broken.png": b"no picture", "broken.json": b'{"captions": ["a red ball"]}'}
    shard = shape_shard(tmp_path / "pairs.tar", further)
    command = [sys.executable, "-m", "pretrain.tokenize", str(shard), "--grid", "3", "--device", "cpu"]
    out = ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "24 pictures tokenized, 0 clips and 1 unreadable" in done.stdout
    assert "pairs.tar::broken" in done.stderr
    assert len(TarIndex([tmp_path / "out" / "pairs.tar"])) == 25
    missing = subprocess.run(
        [*command, "--tokenizer", "nowhere", "--out", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert missing.stderr == (
        "Error: There is no directory nowhere; use `embedded`, or what `cots pretrain configs/visual_tokenizer.yaml` "
        "wrote.\n"
    )


def test_a_shard_is_not_written_over_itself(tokenizer: VisualTokenizer, shards: Path) -> None:
    with pytest.raises(SourceError, match="would be written over itself"):
        tokenize_shards([shards / "val-0.tar"], tokenizer, shards, grid=3)


def test_what_stops_it_leaves_no_part_of_a_shard(
    tokenizer: VisualTokenizer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(pixels: torch.Tensor, grid: int) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_shards([shards / "val-0.tar"], tokenizer, tmp_path / "out", grid=3)
    assert list((tmp_path / "out").iterdir()) == []

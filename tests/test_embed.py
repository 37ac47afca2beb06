"""Bulk embedding: order, exactness, shared batches, errors, memory, Parquet."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cots.data.decode_ahead import content_hash
from cots.data.frame_sampling import FrameSampling
from cots.data.image_io import open_image
from cots.data.samples import Sample, iter_samples
from cots.data.video_io import read_frames
from cots.embed import Embedded, Progress, embed, write_parquet
from cots.errors import MediaError, ModelError, SourceError
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel
from cots.stopwatch import Stopwatch


def no_error(error: MediaError) -> None:
    raise error


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:03}.png" for index in range(count)]
    for index, path in enumerate(paths):
        blocks = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((70, 50), Image.Resampling.NEAREST).save(path)
    return paths


def write_animation(path: Path, frames: int, seconds: float = 1.0) -> Path:
    rng = np.random.default_rng(frames)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=int(1000 * seconds), loop=0)
    return path


def one_by_one(samples: list[Sample], model: RetrievalModel) -> list[np.ndarray]:
    """The slow twin: each image alone, each video's frames alone."""
    vectors = []
    for sample in samples:
        if sample.kind == "image":
            images = [open_image(sample.media(), target_size=model.image_size)]
        else:
            images = read_frames(sample.media(), interval=1.0, min_frames=4, short_side=model.image_size).images
        frames = torch.cat([model.encode_images(model.transform(image)[None]) for image in images]).numpy()
        mean = frames.mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    return vectors


@pytest.fixture
def mixed(tmp_path: Path) -> list[Sample]:
    """Nine pictures, and between them two videos of 10 and 3 frames."""
    write_pictures(tmp_path / "mixed", 9)
    write_animation(tmp_path / "mixed" / "004-long.gif", 10)
    write_animation(tmp_path / "mixed" / "002-short.gif", 3)
    return list(iter_samples([tmp_path / "mixed"], on_error=no_error))


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 2), (7, 3), (None, None)])
def test_vectors_are_those_of_each_sample_alone(
    mixed: list[Sample], tiny_model: RetrievalModel, batch_size: int | None, workers: int | None
) -> None:
    results = list(embed(mixed, tiny_model, on_error=no_error, batch_size=batch_size, workers=workers))
    assert [result.sample for result in results] == mixed
    for result, expected in zip(results, one_by_one(mixed, tiny_model), strict=True):
        np.testing.assert_allclose(result.vectors[0], expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-5)
        assert len(result.vectors) == 1 + len(result.moments)
        assert result.content_hash == content_hash(result.sample)


def test_frames_of_several_videos_share_batches(
    mixed: list[Sample], tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = tiny_model.encode_images
    monkeypatch.setattr(tiny_model, "encode_images", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    list(embed(mixed, tiny_model, on_error=no_error, batch_size=8))
    assert sorted(sizes) == [7, 8, 8]  # 9 pictures, 10 frames, and 4 of the 3-frame video; threads take turns


def test_a_video_is_pooled_into_windows(mixed: list[Sample], tiny_model: RetrievalModel) -> None:
    video = next(result for result in embed(mixed, tiny_model, on_error=no_error) if "long" in result.sample.path)
    assert video.duration == pytest.approx(10)
    assert (video.width, video.height) == (60, 40)
    assert [(moment.start, moment.end) for moment in video.moments] == [(0, 5), (5, 10)]
    for moment in video.moments:
        assert moment.start <= moment.frame_time <= moment.end


def test_bad_items_are_reported_in_order_and_never_embedded(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    paths = write_pictures(tmp_path / "some", 8)
    content = paths[2].read_bytes()
    samples = list(iter_samples([tmp_path / "some"], on_error=no_error))
    paths[2].write_bytes(content[: len(content) // 2])
    paths[5].unlink()
    errors: list[MediaError] = []
    results = list(embed(samples, tiny_model, on_error=errors.append))
    assert [error.path for error in errors] == [str(paths[2]), str(paths[5])]
    assert [result.sample.path for result in results] == [
        str(path) for path in paths if path not in (paths[2], paths[5])
    ]


def test_a_vector_that_is_not_finite_is_an_error(
    mixed: list[Sample], tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tiny_model.encode_images

    def breaks_down(pixels: torch.Tensor) -> torch.Tensor:
        vectors = encode(pixels).clone()
        vectors[1] = torch.nan
        return vectors

    monkeypatch.setattr(tiny_model, "encode_images", breaks_down)
    errors: list[MediaError] = []
    results = list(embed(mixed, tiny_model, on_error=errors.append, batch_size=100))
    assert [error.path for error in errors] == [mixed[1].path]
    assert [result.sample for result in results] == [mixed[0], *mixed[2:]]
    with pytest.raises(SourceError, match="1 of 11 files"):
        list(embed(mixed, tiny_model, on_error=errors.append, batch_size=100, max_bad_share=0))


def test_too_many_bad_items_stop_the_run(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    paths = write_pictures(tmp_path / "some", 40)
    samples = list(iter_samples([tmp_path / "some"], on_error=no_error))
    for path in paths[::2]:
        path.unlink()
    errors: list[MediaError] = []
    with pytest.raises(SourceError, match=r"of 2\d files could not be read, more than the allowed share of 0.1"):
        list(embed(samples, tiny_model, on_error=errors.append, max_bad_share=0.1))
    assert len(list(embed(samples, tiny_model, on_error=errors.append, max_bad_share=0.6))) == 20
    with pytest.raises(SourceError, match="1 of 3 files"):
        list(embed(samples[1:4], tiny_model, on_error=errors.append, max_bad_share=0.1))


def test_a_model_that_gives_no_finite_vector_is_stopped_early(
    tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "some", 100)
    encode = tiny_model.encode_images
    monkeypatch.setattr(tiny_model, "encode_images", lambda pixels: encode(pixels) * torch.nan)
    errors: list[MediaError] = []
    with pytest.raises(SourceError, match=r"more than the allowed share of 0\.1 .*no finite vector"):
        list(embed(iter_samples([tmp_path / "some"], no_error), tiny_model, on_error=errors.append, max_bad_share=0.1))
    assert len(errors) <= 40


def test_samples_are_read_only_a_little_ahead(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    write_pictures(tmp_path / "one", 1)
    sample = next(iter_samples([tmp_path / "one"], on_error=no_error))
    taken = itertools.count()
    results = embed((sample for _ in taken), tiny_model, on_error=no_error, batch_size=8, workers=2)
    for _ in range(200):
        next(results)
    ahead = 8 * (torch.get_num_threads() + 2) + 50  # in batches, and decoded or about to be
    assert next(taken) < 200 + ahead
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "encode"))]


def test_progress_counts_good_and_bad(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    paths = write_pictures(tmp_path / "some", 6)
    samples = list(iter_samples([tmp_path / "some"], on_error=no_error))
    paths[0].unlink()
    told: list[Progress] = []
    list(embed(samples, tiny_model, on_error=lambda error: None, total=6, progress=told.append))
    assert (told[0].done, told[0].failed) == (0, 1)
    assert (told[-1].done, told[-1].failed, told[-1].eta) == (5, 1, 0)
    assert told[2].rate > 0
    assert told[2].eta == pytest.approx(told[2].seconds)  # three of six samples
    assert replace(told[2], total=None).eta is None


def test_size_is_of_the_whole_upright_picture(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    """A large JPEG is decoded at a fraction, and a camera's rotation swaps the sides."""
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "a.jpg")
    picture.save(folder / "b.jpg", exif=exif)
    sizes = [
        (item.width, item.height) for item in embed(iter_samples([folder], no_error), tiny_model, on_error=no_error)
    ]
    assert sizes == [(800, 600), (600, 800)]


def test_parquet_holds_every_vector_and_names_the_model(
    mixed: list[Sample], tiny_model: RetrievalModel, tmp_path: Path
) -> None:
    captioned = [replace(mixed[0], captions=("one", "two")), *mixed[1:]]
    results = list(embed(captioned, tiny_model, on_error=no_error))
    out = tmp_path / "vectors.parquet"
    rows = write_parquet(out, iter(results), tiny_model, batch_rows=5)
    table = pq.read_table(out)
    assert rows == len(table) == sum(len(result.vectors) for result in results)
    assert table.schema.metadata[b"cots.fingerprint"].decode() == tiny_model.fingerprint
    assert table.schema.metadata[b"cots.model"].decode() == tiny_model.name
    assert table["captions"][0].as_py() == ["one", "two"]
    expected = np.concatenate([result.vectors for result in results])
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), expected)
    starts = [None, *(moment.start for moment in _first_video(results).moments)]
    path = _first_video(results).sample.path
    assert [row["start"] for row in table.to_pylist() if row["path"] == path] == starts


def test_a_stopped_run_leaves_no_parquet_file(mixed: list[Sample], tiny_model: RetrievalModel, tmp_path: Path) -> None:
    def breaks_off() -> Iterator[Embedded]:
        yield next(embed(mixed, tiny_model, on_error=no_error))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path / "vectors.parquet", breaks_off(), tiny_model)
    assert not list(tmp_path.glob("*.parquet*"))


def _first_video(results: list[Embedded]) -> Embedded:
    return next(result for result in results if result.moments)


def test_a_gpu_without_memory_for_a_batch_goes_on_with_half(
    mixed: list[Sample], tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(embed(mixed, tiny_model, on_error=no_error))
    sizes: list[int] = []
    encode = tiny_model.encode_images

    def small(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(tiny_model, "encode_images", small)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # else the short last batch may fail before the first
    results = list(embed(mixed, tiny_model, on_error=no_error, batch_size=16))
    assert [result.sample for result in results] == mixed
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.vectors, other.vectors, atol=1e-5)
    assert set(sizes) <= {4, 3}  # 16, 8, 4, and what is left
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no memory for 16 pictures at once" in caplog.text


def test_a_gpu_without_memory_for_one_picture_says_so(
    mixed: list[Sample], tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny_model, "encode_images", full)
    with pytest.raises(ModelError, match="no memory for a single picture"):
        list(embed(mixed, tiny_model, on_error=no_error))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_gpu_gives_the_cpus_vectors(
    mixed: list[Sample], tiny_model: RetrievalModel, tiny_model_dir: Path, tmp_path: Path, batch_size: int
) -> None:
    """JPEGs by the GPU's decoder between pictures and videos by the CPU's."""
    folder = tmp_path / "mixed"
    for place, path in enumerate(sorted(folder.glob("*.png"))):
        exif = Image.Exif()
        exif[0x0112] = place % 8 + 1
        Image.open(path).resize((280, 200), Image.Resampling.BICUBIC).save(folder / f"{place}.jpg", exif=exif)
    samples = list(iter_samples([folder], on_error=no_error))
    model = load_model(str(tiny_model_dir), device="cuda")
    results = list(embed(samples, model, on_error=no_error, batch_size=batch_size))
    assert [result.sample for result in results] == samples
    for result, expected in zip(results, one_by_one(samples, tiny_model), strict=True):
        assert result.vectors[0] @ expected >= 0.999


def test_so_many_frames_of_each_video_and_the_seconds_that_the_work_took(
    mixed: list[Sample], tiny_model: RetrievalModel
) -> None:
    stopwatch = Stopwatch()
    counted = list(embed(mixed, tiny_model, on_error=no_error, frames=FrameSampling(count=2), stopwatch=stopwatch))
    for item in counted:
        if item.sample.kind == "video":
            pictures = FrameSampling(count=2).read(item.sample, tiny_model.image_size).images
            assert len(pictures) == 2
            vectors = tiny_model.encode_images(torch.stack([tiny_model.transform(picture) for picture in pictures]))
            mean = vectors.mean(dim=0)
            assert np.allclose(item.vectors[0], mean / mean.norm(), atol=1e-5)
    assert set(stopwatch.seconds) == {"decoding", "encoding"}
    assert min(stopwatch.seconds.values()) > 0

"""Decoding ahead: the same outcomes in the same order whoever decodes, and bounded memory."""

import gc
import io
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_media import write_video
from torch.nn import functional as F

from cots.data import decode_ahead
from cots.data.decode_ahead import Decoded, MediaDecoder, _PixelBudget, content_hash
from cots.data.frame_sampling import EVERY_SECOND
from cots.data.gpu_jpeg import GpuJpegDecoder, torchvision_jpegs
from cots.data.image_io import open_sized
from cots.data.samples import Sample, iter_samples
from cots.data.square_transform import SquareTransform
from cots.data.video_io import Frames, read_frames
from cots.errors import MediaError
from cots.stopwatch import Stopwatch

SQUARE = SquareTransform(64)


def decoder(batched: bool, workers: int = 2) -> MediaDecoder:
    """With JPEGs decoded many at once, as on a GPU but by a CPU, or each by Pillow."""
    jpegs = GpuJpegDecoder(SQUARE, torch.device("cpu"), torchvision_jpegs()) if batched else None
    return MediaDecoder(SQUARE, EVERY_SECOND, workers, 8, jpegs, Stopwatch())


def no_error(error: MediaError) -> None:
    raise error


@pytest.fixture
def everything(tmp_path: Path) -> list[Sample]:
    """Plain JPEGs among all that a folder may hold besides."""
    rng = np.random.default_rng(0)
    for place in range(24):
        picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160 + place, 120))
        name = tmp_path / f"{place:02}"
        if place % 8 == 1:
            picture.save(name.with_suffix(".png"))
        elif place % 8 == 2:
            picture.save(name.with_suffix(".jpg"), progressive=True)
        elif place % 8 == 3:
            picture.convert("CMYK").save(name.with_suffix(".jpg"))
        elif place % 8 == 4:
            picture.convert("L").save(name.with_suffix(".jpeg"))
        elif place % 8 == 5:
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(name.with_suffix(".JPG"), exif=exif)
        elif place == 6:
            picture.save(name.with_suffix(".gif"), save_all=True, append_images=[picture.rotate(90)], duration=1000)
        else:
            picture.save(name.with_suffix(".jpg"))
    whole = (tmp_path / "08.jpg").read_bytes()
    samples = list(iter_samples([tmp_path], no_error))
    (tmp_path / "08.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "15.jpg").unlink()
    (tmp_path / "16.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture at all")
    return samples


def test_a_batch_decoder_gives_what_pillow_gives(everything: list[Sample]) -> None:
    ours, pillows = (list(decoder(batched).decode(everything)) for batched in (True, False))
    assert len(ours) == len(pillows) == len(everything) == 24
    assert [type(outcome) for outcome in ours] == [type(outcome) for outcome in pillows]
    for sample, one, other in zip(everything, ours, pillows):
        if isinstance(one, MediaError):
            assert str(one) == str(other)
            assert one.path == sample.path
            continue
        assert isinstance(other, Decoded)
        assert one.sample == other.sample == sample
        assert one.content_hash == other.content_hash == content_hash(sample)
        assert (one.width, one.height, one.duration) == (other.width, other.height, other.duration)
        assert one.times == other.times
        assert F.cosine_similarity(one.pixels.float().flatten(), other.pixels.float().flatten(), dim=0) > 0.9995
    assert [Path(outcome.path).stem for outcome in ours if isinstance(outcome, MediaError)] == ["08", "15", "16"]


def test_jpegs_go_together_past_other_files_between_them(
    everything: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[int] = []
    decode = GpuJpegDecoder.decode
    monkeypatch.setattr(GpuJpegDecoder, "decode", lambda self, files: jobs.append(len(files)) or decode(self, files))
    list(decoder(batched=True).decode(everything))
    plain = 3 * 5 - 1 - 3  # of eight, five are plain; one of them is a video, three were damaged
    assert jobs == [plain]


def test_a_job_holds_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (80, 60)).save(tmp_path / "one.jpg")
    sample = next(iter_samples([tmp_path], no_error))
    monkeypatch.setattr(decode_ahead, "BYTES_A_GPU_JOB", 10 * sample.size)
    jobs: list[int] = []
    run = MediaDecoder._run
    monkeypatch.setattr(MediaDecoder, "_run", lambda self, samples: jobs.append(len(samples)) or run(self, samples))
    samples = [sample] * 25 + [replace(sample, size=50 * sample.size)] * 2
    assert len(list(decoder(batched=True).decode(samples))) == 27
    assert sorted(jobs) == [1, 1, 5, 10, 10]


def test_samples_are_read_only_so_far_ahead(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60)).save(tmp_path / "one.jpg")
    sample = next(iter_samples([tmp_path], no_error))
    taken = itertools.count()
    outcomes = decoder(batched=True).decode(sample for _ in taken)
    for _ in range(100):
        next(outcomes)
    assert next(taken) < 100 + 1100
    outcomes.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_large_pictures_wait_for_each_other() -> None:
    budget = _PixelBudget(100)
    lock = threading.Lock()
    held = most = 0

    def work(pixels: int) -> None:
        nonlocal held, most
        with budget.share() as share:
            share.take(pixels)
            with lock:
                held += pixels
                most = max(most, held if held != 500 else 0)
            time.sleep(0.002)
            with lock:
                held -= pixels

    threads = [threading.Thread(target=work, args=(size,)) for size in [60, 30, 10, 500, 70, 20, 5] * 10]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 60 < most <= 100


@pytest.mark.parametrize("container", ["mp4", "ts"])  # read by decord, where it is installed, and by PyAV
def test_who_stops_does_not_wait_for_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str) -> None:
    film = tmp_path / f"film.{container}"
    write_video(film, frames=400, rate=4)
    begun, heeded = threading.Event(), []

    def heeding(*arguments: Any, heed: Callable[[], None], **named: Any) -> Frames:
        def slowly() -> None:
            begun.set()
            heeded.append(time.sleep(0.1))
            heed()

        return read_frames(*arguments, heed=slowly, **named)

    monkeypatch.setattr("cots.data.frame_sampling.read_frames", heeding)
    Image.new("RGB", (90, 80)).save(tmp_path / "a.png")
    outcomes = decoder(batched=False).decode(iter_samples([tmp_path / "a.png", film], no_error))
    assert isinstance(outcomes, Generator)
    next(outcomes)
    begun.wait()
    outcomes.close()
    assert len(heeded) < 10


def test_a_picture_that_is_refused_takes_no_room() -> None:
    budget = _PixelBudget(100)

    def refused() -> None:
        with budget.share() as share:
            share.take(99)
            raise MediaError("a.png", "damaged")

    for _ in range(3):
        with pytest.raises(MediaError):
            refused()
    with budget.share() as share:
        share.take(99)
        assert share.pixels == 99


def test_decoding_says_beforehand_how_many_pixels_it_will_hold() -> None:
    told: list[int] = []
    for options in ({"progressive": True}, {}):
        file = io.BytesIO()
        Image.new("RGB", (1600, 800)).save(file, "JPEG", **options)
        open_sized(file.getvalue(), target_size=100, admit=told.append)
    assert told == [1600 * 800, 400 * 200]


def test_an_error_that_is_kept_keeps_no_pictures(tmp_path: Path) -> None:
    for place in range(4):
        Image.new("RGB", (90, 80), (place, 0, 0)).save(tmp_path / f"{place}.jpg")
    samples = list(iter_samples([tmp_path], no_error))
    (tmp_path / "2.jpg").unlink()
    outcomes = list(decoder(batched=True).decode(samples))
    pictures = [weakref.ref(outcome.pixels) for outcome in outcomes if isinstance(outcome, Decoded)]
    (error,) = (outcome for outcome in outcomes if isinstance(outcome, MediaError))
    del outcomes
    gc.collect()
    assert len(pictures) == 3
    assert [picture() for picture in pictures] == [None] * 3
    assert error.path == samples[2].path

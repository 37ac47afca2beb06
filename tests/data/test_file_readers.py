"""Files read by other processes are those read by this one, whatever happens to the processes."""

import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from cots.data import file_readers
from cots.data.file_readers import JOBS_BEFORE, FileReaders, JpegFile, _Reader, read_jpegs
from cots.data.pinned_memory import pin
from cots.data.samples import Sample, iter_samples
from cots.errors import MediaError


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Plain JPEGs, one with an orientation, one that is progressive, one that has gone and an empty one."""
    rng = np.random.default_rng(0)
    for place in range(20):
        exif = Image.Exif()
        exif[0x0112] = place % 8 + 1
        picture = Image.fromarray(rng.integers(0, 256, (30 + place, 40, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{place:02}.jpg", exif=exif, progressive=place == 3)
    found = list(iter_samples([tmp_path], print))
    (tmp_path / "05.jpg").unlink()
    (tmp_path / "06.jpg").write_bytes(b"")
    return found


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileReaders]:
    monkeypatch.setattr(file_readers, "JOBS_BEFORE", 0)
    readers = FileReaders(2, 200_000)
    yield readers
    readers.close()


def started(readers: FileReaders) -> list[_Reader]:
    """Those that nobody uses just now."""
    return [reader for reader in readers._free.queue if reader is not None]


def assert_same(found: list[JpegFile | MediaError], expected: list[JpegFile | MediaError]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(other, MediaError):
            assert str(one) == str(other)
        else:
            assert isinstance(one, JpegFile)
            assert bytes(one.content) == other.content
            assert (one.digest, one.header) == (other.digest, other.header)


def test_processes_read_what_this_one_reads(samples: list[Sample], readers: FileReaders) -> None:
    expected = read_jpegs(samples)
    assert sum(isinstance(file, MediaError) for file in expected) == 1
    assert sum(isinstance(file, JpegFile) and file.header is None for file in expected) == 2

    def check(part: slice) -> None:
        with readers.read(samples[part]) as found:
            assert_same(found, expected[part])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(check, [slice(start, end) for start in range(5) for end in range(5, 21, 3)]))
    check(slice(0))
    assert 1 <= len(started(readers)) <= 2


def test_what_has_no_room_is_read_here(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_readers, "JOBS_BEFORE", 0)
    readers = FileReaders(1, 5000)
    for _ in range(2):
        with readers.read(samples) as found:
            assert_same(found, read_jpegs(samples))
        with readers.read(samples[:1]) as found:
            assert isinstance(found[0], JpegFile)
            assert isinstance(found[0].content, memoryview)
            assert_same(found, read_jpegs(samples[:1]))
    readers.close()


def test_members_of_a_shard_are_read(tmp_path: Path, samples: list[Sample], readers: FileReaders) -> None:
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(samples[0].path, "a.jpg")
        tar.add(samples[1].path, "b.jpg")
    members = list(iter_samples([tmp_path / "shard.tar"], print))
    with readers.read(members) as found:
        assert_same(found, read_jpegs(members))
        assert isinstance(found[1], JpegFile)
        assert found[1].content == Path(samples[1].path).read_bytes()


def test_what_a_killed_process_leaves_undone_is_read_here(samples: list[Sample], readers: FileReaders) -> None:
    expected = read_jpegs(samples)
    for _ in range(3):
        with readers.read(samples) as found:
            assert_same(found, expected)
        for reader in started(readers):
            reader.process.kill()
    with readers.read(samples) as found:
        assert_same(found, expected)


def test_killed_processes_leave_no_descriptors_and_no_memory(
    samples: list[Sample], readers: FileReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_readers, "MOST_LOST", 100)
    counts = []
    gc.collect()  # else what other tests have left open may close meanwhile
    for _ in range(6):
        for _ in range(2):  # read here after a kill, then by another process
            with readers.read(samples):
                pass
        (reader,) = started(readers)
        counts.append(len(os.listdir("/dev/fd")))
        reader.process.kill()
        reader.process.wait()
    assert counts == counts[:1] * 6


def test_an_answer_that_was_not_taken_is_not_taken_for_the_next(
    samples: list[Sample], readers: FileReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    with readers.read(samples[:1]):
        pass

    def full(pipe: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(file_readers, "_receive", full)
        with pytest.raises(MemoryError), readers.read(samples[:2]):
            pass
    with readers.read(samples[2:4]) as found:
        assert_same(found, read_jpegs(samples[2:4]))


def test_no_more_processes_start_than_threads_ask_at_once(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_readers, "JOBS_BEFORE", 0)
    readers = FileReaders(8, 200_000)
    for _ in range(8):
        with readers.read(samples):
            pass
    assert len(started(readers)) == 1
    readers.close()


def test_modules_are_not_taken_from_the_working_directory(
    samples: list[Sample], readers: FileReaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with readers.read(samples) as found:
        assert isinstance(found[0], JpegFile)
        assert isinstance(found[0].content, memoryview)


def test_a_process_ends_though_another_holds_its_input_open(samples: list[Sample], readers: FileReaders) -> None:
    with readers.read(samples):
        pass
    (reader,) = started(readers)
    assert reader.process.stdin is not None
    held = os.dup(reader.process.stdin.fileno())  # as a forked process would
    closing = Thread(target=readers.close, daemon=True)
    closing.start()
    closing.join(20)
    os.close(held)
    assert not closing.is_alive()


def test_where_no_process_starts_all_is_read_here(
    samples: list[Sample], readers: FileReaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(file_readers, "MOST_LOST", 3)
    for _ in range(6):
        with readers.read(samples) as found:
            assert_same(found, read_jpegs(samples))
    assert not readers._usable


def test_processes_end_with_their_readers(samples: list[Sample], readers: FileReaders) -> None:
    with readers.read(samples):
        pass
    (reader,) = started(readers)
    assert reader.process.poll() is None
    readers.close()
    assert reader.process.poll() is not None
    with readers.read(samples) as found:  # others start if it is needed again
        assert_same(found, read_jpegs(samples))
    assert len(started(readers)) == 1


def test_small_jobs_start_no_process(samples: list[Sample]) -> None:
    readers = FileReaders(2, 200_000)
    for _ in range(file_readers.JOBS_BEFORE):
        with readers.read(samples) as found:
            assert len(found) == len(samples)
    assert not started(readers)
    readers.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_pinned_while_a_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"bytes")
    sample = Sample(str(path), "image", size=5)
    readers = FileReaders(1, 200_000, partial(pin, device=torch.device("cuda")))
    for _ in range(JOBS_BEFORE + 2):
        with readers.read([sample]) as files:
            (file,) = files
            assert isinstance(file, JpegFile)
            pinned = torch.frombuffer(file.content, dtype=torch.uint8).is_pinned()
    assert pinned
    readers.close()
    assert torch.zeros(1, device="cuda").item() == 0

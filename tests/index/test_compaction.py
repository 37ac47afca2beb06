"""Compaction keeps rows and answers, frees space, and disturbs nobody who reads; writers exclude each other."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from gallery_media import write_picture

from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index.build import build, remove
from index.check import check
from index.compaction import compact
from index.gallery import Gallery, open_gallery
from index.lock import writing
from index.search import Searcher


def test_rows_and_answers_stay_and_space_is_freed(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    for seed in range(8):
        write_picture(photos / f"new{seed}.png", 100 + seed)
        build([photos], gallery.directory, tiny_model)
    remove(gallery.directory, "path LIKE '%new3%' OR path LIKE '%00.png'")
    before = open_gallery(gallery.directory)
    hits = before.search("a dog", model=tiny_model).hits
    report = compact(gallery.directory)
    assert report.bytes_after < report.bytes_before
    assert report.fragments_after == 1 < report.fragments_before
    after = open_gallery(gallery.directory)
    assert after.snapshot.rows.equals(before.snapshot.rows)
    assert after.search("a dog", model=tiny_model).hits == hits
    assert check(gallery.directory) == []
    again = compact(gallery.directory)
    assert again.bytes_after <= again.bytes_before * 1.1


def test_what_killed_processes_left_is_removed(gallery: Gallery) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = gallery.directory / "search" / f".scratch-hnsw.{process.pid}.1"
    left.write_bytes(b"half an index")
    compact(gallery.directory)
    assert not left.exists()


def test_readers_are_not_disturbed_while_one_writes_and_compacts(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel
) -> None:
    """Two that hold an open search, and one that opens the gallery anew each time."""
    stop, problems, reads = threading.Event(), [], []
    held = Searcher(open_gallery(gallery.directory), tiny_model)
    first = held.search(like=1, k=20).hits

    def read(fresh: bool) -> None:
        try:
            while not stop.is_set():
                searcher = Searcher(open_gallery(gallery.directory), tiny_model) if fresh else held
                hits = searcher.search(like=1, k=20, where="kind = 'image' OR kind = 'video'").hits
                assert len(hits) >= 13
                assert fresh or {hit.id for hit in hits} <= {hit.id for hit in first}
                snapshot = searcher.snapshot
                assert len(np.unique(snapshot.ids)) == len(snapshot)
                reads.append(fresh)
        except Exception as error:
            problems.append(error)

    readers = [threading.Thread(target=read, args=(fresh,)) for fresh in (False, False, True)]
    for reader in readers:
        reader.start()
    for seed in range(4):
        write_picture(photos / f"new{seed}.png", 100 + seed)
        build([photos], gallery.directory, tiny_model)
        remove(gallery.directory, "path LIKE '%new%'")
        compact(gallery.directory)
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert {True, False} <= set(reads)


@pytest.mark.parametrize("change", [compact, lambda directory: remove(directory, "id = 1")], ids=["compact", "remove"])
def test_a_second_writer_is_told_so(gallery: Gallery, change: object) -> None:
    with writing(gallery.directory):
        with pytest.raises(GalleryError, match=r"Another process is changing the gallery .*; wait until it ends"):
            change(gallery.directory)  # type: ignore[operator]
    change(gallery.directory)  # type: ignore[operator]


def test_of_two_builds_at_once_one_is_told_so_and_nothing_is_doubled(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    directory, started, told = tmp_path / "gallery", threading.Barrier(2), []

    def run() -> None:
        started.wait()
        try:
            build([photos], directory, tiny_model)
        except GalleryError as error:
            told.append(str(error))

    builds = [threading.Thread(target=run) for _ in range(2)]
    for thread in builds:
        thread.start()
    for thread in builds:
        thread.join()
    assert len(told) <= 1  # the second may have come when the first had ended
    assert all("Another process is changing the gallery" in sentence for sentence in told)
    assert check(directory) == []
    assert len(open_gallery(directory).snapshot) == 21

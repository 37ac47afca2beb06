"""Who may write to a table that lies outside of its gallery: one folder, whatever was copied or begun at once."""

import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from object_store import BUCKET, TABLE, ObjectStore, assert_holds_each_file_once

from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index import writer
from index.build import build, info, remove
from index.check import check
from index.compaction import compact
from index.gallery import Gallery, adopt_table, create_gallery, open_gallery
from index.lock import writing


def test_a_table_that_is_gone_or_another_is_not_taken_for_its_own(
    remote: Gallery, store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    version = remote.version
    for key in store.listed():
        store.client.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(GalleryError, match=rf"has lost its table vectors.lance at {TABLE}"):
        info(remote.directory)
    build([photos], tmp_path / "other", tiny_model, table=TABLE)
    assert open_gallery(tmp_path / "other").version == version
    with pytest.raises(GalleryError, match=rf"has lost its table vectors.lance at {TABLE}"):
        info(remote.directory)


def test_a_second_gallery_cannot_take_the_table_of_the_first(
    remote: Gallery, photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    with pytest.raises(GalleryError, match=rf"There is a table at {TABLE} already, which another gallery made"):
        build([photos], tmp_path / "second", tiny_model, table=TABLE)
    with pytest.raises(GalleryError, match=rf"lies at {TABLE}, not at s3://{BUCKET}/elsewhere; leave --table out"):
        build([photos], remote.directory, tiny_model, table=f"s3://{BUCKET}/elsewhere")
    assert check(remote.directory) == []


def test_of_many_that_make_the_table_at_once_one_may_write(
    store: ObjectStore, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    made: list[Gallery] = []

    def make(number: int) -> None:
        with suppress(GalleryError), writing(tmp_path / str(number)) as directory:
            made.append(create_gallery(directory, tiny_model, TABLE))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    allowed = 0
    for gallery in made:
        with suppress(GalleryError):
            gallery.require_own_table()
            allowed += 1
    assert allowed == 1


def test_a_copy_of_the_folder_reads_and_writes_only_once_it_is_adopted(
    remote: Gallery, photos: Path, tmp_path: Path, tiny_model: RetrievalModel, cots_command: Callable[..., str]
) -> None:
    moved = remote.directory.rename(tmp_path / "moved")
    assert build([photos], moved, tiny_model).unchanged == 15
    copy = shutil.copytree(moved, tmp_path / "copy")
    assert len(open_gallery(copy).search("a dog", model=tiny_model, k=50).hits) == 15
    for change in (lambda place: build([photos], place, tiny_model), lambda place: remove(place, "id = 1"), compact):
        with pytest.raises(GalleryError, match=r"another copy of the gallery .*cots index adopt --gallery .*copy"):
            change(copy)
    assert f"writes to {TABLE} from now on" in cots_command("index", "adopt", "--gallery", copy)
    assert remove(copy, "id = 1") == 1
    with pytest.raises(GalleryError, match="written to by another copy"):
        remove(moved, "id = 2")
    assert info(moved)["items"] == 14
    assert check(moved) == []


def test_what_was_opened_before_another_copy_adopted_the_table_removes_nothing(remote: Gallery, tmp_path: Path) -> None:
    assert len(remote.snapshot) > 0
    adopt_table(shutil.copytree(remote.directory, tmp_path / "copy"))
    with pytest.raises(GalleryError, match="written to by another copy"):
        remote.remove_items([1])
    assert check(remote.directory) == []
    assert info(remote.directory)["items"] == 15


def test_a_build_stops_when_another_copy_adopts_its_table(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_ROWS", 1)
    build([photos / "00.png"], tmp_path / "remote", tiny_model, table=TABLE)
    copy = shutil.copytree(tmp_path / "remote", tmp_path / "copy")
    adopting = threading.Thread(target=adopt_table, args=(copy,))
    commits = threading.Semaphore(2)

    def adopt(path: str) -> int:
        if path.endswith(".manifest") and not commits.acquire(blocking=False) and adopting.ident is None:
            adopting.start()
            adopting.join(5)
        return 0

    store.after_put = adopt
    with pytest.raises(GalleryError, match="written to by another copy"):
        build([photos], tmp_path / "remote", tiny_model, batch_size=1, threads=1)
    store.after_put = lambda path: 0
    build([photos], copy, tiny_model)
    assert_holds_each_file_once(copy, photos, tmp_path, tiny_model)


def test_a_creation_that_was_killed_before_the_manifest_is_gone_on_with(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    with writing(tmp_path / "remote") as directory:
        create_gallery(directory, tiny_model, TABLE)
    (tmp_path / "remote" / "manifest.json").unlink()
    assert build([photos], tmp_path / "remote", tiny_model, table=TABLE).added == 15
    (tmp_path / "remote" / "manifest.json").unlink()
    with pytest.raises(GalleryError, match=rf"{TABLE} holds vectors but no manifest\.json"):
        build([photos], tmp_path / "remote", tiny_model, table=TABLE)

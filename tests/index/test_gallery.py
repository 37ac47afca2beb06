"""Opening and refusing galleries, paths that move with them, media behind a row."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_media import write_picture

import cots
from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index.build import build, info
from index.check import check
from index.gallery import Gallery, create_gallery, open_gallery
from index.lock import writing
from index.manifest import FORMAT, Manifest


def test_a_missing_gallery_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match=r"There is no gallery at .*; make one with: cots index build"):
        open_gallery(tmp_path / "nowhere")
    with pytest.raises(GalleryError, match=r"is not a gallery \(it has no manifest.json\)"):
        open_gallery(tmp_path)


def test_a_newer_format_is_refused(gallery: Gallery) -> None:
    replace(gallery.manifest, format=FORMAT + 1).write(gallery.directory)
    with pytest.raises(GalleryError, match=f"has format {FORMAT + 1}, newer than this version reads"):
        open_gallery(gallery.directory)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "one"}', '{"format": 1, "model": "m"}'])
def test_a_damaged_manifest_is_refused(gallery: Gallery, content: str) -> None:
    (gallery.directory / "manifest.json").write_text(content)
    with pytest.raises(GalleryError, match=r"manifest\.json"):
        open_gallery(gallery.directory)


def test_a_flipped_bit_of_the_manifest_changes_nothing_or_is_noticed(gallery: Gallery) -> None:
    path = gallery.directory / "manifest.json"
    content = path.read_bytes()
    noticed = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            assert open_gallery(gallery.directory).manifest == gallery.manifest
        except GalleryError:
            noticed += 1
    assert noticed > len(content) / 2


def test_a_lost_table_is_noticed(gallery: Gallery) -> None:
    shutil.rmtree(gallery.directory / "vectors.lance")
    with pytest.raises(GalleryError, match="has lost its table"):
        open_gallery(gallery.directory)


def test_vectors_of_unknown_origin_are_not_added_to(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    (gallery.directory / "manifest.json").unlink()
    with pytest.raises(GalleryError, match=r"holds vectors but no manifest.json"):
        build([photos], gallery.directory, tiny_model)


def test_a_creation_that_was_killed_before_its_manifest_is_gone_on_with(
    tmp_path: Path, photos: Path, tiny_model: RetrievalModel
) -> None:
    with writing(tmp_path / "gallery") as directory:
        create_gallery(directory, tiny_model)
    (tmp_path / "gallery" / "manifest.json").unlink()
    assert build([photos], tmp_path / "gallery", tiny_model).added == 15


def test_old_rows_do_not_pass_for_those_of_a_version_that_another_thread_moves_on_to(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_table = type(gallery.table).version
    asked: list[int] = []

    def version(table: Any) -> int:
        asked.append(1)
        if len(asked) == 2:  # inside of what reads
            open_gallery(gallery.directory).remove_items([1])
            table.checkout_latest()
        return of_table.fget(table)  # type: ignore[attr-defined]

    monkeypatch.setattr(type(gallery.table), "version", property(version))
    rows, read_version = gallery.read_rows()
    monkeypatch.undo()
    gallery.table.checkout(read_version)
    assert len(rows) == gallery.table.count_rows()


def test_another_model_is_refused_by_name(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_by = tiny_model.name
    monkeypatch.setattr(tiny_model, "name", "other")
    monkeypatch.setattr(tiny_model, "fingerprint", "0" * 32)
    sentence = f"was built by the model '{built_by}' .*, not by 'other' .*; use --model {built_by}"
    with pytest.raises(GalleryError, match=sentence):
        gallery.search("a dog", model=tiny_model)
    with pytest.raises(GalleryError, match=sentence):
        build([photos], gallery.directory, tiny_model)


def test_a_model_that_changed_under_its_name_is_refused(
    gallery: Gallery, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "fingerprint", "0" * 32)
    with pytest.raises(GalleryError, match=r"has changed \(00000000\) since it built the gallery .* build it again"):
        gallery.search("a dog", model=tiny_model)


def test_the_python_face_loads_the_model_of_the_manifest(gallery: Gallery, tiny_model: RetrievalModel) -> None:
    opened = cots.open_gallery(gallery.directory)
    result = opened.search("a red truck", k=3)
    assert result.model == tiny_model.name
    assert result.hits == gallery.search("a red truck", k=3, model=tiny_model).hits


def test_a_model_directory_is_named_so_that_it_is_found_from_anywhere(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_dir.parent)
    monkeypatch.setattr(tiny_model, "name", tiny_model_dir.name)
    build([photos], tmp_path / "gallery", tiny_model)
    assert open_gallery(tmp_path / "gallery").manifest.model == str(tiny_model_dir)


def test_a_gallery_moves_with_the_media_inside_it(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    write_picture(tmp_path / "gallery" / "media" / "inside.png", 1)
    outside = write_picture(tmp_path / "outside.png", 2)
    build([tmp_path / "gallery" / "media", outside], tmp_path / "gallery", tiny_model)
    (tmp_path / "gallery").rename(tmp_path / "elsewhere")
    moved = open_gallery(tmp_path / "elsewhere")
    paths = {hit.path for hit in moved.search("a dog", model=tiny_model).hits}
    assert paths == {str(tmp_path / "elsewhere" / "media" / "inside.png"), str(outside)}
    report = build([tmp_path / "elsewhere" / "media", outside], tmp_path / "elsewhere", tiny_model)
    assert report.unchanged == 2


def test_paths_inside_are_recognised_through_a_link(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    write_picture(tmp_path / "real" / "media" / "inside.png", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build([tmp_path / "real" / "media"], tmp_path / "link", tiny_model)
    assert open_gallery(tmp_path / "real").row(1)["path"] == "media/inside.png"


def test_a_file_inside_that_is_listed_by_two_names_is_one_item(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    picture = write_picture(tmp_path / "real" / "media" / "inside.png", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    names = [tmp_path / "real" / "media", tmp_path / "link" / "media"]
    assert build(names, tmp_path / "link", tiny_model).added == 1
    write_picture(picture, 2)
    assert build(names, tmp_path / "link", tiny_model).updated == 1
    assert check(tmp_path / "link") == []


def test_media_gives_a_path_or_a_shards_bytes(tmp_path: Path, gallery: Gallery, tiny_model: RetrievalModel) -> None:
    hit = gallery.search("a dog", model=tiny_model, kind="image", k=1).hits[0]
    assert gallery.media(hit.id) == (hit.path, "image/png")
    shard = tmp_path / "shard.tar"
    subprocess.run(["tar", "-cf", shard, "00.png", "01.png"], cwd=tmp_path / "photos", check=True)
    build([shard], tmp_path / "from-shard", tiny_model)
    opened = open_gallery(tmp_path / "from-shard")
    content, mime = opened.media(2)
    assert (content, mime) == ((tmp_path / "photos" / "01.png").read_bytes(), "image/png")
    with pytest.raises(GalleryError, match="has no row 99"):
        opened.media(99)


def test_a_read_only_gallery_can_be_read(gallery: Gallery) -> None:
    """As another user, since root may write anywhere; without its snapshot, so that it has to come from the table."""
    shutil.rmtree(gallery.directory / "search")
    before = sorted(path for path in gallery.directory.rglob("*"))
    for folder in gallery.directory.parents:
        if "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o055)
    for path in [gallery.directory, *gallery.directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    script = (
        "import os, sys, lancedb, index.gallery\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(len(index.gallery.open_gallery(sys.argv[1]).snapshot))\n"
        "print(len(index.gallery.open_gallery(sys.argv[1]).ids('moment = false')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(gallery.directory)], capture_output=True, text=True)
    for path in [gallery.directory, *gallery.directory.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.stdout.split() == ["21", "15"], done.stderr
    assert sorted(path for path in gallery.directory.rglob("*")) == before


def test_the_version_in_file_names_is_the_tables(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    for seed in range(3):
        assert gallery.version == gallery.table.version
        write_picture(photos / "new.png", 50 + seed)
        build([photos], gallery.directory, tiny_model)
        gallery.table.checkout_latest()


def test_searching_does_not_import_lancedb(gallery: Gallery, tiny_model_dir: Path) -> None:
    script = (
        "import sys, cots\n"
        "gallery = cots.open_gallery(sys.argv[1])\n"
        "print(len(gallery.search('a dog', kind='image').hits))\n"
        "print([name for name in ('lancedb', 'pandas', 'gradio') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(gallery.directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["10", "[]"]


def test_a_second_writer_is_told_so(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    with writing(gallery.directory):
        with pytest.raises(GalleryError, match="Another process is changing the gallery"):
            build([photos], gallery.directory, tiny_model)
        assert gallery.search("a dog", model=tiny_model).hits  # readers are not locked out
    assert build([photos], gallery.directory, tiny_model).unchanged == 15


def test_a_place_that_cannot_hold_a_gallery_is_named(tmp_path: Path, photos: Path, tiny_model: RetrievalModel) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GalleryError, match=r"cannot be written to \(file exists\)"):
        build([photos], tmp_path / "file", tiny_model)


def test_an_empty_gallery_is_a_gallery(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    gallery = create_gallery(tmp_path / "empty", tiny_model)
    assert gallery.search("a dog", model=tiny_model).hits == []
    assert gallery.search("a dog", model=tiny_model, where="kind = 'image'", kind="video").hits == []
    assert info(gallery.directory)["items"] == 0


def test_the_manifest_is_replaced_as_a_whole(tmp_path: Path) -> None:
    manifest = Manifest.for_model("m", "f" * 32, 8)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "manifest.json").read_text())["dtype"] == "float16"
    assert manifest.with_next_id(7).with_next_id(5).next_id == 7


def test_a_table_that_was_put_back_is_not_taken_for_the_one_before(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel
) -> None:
    table, copy = gallery.directory / "vectors.lance", gallery.directory.with_name("copy.lance")
    shutil.copytree(table, copy)
    (first, *_), before = gallery.snapshot.items.tolist(), gallery.version
    with writing(gallery.directory):
        open_gallery(gallery.directory).remove_items([first])
    lost = open_gallery(gallery.directory)
    assert first not in lost.snapshot.items
    shutil.rmtree(table)
    copy.rename(table)
    second = int(gallery.snapshot.items[-1])
    with writing(gallery.directory):
        open_gallery(gallery.directory).remove_items([second])
    opened = open_gallery(gallery.directory)
    assert opened.version == lost.version > before
    assert first in opened.snapshot.items
    assert second not in opened.snapshot.items


def test_a_damaged_or_old_snapshot_is_made_again(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    file = next((gallery.directory / "search").glob("snapshot-*.arrow"))
    expected = gallery.snapshot.vectors.copy()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    opened = open_gallery(gallery.directory)
    np.testing.assert_array_equal(opened.snapshot.vectors, expected)
    assert file.read_bytes() != content
    write_picture(photos / "new.png", 60)
    build([photos], gallery.directory, tiny_model)
    assert len(list((gallery.directory / "search").iterdir())) == 1
    assert len(open_gallery(gallery.directory).snapshot) == len(expected) + 1

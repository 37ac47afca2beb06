"""Building: what is embedded and what is not, faults, removal, and the report."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_media import write_animation, write_picture
from lancedb.table import LanceTable

from cots.errors import GalleryError, MediaError, SourceError
from cots.model.retrieval_model import RetrievalModel
from index import writer
from index.build import BuildReport, build, info, remove
from index.check import check
from index.gallery import Gallery, open_gallery

KEYS = {"items", "vectors", "images", "videos", "model", "fingerprint", "dimension", "engine", "version"}


def counts(report: BuildReport) -> dict[str, int]:
    """The report's counts that are not zero."""
    names = ("added", "updated", "unchanged", "moved", "relabelled", "pruned")
    lists = {"missing": len(report.missing), "failed": len(report.failed)}
    return {name: count for name, count in ({name: getattr(report, name) for name in names} | lists).items() if count}


def vector_of(gallery: Gallery, name: str) -> tuple[int, np.ndarray]:
    """Id and vector of the pooled row of a file, by the end of its path."""
    snapshot = open_gallery(gallery.directory).snapshot
    paths = snapshot.rows["path"].to_pylist()
    row = next(row for row, path in enumerate(paths) if path.endswith(name) and not snapshot.moments[row])
    return int(snapshot.ids[row]), snapshot.vectors[row].copy()


def test_a_build_embeds_everything_once(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    report = build([photos], tmp_path / "gallery", tiny_model)
    assert counts(report) == {"added": 15}
    assert (report.items, report.vectors) == (15, 21)
    assert report.rate > 0
    facts = info(tmp_path / "gallery")
    assert facts.keys() >= KEYS
    assert [facts[key] for key in ("items", "vectors", "images", "videos")] == [15, 21, 12, 3]
    assert (facts["model"], facts["fingerprint"], facts["dimension"]) == (tiny_model.name, tiny_model.fingerprint, 32)
    assert (facts["engine"], facts["sources"]) == ("exact", ["photos"])
    json.dumps(facts)
    assert check(tmp_path / "gallery", tiny_model) == []
    assert counts(build([photos], tmp_path / "gallery", tiny_model)) == {"unchanged": 15}


def test_texts_that_are_not_unicode_stop_nothing(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    """A file with a name of another code, and half a character in a caption, which JSON can hold."""
    shutil.copy(photos / "00.png", os.fsencode(photos) + b"/\xe9t\xe9.png")
    rows = [{"path": "photos/01.png", "captions": ["a dog \ud83d"], "source": "\udc00", "licence": "x\ud800"}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):
        report = build([tmp_path / "items.jsonl", photos], tmp_path / "gallery", tiny_model)
        assert [error.reason for error in report.failed] == ["its name is not in UTF-8; rename it"]
        assert report.failed[0].path.endswith("\\udce9t\\udce9.png")
        assert report.items == 15
    assert counts(report) == {"unchanged": 15, "failed": 1}
    (row,) = open_gallery(tmp_path / "gallery").table.search().where("caption != ''").to_list()
    assert (row["caption"], row["source"], row["licence"]) == ("a dog ?", "?", "x?")


def test_an_unchanged_file_is_not_read(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither decoded nor hashed: bytes that changed behind an equal size and time stay unnoticed."""
    path = photos / "03.png"
    before, stat = vector_of(gallery, "03.png"), path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert counts(build([photos], gallery.directory, tiny_model)) == {"unchanged": 15}
    assert vector_of(gallery, "03.png")[0] == before[0]


def test_new_changed_touched_and_moved_files(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    before = {name: vector_of(gallery, name) for name in ("00.png", "01.png", "02.png", "03.png", "0.gif")}
    write_picture(photos / "new.png", 77)
    write_picture(photos / "00.png", 78)
    os.utime(photos / "01.png", (1, 1))
    (photos / "deeper").mkdir()
    (photos / "02.png").rename(photos / "deeper" / "renamed.png")
    write_animation(photos / "clips" / "0.gif", 300, seconds=20)
    report = build([photos], gallery.directory, tiny_model)
    assert counts(report) == {"added": 1, "updated": 2, "moved": 2, "unchanged": 11}
    assert (report.items, report.vectors) == (16, 25)  # a picture more; five moments in the place of two
    assert check(gallery.directory, tiny_model) == []

    changed, touched, moved = (vector_of(gallery, name) for name in ("00.png", "01.png", "renamed.png"))
    assert changed[0] == before["00.png"][0]
    assert not np.array_equal(changed[1], before["00.png"][1])
    for after, name in ((touched, "01.png"), (moved, "02.png")):
        assert after[0] == before[name][0]
        np.testing.assert_array_equal(after[1], before[name][1])
    assert counts(build([photos], gallery.directory, tiny_model)) == {"unchanged": 16}


def test_a_moved_video_keeps_all_its_rows(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    (photos / "clips" / "1.gif").rename(photos / "one.gif")
    assert counts(build([photos], gallery.directory, tiny_model)) == {"moved": 1, "unchanged": 14}
    rows = open_gallery(gallery.directory).table.search().where("path LIKE '%one.gif'").to_arrow()
    assert len(rows) == 3
    assert open_gallery(gallery.directory).table.count_rows("path LIKE '%1.gif'") == 0


def test_a_video_that_shrinks_to_a_picture_leaves_no_moment(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel
) -> None:
    write_picture(photos / "clips" / "0.png", 5)
    (photos / "clips" / "0.png").replace(photos / "clips" / "0.gif")
    assert counts(build([photos], gallery.directory, tiny_model)) == {"updated": 1, "unchanged": 14}
    assert info(gallery.directory)["vectors"] == 19
    assert check(gallery.directory, tiny_model) == []


def test_a_copy_is_an_item_of_its_own(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    shutil.copy2(photos / "04.png", photos / "copy.png")
    assert counts(build([photos], gallery.directory, tiny_model)) == {"added": 1, "unchanged": 15}
    original, copy = vector_of(gallery, "04.png"), vector_of(gallery, "copy.png")
    assert original[0] != copy[0]
    np.testing.assert_array_equal(original[1], copy[1])


def test_two_copies_of_a_file_that_is_gone(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    """One takes the item over, the other is new."""
    shutil.copy2(photos / "04.png", photos / "a.png")
    (photos / "04.png").rename(photos / "b.png")
    assert counts(build([photos], gallery.directory, tiny_model)) == {"added": 1, "moved": 1, "unchanged": 14}
    assert check(gallery.directory, tiny_model) == []


def test_files_that_are_gone_are_kept_and_named_until_pruned(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel
) -> None:
    (photos / "07.png").unlink()
    (photos / "clips" / "2.gif").unlink()
    report = build([photos], gallery.directory, tiny_model)
    assert counts(report) == {"unchanged": 13, "missing": 2}
    assert report.missing == [str(photos / "07.png"), str(photos / "clips" / "2.gif")]
    assert report.items == 15
    problems = check(gallery.directory)
    assert len(problems) == 1
    assert "2 files are gone" in problems[0]
    report = build([photos], gallery.directory, tiny_model, prune=True)
    assert counts(report) == {"unchanged": 13, "pruned": 2}
    assert (report.items, report.vectors) == (13, 17)
    assert check(gallery.directory) == []


def test_ctrl_c_during_a_commit_doubles_nothing(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = LanceTable.add

    def interrupted(*arguments: Any) -> None:
        add(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(LanceTable, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build([photos], tmp_path / "gallery", tiny_model)
    monkeypatch.undo()
    assert counts(build([photos], tmp_path / "gallery", tiny_model)) == {"added": 14, "unchanged": 1}
    assert check(tmp_path / "gallery") == []


def test_a_member_that_left_its_shard_is_missing(tmp_path: Path, photos: Path, tiny_model: RetrievalModel) -> None:
    shard = tmp_path / "shard.tar"
    for members in (["00.png", "01.png", "02.png"], ["00.png", "02.png"]):
        subprocess.run(["tar", "-cf", shard, *members], cwd=photos, check=True)
        os.utime(shard, (len(members), len(members)))
        report = build([shard], tmp_path / "gallery", tiny_model)
    assert counts(report) == {"moved": 2, "missing": 1}
    assert report.missing == [f"{shard}::01.png"]


def test_a_member_keeps_its_item_though_an_equal_one_is_put_before_it(
    tmp_path: Path, photos: Path, tiny_model: RetrievalModel
) -> None:
    shard = tmp_path / "shard.tar"
    shutil.copy(photos / "01.png", photos / "copy.png")
    for members in (["00.png", "01.png"], ["copy.png", "00.png", "01.png"]):
        subprocess.run(["tar", "-cf", shard, *members], cwd=photos, check=True)
        os.utime(shard, (len(members), len(members)))
        report = build([shard], tmp_path / "gallery", tiny_model)
    assert counts(report) == {"added": 1, "moved": 2}
    items = {open_gallery(tmp_path / "gallery").row(id)["path"]: id for id in (1, 2, 3)}
    assert items == {f"{shard}::00.png": 1, f"{shard}::01.png": 2, f"{shard}::copy.png": 3}


def test_ids_of_removed_rows_are_not_given_again(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    highest = int(gallery.snapshot.ids.max())
    assert remove(gallery.directory, f"id >= {highest - 5}") >= 2
    build([photos], gallery.directory, tiny_model)
    snapshot = open_gallery(gallery.directory).snapshot
    assert len(snapshot) == 21
    assert not set(snapshot.ids.tolist()) & set(range(highest - 5, highest + 1))


def test_remove_takes_whole_items(gallery: Gallery, photos: Path) -> None:
    assert remove(gallery.directory, "moment AND start > 2 AND path LIKE '%clips/0.gif'") == 1
    assert info(gallery.directory)["vectors"] == 18
    assert remove(gallery.directory, "kind = 'image' AND source = 'photos'") == 12
    assert remove(gallery.directory, "kind = 'image'") == 0
    assert [info(gallery.directory)[key] for key in ("items", "vectors")] == [2, 6]
    assert (photos / "00.png").exists()


def test_remove_explains_a_bad_condition(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match=r"The filter 'colour = 1' cannot be used .*the columns are: id, item, kind"):
        remove(gallery.directory, "colour = 1")
    with pytest.raises(GalleryError, match="There is no gallery"):
        remove(tmp_path / "nowhere", "id = 1")
    assert not (tmp_path / "nowhere").exists()


def test_unreadable_files_are_named_and_the_rest_is_indexed(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.jpg").write_text("not a picture")
    content = (photos / "00.png").read_bytes()
    (photos / "truncated.png").write_bytes(content[: len(content) // 2])
    told: list[MediaError] = []
    report = build([photos], tmp_path / "gallery", tiny_model, on_error=told.append)
    assert counts(report) == {"added": 15, "failed": 3}
    assert {Path(error.path).name for error in report.failed} == {"empty.png", "text.jpg", "truncated.png"}
    assert told == report.failed
    assert counts(build([photos], tmp_path / "gallery", tiny_model)) == {"unchanged": 15, "failed": 3}


def test_a_file_that_became_unreadable_keeps_its_old_rows(
    gallery: Gallery, photos: Path, tiny_model: RetrievalModel
) -> None:
    content = (photos / "00.png").read_bytes()
    (photos / "00.png").write_bytes(content[: len(content) // 2])
    assert counts(build([photos], gallery.directory, tiny_model)) == {"unchanged": 14, "failed": 1}
    assert info(gallery.directory)["items"] == 15


def test_a_stopped_build_keeps_what_it_has(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    seen = 0

    def interrupt(progress: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([photos], tmp_path / "gallery", tiny_model, progress=interrupt)
    assert 5 <= info(tmp_path / "gallery")["items"] <= 6
    report = build([photos], tmp_path / "gallery", tiny_model)
    assert report.added + report.unchanged == 15
    assert check(tmp_path / "gallery") == []


def test_captions_of_a_table_are_kept_brought_up_to_date_and_not_lost(
    tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    write_picture(tmp_path / "media" / "a.png", 1)
    table = tmp_path / "items.jsonl"
    gallery = tmp_path / "gallery"
    for captions in (["a dog"], ["a brown dog", "a pet"]):
        row = {"path": "media/a.png", "captions": captions, "source": "holiday", "licence": "CC0"}
        table.write_text(json.dumps(row) + "\n")
        report = build([table], gallery, tiny_model)
        hit = (
            open_gallery(gallery)
            .search("a dog", model=tiny_model, where="source = 'holiday' AND licence = 'CC0'")
            .hits[0]
        )
        assert (hit.caption, hit.source, hit.licence) == ("\n".join(captions), "holiday", "CC0")
    assert counts(report) == {"relabelled": 1}
    # The folder says nothing of captions, so it does not take them away, whether the file is as it was or was moved.
    assert counts(build([tmp_path / "media"], gallery, tiny_model)) == {"unchanged": 1}
    (tmp_path / "media" / "a.png").rename(tmp_path / "media" / "b.png")
    assert counts(build([tmp_path / "media"], gallery, tiny_model)) == {"moved": 1}
    assert open_gallery(gallery).row(1)["caption"] == "a brown dog\na pet"
    assert open_gallery(gallery).ids("array_has(captions, 'a pet')").tolist() == [1]


def test_quotes_in_names_are_only_names(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    path = write_picture(tmp_path / "it's" / "a 'quoted'; DROP.png", 1)
    build([path], tmp_path / "gallery", tiny_model)
    os.utime(path, (5, 5))
    assert counts(build([path], tmp_path / "gallery", tiny_model)) == {"moved": 1}
    assert open_gallery(tmp_path / "gallery").row(1)["path"] == str(path)


def test_a_source_that_cannot_be_used_leaves_no_gallery(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "table.csv").write_text("title,colour\na,red\n")
    for source in ("nothing", "table.csv", "missing"):
        with pytest.raises(SourceError):
            build([tmp_path / source], tmp_path / "gallery", tiny_model)
        assert not (tmp_path / "gallery").exists()


def test_an_object_store_is_refused_before_anything_is_made(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GalleryError, match=r"s3://bucket/gallery is the address of an object store"):
        build([photos], "s3://bucket/gallery", tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_many_small_builds_are_merged(gallery: Gallery, photos: Path, tiny_model: RetrievalModel) -> None:
    for seed in range(18):
        write_picture(photos / f"new{seed}.png", 200 + seed)
        build([photos], gallery.directory, tiny_model)
    opened = open_gallery(gallery.directory)
    assert opened.table.stats()["fragment_stats"]["num_fragments"] < 10
    assert len(opened.snapshot) == 21 + 18
    assert check(gallery.directory) == []

"""Galleries whose table lies in an object store or in another folder: the same as local ones, and safe when it fails.

The store is Moto's, in this process, spoken to by LanceDB over HTTP as it speaks to S3.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gallery_media import write_picture
from object_store import TABLE, ObjectStore, assert_holds_each_file_once, rows_by_path

from cots.errors import GalleryError
from cots.model.retrieval_model import RetrievalModel
from index import ann, writer
from index.build import build, info, remove
from index.check import check
from index.compaction import compact
from index.engine import set_engine
from index.gallery import Gallery, adopt_table, open_gallery
from index.place import meaning

UNREACHABLE = "http://127.0.0.1:1"


def test_it_finds_what_a_local_gallery_finds(
    remote: Gallery, gallery: Gallery, store: ObjectStore, tiny_model: RetrievalModel
) -> None:
    for query in ({"text": "a dog"}, {"text": "a red car", "kind": "video"}, {"text": "snow", "where": "id > 4"}):
        there, here = (place.search(model=tiny_model, k=8, **query) for place in (remote, gallery))
        assert [(hit.id, hit.path, hit.start) for hit in there.hits] == [(h.id, h.path, h.start) for h in here.hits]
        np.testing.assert_allclose([hit.score for hit in there.hits], [hit.score for hit in here.hits], atol=2e-3)
    assert not list(remote.directory.rglob("*.lance"))
    assert all(key.startswith("galleries/one/vectors.lance/") for key in store.listed())


def test_only_a_condition_asks_the_store(remote: Gallery, store: ObjectStore, tiny_model: RetrievalModel) -> None:
    remote.search("a dog", model=tiny_model)
    store.failing = lambda method, path: 503
    assert {hit.kind for hit in remote.search("a dog", kind="video", model=tiny_model).hits} == {"video"}
    assert remote.search(like=1, model=tiny_model).hits
    with pytest.raises(GalleryError, match="cannot be used"):
        remote.search("a dog", where="id > 4", model=tiny_model)


def test_the_manifest_knows_the_table_and_no_secret(remote: Gallery, store: ObjectStore) -> None:
    manifest = json.loads((remote.directory / "manifest.json").read_text())
    assert manifest["table"] == info(remote.directory)["table"] == TABLE
    written = b"".join(path.read_bytes() for path in remote.directory.rglob("*") if path.is_file())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT"):
        assert store.environment[name].encode() not in written


def test_all_commands_work_without_the_option(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model_dir: Path, cots_command: Callable[..., str]
) -> None:
    directory = tmp_path / "gallery"
    at = ("--gallery", directory)
    cots_command("index", "build", photos, *at, "--model", tiny_model_dir, "--table", TABLE)
    write_picture(photos / "new.png", 77)
    write_picture(photos / "00.png", 78)
    shutil.copy(photos / "05.png", photos / "copy.png")
    assert "2 added, 1 updated, 14 unchanged" in cots_command(
        "index", "build", photos, *at, "--model", tiny_model_dir, "--table", TABLE
    )
    assert "1 superfluous copy in 1 group;" in cots_command("index", "duplicates", *at)
    assert "1 item removed" in cots_command("index", "remove", *at, "--where", "path LIKE '%new.png'")
    assert "fragments 1." in cots_command("index", "compact", *at)
    assert "hnsw" in cots_command("index", "engine", "hnsw", *at)
    facts = json.loads(cots_command("index", "info", *at, "--json"))
    assert (facts["items"], facts["engine"], facts["table"]) == (16, "hnsw", TABLE)
    hits = json.loads(cots_command("search", "a dog", *at, "-k", 20, "--json"))["hits"]
    assert len({hit["path"] for hit in hits}) == 16
    assert cots_command("index", "check", *at) == "The gallery is sound.\n"


def test_words_are_found_by_the_index_in_the_store(
    store: ObjectStore, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", number)
    captions = ("a dog runs", "two cats", "a dog and a boat")
    rows = [json.dumps({"path": f"{number}.png", "captions": [text]}) for number, text in enumerate(captions)]
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    build([tmp_path / "items.jsonl"], tmp_path / "remote", tiny_model, table=TABLE)
    found = open_gallery(tmp_path / "remote").search("dogs", model=tiny_model, mode="text")
    assert {Path(hit.path).name for hit in found.hits} == {"0.png", "2.png"}


def test_structures_are_made_again_when_the_table_has_moved_on(
    remote: Gallery, photos: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ann, "FEW_ROWS", 0)
    set_engine(remote.directory, "ivf")
    shutil.copytree(remote.directory, remote.directory.with_name("reader"))
    for seed in range(40, 60):
        write_picture(photos / f"{seed}.png", seed)
    build([photos], remote.directory, tiny_model)
    reader = open_gallery(remote.directory.with_name("reader"))
    assert reader.version == open_gallery(remote.directory).snapshot.version
    newest = reader.search("a dog", model=tiny_model, k=100)
    expected = open_gallery(remote.directory).search("a dog", model=tiny_model, k=100)
    assert [hit.id for hit in newest.hits] == [hit.id for hit in expected.hits]


def test_several_processes_embed_for_it(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    report = build([photos], tmp_path / "remote", tiny_model, table=TABLE, workers=2)
    assert report.items == 15
    assert_holds_each_file_once(tmp_path / "remote", photos, tmp_path, tiny_model)


KILLED_BUILD = """
import sys
import index.writer
from cots.model.pretrained import load_model
from index.build import build
index.writer.COMMIT_ROWS = 1
photos, gallery, model, table = sys.argv[1:]
build([photos], gallery, load_model(model, device="cpu"), table=table, batch_size=1, threads=1)
"""


def test_a_build_that_was_killed_is_gone_on_with(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel, tiny_model_dir: Path
) -> None:
    """Killed while a commit is under way: just after the store has taken the eighth, before it says so."""
    process: list[subprocess.Popen[bytes]] = []
    commits = 0

    def kill(path: str) -> int:
        nonlocal commits
        commits += path.endswith(".manifest")
        if commits == 8 and process[0].returncode is None:
            process[0].send_signal(signal.SIGKILL)
            process[0].wait()
        return 0

    store.after_put = kill
    arguments = [str(photos), str(tmp_path / "remote"), str(tiny_model_dir), TABLE]
    process.append(subprocess.Popen([sys.executable, "-c", KILLED_BUILD, *arguments], env=dict(os.environ)))
    assert process[0].wait() == -signal.SIGKILL
    store.after_put = lambda path: 0
    held = len(rows_by_path(tmp_path / "remote"))
    assert 5 <= held < 15
    report = build([photos], tmp_path / "remote", tiny_model)
    assert (report.unchanged, report.added) == (held, 15 - held)
    assert_holds_each_file_once(tmp_path / "remote", photos, tmp_path, tiny_model)


def test_a_build_waits_for_a_store_that_fails_for_a_while(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a commit and then fails, so that nobody knows whether it has."""
    build([photos / "00.png"], tmp_path / "remote", tiny_model, table=TABLE)
    monkeypatch.setattr(writer, "COMMIT_ROWS", 2)
    commits = 0

    def lose_answers(path: str) -> int:
        nonlocal commits
        commits += path.endswith(".manifest")
        return 503 if path.endswith(".manifest") and commits in (1, 3, 4) else 0

    store.after_put = lose_answers
    build([photos], tmp_path / "remote", tiny_model, batch_size=2, threads=1)
    assert commits > 5
    assert_holds_each_file_once(tmp_path / "remote", photos, tmp_path, tiny_model)


def test_a_build_whose_store_goes_away_says_so_and_is_gone_on_with(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_ROWS", 1)
    monkeypatch.setattr(writer, "WAITS", (0.01,))
    commits = threading.Semaphore(6)

    def stop_after_some(path: str) -> int:
        if path.endswith(".manifest") and not commits.acquire(blocking=False):
            store.failing = lambda method, path: 503
        return 0

    store.after_put = stop_after_some
    with pytest.raises(GalleryError, match=rf"The table at {TABLE} cannot be used \(it cannot be reached\)") as error:
        build([photos], tmp_path / "remote", tiny_model, table=TABLE, batch_size=1, threads=1)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT", UNREACHABLE)
    with pytest.raises(GalleryError, match=rf"The table at {TABLE} cannot be used \(it cannot be reached\)"):
        info(tmp_path / "remote")
    store.after_put, store.failing = lambda path: 0, lambda method, path: 0
    monkeypatch.setenv("AWS_ENDPOINT", store.environment["AWS_ENDPOINT"])
    held = len(rows_by_path(tmp_path / "remote"))
    assert 0 < held < 15
    assert build([photos], tmp_path / "remote", tiny_model).added == 15 - held
    assert_holds_each_file_once(tmp_path / "remote", photos, tmp_path, tiny_model)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("s3://no-such-bucket/gallery", r"The table at s3://no-such-bucket/gallery .*there is no such bucket"),
        ("ftp://host/gallery", r"A table cannot be kept at 'ftp://host/gallery'; give a folder or one of s3://"),
        ("s3:///gallery", r"A table cannot be kept at 's3:///gallery'"),
        ("s3://key:secret@bucket/gallery", r"The s3:// address was given with more than a bucket and a prefix"),
        ("s3://key:half/secret@bucket/gallery", r"The s3:// address was given with more than a bucket and a prefix"),
        ("s3a://key:secret@bucket/gallery", r"The s3a:// address was given with more than a bucket and a prefix"),
        ("s3://bucket/gallery?secret=1", r"The s3:// address was given with more than a bucket and a prefix"),
        ("s3://[bucket/gallery", r"A table cannot be kept at 's3://\[bucket/gallery'"),
        ("", r"A table cannot be kept at ''; give a folder"),
        ("/dev/null", r"No table can be made in /dev/null \(file exists\); choose another place"),
    ],
)
def test_an_address_that_cannot_be_used_is_a_sentence_and_leaves_nothing(
    store: ObjectStore, photos: Path, tmp_path: Path, tiny_model: RetrievalModel, table: str, sentence: str
) -> None:
    with pytest.raises(GalleryError, match=sentence) as error:
        build([photos], tmp_path / "gallery", tiny_model, table=table)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "gallery" / "manifest.json").exists()
    build([photos], tmp_path / "gallery", tiny_model, table=TABLE)  # the right one, with the same folder


def test_what_lancedb_says_is_told_without_its_own_source_and_signatures() -> None:
    said = "lance error: LanceError(IO): Generic S3 error: no region for 'b',\n /x/src/aws.rs:319:13"
    assert meaning(said) == "Generic S3 error: no region for 'b'"
    assert meaning("something at https://a.b/c?sig=secret, then") == "something at https://a.b/c then"


def test_a_refusal_of_the_store_is_a_sentence(remote: Gallery, store: ObjectStore, photos: Path) -> None:
    store.failing = lambda method, path: 403
    with pytest.raises(GalleryError, match=rf"The table at {TABLE} cannot be used \(access is denied\)"):
        info(remote.directory)
    store.failing = lambda method, path: 403 if method != "GET" else 0
    with pytest.raises(GalleryError, match=rf"The table at {TABLE} cannot be used \(access is denied\)"):
        remove(remote.directory, "id = 1")
    store.failing = lambda method, path: 0
    assert info(remote.directory)["items"] == 15


def test_a_table_in_another_folder(photos: Path, tmp_path: Path, tiny_model: RetrievalModel) -> None:
    gallery, folder = tmp_path / "gallery", tmp_path / "large disk" / "tables"
    build([photos], gallery, tiny_model, table=folder)
    assert (folder / "vectors.lance").is_dir()
    assert not (gallery / "vectors.lance").exists()
    write_picture(photos / "new.png", 77)
    assert build([photos], gallery, tiny_model, table=folder).added == 1
    assert compact(gallery).fragments_after == 1
    opened = open_gallery(gallery)
    assert opened.version == opened.table.version
    assert check(gallery) == []
    assert len(opened.search("a dog", model=tiny_model, k=50).hits) == 16
    with pytest.raises(GalleryError, match=r"There is a table at .*tables already, which another gallery made"):
        build([photos], tmp_path / "second", tiny_model, table=folder)
    shutil.rmtree(folder)
    with pytest.raises(GalleryError, match=r"has lost its table vectors\.lance at .*tables"):
        open_gallery(gallery)


@pytest.mark.parametrize("name", ["gallery/../gallery", "link"])
def test_a_galleries_own_folder_by_another_name_is_its_own(
    photos: Path, tmp_path: Path, tiny_model: RetrievalModel, name: str
) -> None:
    (tmp_path / "gallery").mkdir()
    (tmp_path / "link").symlink_to("gallery")
    build([photos / "00.png"], tmp_path / "gallery", tiny_model, table=tmp_path / name)
    build([photos / "01.png"], tmp_path / "gallery", tiny_model, table=tmp_path / name)
    assert info((tmp_path / "gallery").rename(tmp_path / "moved"))["items"] == 2


def test_an_address_is_the_same_however_its_scheme_is_written(
    remote: Gallery, photos: Path, tiny_model: RetrievalModel
) -> None:
    assert build([photos], remote.directory, tiny_model, table=f"S3{TABLE[2:]}/").unchanged == 15


def test_a_manifest_of_before_has_its_table_in_its_folder(gallery: Gallery) -> None:
    path = gallery.directory / "manifest.json"
    values = json.loads(path.read_text())
    del values["table"], values["table_identity"], values["checksum"]
    path.write_text(json.dumps(values))
    assert info(gallery.directory)["table"] == str(gallery.directory)
    assert remove(gallery.directory, "id = 1") == 1
    with pytest.raises(GalleryError, match="lies in its own folder"):
        adopt_table(gallery.directory)


def test_the_page_follows_the_table(
    remote: Gallery, store: ObjectStore, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo.engine import Engine

    engine = Engine(remote.directory, tiny_model)
    assert len(engine.search("a dog", k=50).hits) == 15
    remove(remote.directory, "id = 1")
    assert len(engine.search("a dog", k=50).hits) == 14
    monkeypatch.setenv("AWS_ENDPOINT", UNREACHABLE)
    with pytest.raises(GalleryError, match="it cannot be reached"):
        engine.search("a dog")
    monkeypatch.setenv("AWS_ENDPOINT", store.environment["AWS_ENDPOINT"])
    assert len(engine.search("a dog", k=50).hits) == 14

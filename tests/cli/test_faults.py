"""Bad input and faults at the command line: one sentence, the right exit code, and the good items are kept."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index.gallery import open_gallery

Cots = Callable[..., Any]
COMMAND = [sys.executable, "-m", "cots.cli"]


def assert_one_sentence(outcome: Any, sentence: str) -> None:
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch(r"Error: .+\n", outcome.err), outcome.err  # `.` matches no line break
    assert re.search(sentence, outcome.err), outcome.err


def _write_bad_files(folder: Path, picture: bytes, clip: bytes) -> dict[str, str]:
    """Files that cannot be read, and what is to be said of each."""
    noise = np.random.default_rng(0).bytes(5000)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "huge.gif", save_all=True, append_images=frames[1:], duration=100)
    animation = bytearray((folder / "huge.gif").read_bytes())
    animation[6:10] = (20_000).to_bytes(2, "little") * 2  # the size that the header claims
    flipped = bytearray(picture)
    flipped[len(flipped) // 2] ^= 255
    contents = {
        "zero.png": (b"", "empty"),
        "zero.mp4": (b"", "empty"),
        "text.jpg": (b"dear diary", "not an image or a video"),
        "noise.jpg": (noise, "not an image or a video"),
        "noise.mp4": (noise, "not an image or a video"),
        "damaged.png": (bytes(flipped), "damaged|truncated"),
        "truncated.png": (picture[: len(picture) // 2], "truncated"),
        "truncated.mp4": (clip[: len(clip) // 2], "."),
        "huge.gif": (bytes(animation), "scale the picture down"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    Image.new("1", (11_000, 11_000)).save(folder / "huge.png")
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "pipe.png")
    further = {"huge.png": "scale the picture down", "link.jpg": "no such file", "pipe.png": "a pipe"}
    return {name: reason for name, (_, reason) in contents.items()} | further


def test_a_build_in_which_nothing_can_be_read_fails(cots: Cots, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("dear diary")
    outcome = cots("index", "build", tmp_path / "text.jpg", "--gallery", tmp_path / "g", "--model", tiny_model_dir)
    assert outcome.code == 1
    assert "No file could be read (1 tried)" in outcome.err


def test_an_embedding_in_which_nothing_can_be_read_fails_and_leaves_what_was_there(
    cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("dear diary")
    content = (media / "red.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    out = tmp_path / "v.parquet"
    out.write_text("vectors of yesterday")
    outcome = cots("embed", tmp_path / "text.jpg", tmp_path / "half.png", "--out", out, "--model", tiny_model_dir)
    assert (outcome.code, outcome.out) == (1, "")
    assert f"No file could be read (2 tried), so {out} is not written" in outcome.err
    assert out.read_text() == "vectors of yesterday"
    assert not list(tmp_path.glob(".v.parquet*"))


def test_unreadable_files_are_each_named_and_the_good_ones_indexed(
    cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    picture, clip = (media / "red.png").read_bytes(), (media / "clip.mp4").read_bytes()
    Image.effect_noise((64, 64), 50).save(folder / "noisy.png")
    expected = _write_bad_files(folder, (folder / "noisy.png").read_bytes(), clip)
    (folder / "good.png").write_bytes(picture)
    (folder / "good.mp4").write_bytes(clip)
    outcome = cots("index", "build", folder, "--gallery", tmp_path / "g", "--model", tiny_model_dir)
    assert outcome.code == 0
    assert "3 added" in outcome.out
    assert f"{len(expected)} unreadable" in outcome.out
    lines = outcome.err.splitlines()
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        assert [line for line in lines if re.search(f"^unreadable: {folder}/{name}: .*({reason})", line)], name
    assert cots("index", "check", "--gallery", tmp_path / "g").code == 0
    embedded = cots("embed", folder, "--out", tmp_path / "v.parquet", "--model", tiny_model_dir)
    assert (embedded.code, len(embedded.err.splitlines())) == (0, len(expected))
    assert len(set(pq.read_table(tmp_path / "v.parquet")["path"].to_pylist())) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("mine.png", "theirs.png"):
        (tmp_path / "photos" / name).write_bytes((media / "red.png").read_bytes())
    (tmp_path / "photos" / "theirs.png").chmod(0)
    outcome = cots("index", "build", tmp_path / "photos", "--gallery", tmp_path / "g", "--model", tiny_model_dir)
    assert "1 added" in outcome.out
    assert "theirs.png: permission denied" in outcome.err


def _write_tables(folder: Path) -> None:
    (folder / "none").mkdir()
    (folder / "none" / "notes.txt").write_text("nothing to see")
    (folder / "columns.csv").write_text("name,words\n1.png,a dog\n")
    (folder / "semicolons.csv").write_text("path;caption\n1.png;a dog\n")
    (folder / "columns.jsonl").write_text('{"name": "1.png"}\n')
    pq.write_table(pa.table({"name": ["1.png"]}), folder / "columns.parquet")
    (folder / "empty.jsonl").write_text("")
    (folder / "damaged.parquet").write_bytes(b"PAR1 and then nothing")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("none", "holds no images"),
        ("nonesuch", "there is no file or folder"),
        ("*.webp", "nothing matches"),
        ("columns.csv", "no column `path`.* its columns are: name, words"),
        ("semicolons.csv", "its columns are: path;caption; its columns must be parted by commas"),
        ("columns.jsonl", "no column `path`.* its columns are: name"),
        ("columns.parquet", "no column `path`.* its columns are: name"),
        ("empty.jsonl", "has no rows"),
        ("damaged.parquet", "not a readable Parquet file"),
    ],
)
@pytest.mark.parametrize("command", ["index build", "embed"])
def test_a_source_that_cannot_be_used_is_one_sentence(
    cots: Cots, tiny_model_dir: Path, tmp_path: Path, command: str, source: str, sentence: str
) -> None:
    _write_tables(tmp_path)
    out = ("--gallery" if command == "index build" else "--out", tmp_path / "out")
    assert_one_sentence(cots(*command.split(), tmp_path / source, *out, "--model", tiny_model_dir), sentence)
    assert not (tmp_path / "out").exists()


def test_a_gallery_of_another_model_is_refused(
    cots: Cots, media: Path, gallery: Path, tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path
) -> None:
    build = ("index", "build", media / "red.png", "--gallery")
    assert_one_sentence(cots(*build, gallery, "--model", other_model_dir), "built by the model .* not by")
    assert cots(*build, tmp_path / "g", "--model", other_model_dir).code == 0
    weights = (tiny_model_dir / "model.safetensors").read_bytes()
    (other_model_dir / "model.safetensors").write_bytes(weights)  # as after another training into the same place
    assert_one_sentence(cots("search", "dog", "--gallery", tmp_path / "g"), "has changed .* since it built the gallery")


def test_a_gallery_that_cannot_be_used_is_one_sentence(
    cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for command in (["search", "dog"], ["index", "info"], ["index", "check"], ["index", "remove", "--where", "id = 1"]):
        assert_one_sentence(cots(*command, "--gallery", tmp_path / "nowhere"), "There is no gallery at .*nowhere")
    (tmp_path / "file").write_text("in the way")
    build = ("index", "build", media / "red.png", "--model", tiny_model_dir, "--gallery")
    assert_one_sentence(cots(*build, tmp_path / "file"), "cannot be written to")
    assert cots(*build, tmp_path / "g").code == 0
    assert_one_sentence(cots("search", "dog", "--gallery", tmp_path / "g", "--where", "colour = 1"), "colour = 1")
    empty = cots("search", " ", "--gallery", tmp_path / "g")
    assert empty.code == 2
    assert "give words to look for, --image FILE, or both" in empty.err
    (tmp_path / "g" / "manifest.json").write_text("{")
    assert_one_sentence(cots("search", "dog", "--gallery", tmp_path / "g"), "manifest")


def test_a_picture_to_search_by_that_cannot_be_read(cots: Cots, gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("dear diary")
    search = ("search", "--gallery", gallery, "--image")
    assert_one_sentence(cots(*search, tmp_path / "text.jpg"), "text.jpg: not an image")
    assert_one_sentence(cots(*search, tmp_path / "none.jpg"), "none.jpg: no such file")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nonesuch", "There is no model 'nonesuch'; use `embedded`, a model directory, or open_clip:ARCH/TAG"),
        ("{folder}", "holds no model"),
        ("open_clip:nonesuch", "is no open_clip model"),
        ("open_clip:ViT-B-32/nonesuch", "no weights 'nonesuch' for ViT-B-32"),
    ],
)
def test_an_unknown_model_is_one_sentence(cots: Cots, media: Path, tmp_path: Path, name: str, sentence: str) -> None:
    model = ("--model", name.format(folder=tmp_path))
    picture = media / "red.png"
    assert_one_sentence(cots("index", "build", picture, "--gallery", tmp_path / "g", *model), sentence)
    assert_one_sentence(cots("embed", picture, "--out", tmp_path / "v.parquet", *model), sentence)
    assert_one_sentence(cots("evaluate", media / "pictures.jsonl", *model), sentence)
    assert_one_sentence(cots("demo", "--port", 0, *model), sentence)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_configuration_is_one_sentence(cots: Cots, media: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {epochs: 1}\n")
    (tmp_path / "bad.yaml").write_text("training: {epochs: 1\n")
    assert_one_sentence(cots("pretrain", tmp_path / "none.yaml"), "cannot be read")
    assert_one_sentence(cots("pretrain", tmp_path / "bad.yaml"), "not valid YAML")
    assert_one_sentence(cots("pretrain", tmp_path / "a.yaml", "training.epoch=2"), "did you mean 'training.epochs'")
    assert_one_sentence(cots("pretrain", tmp_path / "a.yaml", "training.epochs"), "write it as section.key=value")
    assert_one_sentence(cots("pretrain", tmp_path / "a.yaml", "training.epochs=many"), r"training\.epochs.*'many'")
    assert_one_sentence(cots("pretrain", tmp_path / "a.yaml"), "data.train names no source")
    settings = [f"data.train=[{{path: {media / 'pictures.jsonl'}}}]", "training.batch_size=2"]
    outcome = cots("pretrain", tmp_path / "a.yaml", *settings, f"training.output={tmp_path / 'run'}")
    assert_one_sentence(outcome, "tokenizer is not set")


def test_results_that_cannot_be_written(cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    place, model = tmp_path / "nowhere" / "result", ("--model", tiny_model_dir)
    assert_one_sentence(cots("evaluate", media / "pictures.jsonl", "--json", place, *model), "cannot be written to")
    assert_one_sentence(cots("embed", media / "red.png", "--out", place, *model), "cannot be written to")


def test_a_folder_is_refused_as_a_file_of_vectors_before_anything_is_read(cots: Cots, tmp_path: Path) -> None:
    outcome = cots("embed", tmp_path / "nonesuch", "--out", tmp_path, "--model", "nonesuch")
    assert_one_sentence(outcome, f"The vectors cannot be written to {tmp_path}: it is a folder")


def test_a_port_in_use_is_one_sentence(cots: Cots, gallery: Path, tiny_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = cots("demo", "--gallery", gallery, "--port", port, "--model", tiny_model_dir)
        assert_one_sentence(outcome, f"Port {port} on 127.0.0.1 is in use")


def test_ctrl_c_during_a_build_loses_and_doubles_nothing(
    cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    photos, gallery = tmp_path / "photos", tmp_path / "g"
    photos.mkdir()
    for number in range(400):  # more than any machine embeds in the time that follows
        noise = np.random.default_rng(number).integers(0, 256, (200, 300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{number:03}.png", compress_level=1)
    (photos / "clip.mp4").write_bytes((media / "clip.mp4").read_bytes())
    arguments = ["index", "build", str(photos), "--gallery", str(gallery), "--model", str(tiny_model_dir)]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--batch-size", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (gallery / "manifest.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")
    held = cots("index", "info", "--gallery", gallery, "--json").document["items"]
    assert held < 401
    again = cots(*arguments)
    assert f"{401 - held} added" in again.out
    assert "it holds 401 items" in again.out
    assert cots("index", "check", "--gallery", gallery).code == 0
    snapshot = open_gallery(gallery).snapshot
    paths = snapshot.rows.filter(~snapshot.moments)["path"].to_pylist()
    assert sorted(paths) == sorted(str(path) for path in photos.iterdir())


def test_a_reader_that_goes_away_is_no_traceback(gallery: Path) -> None:
    command = [*COMMAND, "search", "dog", "--gallery", str(gallery), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_line_of_an_evaluation_that_is_damaged_ends_it(
    cots: Cots, media: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [{"image": str(media / f"{colour}.png"), "captions": [colour]} for colour in ("red", "blue")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    outcome = cots("evaluate", tmp_path / "pairs.jsonl", "--model", tiny_model_dir)
    assert_one_sentence(outcome, "1 rows cannot be used, the first: .*line 3: not JSON")

"""Every form of source gives the right samples in a fixed order; what is bad is named and the rest goes on."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from synthetic_media import write_tar

from cots.data.image_io import open_image
from cots.data.samples import Sample, iter_samples
from cots.data.video_io import read_frames
from cots.errors import MediaError, SourceError

Encode = Callable[..., bytes]


@pytest.fixture
def picture(encode: Encode, photo: Image.Image) -> bytes:
    return encode(photo.resize((32, 24)), "JPEG")


@pytest.fixture
def moving(encode: Encode) -> dict[str, bytes]:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    return {
        kind: encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        for kind in ("GIF", "WEBP", "PNG")
    }


def collect(*sources: str | Path) -> tuple[list[Sample], list[MediaError]]:
    errors: list[MediaError] = []
    return list(iter_samples(sources, errors.append)), errors


def names(samples: list[Sample], root: Path) -> list[str]:
    return [os.path.relpath(sample.path, root) for sample in samples]


def test_folder_is_walked_sorted_without_hidden_entries(picture: bytes, clip: Path, tmp_path: Path) -> None:
    for name in ("b.jpg", "a.JPEG", "z/y/c.jpg", "d/e.jpg", ".hidden.jpg", ".git/x.jpg", "z/.thumbs/t.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "z/clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "notes.txt").write_text("not media, and not an error")
    samples, errors = collect(tmp_path)
    assert errors == []
    assert names(samples, tmp_path) == ["a.JPEG", "b.jpg", "d/e.jpg", "z/clip.mp4", "z/y/c.jpg"]
    assert [sample.kind for sample in samples] == ["image", "image", "image", "video", "image"]
    assert {sample.source for sample in samples} == {tmp_path.name}
    assert samples[0].size == len(picture)
    assert samples[0].mtime == (tmp_path / "a.JPEG").stat().st_mtime
    assert samples[0].read_bytes() == picture
    assert samples[0].media() == str(tmp_path / "a.JPEG")


def test_kind_is_told_by_content(
    picture: bytes, moving: dict[str, bytes], clip: Path, encode: Encode, tmp_path: Path
) -> None:
    still = {kind: encode(Image.new("RGB", (8, 8)), kind) for kind in ("GIF", "WEBP", "PNG", "TGA", "TIFF", "BMP")}
    expected: dict[str, str] = {}
    for kind, content in still.items():
        (tmp_path / f"still.{kind.lower()}").write_bytes(content)
        expected[f"still.{kind.lower()}"] = "image"
    for kind, content in moving.items():
        (tmp_path / f"moving.{kind.lower()}").write_bytes(content)
        expected[f"moving.{kind.lower()}"] = "video"
    (tmp_path / "really_a_jpeg.mp4").write_bytes(picture)
    (tmp_path / "really_a_clip.jpg").write_bytes(clip.read_bytes())
    expected |= {"really_a_jpeg.mp4": "image", "really_a_clip.jpg": "video"}
    samples, errors = collect(tmp_path)
    assert errors == []
    assert {Path(sample.path).name: sample.kind for sample in samples} == expected
    for sample in samples:
        if sample.kind == "image":
            open_image(sample.media())
        else:
            assert len(read_frames(sample.media(), count=3).images) == 3


def test_a_folder_gives_pictures_of_rarer_formats(encode: Encode, photo: Image.Image, tmp_path: Path) -> None:
    contents = {
        "jpc": encode(photo, "JPEG2000", no_jp2=True),
        "jpf": encode(photo, "JPEG2000"),
        "mpo": encode(photo, "MPO", save_all=True, append_images=[photo]),
        "icns": encode(photo.resize((64, 64)), "ICNS"),
        "xbm": encode(photo.convert("1"), "XBM"),
        "pfm": encode(photo.convert("F"), "PPM"),
        # width, height, bits, bytes, kind and no palette; two pixels
        "ras": struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0) + bytes(6),
        "xpm": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"x c #ff0000",\n"x"\n};\n',
    }
    contents["j2c"] = contents["jpc"]
    for extension, content in contents.items():
        (tmp_path / f"a.{extension}").write_bytes(content)
    samples, errors = collect(tmp_path)
    assert errors == []
    assert names(samples, tmp_path) == sorted(f"a.{extension}" for extension in contents)
    for sample in samples:
        assert sample.kind == "image"
        open_image(sample.media())


def test_bad_files_are_named_and_the_rest_goes_on(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(picture)
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("dear diary")
    (tmp_path / "text.mp4").write_text("dear diary")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    samples, errors = collect(tmp_path)
    assert names(samples, tmp_path) == ["good.jpg"]
    reasons = {Path(error.path).name: error.reason for error in errors}
    assert reasons == {
        "zero.jpg": "the file is empty (0 bytes)",
        "text.jpg": "not an image or a video, whatever its name says",
        "text.mp4": "not an image or a video, whatever its name says",
        "link.png": "no such file or directory",
    }


def test_a_pipe_is_named_and_not_waited_for(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(picture)
    os.mkfifo(tmp_path / "pipe.jpg")
    samples, errors = collect(tmp_path)
    assert names(samples, tmp_path) == ["good.jpg"]
    assert [error.reason for error in errors] == ["not a file but a pipe, a socket or a device"]


def test_a_pipe_called_as_a_shard_or_a_table_is_not_waited_for(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(picture)
    for name in ("pipe.tar", "pipe.csv"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(SourceError, match=f"{name} is not a file but a pipe"):
            collect(tmp_path / name)
    samples, errors = collect(f"{tmp_path}/*")
    assert names(samples, tmp_path) == ["good.jpg"]
    assert len(collect(tmp_path)[1]) == 1  # a folder's tables are not read
    assert [error.reason for error in errors] == ["not a file but a pipe, a socket or a device"] * 2


def test_links_to_folders_are_followed_once(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.jpg").write_bytes(picture)
    root = tmp_path / "root"
    root.mkdir()
    (root / "album").symlink_to(tmp_path / "real")
    (root / "loop").symlink_to(root)
    samples, _ = collect(root)
    assert names(samples, root) == ["album/a.jpg"]


def test_single_file_and_odd_names(picture: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "holiday [2024]"
    folder.mkdir()
    (folder / "été ü.jpg").write_bytes(picture)
    (folder / "no_extension").write_bytes(picture)
    samples, errors = collect(folder / "été ü.jpg", folder / "no_extension")
    assert errors == []
    assert [sample.source for sample in samples] == ["holiday [2024]"] * 2
    assert len(collect(folder)[0]) == 1


def test_globs(picture: bytes, tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.png", "b/3.jpg", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    assert names(collect(f"{tmp_path}/a/*.jpg")[0], tmp_path) == ["a/1.jpg"]
    assert names(collect(f"{tmp_path}/**/*.jpg")[0], tmp_path) == ["a/1.jpg", "b/3.jpg"]
    assert names(collect(f"{tmp_path}/*")[0], tmp_path) == ["a/1.jpg", "a/2.png", "b/3.jpg"]
    with pytest.raises(SourceError, match="nothing matches"):
        collect(f"{tmp_path}/*.nothing")
    with pytest.raises(SourceError, match="none of the 1 files"):
        collect(f"{tmp_path}/b/*.txt")


def test_each_path_once(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    samples, _ = collect(tmp_path, tmp_path / "a.jpg", f"{tmp_path}/*.jpg", os.path.relpath(tmp_path / "a.jpg"))
    assert len(samples) == 1


def test_an_empty_source_is_not_the_working_directory(
    picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="a source is empty"):
        collect("")
    assert len(collect(".")[0]) == 1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no file or folder /nowhere"):
        iter_samples(["/nowhere/at/all"], print)
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(SourceError, match=r"holds no images, videos or \.tar shards"):
        iter_samples([tmp_path], print)


def test_shard(picture: bytes, clip: Path, tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "s-000.tar",
        {
            "x/1.jpg": picture,
            "x/1.json": json.dumps({"captions": ["a dog", "a hound"], "license": "CC0", "seconds": 2.5}).encode(),
            "x/2.mp4": clip.read_bytes(),
            "x/2.txt": b"a clip",
            "x/3.jpg": picture,
            "x/4.jpg": b"no picture",
            "x/5.jpg": picture,
            "x/5.json": b"{broken",
            "readme.md": b"hello",
        },
    )
    samples, errors = collect(shard)
    assert [sample.path for sample in samples] == [
        f"{shard}::x/{name}" for name in ("1.jpg", "2.mp4", "3.jpg", "5.jpg")
    ]
    assert [sample.kind for sample in samples] == ["image", "video", "image", "image"]
    assert [sample.captions for sample in samples] == [("a dog", "a hound"), ("a clip",), (), ()]
    assert {sample.source for sample in samples} == {"s-000.tar"}
    assert samples[0].extra == {"licence": "CC0", "seconds": "2.5"}
    assert (samples[0].size, samples[0].mtime) == (len(picture), shard.stat().st_mtime)
    assert samples[0].read_bytes() == samples[0].media() == picture
    assert len(read_frames(samples[1].media(), count=2).images) == 2
    assert sorted(error.path for error in errors) == [f"{shard}::x/4.jpg", f"{shard}::x/5.json"]


def test_truncated_shard_gives_what_it_has(picture: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.jpg": picture, "b.jpg": picture, "c.jpg": picture})
    os.truncate(shard, 2 * (512 + -(-len(picture) // 512) * 512) + 600)
    samples, errors = collect(shard)
    assert [sample.path for sample in samples] == [f"{shard}::a.jpg", f"{shard}::b.jpg"]
    assert errors[0].path == str(shard)
    assert "truncated" in errors[0].reason


def test_shard_without_media(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"words"})
    with pytest.raises(SourceError, match="holds no images or videos"):
        collect(shard)


def test_shards_in_a_folder(picture: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.jpg": picture})
    write_tar(tmp_path / "backup.tar", {"a.txt": b"words"})
    (tmp_path / "b.jpg").write_bytes(picture)
    samples, errors = collect(tmp_path)
    assert errors == []
    assert [sample.source for sample in samples] == [tmp_path.name, "s.tar"]


def test_shard_that_cannot_be_used_does_not_stop_a_folder(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b compressed")
    (tmp_path / "b.jpg").write_bytes(picture)
    samples, errors = collect(tmp_path)
    assert names(samples, tmp_path) == ["b.jpg"]
    assert "compressed with gzip" in errors[0].reason
    with pytest.raises(SourceError, match="compressed with gzip"):
        collect(tmp_path / "a.tar")


def test_table(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    table = tmp_path / "album.jsonl"
    lines = [
        {"path": "a.jpg", "captions": ["a dog"], "licence": "CC0", "author": "Ada"},
        {"path": "missing.jpg"},
        {"path": "../" + tmp_path.name + "/a.jpg"},
    ]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples, errors = collect(table)
    assert [(sample.path, sample.captions, sample.source) for sample in samples] == [
        (str(tmp_path / "a.jpg"), ("a dog",), "album")
    ]
    assert samples[0].extra == {"licence": "CC0", "author": "Ada"}
    assert errors[0].path == str(tmp_path / "missing.jpg")
    assert "line 2" in errors[0].reason


def test_names_that_no_file_can_have(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    table = tmp_path / "album.jsonl"
    paths = ["nul\0.jpg", "half \ud83d.jpg", "old \udce9.jpg", "a.jpg"]
    table.write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    samples, errors = collect(table)
    assert names(samples, tmp_path) == ["a.jpg"]
    assert [str(error) for error in errors] == [
        f"{tmp_path}/nul\\x00.jpg: no file can have this name (named in {table}, line 1)",
        f"{tmp_path}/half \\ud83d.jpg: no file can have this name (named in {table}, line 2)",
        f"{tmp_path}/old \\udce9.jpg: no such file or directory (named in {table}, line 3)",
    ]


def test_a_shard_that_shrinks_while_it_is_listed_does_not_end_the_list(picture: bytes, tmp_path: Path) -> None:
    captioned = {"1.jpg": picture, "1.txt": b"a dog"}
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": picture, **captioned, "2.jpg": picture, "3.tga": bytes(100)})
    (tmp_path / "b.jpg").write_bytes(picture)
    errors: list[MediaError] = []
    samples = iter_samples([tmp_path], errors.append)
    assert next(samples).path == f"{shard}::0.jpg"
    os.truncate(shard, 1024)
    assert names(list(samples), tmp_path) == ["b.jpg"]
    assert [error.path for error in errors] == [f"{shard}::{name}" for name in ("1.jpg", "2.jpg", "3.tga")]
    assert all("it has changed since it was listed" in error.reason for error in errors)


def test_file_that_changes_under_us(picture: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.jpg": picture})
    (sample,), _ = collect(shard)
    os.truncate(shard, 600)
    with pytest.raises(MediaError, match="changed since it was listed"):
        sample.read_bytes()
    shard.unlink()
    with pytest.raises(MediaError, match="no such file"):
        sample.read_bytes()

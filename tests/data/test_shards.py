"""Shards: what lies where, random access, and broken archives named."""

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from synthetic_media import write_tar

from cots.data.shards import TarIndex, read_captions, read_media, scan_tar, split_key, split_member
from cots.errors import MediaError, SourceError


def pairs(count: int, start: int = 0) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for i in range(start, start + count):
        members[f"{i:04d}.webp"] = b"picture %d" % i * (i + 1)
        members[f"{i:04d}.json"] = json.dumps({"captions": [f"number {i}"]}).encode()
    return members


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.jpg", "a", "jpg"),
        ("dir.v2/a.b.JPG", "dir.v2/a", "b.jpg"),
        ("dir/noext", "dir/noext", ""),
    ],
)
def test_split_key(name: str, key: str, extension: str) -> None:
    assert split_key(name) == (key, extension)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_agrees_with_tarfile(tar_format: int, tmp_path: Path) -> None:
    generator = np.random.default_rng()
    names = ["short.txt", "d/" * 40 + "deep.jpg", *(f"{i}.webp" for i in range(20))]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["long" * 60 + ".png", "Straße/ünï.jpg", "d" * 150 + "/" + "é" * 90 + ".jpg"]
    contents = {name: generator.bytes(int(generator.integers(0, 3000))) for name in names}
    path = write_tar(tmp_path / "x.tar", contents, tar_format)
    members, damage = scan_tar(path)
    assert damage is None
    data = path.read_bytes()
    assert {m.name: data[m.offset : m.offset + m.size] for m in members} == contents
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar] == [(m.name, m.offset, m.size) for m in members]


def test_folders_links_and_hidden_members_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind, name in [(tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "link.jpg")]:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "a.jpg"
            tar.addfile(info)
        for name in ("./a.jpg", "./._a.jpg", "__meta__.json"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert [member.name for member in scan_tar(tmp_path / "x.tar")[0]] == ["a.jpg"]


def test_random_access(tmp_path: Path) -> None:
    index = TarIndex([write_tar(tmp_path / "0.tar", pairs(7)), write_tar(tmp_path / "1.tar", pairs(5, start=7))])
    assert len(index) == 12
    assert [index.key(i) for i in range(12)] == [f"{i:04d}" for i in range(12)]
    for i in np.random.default_rng().permutation(12).tolist():
        parts = index.read(i)
        assert parts["webp"] == b"picture %d" % i * (i + 1)
        assert json.loads(parts["json"]) == {"captions": [f"number {i}"]}
    assert index.shard(6).endswith("0.tar")
    assert index.shard(7).endswith("1.tar")
    with pytest.raises(IndexError):
        index.read(12)
    with pytest.raises(IndexError):
        index.read(-1)


def test_members_of_a_pair_need_not_be_neighbours(tmp_path: Path) -> None:
    members = {"b.jpg": b"B", "a.jpg": b"A", "a.txt": b"a", "b.txt": b"b"}
    index = TarIndex([write_tar(tmp_path / "x.tar", members)])
    assert [index.key(i) for i in range(2)] == ["b", "a"]
    assert index.read(0) == {"jpg": b"B", "txt": b"b"}


def test_keys_of_any_length_and_script_are_told_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng()
    keys = ["".join(generator.choice(list("aü漢😀/"), generator.integers(1, 30))) + f"/{i}" for i in range(200)]
    path = write_tar(tmp_path / "x.tar", {f"{key}.jpg": b"" for key in keys}, tarfile.PAX_FORMAT)
    index = TarIndex([path])
    assert [index.key(i) for i in range(200)] == keys
    assert index.name(77) == f"{path}::{keys[77]}"


def test_no_shards() -> None:
    index = TarIndex([])
    assert len(index) == 0


def test_pickled_and_shared_between_threads_and_processes(tmp_path: Path) -> None:
    index = TarIndex([write_tar(tmp_path / "x.tar", pairs(40))])
    expected = [index.read(i) for i in range(40)]
    again = pickle.loads(pickle.dumps(index))
    assert [again.read(i) for i in range(40)] == expected
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(index.read, range(40))) == expected
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        assert list(processes.map(index.read, range(40), chunksize=10)) == expected


def test_archive_without_closing_blocks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3))
    members = scan_tar(path)[0]
    end = members[-1].offset + -(-members[-1].size // 512) * 512
    os.truncate(path, end)
    assert scan_tar(path) == (members, None)


@pytest.mark.parametrize("surplus", [100, 512, 600])
def test_truncated_shard_is_named(surplus: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", {"a.jpg": b"a" * 400, "b.jpg": b"b" * 5000})
    os.truncate(path, 1024 + surplus)
    members, damage = scan_tar(path)
    assert [member.name for member in members] == ["a.jpg"]
    assert damage is not None
    assert "truncated" in damage
    with pytest.raises(SourceError, match=r"cut\.tar: the archive is truncated"):
        TarIndex([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"this is no archive " * 100, "not a tar archive"),
        (b"\x1f\x8b\x08 and so on" * 100, "compressed with gzip"),
    ],
)
def test_what_is_no_shard(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        TarIndex([tmp_path / "x.tar"])


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.tar: no such file"):
        TarIndex([tmp_path / "gone.tar"])


def test_damaged_header(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3))
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SourceError, match="damaged after 2 whole members"):
        TarIndex([path])


def crafted(member: tarfile.TarInfo, payload: bytes) -> bytes:
    """A member as it lies in an archive, whatever its header says."""
    return member.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)


def test_a_size_below_zero_is_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"abc"})
    member = tarfile.TarInfo("b.jpg")
    member.size = -512
    path.write_bytes(path.read_bytes()[:1024] + crafted(member, b""))
    members, damage = scan_tar(path)
    assert [member.name for member in members] == ["a.jpg"]
    assert damage == "the archive is damaged after 1 whole members"


@pytest.mark.parametrize(
    ("records", "name"),
    [
        (b"17 path=fo\no.png\n", "fo\no.png"),
        (b"12 path=b=c\n", "b=c"),
        (b"8 \xff\xfe=xy\n17 path=good.png\n" + bytes(4), "good.png"),
        (b"9 size=1\n17 path=good.png\n", "good.png"),
        (b"9 size=x\n", None),
        (b"10 size=-1\n", None),
        (b"5007 size=" + b"1" * 4996 + b"\n", None),
        (b"99 path=good.png\n", None),
        (b"15 path=good.png\n", None),
        (b"0 path=good.png\n", None),
        (b"path=good.png\n", None),
    ],
)
def test_pax_records(records: bytes, name: str | None, tmp_path: Path) -> None:
    extended, member = tarfile.TarInfo("pax"), tarfile.TarInfo("plain.png")
    extended.type, extended.size, member.size = tarfile.XHDTYPE, len(records), 1
    (tmp_path / "x.tar").write_bytes(crafted(extended, records) + crafted(member, b"1") + bytes(1024))
    members, damage = scan_tar(tmp_path / "x.tar")
    assert [member.name for member in members] == ([name] if name else [])
    assert damage == (None if name else "the archive is damaged after 0 whole members")


def test_a_folder_called_as_a_shard(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(SourceError, match=r"x\.tar: is a directory"):
        TarIndex([tmp_path / "x.tar"])


def test_shard_that_shrinks_or_goes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3))
    index = TarIndex([path])
    os.truncate(path, 700)
    with pytest.raises(SourceError, match="shorter"):
        index.read(2)
    path.unlink()
    with pytest.raises(SourceError, match="no such file"):
        index.read(0)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/d/a.tar::b/c.jpg", ("/d/a.tar", "b/c.jpg")),
        ("/me::you/a.TAR::b::c.jpg", ("/me::you/a.TAR", "b::c.jpg")),
        ("/me::you/a.jpg", ("/me::you/a.jpg", "")),
        ("/d/a.tar", ("/d/a.tar", "")),
    ],
)
def test_colons_of_other_names_do_not_part_a_shard_from_its_member(path: str, parts: tuple[str, str]) -> None:
    assert split_member(path) == parts


def test_read_media(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"d/a.jpg": b"abc", "b.jpg": b"def"})
    assert read_media(f"{path}::d/a.jpg") == b"abc"
    (tmp_path / "plain.jpg").write_bytes(b"ghi")
    assert read_media(str(tmp_path / "plain.jpg")) == b"ghi"
    with pytest.raises(MediaError, match="no such member"):
        read_media(f"{path}::c.jpg")
    with pytest.raises(MediaError, match="no such file"):
        read_media(f"{tmp_path}/none.tar::c.jpg")
    write_tar(path, {"c.jpg": b"now here", "d.jpg": b"and a longer archive" * 1000})
    assert read_media(f"{path}::c.jpg") == b"now here"


@pytest.mark.parametrize(
    ("parts", "captions"),
    [
        ({"json": b'{"captions": [" a dog ", "", "a cat"]}'}, ("a dog", "a cat")),
        ({"json": b'{"caption": "a dog"}', "txt": b"unused"}, ("a dog",)),
        ({"json": b'{"other": 1}', "txt": b"a dog\n\na cat\n"}, ("a dog", "a cat")),
        ({"txt": "ein Hühnchen".encode()}, ("ein Hühnchen",)),
        ({}, ()),
    ],
)
def test_captions(parts: dict[str, bytes], captions: tuple[str, ...]) -> None:
    assert read_captions(parts)[0] == captions


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_captions_in_broken_json(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_captions({"json": content})

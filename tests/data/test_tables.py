"""Tables in every format give the same rows, and faults are named with file and line."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cots.data.tables import Row, read_items, read_table
from cots.errors import MediaError, SourceError


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            cells = ({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
            writer.writerows(cells)
    return path


def rows_of(path: Path) -> tuple[list[Row], list[MediaError]]:
    errors: list[MediaError] = []
    return list(read_table(path, errors.append)), errors


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format(extension: str, tmp_path: Path) -> None:
    table = write_table(
        tmp_path / f"list.{extension}",
        [
            {
                "path": "sub/a.jpg",
                "captions": ["ein Hühnchen", "a, b"],
                "license": "CC0",
                "source": "museum",
                "year": 1901,
            },
            {"path": str(tmp_path / "b.jpg"), "captions": ["two"], "license": "", "source": "", "year": 1902},
        ],
    )
    (first, second), errors = rows_of(table)
    assert errors == []
    assert first.path == str(tmp_path / "sub/a.jpg")
    assert first.captions == ("ein Hühnchen", "a, b")
    assert first.source == "museum"
    assert first.extra == {"licence": "CC0", "year": "1901"}
    assert second.path == str(tmp_path / "b.jpg")
    assert second.source == "list"
    assert "licence" not in second.extra
    assert "2" in second.place or "3" in second.place


@pytest.mark.parametrize("column", ["path", "image", "video", "filepath", "file_name", "filename"])
@pytest.mark.parametrize("captions", ["captions", "caption", "title", "text"])
def test_column_names(column: str, captions: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{column: "a.jpg", captions: "a dog"}])
    (row,), _ = rows_of(table)
    assert (row.path, row.captions, row.extra) == (str(tmp_path / "a.jpg"), ("a dog",), {})


def test_images_and_videos_in_one_file(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"image": "a.jpg"}, {"video": "b.mp4", "captions": ["run"]}])
    rows, errors = rows_of(table)
    assert [Path(row.path).name for row in rows] == ["a.jpg", "b.mp4"]
    assert errors == []


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_missing_column_names_those_found(extension: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / f"t.{extension}", [{"url": "x", "words": "y"}])
    with pytest.raises(SourceError, match="url, words") as caught:
        rows_of(table)
    assert "`path`" in str(caught.value)


@pytest.mark.parametrize("extension", ["jsonl", "csv"])
def test_empty_table(extension: str, tmp_path: Path) -> None:
    (tmp_path / f"t.{extension}").write_bytes(b"")
    with pytest.raises(SourceError, match="no rows"):
        rows_of(tmp_path / f"t.{extension}")


def test_broken_line_is_reported_and_the_rest_read(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"path": "a.jpg"}\n{"path": "b.jpg\n\n[1]\n{"path": 5}\n{"path": ""}\n{"path": "c.jpg"}\n')
    rows, errors = rows_of(table)
    assert [Path(row.path).name for row in rows] == ["a.jpg", "c.jpg"]
    assert [error.path.rpartition(" ")[2] for error in errors] == ["2", "4", "5", "6"]
    assert "not JSON" in errors[0].reason
    assert str(table) in errors[0].path


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("path,caption\nb.jpg,a dog\na.jpg,café\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"t\.csv is not UTF-8 \(byte 0xe9 in line 3\); save it as UTF-8"):
        rows_of(tmp_path / "t.csv")


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfpath\na.jpg\n")
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"path": "a.jpg"}\n')
    for name in ("t.csv", "t.jsonl"):
        assert len(rows_of(tmp_path / name)[0]) == 1


def test_quotes_and_line_breaks_in_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,caption\na.jpg,"one ""two""\nthree"\nb.jpg,[not json\n')
    rows, _ = rows_of(tmp_path / "t.csv")
    assert [row.captions for row in rows] == [('one "two"\nthree',), ("[not json",)]
    assert rows[1].place.endswith("line 4")


def test_short_and_long_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\na.jpg\nb.jpg,two,three,four\n")
    rows, errors = rows_of(tmp_path / "t.csv")
    assert [row.captions for row in rows] == [(), ("two",)]
    assert errors == []


def test_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match="not a readable Parquet file"):
        rows_of(tmp_path / "t.parquet")


def test_parquet_with_pictures_instead_of_paths(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [{"image": {"bytes": b"abc", "path": "a.jpg"}}])
    rows, errors = rows_of(table)
    assert rows == []
    assert "holds a dict, not a path" in errors[0].reason


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_rows_of_one_path_are_one_item(extension: str, tmp_path: Path) -> None:
    rows = [
        {"path": "a.png", "caption": "a dog", "group": "1"},
        {"path": "b.png", "caption": "a cat", "group": ""},
        {"path": "x/../a.png", "caption": "a brown dog", "group": "2"},
        {"path": "", "caption": "nothing", "group": ""},
        {"path": "c.png", "caption": "", "group": ""},
        {"path": "a.png", "caption": "a dog", "group": ""},
        {"path": "c.png", "caption": "a bird", "group": "3"},
    ]
    errors: list[MediaError] = []
    items = list(read_items(write_table(tmp_path / f"list.{extension}", rows), errors.append))
    assert [(Path(item.path).relative_to(tmp_path).as_posix(), item.captions, item.extra) for item in items] == [
        ("a.png", ("a dog", "a brown dog"), {"group": "1"}),
        ("b.png", ("a cat",), {}),
        ("c.png", ("a bird",), {"group": "3"}),
    ]
    assert [error.reason for error in errors] == ["the column `path` is empty"]


def test_what_precedes_damage_is_read_before_it_is_told(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_bytes(b"path,caption\na.png,a dog\na.png,a brown dog\n" + b"b.png,a cat\n" * 2000 + b"c.png,\xff\n")
    items = read_items(table, lambda _: None)
    assert next(items).captions == ("a dog", "a brown dog")
    with pytest.raises(SourceError, match="is not UTF-8"):
        list(items)


def test_a_value_that_is_missing_is_no_text(tmp_path: Path) -> None:
    table = tmp_path / "list.jsonl"
    table.write_text('{"path": "a.jpg", "group": NaN, "event": null, "place": "", "year": 2024, "tags": ["x"]}\n')
    (row,) = rows_of(table)[0]
    assert row.extra == {"year": "2024"}

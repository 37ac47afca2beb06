"""Tables of media: .jsonl, .csv, .tsv and .parquet files with a path column, perhaps captions, source and licence."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cots.data.shards import clean_captions
from cots.errors import MediaError, SourceError

TABLE_EXTENSIONS = frozenset({"jsonl", "csv", "tsv", "parquet"})
PATH_COLUMNS = ("path", "image", "video", "filepath", "file_name", "filename")
CAPTION_COLUMNS = ("captions", "caption", "title", "text")

_PARQUET_BATCH = 4096


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        path: absolute; the table's relative paths start at the table's own directory.
        captions: from the first of CAPTION_COLUMNS that has any.
        source: the column `source`, or the table's name.
        extra: the other columns that hold a value, as strings; `license` is called `licence`.
        place: "table.csv, line 3", for messages.
    """

    path: str
    captions: tuple[str, ...]
    source: str
    extra: dict[str, str]
    place: str


def read_items(path: str | Path, on_error: Callable[[MediaError], None]) -> Iterator[Row]:
    """The rows of a table, those of one path (a caption each, say) as one: the first, with what all of them hold.

    The table is read twice, so that no more than paths, and the rows that join others, are kept in memory.

    Raises:
        SourceError: see `read_table`.
    """
    once: set[str] = set()
    further: dict[str, Row] = {}  # of a path, all rows behind the first
    with suppress(SourceError):  # which the second reading meets too, and tells with the rows before it
        for row in read_table(path, lambda _: None):
            if row.path in further:
                further[row.path] = _joined(further[row.path], row)
            elif row.path in once:
                further[row.path] = row
            else:
                once.add(row.path)
    once.clear()
    for row in read_table(path, on_error):
        if row.path not in further:
            yield row
        elif row.path not in once:
            once.add(row.path)
            yield _joined(row, further[row.path])


def _joined(first: Row, second: Row) -> Row:
    captions = tuple(dict.fromkeys((*first.captions, *second.captions)))
    return replace(first, captions=captions, extra=second.extra | first.extra)


def read_table(path: str | Path, on_error: Callable[[MediaError], None]) -> Iterator[Row]:
    """The rows of a table, one after another.

    A row that does not parse or names no file goes to `on_error`, and the rest follows.

    Raises:
        SourceError: the table cannot be opened or decoded, is empty, or has no path column (the message lists those it
            has).
    """
    table = Path(path)
    readers = {"jsonl": _read_jsonl, "csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet}
    reader = readers[table.suffix[1:].lower()]
    column: str | None = None
    try:
        for place, fields in reader(table, on_error):
            if column is None:
                column = _path_column(table, fields)
            if row := _row(table, place, fields, column, on_error):
                yield row
    except OSError as error:
        raise SourceError(f"cannot read the table {table}: {(error.strerror or str(error)).lower()}") from error
    if column is None:
        raise SourceError(f"the table {table} has no rows")


def _path_column(table: Path, fields: Mapping[str, Any]) -> str:
    column = next((name for name in PATH_COLUMNS if name in fields), None)
    if column is None:
        found = ", ".join(str(name) for name in fields) or "none"
        semicolons = "; its columns must be parted by commas" if len(fields) == 1 and ";" in found else ""
        raise SourceError(
            f"the table {table} has no column `path` (or {', '.join(PATH_COLUMNS[1:])}); its columns are: {found}"
            f"{semicolons}"
        )
    return column


def _row(
    table: Path, place: str, fields: Mapping[str, Any], column: str, on_error: Callable[[MediaError], None]
) -> Row | None:
    # A .jsonl may name images in one line and videos in the next.
    column = next((name for name in (column, *PATH_COLUMNS) if fields.get(name)), column)
    value = fields.get(column)
    if not isinstance(value, str) or not value.strip():
        problem = "is empty" if not value else f"holds a {type(value).__name__}, not a path"
        on_error(MediaError(place, f"the column `{column}` {problem}"))
        return None
    captions: tuple[str, ...] = ()
    for name in CAPTION_COLUMNS:
        captions = captions or clean_captions(_unpacked(fields.get(name)))
    extra = plain_fields(fields)
    for name in (column, *CAPTION_COLUMNS):
        extra.pop(name, None)
    if "license" in extra:
        extra.setdefault("licence", extra.pop("license"))
    source = extra.pop("source", table.stem)
    return Row(os.path.abspath(table.parent / value.strip()), captions, source, extra, place)


def plain_fields(fields: Mapping[str, Any]) -> dict[str, str]:
    """What is a text or a number, as text; nothing for what is missing: null, the empty text, pandas' NaN."""
    return {
        name: str(value)
        for name, value in fields.items()
        if name and isinstance(value, (str, int, float)) and value != "" and value == value
    }


def _unpacked(value: Any) -> Any:
    """A .csv cell can hold several captions as a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _read_jsonl(table: Path, on_error: Callable[[MediaError], None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(table, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{table}, line {number}"
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                on_error(
                    MediaError(place, f"not UTF-8 (byte {error.object[error.start]:#04x}); save the table as UTF-8")
                )
                continue
            except ValueError as error:
                on_error(MediaError(place, f"not JSON ({error})"))
                continue
            if isinstance(fields, dict):
                yield place, fields
            else:
                on_error(MediaError(place, f"holds a {type(fields).__name__}, not an object"))


def _read_csv(table: Path, on_error: Callable[[MediaError], None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than some lists of captions
    with open(table, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, restkey="")
        try:
            names: Sequence[str] = reader.fieldnames or ()
            if names and not set(names) & set(PATH_COLUMNS):
                _path_column(table, dict.fromkeys(names))
            for fields in reader:
                yield f"{table}, line {reader.line_num}", fields
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x} in line {_undecodable_line(table)}"
            raise SourceError(f"the table {table} is not UTF-8 ({byte}); save it as UTF-8") from error
        except csv.Error as error:
            raise SourceError(f"the table {table} is damaged after line {reader.line_num} ({error})") from error


def _undecodable_line(table: Path) -> int:
    """The first line of a table that is no UTF-8; what reads it decodes blocks of many lines."""
    with open(table, "rb") as lines:
        return next(number for number, line in enumerate(lines, 1) if line.decode("utf-8", "ignore").encode() != line)


def _read_parquet(table: Path, on_error: Callable[[MediaError], None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            names = file.schema_arrow.names
            _path_column(table, dict.fromkeys(names))
            number = 0
            for batch in file.iter_batches(_PARQUET_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{table}, row {number}", fields
    except pa.ArrowException as error:
        raise SourceError(f"the table {table} is not a readable Parquet file ({error})") from error

"""A check names what is wrong."""

import re

import numpy as np
import pyarrow as pa
import pytest

from cots.model.retrieval_model import RetrievalModel
from index.check import check
from index.gallery import Gallery, schema


def spoil(gallery: Gallery, **columns: object) -> None:
    """Append a row like the first, with some columns changed."""
    row = gallery.table.search().where("id = 1").to_arrow().select(schema(32).names).to_pylist()[0]
    gallery.table.add(pa.Table.from_pylist([row | columns], schema(32)))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({}, "1 rows have an id that another row has"),
        ({"id": 99, "item": 99}, "1 items have a path that another item has"),
        ({"id": 99, "moment": True, "item": 98}, "no pooled row"),
        ({"id": 99, "item": 98, "path": "x"}, "ids are not those of their pooled rows"),
        ({"id": 99, "item": 99, "path": "gone.png"}, "1 files are gone: gone.png"),
        ({"id": 99, "item": 99, "vector": np.zeros(32, np.float16)}, r"1 vectors are not finite .* \(ids 99\)"),
    ],
)
def test_a_spoilt_row_is_found(gallery: Gallery, columns: dict[str, object], problem: str) -> None:
    assert check(gallery.directory) == []
    spoil(gallery, **columns)
    found = check(gallery.directory)
    assert any(re.search(problem, sentence) for sentence in found), found


def test_another_model_is_a_problem(
    gallery: Gallery, tiny_model: RetrievalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "fingerprint", "0" * 32)
    assert "did not build the gallery" in check(gallery.directory, tiny_model)[0]


def test_other_columns_are_a_problem(gallery: Gallery) -> None:
    gallery.table.drop_columns(["licence"])
    assert check(gallery.directory) == ["The table's columns are not those that the manifest implies: licence."]


def test_a_flipped_byte_in_the_table_is_a_problem_of_the_table(gallery: Gallery) -> None:
    vector = gallery.snapshot.vectors[3].tobytes()
    (path,) = (path for path in (gallery.directory / "vectors.lance" / "data").iterdir() if vector in path.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(vector) + 6] ^= 1
    path.write_bytes(content)
    (problem,) = check(gallery.directory)
    assert "The table at" in problem
    assert "is damaged, or was put back from a copy. Restore the table" in problem

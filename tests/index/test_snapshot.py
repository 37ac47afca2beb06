"""Rows are found by id, whether ids are few or were given out by the million."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.snapshot import COLUMNS, Snapshot, load_snapshot


def snapshot_of(ids: np.ndarray) -> Snapshot:
    """One row an id; all other columns are the same in each."""
    count = len(ids)
    texts = ("path", "source", "caption", "licence")
    columns = {name: pa.array(np.zeros(count)) for name in COLUMNS} | {
        name: pa.array([""] * count, pa.string()) for name in texts
    }
    columns |= {"id": pa.array(ids), "item": pa.array(ids), "kind": pa.array(["image"] * count, pa.string())}
    columns["moment"] = pa.array(np.zeros(count, bool))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * count, np.float16)), 4)
    return Snapshot.of(pa.table({name: columns[name] for name in COLUMNS}), 1)


@pytest.mark.parametrize("most", [60, 10**15], ids=["dense", "sparse"])
@pytest.mark.parametrize("count", [1, 50])
def test_ids_are_found_where_they_stand(count: int, most: int) -> None:
    rng = np.random.default_rng(count)
    ids = rng.choice(60, count, replace=False) * (most // 60)
    snapshot = snapshot_of(ids)
    asked = np.concatenate([rng.permutation(ids), [-1, most + 1, 2**62, ids[0] + 10**6 + 1], ids[:1]])
    expected = [int(np.flatnonzero(ids == id)[0]) if id in ids else -1 for id in asked]
    assert snapshot.find(asked).tolist() == expected
    assert snapshot.positions(asked).tolist() == [place for place in expected if place >= 0]


def test_an_empty_snapshot_holds_no_id() -> None:
    assert snapshot_of(np.empty(0, np.int64)).find(np.array([0, 5])).tolist() == [-1, -1]


def test_a_snapshot_is_used_where_it_is_mapped(tmp_path: Path) -> None:
    rows = snapshot_of(np.arange(1000)).rows
    read = load_snapshot(tmp_path, 1, str, lambda: (rows, 1))
    assert read.ids.tolist() == list(range(1000))
    mapped = load_snapshot(tmp_path, 1, str, lambda: pytest.fail("the snapshot was not used"))
    before = pa.total_allocated_bytes()
    assert mapped.row(7)["id"] == 7
    assert mapped.vectors.shape == (1000, 4)
    assert pa.total_allocated_bytes() == before
    for column in (mapped.ids, mapped.items, mapped.vectors):
        assert not column.flags.writeable

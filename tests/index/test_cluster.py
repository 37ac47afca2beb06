"""Building on a Ray cluster: two nodes of one core each, on this machine."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_media import write_animation, write_picture

from cots.data.samples import Sample, iter_samples
from cots.embed import Progress
from cots.errors import CotsError, ModelError, SourceError
from cots.model.retrieval_model import RetrievalModel
from index.ann import make_structure
from index.build import build, info
from index.check import check
from index.cluster import Node, RayCrew, cores_each
from index.crew import Recipe, embed_with
from index.filling import cluster_fill
from index.gallery import open_gallery

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # else it leaves a token in the home directory
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cots[cluster]'")


def test_without_a_cluster_it_says_so(tmp_path: Path, tiny_model: RetrievalModel) -> None:
    write_picture(tmp_path / "0.png", 0)
    with pytest.raises(CotsError, match=r"There is no Ray cluster at 'auto' \(.*\); start one"):
        build([tmp_path / "0.png"], tmp_path / "gallery", tiny_model, cluster="auto")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
    ray.init(address=nodes.address, logging_level="error", log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def pooled(directory: Path) -> dict[str, np.ndarray]:
    snapshot = open_gallery(directory).snapshot
    rows = np.flatnonzero(~snapshot.moments)
    paths = snapshot.rows["path"].take(rows).to_pylist()
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, snapshot.vectors[rows].astype(np.float32)))


def actors() -> list[int]:
    found = subprocess.run(["pgrep", "-f", "ray::EmbeddingActor"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def all_end() -> bool:
    """Whether the actors end by themselves, which Ray has them do in its own time."""
    deadline = time.monotonic() + 90
    while actors() and time.monotonic() < deadline:
        time.sleep(0.2)
    return actors() == []


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    for seed in range(200):
        write_picture(folder / f"{seed:03}.png", seed)
    for seed in range(4):
        write_animation(folder / f"{seed}.gif", seed)
    content = (folder / "000.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    return folder


def test_a_cluster_builds_what_one_process_builds_though_an_actor_is_killed(
    cluster: Any, media: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    killed: list[int] = []

    def kill_one(step: Progress) -> None:
        if step.done == 20:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    report = build([media], tmp_path / "gallery", tiny_model, cluster="auto", engine="ivf", progress=kill_one)
    assert len(killed) == 1
    assert (report.added, report.items) == (204, 204)
    assert [Path(error.path).name for error in report.failed] == ["truncated.png"]
    assert all_end()
    assert check(tmp_path / "gallery", tiny_model) == []
    assert info(tmp_path / "gallery")["structure_vectors"] == report.vectors
    build([media], tmp_path / "alone", tiny_model)
    found, expected = pooled(tmp_path / "gallery"), pooled(tmp_path / "alone")
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=2e-3)


def test_a_file_that_a_node_does_not_see_stops_the_build(
    cluster: Any, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    """A file of this process alone stands for a disk that is not mounted on the node."""
    with write_picture(tmp_path / "0.png", 0).open("rb") as file:
        os.dup2(file.fileno(), 199)
        sample = Sample("/proc/self/fd/199", "image")
        recipe = Recipe(tiny_model.name, tiny_model.fingerprint, "cpu", None, None)
        with pytest.raises(SourceError, match=r"The node [\d.]+ has no file /proc/self/fd/199, which is there on this"):
            list(embed_with(RayCrew(ray, 1, 1, recipe), [sample], on_error=print))
        os.close(199)
    assert all_end()


def test_a_node_that_finds_another_model_is_named(cluster: Any, media: Path, tiny_model_dir: Path) -> None:
    samples = list(iter_samples([media], on_error=print))
    recipe = Recipe(str(tiny_model_dir), "0123456789", "cpu", None, None)
    with pytest.raises(ModelError, match=r"On the node [\d.]+: A worker finds another model by the name"):
        list(embed_with(RayCrew(ray, 1, 9, recipe), samples, on_error=print))


def test_more_workers_than_the_cluster_has_room_for_are_refused(cluster: Any, tiny_model_dir: Path) -> None:
    recipe = Recipe(str(tiny_model_dir), "", "cpu", None, None)
    with pytest.raises(CotsError, match=r"has 2 cores, too few for 3 workers"):
        RayCrew(ray, 3, 9, recipe)


def test_the_work_of_a_lost_node_is_done_by_the_other(
    cluster: Any, media: Path, tmp_path: Path, tiny_model: RetrievalModel
) -> None:
    lost: list[Any] = []

    def lose_one(step: Progress) -> None:
        if step.done == 20:
            lost.extend(cluster.worker_nodes)
            cluster.remove_node(lost[0], allow_graceful=False)

    report = build([media], tmp_path / "gallery", tiny_model, cluster="auto", workers=2, progress=lose_one)
    assert len(lost) == 1
    assert (report.added, len(report.failed)) == (204, 1)
    assert check(tmp_path / "gallery", tiny_model) == []


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_a_structure_filled_in_parts_is_the_one_filled_at_once(
    cluster: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.filling.FEWEST", 700)
    vectors = np.random.default_rng().standard_normal((5000, 32)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    asked = vectors[:100].astype(np.float32)
    alone, parts = make_structure(kind, vectors), make_structure(kind, vectors, cluster_fill(ray))
    assert parts.ntotal == 5000
    for structure in (alone, parts):
        structure.nprobe = 4
    for found, expected in zip(parts.search(asked, 10), alone.search(asked, 10)):
        np.testing.assert_array_equal(found, expected)


def test_cores_are_shared_out_node_by_node() -> None:
    assert cores_each([Node(16, 0)], 1) == 16
    assert cores_each([Node(8, 0), Node(8, 0)], 4) == 4
    assert cores_each([Node(3, 0), Node(3, 0)], 3) == 1
    assert cores_each([Node(64, 4), Node(32, 4)], 8) == 8
    assert cores_each([Node(64, 4), Node(32, 0)], 4) == 16
    with pytest.raises(CotsError, match="has 2 GPUs, too few for 3 workers"):
        cores_each([Node(16, 2)], 3)
